"""The primitives in stock torch operations: any device, any dtype, no compiler (primitives.py has the contract).

Scores pass in blocks of tokens and weights are gathered by embedding_bag, so neither [B, F] nor [N, D] exists. Codes with so many
entries that dense arithmetic pays go through dense blocks of tokens instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam

from saebench.codes import SparseCodes
from saebench.kernels.latent_order import latent_order
from saebench.kernels.primitives import AdamRule, Gradient
from saebench.kernels.scores import SIXTEEN_BITS, score_blocks

CROWDED = 24  # with more than one entry in so many active, dense products over blocks of tokens are faster than gathering rows
ROWS_AT_ONCE = 512  # of a large matrix, so that what lies between two operations stays in the cache


def topk(
    x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int, latents_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    if latents_M is not None:
        latents_M = latents_M.long()
        W_FD, b_F, scale_F = W_FD[latents_M], b_F[latents_M], None if scale_F is None else scale_F[latents_M]
    k = min(k, len(W_FD))
    values_BK = x_BD.new_empty(len(x_BD), k)
    indices_BK = torch.empty(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    for start, z_bF in score_blocks(x_BD, W_FD, b_F, scale_F):
        stop = start + len(z_bF)
        values_BK[start:stop], indices_BK[start:stop] = select_topk(z_bF, k)
    indices_BK = indices_BK if latents_M is None else latents_M[indices_BK]
    return indices_BK.to(torch.int32), values_BK.relu_()


def select_topk(z_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices (int64) of the k largest entries of each row; of equal ones the lowest index wins."""
    width = z_BF.shape[1]
    if k >= width:
        indices = torch.arange(width, device=z_BF.device).expand(len(z_BF), width)
        return z_BF.clone(), indices.clone()
    values, indices = torch.topk(z_BF, k + 1, dim=1)
    # torch.topk breaks ties as it likes. Only a tie across the border changes the set, and only above zero does it matter.
    tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
    values, indices = values[:, :k], indices[:, :k]
    if tied.any():
        rows = tied.nonzero()[:, 0]
        ranked = torch.sort(z_BF[rows], dim=1, descending=True, stable=True)
        values, indices = values.clone(), indices.clone()
        values[rows], indices[rows] = ranked.values[:, :k], ranked.indices[:, :k]
    return values, indices


def above(x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, threshold_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts, latents, values = [], [], []
    for _, z_bF in score_blocks(x_BD, W_FD, b_F, scale_F):
        kept_bF = z_bF > threshold_F
        row_N, latent_N = kept_bF.nonzero(as_tuple=True)
        counts.append(kept_bF.sum(1))
        latents.append(latent_N.to(torch.int32))
        values.append(z_bF[row_N, latent_N])
    offsets_B = torch.cat([torch.zeros(1, dtype=torch.int64, device=x_BD.device), torch.cat(counts).cumsum(0)])
    return offsets_B, torch.cat(latents), torch.cat(values)


def decode(codes: SparseCodes, W_FD: Tensor, bias_D: Tensor | None = None) -> Tensor:
    W_FD = _widened(W_FD)
    if codes.crowded(CROWDED):
        out_BD = W_FD.new_empty(len(codes), W_FD.shape[1])
        for start, dense_bF in codes.dense_blocks():
            torch.mm(dense_bF, W_FD, out=out_BD[start : start + len(dense_bF)])
    else:
        out_BD = torch.nn.functional.embedding_bag(
            codes.indices.reshape(-1), W_FD, _row_starts(codes), per_sample_weights=codes.values.reshape(-1), mode="sum"
        )
    return out_BD if bias_D is None else out_BD.add_(bias_D)


def dots(codes: SparseCodes, rows_BD: Tensor, W_FD: Tensor) -> Tensor:
    rows_BD, W_FD = _widened(rows_BD), _widened(W_FD)
    if codes.crowded(CROWDED):
        at = codes.indices.reshape(-1)
        found = rows_BD.new_empty(len(at))
        for start, count, first, last in codes.blocks():
            scores_bF = rows_BD[start : start + count] @ W_FD.T
            found[first:last] = scores_bF[codes.tokens[first:last] - start, at[first:last]]
        return found.reshape(codes.values.shape)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_BD, W_FD, codes.indices.reshape(-1), _row_starts(codes), codes.tokens.to(torch.int32), 0
    ).reshape(codes.values.shape)


