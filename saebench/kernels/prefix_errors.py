"""Errors of nested reconstructions: what is left after the first parts of a sum, for every number of parts (methods.md T6).

    e_0 = first,  e_g = e_(g-1) + parts[g-1],  loss_g = mean over tokens of ||e_g||^2

All errors live in the memory of the parts, forward and backward, so a step passes over them as few times as it can.
Shape suffixes: `G` parts, `B` tokens, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.kernels.implementations import current_implementation


def prefix_errors(first_BD: Tensor, parts_GBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [G + 1], differentiable in both arguments; and without gradient the last error [B, D] and its squared length [B]. The memory
    of `parts` is taken over."""
    if current_implementation() == "reference":
        errors_GBD = torch.cat([first_BD[None], parts_GBD]).cumsum(0)
        last_BD = errors_GBD[-1].detach()
        return errors_GBD.square().sum(2).mean(1), last_BD, last_BD.square().sum(1)
    losses_G, last_BD, squares_B = _PrefixErrors.apply(first_BD, parts_GBD)
    return losses_G, last_BD, squares_B


class _PrefixErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first_BD: Tensor, parts_GBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        errors_GBD, before_BD = parts_GBD.detach(), first_BD
        squares = [torch.linalg.vector_norm(first_BD, dim=1).square()]
        for error_BD in errors_GBD:
            error_BD += before_BD
            squares.append(torch.linalg.vector_norm(error_BD, dim=1).square())
            before_BD = error_BD
        last_BD = before_BD.clone()  # the way back writes over the others
        ctx.save_for_backward(first_BD)
        ctx.errors_GBD = errors_GBD
        ctx.mark_non_differentiable(last_BD, squares[-1])
        return torch.stack(squares).mean(1), last_BD, squares[-1]

    @staticmethod
    def backward(ctx: Any, grad_G: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        (first_BD,) = ctx.saved_tensors
        grads_GBD = ctx.errors_GBD
        ctx.errors_GBD = None  # a second backward pass through it would find gradients there
        scales_G = 2 * grad_G / len(first_BD)
        later_BD: Tensor | None = None
        for g in reversed(range(len(grads_GBD))):
            later_BD = _plus_scaled(later_BD, grads_GBD[g], scales_G[g + 1], out=grads_GBD[g])
        return _plus_scaled(later_BD, first_BD, scales_G[0]), grads_GBD


def _plus_scaled(sum_BD: Tensor | None, rows_BD: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """sum + scale * rows, in one pass."""
    if sum_BD is None:
        return torch.mul(rows_BD, scale, out=out)
    return torch.addcmul(sum_BD, rows_BD, scale, out=out)
