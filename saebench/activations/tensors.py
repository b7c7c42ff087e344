"""Activations that are given as tensors: the same interface as a store, for planted data, embeddings and tests.

Shape suffixes: `R` rows (tokens), `N` contexts, `S` positions, `D` width of a site.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from saebench.activations.encoding import Encoded
from saebench.activations.statistics import SiteStatistics
from saebench.errors import UserError
from saebench.files import identity
from saebench.lm.tokens import Contexts

ROWS_AT_ONCE = 65_536


class TensorSource:
    """A source of activations from tensors in memory: [R, D] rows without an order, or [N, S, D] contexts, for every site alike."""

    competes = True  # rows are gathered by all threads

    def __init__(self, tensors: Mapping[str, Tensor], *, skip: int = 0):
        """`skip` positions at the start of every context are left out of batches. Raises UserError for no tensors, or tensors
        that differ in the number of tokens."""
        if not tensors or any(x.ndim not in (2, 3) or not x.numel() for x in tensors.values()):
            raise UserError("activations are given by site as tensors [R, D] or [N, S, D] with at least one row")
        shapes = {site: tuple(x.shape[:-1]) for site, x in tensors.items()}
        if len(set(shapes.values())) > 1:
            raise UserError(f"sites differ in their number of tokens: {shapes}")
        self.ordered = next(iter(tensors.values())).ndim == 3
        self._tensors = {site: x if self.ordered else x[:, None] for site, x in tensors.items()}
        self.skip = skip
        self.widths = {site: x.shape[-1] for site, x in self._tensors.items()}
        self.num_contexts, self.context_size = next(iter(self._tensors.values())).shape[:2]
        self._statistics: dict[str, SiteStatistics] = {}

    @property
    def num_tokens(self) -> int:
        return self.num_contexts * self.context_size

    @property
    def identity(self) -> str:
        sums = {site: float(x.double().sum()) for site, x in self._tensors.items()}
        return identity([sums, self.num_contexts, self.context_size, self.widths])

    @property
    def contexts(self) -> Contexts:
        """Raises UserError: tensors have no text."""
        raise UserError("activations given as tensors have no text: harvest a model where tokens are needed")

    def verify(self) -> None:
        """Nothing is stored, so nothing can be damaged."""

    def check_sites(self, sites: list[str]) -> None:
        for site in sites:
            if site not in self.widths:
                raise UserError(f"site {site!r} is not among the activations given: they are {', '.join(self.widths)}")

    def fetch(self, contexts_N: Tensor, sites: list[str], out: dict[str, Encoded] | None = None) -> dict[str, Encoded]:
        """The activations of some contexts, in the order given: values [N, S, D]."""
        self.check_sites(sites)
        return {site: Encoded(self._tensors[site].index_select(0, contexts_N).float()) for site in sites}

    def statistics(self, site: str) -> SiteStatistics:
        """Mean, norms and covariance over all tokens that batches have."""
        self.check_sites([site])
        if site not in self._statistics:
            statistics = SiteStatistics.empty(self.widths[site])
            for chunk in self._tensors[site].split(max(1, ROWS_AT_ONCE // self.context_size)):
                statistics.update(chunk[:, self.skip :].flatten(0, 1))
            self._statistics[site] = statistics
        return self._statistics[site]
