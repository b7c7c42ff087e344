"""Every code of a set of contexts in column order: for each latent the tokens it fires on, with values.

Shape suffixes: `N` entries in all, `F` d_sae, `C` contexts, `S` positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.activations import Source
from saebench.dictionaries import Dictionary
from saebench.lm import Contexts
from saebench.progress import progress

CONTEXTS_AT_ONCE = 32


@dataclass(frozen=True)
class Postings:
    """Entries sorted by latent, and by token within a latent. `tokens_N` counts tokens row by row through `contexts`."""

    tokens_N: Tensor
    values_N: Tensor
    starts_F1: Tensor
    contexts: Contexts

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """(tokens, values) of one latent."""
        first, last = int(self.starts_F1[latent]), int(self.starts_F1[latent + 1])
        return self.tokens_N[first:last], self.values_N[first:last]

    @property
    def counts_F(self) -> Tensor:
        return self.starts_F1.diff()

    def density_F(self) -> Tensor:
        return self.counts_F.double() / (len(self.contexts) * (self.contexts.context_size - 1))

    def top(self, latent: int, count: int, skip: int = 0) -> list[tuple[int, float]]:
        """The strongest firings of a latent, at most one from each context and none at its first `skip` positions: (token, value),
        strongest first."""
        tokens, values = self.of(latent)
        found: dict[int, tuple[int, float]] = {}
        for place in torch.argsort(values, descending=True, stable=True).tolist():
            if len(found) == count:
                break
            token = int(tokens[place])
            if token % self.contexts.context_size < skip:
                continue
            found.setdefault(token // self.contexts.context_size, (token, float(values[place])))
        return list(found.values())


@torch.inference_mode()
def collect(dictionary: Dictionary, source: Source, site: str | None = None, limit: int | None = None) -> Postings:
    """Encode up to `limit` contexts of a source once, spread evenly over it, and sort the codes by latent.

    It reads the sites it was trained on, or `site`. Position 0 is left out. Holds all entries in memory: 12 bytes each.
    """
    sites = (site,) if site else dictionary.config.reads
    count = source.num_contexts if limit is None else min(limit, source.num_contexts)
    numbers_C = torch.arange(count) * source.num_contexts // count
    contexts = source.contexts[numbers_C]
    size, d_sae = contexts.context_size, dictionary.config.d_sae
    tokens, latents, values = [], [], []
    with progress("index", contexts.num_tokens, "tokens") as report:
        for start in range(0, count, CONTEXTS_AT_ONCE):
            fetched = source.fetch(numbers_C[start : start + CONTEXTS_AT_ONCE], list(sites))
            x_CSD = torch.cat([fetched[name].decode() for name in sites], -1)
            codes = dictionary.encode_contexts(x_CSD)
            row_N, latent_N, value_N = codes.nonzero()
            context_N, position_N = row_N // (size - 1), row_N % (size - 1) + 1
            tokens.append(((start + context_N) * size + position_N).to(torch.int32))
            latents.append(latent_N.to(torch.int32))
            values.append(value_N)
            report(len(x_CSD) * size)
    latent_N = torch.cat(latents)
    order_N = torch.argsort(latent_N, stable=True)
    counts_F = torch.bincount(latent_N, minlength=d_sae)
    starts_F1 = torch.cat([counts_F.new_zeros(1), counts_F.cumsum(0)])
    return Postings(torch.cat(tokens)[order_N], torch.cat(values)[order_N], starts_F1, contexts)
