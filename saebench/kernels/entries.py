"""Give selected pre-activations their gradient: z at the entries of a code as a function of input, encoder and biases (methods.md K5).

Selection happens without gradients, by whatever rule; what every rule shares is this: the values at the selected (token, latent) entries
are (x W_enc^T + b_enc) * scale there, and their gradient touches only those rows.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `N` entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import primitives_for
from saebench.kernels.latent_gradient import collected_in, hand_over
from saebench.kernels.latent_numbers import at_entries, latent_totals
from saebench.kernels.stacked import minus, stack_size, weighted_sum


def centred(x_BD: Tensor, b_in_D: Tensor | None) -> Tensor:
    """x - b_in, without gradient: [B, D], of a stack's x_nBD [n B, D]."""
    return x_BD.detach().reshape(-1, x_BD.shape[-1]) if b_in_D is None else minus(x_BD.detach(), b_in_D.detach())


def with_gradient(
    codes: SparseCodes,
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    scale_F: Tensor | None = None,
    centred_BD: Tensor | None = None,
) -> SparseCodes:
    """The same codes, whose values are pre-activations z = ((x - b_in) W_enc^T + b_enc) * scale, now differentiable in all five, with the
    selection held constant. An entry whose value is exactly 0 is padding and passes no gradient. `centred_BD` is x - b_in, where it is
    at hand."""
    if not torch.is_grad_enabled():
        return codes
    _ = codes.order  # made here, so that the decoder's backward pass shares its sort
    values = _Entries.apply(x_BD, W_enc_FD, b_enc_F, b_in_D, scale_F, codes, centred_BD)
    return codes.replaced(values)


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_in_D: Tensor | None,
        scale_F: Tensor | None,
        codes: SparseCodes,
        centred_BD: Tensor | None,
    ) -> Tensor:
        ctx.codes, ctx.parts, ctx.stack = codes, collected_in(W_enc_FD), stack_size(b_in_D)
        ctx.save_for_backward(W_enc_FD, scale_F, centred(x_BD, b_in_D) if centred_BD is None else centred_BD)
        return codes.values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        W_enc_FD, scale_F, centred_BD = ctx.saved_tensors
        codes: SparseCodes = ctx.codes
        need_x, need_W, need_b, need_b_in, need_scale = ctx.needs_input_grad[:5]
        grad_z = grad_values * (codes.values != 0)
        grad_scale = None
        if scale_F is not None:
            if need_scale:
                grad_scale = latent_totals(codes.replaced(grad_z * codes.values)) / scale_F.where(scale_F != 0, 1.0)
            grad_z = grad_z * at_entries(scale_F, codes)
        gradient = codes.replaced(grad_z)
        grad_x = grad_W = grad_b = grad_b_in = None
        if need_x:
            grad_x = primitives_for(W_enc_FD).decode(gradient, W_enc_FD)
        if need_W:
            grad_W = hand_over(ctx.parts, gradient, centred_BD)
        if need_b or need_b_in:
            grad_b = latent_totals(gradient)
            grad_b_in = -weighted_sum(grad_b.to(W_enc_FD.dtype), W_enc_FD, ctx.stack) if need_b_in else None
        return grad_x, grad_W, grad_b, grad_b_in, grad_scale, None, None
