"""How much latents are active together on some text: what turns a connection by weights into one that text makes use of.

For a source i and a target j the mean over all tokens of f_i where f_j is active, E[f_i 1(f_j > 0)], at the same token; for a target that
is no latent, E[f_i].
Shape suffixes: `B` tokens, `F` latents of a part, `N` entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saebench.circuits.graphs.parts import Part
from saebench.circuits.graphs.replacement import LocalModel
from saebench.codes import SparseCodes
from saebench.errors import UserError

Codes = Mapping[str, SparseCodes] | Sequence[SparseCodes]


class CoActivity:
    """Of the codes of all dictionaries, by name or in their order, over the same tokens. Raises UserError where they do not fit."""

    def __init__(self, model: LocalModel, codes: Codes):
        names = model.names
        if isinstance(codes, Mapping):
            if missing := [name for name in names if name not in codes]:
                raise UserError(f"there are no codes of {missing[0]}: give those of every dictionary over the same tokens")
            codes = [codes[name] for name in names]
        if len(codes) != len(names):
            raise UserError(
                f"there are {len(codes)} codes for {len(names)} dictionaries: give those of every dictionary, in order"
            )
        for name, own, dictionary in zip(names, codes, model.dictionaries, strict=True):
            if own.d_sae != dictionary.config.d_sae:
                raise UserError(f"the codes of {name} are over {own.d_sae:,} latents, not its {dictionary.config.d_sae:,}")
        if len({len(own) for own in codes}) > 1:
            counts = ", ".join(f"{len(own):,}" for own in codes)
            raise UserError(f"the codes are over different numbers of tokens ({counts}): give those of the same tokens")
        if not len(codes[0]):
            raise UserError("the codes are over no token: give those of some text")
        self.count = len(codes[0])
        self._entries = [own.nonzero() for own in codes]

    def values(self, part: Part, latent: int) -> Tensor:
        """Activation of a latent, counted from the part's first, on every token: [B]."""
        tokens_N, latents_N, values_N = self._entries[part.number]
        own_N = latents_N == part.first + latent
        return values_N.new_zeros(self.count).index_add_(0, tokens_N[own_N], values_N[own_N])

    def of_sources(self, part: Part, active_B: Tensor | None) -> Tensor:
        """E[f_i 1] of every latent of a part, over all tokens or where a target is active: [F]."""
        tokens_N, latents_N, values_N = self._inside(part)
        if active_B is not None:
            values_N = values_N * active_B[tokens_N]
        return self._mean(part, latents_N, values_N)

    def of_targets(self, part: Part, values_B: Tensor) -> Tensor:
        """E[f_i 1(f_j > 0)] for one source, by its values, and every latent j of a part: [F]."""
        tokens_N, latents_N, _ = self._inside(part)
        return self._mean(part, latents_N, values_B[tokens_N])

    def _inside(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of a part, latents counted from its first."""
        tokens_N, latents_N, values_N = self._entries[part.number]
        own_N = (latents_N >= part.first) & (latents_N < part.first + len(part.W_read_FD))
        return tokens_N[own_N], latents_N[own_N] - part.first, values_N[own_N]

    def _mean(self, part: Part, latents_N: Tensor, values_N: Tensor) -> Tensor:
        sums_F = torch.zeros(len(part.W_read_FD), dtype=torch.float64, device=values_N.device)
        mean_F = sums_F.index_add_(0, latents_N, values_N.double()) / self.count
        return mean_F.float().to(part.W_read_FD.device)
