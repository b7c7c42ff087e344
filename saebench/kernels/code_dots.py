"""Dot products between sparse codes, and the contrast of a batch of codes with itself (methods.md T21).

Codes of one side are made dense a block of tokens at a time; the other side stays sparse. The contrast needs the products of all
pairs of a batch, but holds no more of them at once than a block: the backward pass makes them again.
Shape suffixes: `A`, `B` tokens of either side, `K` entries of a token, `F` d_sae; `b` a block of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.implementations import current_implementation
from saebench.kernels.latent_gradient import latent_sums
from saebench.kernels.sparse_decode import sparse_decode


@torch.no_grad()
def code_dots(codes_A: SparseCodes, codes_B: SparseCodes) -> Tensor:
    """f_a . f_b for every pair of tokens: [A, B], without gradient."""
    if current_implementation() == "reference":
        return codes_A.to_dense() @ codes_B.to_dense().T
    out_AB = codes_A.values.new_empty(len(codes_A), len(codes_B))
    for start, dense_bF in codes_B.dense_blocks():
        out_AB[:, start : start + len(dense_bF)] = sparse_decode(codes_A, dense_bF.T.contiguous())
    return out_AB


def self_contrast(codes: SparseCodes, temperature: float) -> Tensor:
    """mean over tokens a of log sum_b exp(u_a . u_b / temperature) - u_a . u_a / temperature, where u are fixed-k codes divided by their
    length: the cross-entropy of finding a token again among its batch. Differentiable in the values."""
    assert codes.offsets is None
    u_BK = codes.values / (codes.values.norm(dim=1, keepdim=True) + 1e-8)
    own_B = u_BK.square().sum(1) / temperature
    if current_implementation() == "reference":
        dense_BF = codes.replaced(u_BK).to_dense()
        return (torch.logsumexp(dense_BF @ dense_BF.T / temperature, 1) - own_B).mean()
    return (_SelfLogSumExp.apply(u_BK, codes, temperature) - own_B).mean()


class _SelfLogSumExp(torch.autograd.Function):
    """log sum_b exp(u_a . u_b / temperature) of every token a: [B]."""

    @staticmethod
    def forward(ctx: Any, u_BK: Tensor, codes: SparseCodes, temperature: float) -> Tensor:
        codes = codes.replaced(u_BK.detach())
        sums_B = u_BK.new_empty(len(u_BK))
        for start, dense_bF in codes.dense_blocks():
            logits_Bb = sparse_decode(codes, dense_bF.T.contiguous()) / temperature
            sums_B[start : start + len(dense_bF)] = torch.logsumexp(logits_Bb, 0)
        ctx.codes, ctx.temperature = codes, temperature
        ctx.save_for_backward(sums_B)
        return sums_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor | None, ...]:
        (sums_B,) = ctx.saved_tensors
        codes: SparseCodes = ctx.codes
        grad_BK = torch.empty_like(codes.values)
        for start, dense_bF in codes.dense_blocks():
            rows = slice(start, start + len(dense_bF))
            logits_Bb = sparse_decode(codes, dense_bF.T.contiguous()) / ctx.temperature
            weights_Bb = (logits_Bb - sums_B[rows]).exp() * grad_B[rows]  # of b as the anchor
            weights_Bb += (logits_Bb - sums_B[:, None]).exp() * grad_B[:, None]  # of b among the others' candidates
            grad_Fb = latent_sums(codes, weights_Bb) / ctx.temperature
            grad_BK[rows] = grad_Fb.gather(0, codes.indices[rows].T).T
        return grad_BK, None, None
