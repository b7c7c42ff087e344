"""Dot products of token rows with the latent rows of their entries (methods.md K2).

A program takes one token and every other so many of its chunks of entries: the token's row stays in the cache while rows of latents pass.
Shape suffixes: `B` tokens, `D` width, `F` d_sae.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.triton.decode import entry_range
from saebench.kernels.triton.device import on_its_device

ENTRIES = 8
PROGRAMS = 4
"""Programs that share a token of ragged codes: how many entries it has is known on the device only."""


@on_its_device
def dots(codes: SparseCodes, rows_BD: Tensor, W_FD: Tensor) -> Tensor:
    """rows[b] . W[index] at every entry, float32, in the shape of the values. Padding of fixed-k codes is not read and gives 0; ragged
    codes have the dot product at entries of value 0 too, where thresholds take their gradient from."""
    width = W_FD.shape[1]
    out = torch.empty(codes.values.shape, dtype=torch.float32, device=W_FD.device)
    ragged = codes.offsets is not None
    programs = PROGRAMS if ragged else min(PROGRAMS, triton.cdiv(codes.indices.shape[1], ENTRIES))
    if out.numel():
        _dots[(len(codes), programs)](
            codes.indices,
            codes.values,
            codes.offsets,
            rows_BD,
            W_FD,
            out,
            codes.indices.shape[-1],
            width,
            RAGGED=ragged,
            PROGRAMS=programs,
            ENTRIES=ENTRIES,
            BLOCK=min(512, triton.next_power_of_2(max(width, 16))),
            num_warps=4,
        )
    return out


@triton.jit
def _dots(
    indices,
    values,
    offsets,
    rows,
    W,
    out,
    K,
    D,
    RAGGED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    begin, count = entry_range(token, offsets, K, RAGGED)
    for start in range(tl.program_id(1) * ENTRIES, count, PROGRAMS * ENTRIES):
        here = start + entry < count
        at = begin + start + entry
        latent = tl.load(indices + at, mask=here, other=0).to(tl.int64)
        wanted = here
        if not RAGGED:
            wanted = here & (tl.load(values + at, mask=here, other=0.0) != 0)
        acc = tl.zeros((ENTRIES, BLOCK), tl.float32)
        for first in range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            row = tl.load(rows + token * D + d, mask=d < D, other=0.0).to(tl.float32)
            mask = wanted[:, None] & (d < D)[None, :]
            acc += row[None, :] * tl.load(W + latent[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, tl.sum(acc, 1), mask=here)
