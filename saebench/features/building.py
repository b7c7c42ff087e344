"""Build a feature store: encode a corpus once, sort the codes by latent, and compute what is shown of each latent.

source -> chunks of contexts -> codes by token (kept) and by latent (a run) -> runs merged, a range of latents at a time -> postings and
tables of that range

Chunks and ranges are written whole and then entered in the manifest, so a stopped build goes on behind the last one entered. Memory is
bounded by a chunk and a range, whatever the length of the corpus: what is as long as the corpus lies in mapped files (a latent with more
entries than a range may have makes a range of its own; the names of the documents are a list). The store is built beside its place and
takes it when it is complete: who reads sees the old one or the new one.

Shape suffixes: `N` entries, `F` d_sae, `M` latents of a range, `T` tokens.
"""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.activations import Source
from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features import layout
from saebench.features.effects import EMPTY, LogitEffects, Neighbours, encoder_rows
from saebench.features.store import Chunk, FeatureStore, map_chunk
from saebench.features.tables import Listed, map_ids, write_corpus, write_details, write_latents, write_postings
from saebench.files import (
    MANIFEST,
    check_files,
    identity,
    locked,
    map_tensors,
    read_manifest,
    sha256,
    write_manifest,
    write_tensors,
)
from saebench.kernels.latent_order import latent_order
from saebench.kernels.posting_statistics import Postings, coactivation, merge_runs, moments, top_tokens
from saebench.lm import Contexts
from saebench.progress import progress, say

CONTEXTS_AT_ONCE = 32
CHUNK_TOKENS = 65_536
RANGE_ENTRIES = 8 << 20
RANGE_LATENTS = 32_768
FIT = (2.0**-3, 2.0**13)  # largest values that are stored as they are; others are scaled by a power of two
LARGEST = 65504.0


def index(
    dictionary: Dictionary,
    source: Source,
    out: str | Path,
    *,
    lm: Any = None,
    site: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    grow: bool = False,
) -> FeatureStore:
    """Build the feature store of a dictionary over a source of activations, or finish or open the one that is there.

    It reads the sites it was trained on, or `site`; up to `limit` contexts, spread evenly; position 0 is left out. `lm` gives tokens
    their text, and latents their effect on the logits. Raises UserError where `out` holds another store, and where another process is
    building it. To `overwrite`, any other store gives way; to `grow`, one of the same dictionary and activations over fewer contexts.
    """
    out = Path(out)
    sites = [site] if site else list(dictionary.config.reads)
    source.check_sites(sites)
    count = source.num_contexts if limit is None else max(1, min(limit, source.num_contexts))
    numbers_C = torch.arange(count) * source.num_contexts // count
    config = {
        "dictionary": fingerprint(dictionary),
        "architecture": dictionary.config.architecture,
        "sites": sites,
        "writes": list(dictionary.config.writes),
        "activations": source.identity,
        "model": None if lm is None else lm.name,
        "model_fingerprint": None if lm is None else lm.fingerprint,
        "context_size": source.context_size,
        "skip": 1,
    }
    if (out / MANIFEST).exists() and not overwrite:
        found = FeatureStore(out)
        if found.config == config and found.num_contexts == count:
            return found
        same = all(found.config[key] == config[key] for key in ("dictionary", "activations"))
        if not (grow and same and found.num_contexts < count):
            there, asked = layout.describe(found.config, found.num_contexts), layout.describe(config, count)
            raise UserError(f"{out} holds features of {there}, not of {asked}: overwrite it, or name another place")
    building = out.with_name(f".{out.name}.building")
    building.mkdir(parents=True, exist_ok=True)
    with locked(building / ".lock", busy=f"building {building}"):
        builder = _Builder.open(building, config, source.contexts, numbers_C, dictionary.config.d_sae)
        builder.encode(dictionary, source)
        builder.sort(dictionary, lm)
        return builder.finish(out)


