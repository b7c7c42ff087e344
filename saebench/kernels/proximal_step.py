"""One step of unrolled sparse coding: f <- S(f + eta r D^T), where r is what f leaves of x (ISTA, IHT: Gregor and LeCun 2010).

S keeps what exceeds a threshold, less the threshold (soft, non-negative), or the k largest, those above zero (hard). Codes stay sparse
between steps: scores pass in blocks, to which the entries of f are added; the values of selected entries are then computed anew with
their gradient, the selection held constant.
Shape suffixes: `B` tokens, `D` width, `F` number of atoms, `K` k, `N` entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import current_implementation
from saebench.kernels.latent_gradient import latent_sums
from saebench.kernels.scores import score_blocks
from saebench.kernels.sparse_decode import gathered_dot, sparse_decode
from saebench.kernels.stock import select_topk


def proximal_step(
    codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor, eta: Tensor, threshold: Tensor | None = None, k: int | None = None
) -> SparseCodes:
    """The code after a step of size `eta` (0-dim) from `codes`, or from zero where they are None. `threshold` (0-dim, not negative) gives
    ragged codes; `k` codes with k entries per token, padding 0. Latents ascend in each row. Differentiable in all tensors."""
    assert (threshold is None) != (k is None)
    if current_implementation() == "reference":
        return _reference(codes, r_BD, atoms_FD, eta, threshold, k)
    with torch.no_grad():
        chosen = _select(codes, r_BD, atoms_FD, eta, threshold, k)
    _ = chosen.order  # one sort for all that goes backward through these entries
    values = eta * _EntryDots.apply(r_BD, atoms_FD, chosen)
    if codes is not None:
        values = values + _at_entries_of(chosen, codes)
    if threshold is not None:
        values = values - threshold
    return chosen.replaced(values.relu())


def _reference(
    codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor, eta: Tensor, threshold: Tensor | None, k: int | None
) -> SparseCodes:
    u_BF = eta * (r_BD @ atoms_FD.T)
    if codes is not None:
        u_BF = u_BF + codes.to_dense()
    if k is None:
        return SparseCodes.from_dense((u_BF - threshold).relu())
    indices_BK = torch.sort(u_BF.detach(), dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    return SparseCodes(indices_BK, u_BF.gather(1, indices_BK).relu(), len(atoms_FD))


def _select(
    codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor, eta: Tensor, threshold: Tensor | None, k: int | None
) -> SparseCodes:
    """The entries that are kept; their values do not matter."""
    num = len(atoms_FD)
    rows: list[Tensor] = []
    latents: list[Tensor] = []
    for start, u_bF in score_blocks(r_BD, atoms_FD, r_BD.new_zeros(num)):
        u_bF *= eta
        if codes is not None:
            part = codes[start : start + len(u_bF)]
            u_bF.view(-1).index_add_(0, part.tokens * num + part.indices.reshape(-1), part.values.reshape(-1))
        if k is not None:
            latents.append(select_topk(u_bF, k)[1].sort(1).values)
        else:
            row_N, latent_N = (u_bF > threshold).nonzero(as_tuple=True)
            rows.append(row_N + start)
            latents.append(latent_N)
    indices = torch.cat(latents)
    values = torch.ones_like(indices, dtype=r_BD.dtype)
    if k is not None:
        return SparseCodes(indices, values, num)
    return SparseCodes.ragged(torch.cat(rows), indices, values, len(r_BD), num)


def _at_entries_of(chosen: SparseCodes, codes: SparseCodes) -> Tensor:
    """The values of `codes` at the entries of `chosen`, 0 where they have none. Both have ascending latents in every row."""
    if codes.indices.numel() == 0:
        return torch.zeros_like(chosen.values)
    wanted_N, present_N = (each.tokens * each.d_sae + each.indices.reshape(-1) for each in (chosen, codes))
    at_N = torch.searchsorted(present_N, wanted_N).clamp_max_(len(present_N) - 1)
    return torch.where(present_N[at_N] == wanted_N, codes.values.reshape(-1)[at_N], 0.0).reshape(chosen.values.shape)


class _EntryDots(torch.autograd.Function):
    """r[b] . atoms[f] at every entry (b, f)."""

    @staticmethod
    def forward(ctx: Any, r_BD: Tensor, atoms_FD: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(r_BD, atoms_FD)
        return gathered_dot(codes, r_BD, atoms_FD)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        r_BD, atoms_FD = ctx.saved_tensors
        gradient = ctx.codes.replaced(grad_values.contiguous())
        grad_r = sparse_decode(gradient, atoms_FD) if ctx.needs_input_grad[0] else None
        grad_atoms = latent_sums(gradient, r_BD) if ctx.needs_input_grad[1] else None
        return grad_r, grad_atoms, None