def by_latent(indices_N: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    counts_F = torch.bincount(indices_N, minlength=d_sae)
    starts_F = torch.cat([counts_F.new_zeros(1), counts_F.cumsum(0)])
    return torch.argsort(indices_N, stable=True).to(torch.int32), starts_F.to(torch.int32)


def sums(codes: SparseCodes, rows_BD: Tensor) -> Tensor:
    rows_BD = _widened(rows_BD)
    if codes.crowded(CROWDED):
        total_FD = rows_BD.new_zeros(codes.d_sae, rows_BD.shape[1])
        for start, dense_bF in codes.dense_blocks():
            total_FD.addmm_(dense_bF.T, rows_BD[start : start + len(dense_bF)])
        return total_FD
    order = latent_order(codes)
    assert order.by_latent is not None
    positions_N, starts_F = order.by_latent
    return torch.nn.functional.embedding_bag(
        order.tokens_by_latent_N,
        rows_BD,
        starts_F[:-1],
        per_sample_weights=codes.values.reshape(-1)[positions_N],
        mode="sum",
    )


def gradient_square(W_FD: Tensor, gradient: Gradient, unit: bool) -> Tensor:
    return _summed(W_FD, gradient, unit).square().sum(dtype=torch.float64)


def gradient_bound(W_FD: Tensor, gradient: Gradient) -> float:
    """An upper bound of `gradient_square` that looks, for terms, at the lengths of rows alone: no gradient is summed twice."""
    most_F = torch.zeros(len(W_FD), dtype=torch.float64, device=W_FD.device)
    for term in gradient.terms:
        codes, lengths_B = term.codes, torch.linalg.vector_norm(term.rows_BD, dim=1, dtype=torch.float64)
        weights_N = codes.values.reshape(-1).abs() * lengths_B[codes.tokens]
        most_F += torch.bincount(codes.indices.reshape(-1), weights_N, minlength=len(W_FD))
    if gradient.own_F is not None:
        most_F += gradient.own_F.abs() * torch.linalg.vector_norm(W_FD, dim=1, dtype=torch.float64)
    dense = 0.0 if gradient.dense_FD is None else float(torch.linalg.vector_norm(gradient.dense_FD, dtype=torch.float64))
    return (dense + 1.001 * float(torch.linalg.vector_norm(most_F))) ** 2


def update(
    W_FD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    gradient: Gradient,
    unit: bool,
    rule: AdamRule,
    factor: Tensor,
    master_FD: Tensor | None = None,
) -> Tensor:
    """Also returns what `gradient_square` would have."""
    weights_FD = W_FD if master_FD is None else master_FD
    total_FD = _summed(weights_FD, gradient, unit)
    square = torch.linalg.vector_norm(total_FD).double().square()
    total_FD *= factor
    wide_FD = m_FD.to(v_FD.dtype)  # m itself where the types are the same
    step = torch.full((), float(rule.step - 1), device=W_FD.device)  # adam counts it up
    adam(
        [weights_FD],
        [total_FD],
        [wide_FD],
        [v_FD],
        [],
        [step],
        fused=W_FD.device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        lr=rule.lr,
        weight_decay=0.0,
        eps=rule.eps,
        maximize=False,
    )
    if wide_FD is not m_FD:
        m_FD.copy_(wide_FD)
    if unit:
        for rows in weights_FD.split(ROWS_AT_ONCE):
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(1e-12)
    if master_FD is not None:
        W_FD.copy_(master_FD)
    return square


def _summed(W_FD: Tensor, gradient: Gradient, unit: bool) -> Tensor:
    """The gradient as one matrix that belongs to the caller."""
    parts = [sums(term.codes, term.rows_BD) for term in gradient.terms]
    if gradient.dense_FD is not None:
        parts.append(gradient.dense_FD.to(W_FD.dtype, copy=not parts))
    total_FD = parts[0] if parts else torch.zeros_like(W_FD)
    for part in parts[1:]:
        total_FD += part
    if gradient.own_F is not None:
        total_FD.addcmul_(gradient.own_F[:, None], W_FD)
    if unit:
        for part_gD, rows_gD in zip(total_FD.split(ROWS_AT_ONCE), W_FD.split(ROWS_AT_ONCE), strict=True):
            squares = rows_gD.square().sum(1, keepdim=True).clamp_min_(1e-24)
            part_gD.addcmul_((part_gD * rows_gD).sum(1, keepdim=True).div_(squares), rows_gD, value=-1)
    return total_FD


def _widened(numbers: Tensor) -> Tensor:
    """In float32 where they have 16 bits: sums and results are float32."""
    return numbers.float() if numbers.dtype in SIXTEEN_BITS else numbers


def _row_starts(codes: SparseCodes) -> Tensor:
    if codes.offsets is not None:
        return codes.offsets[:-1].to(torch.int32)
    return torch.arange(0, codes.indices.numel(), codes.indices.shape[1], device=codes.indices.device, dtype=torch.int32)
