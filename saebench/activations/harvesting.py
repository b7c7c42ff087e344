"""Run a model over text once and store what its sites hold.

Contexts pass through the model in fixed batches; each shard of contexts is written whole, in the background, and then entered in
the manifest together with the statistics so far. Stopped at any moment, the same call goes on behind the last entered shard and
ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.encoding import STORAGE, Encoded, check_storage, encode
from saebench.activations.statistics import SiteStatistics
from saebench.activations.store import DOCUMENTS, FIELDS, FORMAT, TOKENS, VERSION, ActivationStore, shard_name
from saebench.errors import UserError
from saebench.files import MANIFEST, identity, read_manifest, read_tensors, sha256, write_json, write_manifest, write_tensors
from saebench.lm import Contexts, LanguageModel, Text, load_text, pack
from saebench.progress import progress, say

SHARD_BYTES = 64 << 20


def harvest(
    lm: LanguageModel,
    text: Text | Contexts | str,
    sites: Sequence[str],
    out: str | Path,
    *,
    num_tokens: int | None = None,
    context_size: int = 256,
    storage: str = "float16",
    batch_size: int = 32,
) -> ActivationStore:
    """Store the activations of `sites` over about `num_tokens` of the text (None: all of it) in the directory `out`.

    `storage` is float32, bfloat16, float16 or int8; `batch_size` counts contexts in a forward pass. An `out` with the same
    harvest, finished or not, is completed and opened; raises UserError where it holds anything else, for an unknown site, for
    text shorter than one context, for NaN or Inf, and for values beyond the storage type.
    """
    out = Path(out)
    check_storage(storage)
    sites = list(dict.fromkeys(sites))
    if not sites:
        raise UserError("no sites to harvest: name at least one, such as blocks.0.hook_resid_post")
    lm.check_context(text.context_size if isinstance(text, Contexts) else context_size)
    widths = {site: lm.width(site) for site in sites}
    contexts = text if isinstance(text, Contexts) else pack(load_text(text), lm.tokenizer, context_size, num_tokens)
    config = {
        "model": lm.name,
        "model_fingerprint": lm.fingerprint,
        "text": text.name if isinstance(text, Text) else str(text) if isinstance(text, str) else "contexts",
        "tokens": contexts.identity,
        "context_size": contexts.context_size,
        "sites": sites,
        "storage": storage,
        "batch_size": batch_size,
    }
    writer = _Writer.open(out, config, widths, contexts)
    if writer.next_context < len(contexts):
        _fill(lm, contexts, writer, batch_size)
    return ActivationStore(out)


def _fill(lm: LanguageModel, contexts: Contexts, writer: _Writer, batch_size: int) -> None:
    sites, storage = writer.config["sites"], writer.config["storage"]
    with (
        ThreadPoolExecutor(1) as pool,
        progress("harvest", contexts.num_tokens, "tokens", writer.next_context * contexts.context_size) as report,
    ):
        pending: Future | None = None
        shard: dict[str, list[Encoded]] = {site: [] for site in sites}
        for start in range(writer.next_context, len(contexts), batch_size):
            stop = min(start + batch_size, len(contexts))
            read = lm.read(contexts.ids_NS[start:stop], sites)
            for site in sites:
                shard[site].append(_encode_checked(read[site], site, storage, start, stop, writer.statistics[site]))
            if stop % writer.contexts_per_shard == 0 or stop == len(contexts):
                if pending is not None:
                    pending.result()
                snapshot = {
                    site: SiteStatistics(**{k: v.clone() for k, v in vars(s).items()}) for site, s in writer.statistics.items()
                }
                pending = pool.submit(writer.write_shard, shard, stop, snapshot)
                shard = {site: [] for site in sites}
            report((stop - start) * contexts.context_size)
        if pending is not None:
            pending.result()


def _encode_checked(x_NSD: Tensor, site: str, storage: str, start: int, stop: int, statistics: SiteStatistics) -> Encoded:
    x_NSD = x_NSD.reshape(*x_NSD.shape[:2], -1)
    encoded = encode(x_NSD, storage)
    kept_RD = x_NSD[:, 1:].flatten(0, 1)  # position 0 has an outlying norm in most models
    statistics.update(kept_RD, None if storage == "float32" else encoded.decode()[:, 1:].flatten(0, 1))
    if not math.isfinite(float(statistics.squares)):
        raise UserError(
            f"NaN or Inf in the activations of site {site!r}, contexts {start} to {stop - 1}: nothing of this shard is stored"
        )
    if not math.isfinite(float(statistics.error)):
        raise UserError(
            f"activations of site {site!r} exceed the range of {storage} in contexts {start} to {stop - 1}: store bfloat16 or float32"
        )
    return Encoded(encoded.values.cpu(), None if encoded.scales is None else encoded.scales.cpu())


def _is_leftover(name: str) -> bool:
    """Whether a file may stem from a harvest that was killed before its first entry in the manifest."""
    return name in (TOKENS, DOCUMENTS, shard_name(0), "statistics-00000.safetensors") or (
        name.startswith(".") and name.endswith(".partial")
    )


@dataclass
class _Writer:
    """The store being written: what is on disk and entered in the manifest, and the statistics up to there."""

    path: Path
    config: dict[str, Any]
    widths: dict[str, int]
    contexts: Contexts
    contexts_per_shard: int
    next_context: int
    statistics: dict[str, SiteStatistics]
    files: dict[str, str]

    @classmethod
    def open(cls, path: Path, config: dict[str, Any], widths: dict[str, int], contexts: Contexts) -> _Writer:
        """Begin a store, or take up one of the same configuration."""
        context_bytes = contexts.context_size * sum(widths.values()) * STORAGE[config["storage"]].itemsize
        batches = max(1, SHARD_BYTES // (context_bytes * config["batch_size"]))
        writer = cls(path, config, widths, contexts, batches * config["batch_size"], 0, {}, {})
        if blocking := next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None):
            raise UserError(f"{blocking} is a file: name another directory for the store")
        if (path / MANIFEST).exists():
            writer._take_up()
            return writer
        if path.exists() and (foreign := [p.name for p in path.iterdir() if not _is_leftover(p.name)]):
            raise UserError(f"{path} is not empty and holds no store (it has {foreign[0]}): name another directory")
        writer.statistics = {site: SiteStatistics.empty(width) for site, width in widths.items()}
        return writer

    def _take_up(self) -> None:
        manifest = read_manifest(self.path, FORMAT, VERSION, FIELDS)
        if manifest["config"] != self.config:
            differing = [k for k in self.config if manifest["config"].get(k) != self.config[k]]
            other = next((k for k in differing if k != "tokens"), "tokens")  # the hash of the tokens tells a person least
            raise UserError(
                f"{self.path} holds another harvest ({other}: {manifest['config'].get(other)!r} there, {self.config[other]!r} here): "
                "name another directory or remove it"
            )
        self.files = manifest["files"]
        shards = [name for name in self.files if name.startswith("shard-")]
        self.contexts_per_shard = manifest["contexts_per_shard"]
        self.next_context = min(len(shards) * self.contexts_per_shard, len(self.contexts))
        self.statistics = {site: SiteStatistics.empty(width) for site, width in self.widths.items()}
        for name in self.files:
            if name.startswith("statistics-"):
                tensors = read_tensors(self.path / name)
                self.statistics = {site: SiteStatistics.from_tensors(tensors, site) for site in self.widths}
        for path in self.path.glob("statistics-*.safetensors"):
            if path.name not in self.files:  # killed after an entry, before the last one's statistics were removed; or before one
                path.unlink(missing_ok=True)
        if not manifest["complete"]:
            say(f"{self.path}: continuing at token {self.next_context * self.config['context_size']:,}")

    def _write_tokens(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        tokens = {"ids": self.contexts.ids_NS, "documents": self.contexts.documents_NS, "positions": self.contexts.positions_NS}
        write_tensors(self.path / TOKENS, tokens)
        write_json(self.path / DOCUMENTS, self.contexts.names)
        self.files = {name: sha256(self.path / name) for name in (TOKENS, DOCUMENTS)}

    def write_shard(self, shard: dict[str, list[Encoded]], stop: int, statistics: dict[str, SiteStatistics]) -> None:
        """Write one shard and the statistics up to it, then enter both; leftovers of the entry before are removed last."""
        number = (stop - 1) // self.contexts_per_shard
        if number == 0:
            self._write_tokens()
        tensors = {}
        for site, batches in shard.items():
            tensors[site] = torch.cat([batch.values for batch in batches])
            if batches[0].scales is not None:
                tensors[f"{site}.scale"] = torch.cat([batch.scales for batch in batches if batch.scales is not None])
        write_tensors(self.path / shard_name(number), tensors)
        old = [name for name in self.files if name.startswith("statistics-")]
        new = f"statistics-{number:05d}.safetensors"
        write_tensors(self.path / new, {k: v for site, s in statistics.items() for k, v in s.tensors(site).items()})
        self.files = {name: value for name, value in self.files.items() if name not in old}
        self.files |= {name: sha256(self.path / name) for name in (shard_name(number), new)}
        self._enter(complete=stop == len(self.contexts), statistics=statistics)
        for name in old:
            if name != new:
                (self.path / name).unlink(missing_ok=True)

    def _enter(self, complete: bool, statistics: dict[str, SiteStatistics]) -> None:
        content = {
            "complete": complete,
            "config": self.config,
            "config_id": identity(self.config),
            "widths": self.widths,
            "num_contexts": len(self.contexts),
            "contexts_per_shard": self.contexts_per_shard,
            "storage_fvu": {site: s.storage_fvu for site, s in statistics.items()},
            "sizes": {name: (self.path / name).stat().st_size for name in self.files},
        }
        write_manifest(self.path, FORMAT, VERSION, content, self.files)
