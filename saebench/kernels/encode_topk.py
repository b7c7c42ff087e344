"""Encode and keep the k largest pre-activations of every token (methods.md 0.7, T2, K5).

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `K` k. The encoder is handled by its rows, `W_enc_FD`, one per latent, because
the backward pass gathers and sums rows; dictionaries show it transposed.

Selection: the k largest z in float32, ties to the lowest index, then ReLU. An entry that is not positive becomes padding: value
0, and no gradient. The scores never exist as a whole: tokens pass in blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import LatentOrder, SparseCodes
from saebench.kernels.implementations import current_implementation
from saebench.kernels.latent_sums import latent_sums

BLOCK_BYTES = (
    64 << 20
)  # scores of one block of tokens: smaller blocks read the encoder more often than they save (benchmarks/NOTES.md)


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor, k: int) -> SparseCodes:
    """z = (x - b_in) W_enc^T + b_enc; the k largest of each row, those above zero. Returns fixed-k codes, differentiable in
    every tensor argument, selection held constant. NaN in the input gives NaN values."""
    if current_implementation() == "reference":
        return _reference(x_BD, W_enc_FD, b_enc_F, b_in_D, k)
    d_sae = len(W_enc_FD)
    values_BK, indices_BK, order = _EncodeTopK.apply(x_BD, W_enc_FD, b_enc_F, b_in_D, k)
    return SparseCodes(indices_BK, values_BK, d_sae, _order=order)


def _reference(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor, k: int) -> SparseCodes:
    z_BF = (x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
    indices_BK = torch.sort(z_BF.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    return SparseCodes(indices_BK, z_BF.gather(1, indices_BK).relu(), len(W_enc_FD))


def select_topk(z_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest entries of each row; of equal ones the lowest index wins."""
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


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor, k: int
    ) -> tuple[Tensor, Tensor, LatentOrder]:
        num_tokens, d_sae = len(x_BD), len(W_enc_FD)
        k = min(k, d_sae)
        centred_BD = x_BD - b_in_D
        values_BK = x_BD.new_empty(num_tokens, k)
        indices_BK = torch.empty(num_tokens, k, dtype=torch.int64, device=x_BD.device)
        block = max(1, BLOCK_BYTES // (d_sae * x_BD.element_size()))
        scores = x_BD.new_empty(min(block, num_tokens), d_sae)
        for start in range(0, num_tokens, block):
            rows_BD = centred_BD[start : start + block]
            z_BF = torch.addmm(b_enc_F, rows_BD, W_enc_FD.T, out=scores[: len(rows_BD)])
            values_BK[start : start + block], indices_BK[start : start + block] = select_topk(z_BF, k)
        values_BK.relu_()
        tokens_N = torch.arange(num_tokens, device=x_BD.device).repeat_interleave(k)
        order = LatentOrder(indices_BK.reshape(-1), tokens_N, d_sae)
        ctx.order = order
        ctx.mark_non_differentiable(indices_BK)
        ctx.save_for_backward(centred_BD, W_enc_FD, values_BK, indices_BK)
        return values_BK, indices_BK, order

    @staticmethod
    def backward(ctx: Any, grad_values_BK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred_BD, W_enc_FD, values_BK, indices_BK = ctx.saved_tensors
        d_sae = len(W_enc_FD)
        grad_z_BK = grad_values_BK * (values_BK > 0)
        need_x, need_W, need_b, need_b_in = ctx.needs_input_grad[:4]
        grad_x = (
            torch.nn.functional.embedding_bag(indices_BK, W_enc_FD, per_sample_weights=grad_z_BK, mode="sum") if need_x else None
        )
        grad_W = latent_sums(ctx.order, grad_z_BK, centred_BD) if need_W else None
        grad_b = grad_b_in = None
        if need_b or need_b_in:
            grad_b = grad_z_BK.new_zeros(d_sae).index_add_(0, indices_BK.reshape(-1), grad_z_BK.reshape(-1))
            grad_b_in = -(grad_b @ W_enc_FD) if need_b_in else None
        return grad_x, grad_W, grad_b, grad_b_in, None