def fingerprint(dictionary: Dictionary) -> str:
    """A hash of what a dictionary is: its settings and its tensors."""
    digest = hashlib.sha256(identity(dictionary.config.model_dump(mode="json")).encode())
    for name, tensor in sorted(dictionary.settled().public_tensors().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.ndim else repr(tensor.item()).encode()
        )
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Run:
    """The entries of a chunk by latent, mapped: those of latent f are at starts_F1[f] .. starts_F1[f + 1]."""

    starts_F1: np.ndarray
    tokens: np.ndarray
    values: np.ndarray


class _TooLarge(Exception):
    def __init__(self, largest: float):
        self.largest = largest


@dataclass(frozen=True)
class _Weights:
    """What is listed of a latent by the weights alone."""

    written: tuple[Tensor, Tensor] | None
    read: tuple[Tensor, Tensor] | None
    effects: LogitEffects

    @classmethod
    def of(cls, dictionary: Dictionary, lm: Any) -> _Weights:
        written, read = (
            Neighbours(rows).nearest(layout.NEIGHBOURS) for rows in (dictionary.directions, encoder_rows(dictionary))
        )
        return cls(written, read, LogitEffects(dictionary, lm))

    def listed(self, first: int, last: int) -> dict[str, Listed]:
        none = torch.full((last, 0), EMPTY), torch.zeros(last, 0)
        (written, cosines), (read, read_cosines) = self.written or none, self.read or none
        promoted, raised, suppressed, lowered = self.effects.of(first, last, layout.LOGITS)
        return {
            "neighbours": Listed(written[first:last], cosines[first:last], name="cosine"),
            "read_neighbours": Listed(read[first:last], read_cosines[first:last], name="cosine"),
            "promoted": Listed(promoted, raised, name="logit"),
            "suppressed": Listed(suppressed, lowered, name="logit"),
        }


@dataclass(frozen=True)
class _Whole:
    """What every range needs of the whole corpus, which is mapped, and of all latents."""

    chunks: list[Chunk]
    counts_F: np.ndarray
    ids_T: np.ndarray
    vocabulary: int
    weights: _Weights


