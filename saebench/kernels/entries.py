"""Give selected pre-activations their gradient: z at the entries of a code as a function of input, encoder and biases (methods.md K5).

Selection happens without gradients, by whatever rule; what every rule shares is this: the values at the selected (token, latent) entries
are x W_enc^T + b_enc there, and their gradient touches only those rows.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `N` entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.latent_sums import latent_sums


def with_gradient(codes: SparseCodes, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor | None) -> SparseCodes:
    """The same codes, whose values are pre-activations z = (x - b_in) W_enc^T + b_enc, now differentiable in all four, with the
    selection held constant. An entry whose value is exactly 0 is padding and passes no gradient."""
    if not torch.is_grad_enabled():
        return codes
    _ = codes.order  # made here, so that the decoder's backward pass shares its sort
    values = _Entries.apply(x_BD, W_enc_FD, b_enc_F, b_in_D, codes)
    return codes.replaced(values)


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor | None, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(x_BD, W_enc_FD, b_in_D)
        return codes.values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_enc_FD, b_in_D = ctx.saved_tensors
        codes: SparseCodes = ctx.codes
        need_x, need_W, need_b, need_b_in = ctx.needs_input_grad[:4]
        grad_z = grad_values * (codes.values != 0)
        gradient = codes.replaced(grad_z)
        grad_x = grad_W = grad_b = grad_b_in = None
        if need_x:
            from saebench.kernels.sparse_decode import sparse_decode

            with torch.no_grad():
                grad_x = sparse_decode(gradient, W_enc_FD)
        if need_W:
            grad_W = latent_sums(gradient, x_BD if b_in_D is None else x_BD - b_in_D)
        if need_b or need_b_in:
            grad_b = grad_z.new_zeros(codes.d_sae).index_add_(0, codes.indices.reshape(-1), grad_z.reshape(-1))
            grad_b_in = -(grad_b @ W_enc_FD) if need_b_in else None
        return grad_x, grad_W, grad_b, grad_b_in, None
