"""MP-SAE: a dictionary whose encoder is matching pursuit on its own atoms (Costa et al. 2025; methods.md T9).

One atom after the other is taken, each the one that explains most of what those before left over, so later atoms may depend on
earlier ones (hierarchies), and the squared error never rises with a further step: one trained dictionary serves every number of
steps, and every tolerance. Gradients flow through all steps.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `T` steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import register
from saebench.dictionaries.sparse_coding import SparseCoder, SparseCodingConfig
from saebench.errors import UserError
from saebench.kernels import matching_pursuit


class MatchingPursuit(SparseCodingConfig):
    """Configuration of a matching-pursuit autoencoder."""

    architecture = "matching_pursuit"

    steps: int = Field(default=32, gt=0)
    """Atoms taken on each token, at most, one after the other; another number may be asked for after training."""
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """A token is done when its residual is shorter than this share of its distance from b_dec."""

    @property
    def default_id(self) -> str:
        return f"{self.architecture}-{self.d_sae}-steps{self.steps}"


@dataclass(frozen=True)
class Trace:
    """The explanation of every token in the order in which it was found; steps that were not taken have coefficient 0."""

    atoms_BT: Tensor
    """The latent taken at each step: int64. One may come again."""
    coefficients_BT: Tensor
    """By how much it was raised, in units of the activations."""
    norms_BT: Tensor
    """Length of the residual after each step."""


@register(MatchingPursuit)
class MatchingPursuitDictionary(SparseCoder):
    """r = x - b_dec; repeat: j = argmax_i r . d_i, f_j += r . d_j, r -= (r . d_j) d_j; x_hat = x - r."""

    config: MatchingPursuit

    def solve(
        self, x_BD: Tensor, atoms_FD: Tensor, steps: int | None = None, tolerance: float | None = None
    ) -> tuple[SparseCodes, Tensor]:
        steps = self.config.steps if steps is None else steps
        tolerance = self.config.tolerance if tolerance is None else tolerance
        if steps < 1 or not 0 <= tolerance < 1:
            raise UserError(
                f"matching pursuit with steps={steps} and tolerance={tolerance}: steps is at least 1, tolerance in [0, 1)"
            )
        pursuit = matching_pursuit(x_BD, atoms_FD, steps, tolerance)
        return merged(pursuit.atoms_BT, pursuit.coefficients_BT, len(atoms_FD)), pursuit.residual_BD

    def encode(self, x_BD: Tensor, steps: int | None = None, tolerance: float | None = None) -> SparseCodes:
        """The code after `steps` steps, or fewer where the residual is shorter than `tolerance` times ||x - b_dec||; both may differ
        from training. Latents in the order in which they were first taken. Raises UserError for steps below 1."""
        self.check_rows(x_BD)
        return self.solve(self.centred(x_BD), self.atoms, steps, tolerance)[0]

    @torch.no_grad()
    def trace(self, x_BD: Tensor, steps: int | None = None, tolerance: float = 0.0) -> Trace:
        """Step by step, which latent was taken, by how much it was raised and how long the residual then was: [B, T] each. Lengths of
        several sites side by side are in their normalised units."""
        steps = self.config.steps if steps is None else steps
        pursuit = matching_pursuit(self.centred(x_BD), self.atoms, steps, tolerance)
        return Trace(pursuit.atoms_BT, pursuit.coefficients_BT, pursuit.norms_BT)


def merged(indices_BT: Tensor, values_BT: Tensor, d_sae: int) -> SparseCodes:
    """Codes in which every latent of a token comes once, where it came first, with the sum of its values; what is left of the
    others is padding."""
    order_BT = indices_BT.argsort(dim=1, stable=True)
    sorted_BT = indices_BT.gather(1, order_BT)
    positions_BT = torch.arange(indices_BT.shape[1], device=indices_BT.device).expand_as(indices_BT)
    begins_BT = torch.ones_like(sorted_BT, dtype=torch.bool)
    begins_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    first_BT = torch.where(begins_BT, positions_BT, 0).cummax(1).values  # in the sorted row, where a latent's entries begin
    slots_BT = torch.empty_like(order_BT).scatter_(1, order_BT, order_BT.gather(1, first_BT))
    return SparseCodes(indices_BT, torch.zeros_like(values_BT).scatter_add(1, slots_BT, values_BT), d_sae)
