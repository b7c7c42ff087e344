"""Activations without a disk: the same interface as a store, computed by the model when asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saebench.activations.encoding import Encoded
from saebench.activations.statistics import SiteStatistics
from saebench.errors import UserError
from saebench.files import identity
from saebench.lm import Contexts, LanguageModel

CALIBRATION_CONTEXTS = 128


class ActivationStream:
    """The activations of `sites` over packed contexts, as float32, computed by the model each time they are fetched."""

    skip = 1  # position 0 has an outlying norm in most models
    ordered = True

    def __init__(self, lm: LanguageModel, contexts: Contexts, sites: Sequence[str], *, batch_size: int = 32):
        """`batch_size` counts contexts in a forward pass. Raises UserError for an unknown site."""
        self.lm, self.contexts, self.batch_size = lm, contexts, batch_size
        self.widths = {site: lm.width(site) for site in sites}
        self.num_contexts, self.context_size = len(contexts), contexts.context_size
        self.competes = lm.device.type == "cpu"
        self._statistics: dict[str, SiteStatistics] = {}

    @property
    def num_tokens(self) -> int:
        return self.contexts.num_tokens

    @property
    def identity(self) -> str:
        return identity([self.lm.fingerprint, self.contexts.identity, list(self.widths)])

    @property
    def model_fingerprint(self) -> str:
        """Of the model that the activations are of."""
        return self.lm.fingerprint

    def verify(self) -> None:
        """Nothing is stored, so nothing can be damaged."""

    def check_sites(self, sites: list[str]) -> None:
        for site in sites:
            if site not in self.widths:
                raise UserError(f"site {site!r} is not in this stream: it computes {', '.join(self.widths)}")

    def fetch(self, contexts_N: Tensor, sites: list[str], out: dict[str, Encoded] | None = None) -> dict[str, Encoded]:
        """The activations of some contexts, in the order given: values [N, S, D] float32, in new memory."""
        self.check_sites(sites)
        parts = [self.lm.read(self.contexts.ids_NS[chunk], sites) for chunk in contexts_N.split(self.batch_size)]
        return {site: Encoded(torch.cat([p[site].flatten(2).float().cpu() for p in parts])) for site in sites}

    def statistics(self, site: str) -> SiteStatistics:
        """Mean, norms and covariance measured on up to 128 contexts spread evenly over the text, their first tokens left out."""
        self.check_sites([site])
        if site not in self._statistics:
            count = min(CALIBRATION_CONTEXTS, self.num_contexts)
            sample_N = torch.arange(count) * self.num_contexts // count
            statistics = SiteStatistics.empty(self.widths[site])
            for chunk in sample_N.split(self.batch_size):
                statistics.update(self.fetch(chunk, [site])[site].values[:, 1:].flatten(0, 1))
            self._statistics[site] = statistics
        return self._statistics[site]