@dataclass
class _Builder:
    """A store being built: what is on disk and entered in the manifest."""

    path: Path
    config: dict[str, Any]
    corpus: Contexts
    numbers_C: Tensor
    """The contexts of the corpus that are encoded."""
    d_sae: int
    chunk_contexts: int
    value_scale: float = 1.0
    ranges: list[list[int]] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=lambda: {"error": 0.0, "total": 0.0})
    num_entries: int = 0
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, config: dict[str, Any], corpus: Contexts, numbers_C: Tensor, d_sae: int) -> _Builder:
        """Begin, or take up what a stopped build of the same left."""
        builder = cls(path, config, corpus, numbers_C, d_sae, max(1, CHUNK_TOKENS // corpus.context_size))
        if not (path / MANIFEST).exists():
            builder.clear()
            return builder
        manifest = read_manifest(path, layout.FORMAT, layout.VERSION, layout.FIELDS)
        expected = (config, len(numbers_C), builder.chunk_contexts)
        if (manifest["config"], manifest["num_contexts"], manifest["chunk_contexts"]) != expected:
            builder.clear()  # of something else, and unfinished: of no use to anyone
            return builder
        check_files(path, manifest["files"])
        for name in ("value_scale", "ranges", "rounding", "num_entries", "files"):
            setattr(builder, name, manifest[name])
        if builder.files:
            say(f"{path.parent / path.name.removeprefix('.').removesuffix('.building')}: going on with what a stopped build left")
        return builder

    def clear(self) -> None:
        for path in self.path.iterdir():
            if path.name != ".lock":
                path.unlink()
        self.files, self.ranges, self.num_entries, self.rounding = {}, [], 0, {"error": 0.0, "total": 0.0}

    @property
    def num_chunks(self) -> int:
        return -(-len(self.numbers_C) // self.chunk_contexts)

    @property
    def num_tokens(self) -> int:
        """Tokens that were encoded: all but the first of each context."""
        return len(self.numbers_C) * (self.corpus.context_size - 1)

    def enter(self, names: list[str], complete: bool = False) -> None:
        self.files |= {name: sha256(self.path / name) for name in names}
        content = {
            "complete": complete,
            "config": self.config,
            "num_contexts": len(self.numbers_C),
            "num_tokens": self.num_tokens,
            "num_entries": self.num_entries,
            "d_sae": self.d_sae,
            "chunk_contexts": self.chunk_contexts,
            "ranges": self.ranges,
            "value_scale": self.value_scale,
            "rounding": self.rounding,
            "sizes": {name: (self.path / name).stat().st_size for name in self.files},
        }
        write_manifest(self.path, layout.FORMAT, layout.VERSION, content, self.files)

    # --- codes, chunk by chunk ---

    def encode(self, dictionary: Dictionary, source: Source) -> None:
        done = sum(layout.codes_name(i) in self.files for i in range(self.num_chunks))
        size, numbers_C = self.corpus.context_size, self.numbers_C
        try:
            with (
                ThreadPoolExecutor(1) as pool,  # a chunk is sorted, hashed and written while the next is encoded
                progress(
                    "encode", len(numbers_C) * size, "tokens", min(done * self.chunk_contexts, len(numbers_C)) * size
                ) as report,
            ):
                pending: Future | None = None
                for number in range(done, self.num_chunks):
                    part_C = numbers_C[number * self.chunk_contexts : (number + 1) * self.chunk_contexts]
                    parts = []
                    for some_C in part_C.split(CONTEXTS_AT_ONCE):
                        parts.append(self._encode(dictionary, source, some_C))
                        report(len(some_C) * size)
                    if pending is not None:
                        pending.result()
                    pending = pool.submit(self._write_chunk, number, parts)
                if pending is not None:
                    pending.result()
        except _TooLarge as found:
            self.clear()
            self.value_scale = scale_for(found.largest)
            self.encode(dictionary, source)

    @torch.inference_mode()
    def _encode(self, dictionary: Dictionary, source: Source, contexts_C: Tensor) -> SparseCodes:
        """Ragged codes of all tokens of some contexts, none on the first."""
        fetched = source.fetch(contexts_C, self.config["sites"])
        x_CSD = torch.cat([fetched[name].decode() for name in self.config["sites"]], -1)
        codes = dictionary.encode_contexts(x_CSD)
        kept_N = codes.values.reshape(-1) != 0
        lengths_CS = torch.cat([torch.zeros(len(x_CSD), 1, dtype=torch.int64), codes.l0().view(len(x_CSD), -1)], 1)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_CS.flatten().cumsum(0)])
        return SparseCodes(codes.indices.reshape(-1)[kept_N], codes.values.reshape(-1)[kept_N], codes.d_sae, starts)

    def _write_chunk(self, number: int, parts: list[SparseCodes]) -> None:
        values_N = torch.cat([codes.values for codes in parts])
        largest = float(values_N.abs().max()) if len(values_N) else 0.0
        if number == 0 and self.value_scale == 1 and largest and not FIT[0] <= largest <= FIT[1]:
            self.value_scale = scale_for(largest)
        if largest / self.value_scale > LARGEST:
            raise _TooLarge(largest)
        latents_N = torch.cat([codes.indices for codes in parts])
        lengths = torch.cat([codes.offsets.diff() for codes in parts if codes.offsets is not None])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        stored_N = (values_N / self.value_scale).half()
        self.rounding = {
            "error": self.rounding["error"] + float((stored_N.float() * self.value_scale - values_N).double().square().sum()),
            "total": self.rounding["total"] + float(values_N.double().square().sum()),
        }
        codes = SparseCodes(latents_N, stored_N.float(), self.d_sae, starts)
        order_N, starts_F1 = latent_order(codes).by_latent  # type: ignore[misc]
        first = number * self.chunk_contexts * self.corpus.context_size
        tokens_N = (codes.tokens + first).to(torch.int32)[order_N]
        write_tensors(self.path / layout.codes_name(number), {"latents": latents_N, "values": stored_N, "starts": starts})
        write_tensors(
            self.path / layout.run_name(number), {"tokens": tokens_N, "values": stored_N[order_N], "starts_F1": starts_F1.long()}
        )
        self.num_entries += len(values_N)
        self.enter([layout.codes_name(number), layout.run_name(number)])

    # --- latents, range by range ---

    def sort(self, dictionary: Dictionary, lm: Any) -> None:
        if layout.VOCABULARY in self.files:
            return  # stopped while it took its place
        size = self.corpus.context_size
        chunks = [map_chunk(self.path / layout.codes_name(i), i * self.chunk_contexts * size) for i in range(self.num_chunks)]
        runs = [_Run(**map_tensors(self.path / layout.run_name(i))) for i in range(self.num_chunks)]
        counts_F = np.zeros(self.d_sae, np.int64)
        for run in runs:
            counts_F += np.diff(run.starts_F1)
        self.ranges = self.ranges or ranges_of(counts_F)
        done = sum(layout.details_name(i) in self.files for i in range(len(self.ranges)))
        ids_T = map_ids(self.path / layout.IDS, self.corpus, self.numbers_C)
        whole = _Whole(chunks, counts_F, ids_T, int(ids_T.max()) + 1, _Weights.of(dictionary, lm))
        with progress("sort", self.d_sae, "latents", sum(last - first for first, last in self.ranges[:done])) as report:
            for number in range(done, len(self.ranges)):
                first, last = self.ranges[number]
                self._write_range(number, merge_runs(runs, first, last), whole)
                report(last - first)
        names = write_corpus(self.path, self.corpus, self.numbers_C, None if lm is None else lm.token_strings)
        self.enter(names)

    def _write_range(self, number: int, postings: Postings, whole: _Whole) -> None:
        (first, last), names = self.ranges[number], (layout.postings_name(number), layout.latents_name(number))
        size, scale = self.corpus.context_size, self.value_scale
        write_postings(self.path / names[0], first, *postings)
        found = moments(*postings, size, layout.BINS, layout.POSITION_BINS)
        on_tokens = top_tokens(*postings, whole.ids_T, whole.vocabulary, layout.TOP_TOKENS)
        together = coactivation(*postings[:2], whole.chunks, whole.counts_F, self.num_tokens, first, layout.COACTIVE)
        write_latents(self.path / names[1], first, postings[0], found, on_tokens, self.num_tokens, scale, number)
        details = layout.details_name(number)
        write_details(self.path / details, first, found, on_tokens, together, scale, whole.weights.listed(first, last))
        self.enter([*names, details])

    def finish(self, out: Path) -> FeatureStore:
        """Put the store in its place."""
        self.files = {name: value for name, value in self.files.items() if not fnmatch(name, layout.RUNS)}
        self.enter([], complete=True)
        for path in [*self.path.glob(layout.RUNS), self.path / layout.IDS]:
            path.unlink(missing_ok=True)
        replaced = out.with_name(f".{out.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        self.path.rename(out)
        (out / ".lock").unlink(missing_ok=True)
        shutil.rmtree(replaced, ignore_errors=True)
        return FeatureStore(out)


def scale_for(largest: float) -> float:
    """The power of two that brings the largest value to 2048 at most: below that values keep all their bits down to 2^-25 of it."""
    return float(2.0 ** np.ceil(np.log2(largest / 2048)))


def ranges_of(counts_F: np.ndarray) -> list[list[int]]:
    """Ranges of neighbouring latents [first, last) with up to `RANGE_ENTRIES` entries and `RANGE_LATENTS` latents each."""
    ranges, first, entries = [], 0, 0
    for latent, count in enumerate(counts_F.tolist()):
        if latent > first and (entries + count > RANGE_ENTRIES or latent - first == RANGE_LATENTS):
            ranges.append([first, latent])
            first, entries = latent, 0
        entries += count
    return [*ranges, [first, len(counts_F)]]
