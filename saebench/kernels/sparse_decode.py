"""Decode sparse codes: a weighted sum of decoder rows per token (methods.md K1 to K3).

Shape suffixes: `B` tokens, `K` entries of a token, `D` width of the output, `F` d_sae.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import current_implementation, primitives_for
from saebench.kernels.latent_gradient import collected_in, hand_over


def sparse_decode(codes: SparseCodes, W_dec_FD: Tensor, b_dec_D: Tensor | None = None) -> Tensor:
    """sum over the entries of each token of value * W_dec[index], plus b_dec: [B, D], differentiable in values, decoder and b_dec. Serves
    fixed-k and ragged codes; padding adds nothing, forward or backward."""
    if current_implementation() == "reference":
        written_BD = codes.to_dense() @ W_dec_FD
        return written_BD if b_dec_D is None else written_BD + b_dec_D
    return _SparseDecode.apply(codes.values, W_dec_FD, b_dec_D, codes)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor | None, codes: SparseCodes) -> Tensor:
        ctx.codes, ctx.parts = codes.replaced(values.detach()), collected_in(W_dec_FD)
        ctx.save_for_backward(W_dec_FD)
        return primitives_for(W_dec_FD).decode(ctx.codes, W_dec_FD, b_dec_D)

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        (W_dec_FD,) = ctx.saved_tensors
        codes: SparseCodes = ctx.codes
        grad_BD = grad_BD.contiguous()
        grad_values = gathered_dot(codes, grad_BD, W_dec_FD) if ctx.needs_input_grad[0] else None
        grad_W = hand_over(ctx.parts, codes, grad_BD) if ctx.needs_input_grad[1] else None
        return grad_values, grad_W, grad_BD.sum(0) if ctx.needs_input_grad[2] else None, None


def gathered_dot(codes: SparseCodes, rows_BD: Tensor, W_FD: Tensor) -> Tensor:
    """rows[b] . W[f] at every entry (b, f) of a code, in the shape of its values, without a [B, K, D] temporary (methods.md K2)."""
    return primitives_for(rows_BD, W_FD).dots(codes, rows_BD, W_FD)
