"""Numbers of latents at the entries of a code, and numbers at entries summed by latent: each is the other's gradient.

What rules do with biases and thresholds, a number a latent, is done at entries. Summing by latent in the order that gradients of matrices
are summed in anyway takes a fraction of scattering with `index_add_`, on all threads, with the same bits for any number of them.
Shape suffixes: `F` d_sae.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import primitives_for


def at_entries(numbers_F: Tensor, codes: SparseCodes) -> Tensor:
    """A number of each latent at the code's entries, in the shape of its values, differentiable."""
    if torch.is_grad_enabled() and numbers_F.requires_grad:
        return _AtEntries.apply(numbers_F, codes.detach())
    return _gathered(numbers_F, codes)


def latent_totals(codes: SparseCodes) -> Tensor:
    """The sum of each latent's values [F], differentiable in the values."""
    if torch.is_grad_enabled() and codes.values.requires_grad:
        return _Totals.apply(codes.values, codes.detach())
    return _totals(codes)


def latent_firings(codes: SparseCodes) -> Tensor:
    """How many tokens each latent is active on: [F], whole numbers in the values' type. `SparseCodes.firings` where they are sorted by
    latent already."""
    return _totals(codes.replaced(codes.values.detach().sign().abs()))


class _AtEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers_F: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        return _gathered(numbers_F, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _totals(ctx.codes.replaced(grad)), None


class _Totals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        return _totals(codes.replaced(values))

    @staticmethod
    def backward(ctx: Any, grad_F: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad_F, ctx.codes), None


def _gathered(numbers_F: Tensor, codes: SparseCodes) -> Tensor:
    return numbers_F.index_select(0, codes.indices.reshape(-1)).reshape(codes.values.shape)


def _totals(codes: SparseCodes) -> Tensor:
    measure = getattr(primitives_for(codes.values), "totals", None)
    if measure is not None:
        return measure(codes)
    values_N = codes.values.reshape(-1)
    return values_N.new_zeros(codes.d_sae).index_add_(0, codes.indices.reshape(-1), values_N)
