"""Decode and compare: the error of a reconstruction and its squares, in one pass over the rows that make it (methods.md K1, K2).

The gradient of squared errors needs the products of each token's error with the rows it was decoded from: where an implementation can, they
are made in the forward pass, while those rows are in the cache, and the backward pass gathers nothing.
Shape suffixes: `B` tokens, `K` entries of a token, `D` width of what is written, `F` d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import current_implementation, primitives_for
from saebench.kernels.latent_gradient import collected_in, hand_over
from saebench.kernels.sparse_decode import sparse_decode
from saebench.kernels.stacked import decode_errors, stack_size, weighted_sum


def decode_error(codes: SparseCodes, W_dec_FD: Tensor, b_dec_D: Tensor, y_BD: Tensor) -> tuple[Tensor, Tensor]:
    """error = decode(codes) + b_dec - y [B, D], and its squared length [B]. Both are differentiable in values, decoder, b_dec and y.
    A stack's y_nBD and b_dec_nD (stacked.py) give those of its n B tokens, and y has no gradient."""
    if current_implementation() == "reference":
        error_BD = sparse_decode(codes, W_dec_FD) + b_dec_D - y_BD
        return error_BD, error_BD.square().sum(1)
    return _DecodeError.apply(codes.values, W_dec_FD, b_dec_D, y_BD, codes, None)


def decode_error_beside(
    codes: SparseCodes, beside: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, y_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_error`, and beside it the squared length [B] of the error of a second code with the same entries and the values `beside`,
    differentiable in these alone: decoder, b_dec and y are held constant for it. Rows are read once for both."""
    primitives = primitives_for(W_dec_FD)
    pair = None if current_implementation() == "reference" else getattr(primitives, "decode_error_pair", None)
    if pair is None or codes.crowded(getattr(primitives, "CROWDED", 1)):
        held = (W_dec_FD.detach(), b_dec_D.detach(), y_BD.detach())
        return *decode_error(codes, W_dec_FD, b_dec_D, y_BD), decode_error(codes.replaced(beside), *held)[1]
    with torch.no_grad():
        held_codes = codes.replaced(codes.values.detach())
        *found, squares_B, dots = pair(held_codes, beside.detach(), W_dec_FD, b_dec_D, y_BD)
    error_BD, own_B = _DecodeError.apply(codes.values, W_dec_FD, b_dec_D, y_BD, codes, found)
    return error_BD, own_B, _Squares.apply(beside, squares_B, dots, codes)


class _DecodeError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec_FD: Tensor,
        b_dec_D: Tensor,
        y_BD: Tensor,
        codes: SparseCodes,
        found: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        codes = codes.replaced(values.detach())
        primitives = primitives_for(W_dec_FD)
        ctx.stack = stack_size(b_dec_D)
        if found is not None:
            error_BD, squares_B, dots = found
        elif ctx.stack is not None:
            error_BD, squares_B, dots = decode_errors(primitives, codes, W_dec_FD, b_dec_D, y_BD)
        elif hasattr(primitives, "decode_error"):
            error_BD, squares_B, dots = primitives.decode_error(codes, W_dec_FD, b_dec_D, y_BD)
        else:
            error_BD = primitives.decode(codes, W_dec_FD, b_dec_D).sub_(y_BD)
            squares_B, dots = error_BD.square().sum(1), None
        ctx.codes, ctx.parts = codes, collected_in(W_dec_FD)
        ctx.save_for_backward(W_dec_FD, error_BD, dots)
        ctx.set_materialize_grads(False)
        return error_BD, squares_B

    @staticmethod
    def backward(ctx: Any, grad_error_BD: Tensor | None, grad_squares_B: Tensor | None) -> tuple[Tensor | None, ...]:
        W_dec_FD, error_BD, dots = ctx.saved_tensors
        codes: SparseCodes = ctx.codes
        need_values, need_W, need_b, need_y = ctx.needs_input_grad[:4]
        if grad_error_BD is None and grad_squares_B is None:
            return (None,) * 6
        grad_values = grad_W = grad_b = grad_y = None
        if grad_error_BD is None and grad_squares_B is not None and dots is not None:
            twice_B = 2 * grad_squares_B
            twice = _by_entry(twice_B, codes)
            if need_values:
                grad_values = dots * twice
            if need_W:
                grad_W = hand_over(ctx.parts, codes.replaced(codes.values * twice), error_BD)
            if need_b:
                grad_b = weighted_sum(twice_B, error_BD, ctx.stack)
            if need_y:
                grad_y = -twice_B[:, None] * error_BD
            return grad_values, grad_W, grad_b, grad_y, None, None
        grad_BD = torch.zeros_like(error_BD) if grad_error_BD is None else grad_error_BD
        if grad_squares_B is not None:
            grad_BD = torch.addcmul(grad_BD, grad_squares_B[:, None], error_BD, value=2)
        grad_BD = grad_BD.contiguous()
        if need_values:
            grad_values = primitives_for(W_dec_FD).dots(codes, grad_BD, W_dec_FD)
        if need_W:
            grad_W = hand_over(ctx.parts, codes, grad_BD)
        if need_b:
            grad_b = grad_BD.sum(0) if ctx.stack is None else grad_BD.view(ctx.stack, -1, grad_BD.shape[1]).sum(1)
        if need_y:
            grad_y = -grad_BD
        return grad_values, grad_W, grad_b, grad_y, None, None


class _Squares(torch.autograd.Function):
    """Squared lengths that are known, as a function of the values of a code."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, squares_B: Tensor, dots: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes.detach()
        ctx.save_for_backward(dots)
        return squares_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        (dots,) = ctx.saved_tensors
        return dots * _by_entry(2 * grad_B, ctx.codes), None, None, None


def _by_entry(numbers_B: Tensor, codes: SparseCodes) -> Tensor:
    """A number of each token at its entries."""
    return numbers_B[:, None] if codes.offsets is None else numbers_B.index_select(0, codes.tokens)
