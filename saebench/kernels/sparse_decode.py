"""Decode sparse codes: a weighted sum of decoder rows per token (methods.md K1 to K3).

Shape suffixes: `B` tokens, `K` entries of a token, `D` width of the output, `F` d_sae.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import current_implementation
from saebench.kernels.latent_sums import latent_sums


def sparse_decode(codes: SparseCodes, W_dec_FD: Tensor) -> Tensor:
    """sum over the entries of each token of value * W_dec[index]: [B, D], differentiable in values and decoder. Serves
    fixed-k and ragged codes; padding adds nothing, forward or backward. Crowded codes go through dense blocks of tokens."""
    if current_implementation() == "reference":
        return codes.to_dense() @ W_dec_FD
    return _SparseDecode.apply(codes.values, W_dec_FD, codes)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec_FD: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes.replaced(values.detach())
        ctx.save_for_backward(W_dec_FD)
        if codes.crowded:
            out_BD = W_dec_FD.new_empty(len(codes), W_dec_FD.shape[1])
            for start, dense_bF in ctx.codes.dense_blocks():
                torch.mm(dense_bF, W_dec_FD, out=out_BD[start : start + len(dense_bF)])
            return out_BD
        return torch.nn.functional.embedding_bag(
            codes.indices.reshape(-1), W_dec_FD, _row_starts(codes), per_sample_weights=values.reshape(-1), mode="sum"
        )

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec_FD,) = ctx.saved_tensors
        codes: SparseCodes = ctx.codes
        grad_BD = grad_BD.contiguous()
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = gathered_dot(codes, grad_BD, W_dec_FD)
        if ctx.needs_input_grad[1]:
            grad_W = latent_sums(codes, grad_BD)
        return grad_values, grad_W, None


def gathered_dot(codes: SparseCodes, rows_BD: Tensor, W_FD: Tensor) -> Tensor:
    """rows[b] . W[f] at every entry (b, f) of a code, in the shape of its values, without a [B, K, D] temporary (methods.md K2)."""
    if codes.crowded:
        at = codes.indices.reshape(-1)
        dots = rows_BD.new_empty(len(at))
        for start, count, first, last in codes.blocks():
            scores_bF = rows_BD[start : start + count] @ W_FD.T
            dots[first:last] = scores_bF[codes.tokens[first:last] - start, at[first:last]]
        return dots.reshape(codes.values.shape)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_BD, W_FD, codes.indices.reshape(-1), _row_starts(codes), codes.tokens, 0
    ).reshape(codes.values.shape)


def _row_starts(codes: SparseCodes) -> Tensor:
    if codes.offsets is not None:
        return codes.offsets[:-1]
    return torch.arange(0, codes.indices.numel(), codes.indices.shape[1], device=codes.indices.device)
