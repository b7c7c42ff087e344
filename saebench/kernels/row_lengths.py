"""Lengths of the rows of a matrix. Whoever takes steps with the rows has them at hand, and a pass over the matrix is saved.

An optimiser that alone changes a parameter's memory unseen by autograd says so once (`keep_lengths`), and has each of its steps leave the
new lengths with the parameter (`lengths_to_leave`). Every other change shows in the parameter's version or address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saebench.kernels.implementations import current_implementation, primitives_for
from saebench.kernels.latent_gradient import collected_in, hand_over_own
from saebench.kernels.primitives import Primitives

_KEPT = "_saebench_lengths"


@dataclass
class _Kept:
    values_F: Tensor
    version: int = -1
    address: int = 0

    def hold_for(self, W_FD: Tensor) -> bool:
        return (self.version, self.address) == (W_FD._version, W_FD.data_ptr())

    def now_for(self, W_FD: Tensor) -> Tensor:
        self.version, self.address = W_FD._version, W_FD.data_ptr()
        return self.values_F


def row_lengths(W_FD: Tensor) -> Tensor:
    """||W[f]|| for every row, differentiable: [F], float32 or better. Not to be changed in place."""
    if current_implementation() == "reference":
        return _norms(W_FD)
    return _Lengths.apply(W_FD, _lengths(W_FD)) if torch.is_grad_enabled() and W_FD.requires_grad else _lengths(W_FD)


def distances(x_BD: Tensor, point_D: Tensor) -> Tensor:
    """||x[b] - point|| for every row, without gradient: [..., B]."""
    measure = getattr(primitives_for(x_BD, point_D), "row_lengths", None)
    if measure is None or x_BD.ndim != 2 or point_D.ndim != 1:
        return torch.linalg.vector_norm(x_BD.detach() - point_D, dim=-1)
    return measure(x_BD, point_D)


class _Lengths(torch.autograd.Function):
    """Known lengths as a function of the matrix."""

    @staticmethod
    def forward(ctx: Any, W_FD: Tensor, lengths_F: Tensor) -> Tensor:
        ctx.parts = collected_in(W_FD)
        ctx.save_for_backward(W_FD, lengths_F)
        return lengths_F.clone()  # the next step's are left in the same memory

    @staticmethod
    def backward(ctx: Any, grad_F: Tensor) -> tuple[Tensor | None, None]:
        W_FD, lengths_F = ctx.saved_tensors
        own_F = torch.where(lengths_F > 0, grad_F / lengths_F, 0.0)  # a row of length 0 gets none, as from torch
        return hand_over_own(ctx.parts, own_F, W_FD), None


def _norms(W_FD: Tensor) -> Tensor:
    return W_FD.norm(dim=1, dtype=torch.promote_types(W_FD.dtype, torch.float32))


def _lengths(W_FD: Tensor) -> Tensor:
    measure = getattr(primitives_for(W_FD), "row_lengths", None)
    if measure is None:
        return _norms(W_FD.detach())
    kept: _Kept | None = getattr(W_FD, _KEPT, None)
    if kept is None:
        return measure(W_FD)
    if not kept.hold_for(W_FD):
        kept.values_F = measure(W_FD)
    return kept.now_for(W_FD)


def keep_lengths(parameter: nn.Parameter) -> None:
    """Promises that every step which autograd does not see takes `lengths_to_leave`."""
    setattr(parameter, _KEPT, _Kept(parameter.new_empty(0)))


def lengths_to_leave(parameter: Tensor, primitives: Primitives) -> dict[str, Tensor]:
    """What an `update` of this parameter is to be given besides: where to leave the lengths of all rows, if anybody has asked for them and
    the update can tell."""
    kept: _Kept | None = getattr(parameter, _KEPT, None)
    if kept is None or kept.version < 0:
        return {}
    if hasattr(primitives, "row_lengths"):
        return {"lengths_F": kept.now_for(parameter)}
    kept.version = -1
    return {}
