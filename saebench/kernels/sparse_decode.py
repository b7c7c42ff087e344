"""Decode sparse codes: a weighted sum of decoder rows per token (methods.md K1 to K3).

Shape suffixes: `B` tokens, `K` entries of a token, `D` width of the output, `F` d_sae.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import LatentOrder, SparseCodes
from saebench.kernels.implementations import current_implementation
from saebench.kernels.latent_sums import latent_sums


def sparse_decode(codes: SparseCodes, W_dec_FD: Tensor) -> Tensor:
    """sum over the entries of each token of value * W_dec[index]: [B, D], differentiable in values and decoder. Serves
    fixed-k and ragged codes; padding adds nothing, forward or backward."""
    if current_implementation() == "reference":
        return codes.to_dense() @ W_dec_FD
    return _SparseDecode.apply(codes.values, W_dec_FD, codes.indices, codes.offsets, codes.order)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec_FD: Tensor, indices: Tensor, offsets: Tensor | None, order: LatentOrder
    ) -> Tensor:
        starts_B = _row_starts(indices, offsets)
        ctx.order = order
        ctx.save_for_backward(values, W_dec_FD, indices, starts_B)
        return torch.nn.functional.embedding_bag(
            indices.reshape(-1), W_dec_FD, starts_B, per_sample_weights=values.reshape(-1), mode="sum"
        )

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec_FD, indices, starts_B = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            # the gathered dot product of K2: grad[b] . W_dec[index], without a [B, K, D] temporary
            grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_BD, W_dec_FD, indices.reshape(-1), starts_B, ctx.order.tokens_N, 0
            ).reshape(values.shape)
        if ctx.needs_input_grad[1]:
            grad_W = latent_sums(ctx.order, values, grad_BD)
        return grad_values, grad_W, None, None, None


def _row_starts(indices: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is not None:
        return offsets[:-1]
    return torch.arange(0, indices.numel(), indices.shape[1], device=indices.device)
