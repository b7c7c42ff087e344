"""Decode sparse codes: a weighted sum of latent rows per token (methods.md K1).

One program per token and piece of the width. It holds a small matrix of running sums, entries by width, so that the rows of several entries
are on their way at once, and adds it up at the end, always in the same order.
Shape suffixes: `B` tokens, `D` width, `F` d_sae.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.triton.device import on_its_device

ENTRIES = 8


@on_its_device
def decode(codes: SparseCodes, W_FD: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """sum over the entries of each token of value * W[index], plus bias: [B, D] float32, whatever the type of W. Entries of value 0 are
    not read."""
    width = W_FD.shape[1]
    out_BD = torch.empty(len(codes), width, dtype=torch.float32, device=W_FD.device)
    block = min(1024, triton.next_power_of_2(max(width, 16)))
    if out_BD.numel():
        _decode[(len(codes), triton.cdiv(width, block))](
            codes.indices,
            codes.values,
            codes.offsets,
            W_FD,
            bias_D,
            out_BD,
            codes.indices.shape[-1],
            width,
            RAGGED=codes.offsets is not None,
            ENTRIES=ENTRIES,
            BLOCK=block,
            num_warps=4,
        )
    return out_BD


@triton.jit
def entry_range(token, offsets, K, RAGGED: tl.constexpr):
    """Where a token's entries begin, int64, and how many there are."""
    if RAGGED:
        begin = tl.load(offsets + token)
        return begin, (tl.load(offsets + token + 1) - begin).to(tl.int32)
    return token * K, K


@triton.jit
def _decode(indices, values, offsets, W, bias, out, K, D, RAGGED: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, ENTRIES)
    begin, count = entry_range(token, offsets, K, RAGGED)
    acc = tl.zeros((ENTRIES, BLOCK), tl.float32)
    for start in range(0, count, ENTRIES):
        here = start + entry < count
        at = begin + start + entry
        latent = tl.load(indices + at, mask=here, other=0).to(tl.int64)
        value = tl.load(values + at, mask=here, other=0.0).to(tl.float32)
        wanted = (value != 0)[:, None] & (d < D)[None, :]
        acc += value[:, None] * tl.load(W + latent[:, None] * D + d[None, :], mask=wanted, other=0.0).to(tl.float32)
    sums = tl.sum(acc, 0)
    if bias is not None:
        sums += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, sums, mask=d < D)
