"""Matching pursuit: take the atom that explains most of what is left, subtract it, repeat (Mallat and Zhang 1993; methods.md T9).

    r = x;  repeat:  j = argmax_i r . d_i;  v = r . d_j;  r <- r - v d_j

Only positive multiples are taken: a token is done when no score is positive, or its residual is short. The scores of a step come from
a matrix product with the residual or, where the Gram matrix of the atoms fits and pays, from the last ones: s <- s - v (d_j D^T), which
costs a row of that matrix instead of a product. Coefficients are always r . d_j, so both take the same steps but where scores tie.
The backward pass rebuilds the residuals from the last one backwards: it holds one residual per token, not one per step.

Shape suffixes: `B` tokens, `D` width, `F` number of atoms, `T` steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saebench.kernels.implementations import current_implementation, primitives_for

BLOCK_BYTES = (
    2 << 20
)  # scores of the tokens that take their steps together: they are read at every step, so they stay in the cache
BLOCK_BYTES_GPU = 256 << 20
GRAM_BYTES = 1 << 30


@dataclass(frozen=True)
class Pursuit:
    """The steps of every token, in order; steps that were not taken have coefficient 0. An atom may be taken more than once."""

    atoms_BT: Tensor
    """The atom of each step: int64."""
    coefficients_BT: Tensor
    """What multiple of it was subtracted; differentiable."""
    norms_BT: Tensor
    """Length of the residual after each step; without gradient."""
    residual_BD: Tensor
    """What is left after the last step; differentiable."""


def matching_pursuit(x_BD: Tensor, atoms_FD: Tensor, steps: int, tolerance: float = 0.0) -> Pursuit:
    """Up to `steps` steps of non-negative matching pursuit on every token. Atoms must be unit rows. A token is done early when no score is
    positive, or its residual is shorter than `tolerance` times its own length. Differentiable in x and atoms, the choice of
    atoms held constant. NaN in the input gives NaN coefficients."""
    if current_implementation() == "reference":
        return _reference(x_BD, atoms_FD, steps, tolerance)
    atoms_BT, coefficients_BT, norms_BT, residual_BD = _Pursue.apply(x_BD, atoms_FD, steps, tolerance)
    return Pursuit(atoms_BT, coefficients_BT, norms_BT, residual_BD)


def _reference(x_BD: Tensor, atoms_FD: Tensor, steps: int, tolerance: float) -> Pursuit:
    r_BD = x_BD
    taken = []
    for _ in range(steps):
        s_BF = r_BD @ atoms_FD.T
        j_B = s_BF.detach().argmax(1)
        v_B = s_BF.gather(1, j_B[:, None])[:, 0]
        done_B = (v_B <= 0) | (r_BD.norm(dim=1) < tolerance * x_BD.norm(dim=1))
        v_B = torch.where(done_B, 0.0, v_B)
        r_BD = r_BD - v_B[:, None] * atoms_FD[j_B]
        taken.append((j_B, v_B, r_BD.detach().norm(dim=1)))
    j_BT, v_BT, norms_BT = (torch.stack(each, 1) for each in zip(*taken, strict=True))
    return Pursuit(j_BT, v_BT, norms_BT, r_BD)


class _Pursue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, atoms_FD: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        j_BT, v_BT, norms_BT, r_BD = _search(x_BD, atoms_FD, steps, tolerance)
        ctx.save_for_backward(atoms_FD, j_BT, v_BT, r_BD)
        ctx.mark_non_differentiable(j_BT, norms_BT)
        return j_BT, v_BT, norms_BT, r_BD

    @staticmethod
    def backward(ctx: Any, _j: Any, grad_v_BT: Tensor, _norms: Any, grad_r_BD: Tensor) -> tuple[Tensor | None, ...]:
        atoms_FD, j_BT, v_BT, r_BD = ctx.saved_tensors
        r_BD, grad_r_BD = r_BD.clone(), grad_r_BD.clone()
        grad_atoms_FD = torch.zeros_like(atoms_FD) if ctx.needs_input_grad[1] else None
        for t in reversed(range(j_BT.shape[1])):
            j_B, v_B, d_BD = j_BT[:, t], v_BT[:, t, None], atoms_FD[j_BT[:, t]]
            a_B = (grad_v_BT[:, t, None] - (grad_r_BD * d_BD).sum(1, keepdim=True)) * (v_B != 0)
            r_BD.addcmul_(v_B, d_BD)
            if grad_atoms_FD is not None:
                _add_rows(grad_atoms_FD, j_B, (a_B * r_BD).addcmul_(v_B, grad_r_BD, value=-1))
            grad_r_BD.addcmul_(a_B, d_BD)
        return grad_r_BD, grad_atoms_FD, None, None


def _add_rows(total_FD: Tensor, rows_B: Tensor, values_BD: Tensor) -> None:
    """total[rows] += values, in the same order every time: on a GPU index_add_ is not."""
    if total_FD.is_cuda:
        total_FD.index_put_((rows_B,), values_BD, accumulate=True)
    else:
        total_FD.index_add_(0, rows_B, values_BD)


def _gram_pays(tokens: int, steps: int, atoms_FD: Tensor) -> bool:
    num = len(atoms_FD)
    return num * num * atoms_FD.element_size() <= GRAM_BYTES and tokens * (steps - 1) >= 2 * num


def _search(x_BD: Tensor, atoms_FD: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    primitives = primitives_for(x_BD)
    if hasattr(primitives, "pursue"):
        return primitives.pursue(x_BD, atoms_FD, steps, tolerance)
    num = len(atoms_FD)
    gram_FF = atoms_FD @ atoms_FD.T if _gram_pays(len(x_BD), steps, atoms_FD) else None
    block = max(1, (BLOCK_BYTES_GPU if x_BD.is_cuda else BLOCK_BYTES) // (num * x_BD.element_size()))
    r_BD = x_BD.clone()
    j_BT = torch.zeros(len(x_BD), steps, dtype=torch.int64, device=x_BD.device)
    v_BT, norms_BT = x_BD.new_zeros(len(x_BD), steps), x_BD.new_empty(len(x_BD), steps)
    scores = x_BD.new_empty(min(block, len(x_BD)), num)
    for start in range(0, len(x_BD), block):
        rows = slice(start, start + block)
        r_bD, s_bF = r_BD[rows], scores[: len(r_BD[rows])]
        norm_b = r_bD.norm(dim=1)
        shortest_b = tolerance * norm_b
        torch.mm(r_bD, atoms_FD.T, out=s_bF)
        for t in range(steps):
            j_b = s_bF.argmax(1)
            d_bD = atoms_FD[j_b]
            v_b = (r_bD * d_bD).sum(1)
            v_b.masked_fill_((v_b <= 0) | (norm_b < shortest_b), 0.0)
            r_bD.addcmul_(v_b[:, None], d_bD, value=-1)
            norm_b = r_bD.norm(dim=1)
            j_BT[rows, t], v_BT[rows, t], norms_BT[rows, t] = j_b, v_b, norm_b
            if tolerance and not v_b.any():
                norms_BT[rows, t:] = norm_b[:, None]
                break
            if gram_FF is not None:
                s_bF.addcmul_(gram_FF[j_b], v_b[:, None], value=-1)
            else:
                torch.mm(r_bD, atoms_FD.T, out=s_bF)
    return j_BT, v_BT, norms_BT, r_BD
