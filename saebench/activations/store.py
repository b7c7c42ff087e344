"""The activation store on disk: written once by `harvest`, read in any order. The format is in docs/formats.md.

Shape suffixes: `N` contexts, `S` positions in a context, `D` width of a site.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.activations.encoding import STORAGE, Encoded
from saebench.activations.statistics import SiteStatistics
from saebench.errors import UserError
from saebench.files import check_files, identity, map_tensors, read_json, read_manifest, read_tensors
from saebench.lm.tokens import Contexts
from saebench.progress import progress

FORMAT, VERSION = "saebench-activations", 1
FIELDS = {"complete", "config", "config_id", "contexts_per_shard", "num_contexts", "sizes", "storage_fvu", "widths"}
TOKENS, DOCUMENTS = "tokens.safetensors", "documents.json"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class ActivationStore:
    """Activations of some sites of a model over packed text. Opening checks format, version, completeness and file sizes;
    `verify()` checks every byte."""

    skip = 1  # position 0 has an outlying norm in most models
    ordered = True
    competes = False

    def __init__(self, path: str | Path):
        """Raises UserError for a path that is no complete store of this version."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path, FORMAT, VERSION, FIELDS)
        if not self.manifest["complete"]:
            raise UserError(f"{self.path} is incomplete: run the same harvest again to finish it")
        for name, size in self.manifest["sizes"].items():
            file = self.path / name
            if not file.exists():
                raise UserError(f"{file} is missing: the store is damaged, harvest it again")
            if file.stat().st_size != size:
                raise UserError(
                    f"{file} is truncated or damaged: {file.stat().st_size} bytes instead of {size}; harvest it again"
                )
        self.config: dict[str, Any] = self.manifest["config"]
        self.widths: dict[str, int] = self.manifest["widths"]
        self.num_contexts: int = self.manifest["num_contexts"]
        self.context_size: int = self.config["context_size"]
        self._shards: dict[int, dict[str, np.ndarray]] = {}

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}: {', '.join(self.widths)}; {self.num_tokens:,} tokens as {self.config['storage']})"

    @property
    def num_tokens(self) -> int:
        return self.num_contexts * self.context_size

    @property
    def identity(self) -> str:
        """A hash of the content of all files."""
        return identity(self.manifest["files"])

    @property
    def model_fingerprint(self) -> str:
        """Of the model that the activations are of."""
        return self.config["model_fingerprint"]

    def verify(self) -> None:
        """Read every file and compare it with its hash. Raises UserError naming the first damaged file."""
        sizes = self.manifest["sizes"]
        with progress("verify", sum(sizes.values()), "bytes") as report:
            for name, expected in self.manifest["files"].items():
                check_files(self.path, {name: expected})
                report(sizes[name])

    @cached_property
    def contexts(self) -> Contexts:
        """The tokens, their documents and positions."""
        tensors = read_tensors(self.path / TOKENS)
        return Contexts(tensors["ids"], tensors["documents"], tensors["positions"], read_json(self.path / DOCUMENTS))

    @cached_property
    def _statistics(self) -> dict[str, SiteStatistics]:
        (name,) = [name for name in self.manifest["files"] if name.startswith("statistics-")]
        tensors = read_tensors(self.path / name)
        return {site: SiteStatistics.from_tensors(tensors, site) for site in self.widths}

    def statistics(self, site: str) -> SiteStatistics:
        """Mean, norms and covariance over all tokens but the first of each context. Raises UserError for an unknown site."""
        self.check_sites([site])
        return self._statistics[site]

    def check_sites(self, sites: list[str]) -> None:
        for site in sites:
            if site not in self.widths:
                raise UserError(f"site {site!r} is not in the store {self.path}: it holds {', '.join(self.widths)}")

    def fetch(self, contexts_N: Tensor, sites: list[str], out: dict[str, Encoded] | None = None) -> dict[str, Encoded]:
        """The stored activations of some contexts, in the order given: values [N, S, D]. Written into `out`, the result of an
        earlier call for as many contexts, where that is given."""
        self.check_sites(sites)
        per_shard = self.manifest["contexts_per_shard"]
        count, size = len(contexts_N), self.context_size
        if out is None or any(len(encoded.values) != count for encoded in out.values()):
            storage = STORAGE[self.config["storage"]]
            out = {
                site: Encoded(
                    torch.empty(count, size, self.widths[site], dtype=storage),
                    torch.empty(count, size) if storage == torch.int8 else None,
                )
                for site in sites
            }
        for name, target in tensors_of(out).items():
            # copied by numpy, in one thread: the caller's threads have work of their own
            rows = target.view(torch.uint8).flatten(1).numpy()
            for row, context in enumerate(contexts_N.tolist()):
                rows[row] = self._shard(context // per_shard)[name][context % per_shard]
        return out

    def read(self, site: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A range of contexts in order, as float32 [N, S, D]."""
        stop = self.num_contexts if stop is None else min(stop, self.num_contexts)
        return self.fetch(torch.arange(start, stop), [site])[site].decode()

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._shards:
            self._shards[number] = map_contexts(self.path / shard_name(number))
        return self._shards[number]


def tensors_of(read: dict[str, Encoded]) -> dict[str, Tensor]:
    """The tensors of what was read, under their names in a shard."""
    scales = {f"{site}.scale": encoded.scales for site, encoded in read.items() if encoded.scales is not None}
    return {site: encoded.values for site, encoded in read.items()} | scales


def map_contexts(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a shard as the bytes of each context: nothing is read until it is used."""
    return {name: tensor.view(np.uint8).reshape(len(tensor), -1) for name, tensor in map_tensors(path).items()}
