"""A feature store, open for reading: every code of a corpus by latent and by token, and the tables made from them.

Nothing is read before it is asked for, and a latent costs the same however many there are.
Shape suffixes: `N` entries, `T` tokens, `F` d_sae.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saebench.errors import UserError
from saebench.features import layout
from saebench.files import check_files, identity, map_tensors, read_manifest
from saebench.lm import Contexts
from saebench.progress import progress


@dataclass(frozen=True)
class Chunk:
    """The codes of consecutive tokens, as they are mapped from a file: those of token first_token + t are at starts[t] .. starts[t + 1]."""

    first_token: int
    starts: np.ndarray
    latents: np.ndarray
    values: np.ndarray


def map_chunk(path: Path, first_token: int) -> Chunk:
    return Chunk(first_token, **map_tensors(path))


@dataclass(frozen=True)
class Details:
    """What is listed of one latent."""

    latent: int
    histogram: np.ndarray
    """Firings by value, in bins of equal width from `edges[0]` = min(0, smallest value) to the largest."""
    edges: np.ndarray
    positions: np.ndarray
    """Firings by place in the context, in bins of equal width."""
    tokens: list[tuple[int, int, float]]
    """Tokens it fires on: (id, firings, summed value), by summed value."""
    coactive: list[tuple[int, int, float, float]]
    """Latents it fires together with: (latent, tokens together, phi, Jaccard), by phi."""
    neighbours: list[tuple[int, float]]
    """Latents that write nearly the same: (latent, cosine)."""
    read_neighbours: list[tuple[int, float]]
    """Latents that read nearly the same."""
    promoted: list[tuple[int, float]]
    """Tokens whose logit it raises most: (id, effect of one unit of the latent)."""
    suppressed: list[tuple[int, float]]
    """Tokens whose logit it lowers most."""


class FeatureStore:
    """The features of one dictionary over one corpus. Opening checks format, version, completeness and file sizes; `verify()` every byte.

    Tokens are numbered row by row through the contexts, first tokens included, on which nothing fires."""

    def __init__(self, path: str | Path):
        """Raises UserError for a path that is no complete store of this version, or a damaged one."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path, layout.FORMAT, layout.VERSION, layout.FIELDS)
        if not self.manifest["complete"]:
            raise UserError(f"{self.path} is not finished: run the same `saebench index` again")
        for name, size in self.manifest["sizes"].items():
            file = self.path / name
            if not file.exists() or file.stat().st_size != size:
                state = f"has {file.stat().st_size} bytes instead of {size}" if file.exists() else "is missing"
                raise UserError(f"{file} {state}: the feature store is damaged, index it again")
        self.config: dict[str, Any] = self.manifest["config"]
        self.d_sae: int = self.manifest["d_sae"]
        self.num_contexts: int = self.manifest["num_contexts"]
        self.num_tokens: int = self.manifest["num_tokens"]
        """Tokens that were encoded, which densities are shares of: all but the first of each context."""
        self.num_entries: int = self.manifest["num_entries"]
        self.context_size: int = self.config["context_size"]
        self.value_scale: float = self.manifest["value_scale"]
        self._reading = threading.Lock()  # one parquet file serves one reader at a time

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}: {self.d_sae:,} latents over {self.num_tokens:,} tokens)"

    @property
    def identity(self) -> str:
        return identity(self.manifest["files"])

    @property
    def rounding_error(self) -> float:
        """What keeping values in 16 bits costs: the root of the summed squared error over the summed squares."""
        rounding = self.manifest["rounding"]
        return float((rounding["error"] / rounding["total"]) ** 0.5) if rounding["total"] else 0.0

    def verify(self) -> None:
        """Read every file and compare it with its hash. Raises UserError naming the first damaged one."""
        sizes = self.manifest["sizes"]
        with progress("verify", sum(sizes.values()), "bytes") as report:
            for name, expected in self.manifest["files"].items():
                check_files(self.path, {name: expected})
                report(sizes[name])

    def check_latent(self, latent: int) -> None:
        if not 0 <= latent < self.d_sae:
            raise UserError(f"latent {latent} is not one of the {self.d_sae:,}, counted from 0")

    # --- the corpus ---

    @cached_property
    def contexts(self) -> Contexts:
        table = self._read(layout.TOKENS)
        by_token = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("id", "document", "position"))
        ids_NS, documents_NS, positions_NS = (column.view(self.num_contexts, self.context_size) for column in by_token)
        return Contexts(ids_NS, documents_NS, positions_NS, self._read(layout.DOCUMENTS)["name"].to_pylist())

    @cached_property
    def ids_T(self) -> np.ndarray:
        """The token ids of the corpus, one after the other."""
        return self.contexts.ids_NS.flatten().numpy()

    @cached_property
    def token_strings(self) -> list[str]:
        """The text of every token of the vocabulary."""
        return self._read(layout.VOCABULARY)["text"].to_pylist()

    @cached_property
    def token_counts(self) -> np.ndarray:
        """How often each token of the vocabulary stands in the corpus."""
        return self._read(layout.VOCABULARY)["count"].to_numpy()

    def documents_of(self, tokens: np.ndarray) -> np.ndarray:
        """The number of the document that each token is from, -1 for an added first token."""
        return self.contexts.documents_NS.flatten().numpy()[tokens]

    # --- by latent ---

    @cached_property
    def latents(self) -> pa.Table:
        """One row a latent: latent, count, density, mean, std, skew, kurtosis, min, max, contexts, distinct_tokens, top_token,
        top_token_share, file, row (docs/formats.md)."""
        return pa.concat_tables([self._read(layout.latents_name(i)) for i in range(len(self.manifest["ranges"]))])

    @cached_property
    def counts_F(self) -> np.ndarray:
        """Firings of each latent."""
        return self.latents["count"].to_numpy()

    @property
    def density_F(self) -> np.ndarray:
        """Share of tokens on which each latent fires."""
        return self.counts_F / max(1, self.num_tokens)

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return self.latents["file"].to_numpy(), self.latents["row"].to_numpy()

    @cached_property
    def _postings(self) -> list[pq.ParquetFile]:
        return [self._open(layout.postings_name(i)) for i in range(len(self.manifest["ranges"]))]

    @cached_property
    def _details(self) -> list[pq.ParquetFile]:
        return [self._open(layout.details_name(i)) for i in range(len(self.manifest["ranges"]))]

    def postings(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Where a latent fires: token numbers, ascending, and its values there, float32. Raises UserError for an unknown latent."""
        self.check_latent(latent)
        files, rows = self._places
        first, count = int(rows[latent]), int(self.counts_F[latent])
        if count == 0:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        groups = range(first // layout.POSTINGS_GROUP, (first + count - 1) // layout.POSTINGS_GROUP + 1)
        with self._reading:
            table = self._postings[files[latent]].read_row_groups(list(groups), columns=["token", "value"])
        table = table.slice(first - groups[0] * layout.POSTINGS_GROUP, count)
        return table["token"].to_numpy(), table["value"].to_numpy().astype(np.float32) * np.float32(self.value_scale)

    def details(self, latent: int) -> Details:
        """What is listed of a latent. Raises UserError for an unknown one."""
        self.check_latent(latent)
        number = int(self._places[0][latent])
        group, place = divmod(latent - self.manifest["ranges"][number][0], layout.DETAILS_GROUP)
        with self._reading:
            table = self._details[number].read_row_group(group)
        row = {name: value[0] for name, value in table.slice(place, 1).to_pydict().items()}
        counts = self.counts_F
        low, high = (float(self.latents[name][latent].as_py()) for name in ("min", "max"))
        pairs = lambda ids, figures: list(zip(row[ids], row[figures], strict=True))  # noqa: E731
        return Details(
            latent=latent,
            histogram=np.array(row["histogram"]),
            edges=np.linspace(min(0.0, low), high, len(row["histogram"]) + 1),
            positions=np.array(row["positions"]),
            tokens=list(zip(row["token_ids"], row["token_counts"], row["token_sums"], strict=True)),
            coactive=[
                (other, both, phi, both / int(counts[latent] + counts[other] - both))
                for other, both, phi in zip(row["coactive"], row["coactive_counts"], row["coactive_phi"], strict=True)
            ],
            neighbours=pairs("neighbours", "neighbours_cosine"),
            read_neighbours=pairs("read_neighbours", "read_neighbours_cosine"),
            promoted=pairs("promoted", "promoted_logit"),
            suppressed=pairs("suppressed", "suppressed_logit"),
        )

    def position_edges(self) -> np.ndarray:
        """Edges of the bins of `Details.positions`, in tokens from the start of the context."""
        return np.arange(layout.POSITION_BINS + 1) * self.context_size / layout.POSITION_BINS

    # --- by token ---

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The codes in the order of the corpus, mapped."""
        size = self.manifest["chunk_contexts"]
        count = -(-self.num_contexts // size)
        return [map_chunk(self.path / layout.codes_name(i), i * size * self.context_size) for i in range(count)]

    def codes(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The codes of tokens first to last (exclusive): where each token's begin [T + 1], latents [N], values [N] float32."""
        starts, latents, values = [np.zeros(1, dtype=np.int64)], [], []
        for chunk in self.chunks:
            begin, end = max(first - chunk.first_token, 0), min(last - chunk.first_token, len(chunk.starts) - 1)
            if begin >= end:
                continue
            low, high = int(chunk.starts[begin]), int(chunk.starts[end])
            starts.append(chunk.starts[begin + 1 : end + 1] - low + starts[-1][-1])
            latents.append(chunk.latents[low:high])
            values.append(chunk.values[low:high].astype(np.float32) * np.float32(self.value_scale))
        if not latents:
            return starts[0], np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        return np.concatenate(starts), np.concatenate(latents), np.concatenate(values)

    # --- files ---

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path / name, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{self.path / name} is damaged ({str(error).splitlines()[0]}): index it again") from None

    def _read(self, name: str) -> pa.Table:
        return self._open(name).read()
