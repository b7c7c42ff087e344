"""Encode and keep the pre-activations above a threshold: ragged codes, in order, without atomics (methods.md K7).

Each block of scores is counted in pieces, the counts are summed up to where every piece's entries go, and pieces that have entries are read
again to write them. The number of entries decides how much memory the result needs, so the host waits once for each block of rows: once
in all where the scores fit in SCORE_BYTES.
Shape suffixes: `B` tokens, `C` tokens of a block, `D` width, `F` d_sae, `N` entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.kernels.triton.device import on_its_device
from saebench.kernels.triton.products import score_blocks

PIECE = 512


@on_its_device
def above(x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, threshold_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All z = (x W^T + b) * scale with z > threshold, strictly: offsets [B + 1] int64, indices [N] int32 ascending in each row, z [N]
    float32. NaN is above nothing."""
    num = len(W_FD)
    pieces = triton.cdiv(num, PIECE)
    ends = [torch.zeros(1, dtype=torch.int64, device=x_BD.device)]
    indices: list[Tensor] = []
    values: list[Tensor] = []
    total = 0
    for block in score_blocks(x_BD, W_FD, b_F, scale_F, None, None):
        rows = len(block.products_CM)
        counts = torch.empty(rows * pieces, dtype=torch.int32, device=x_BD.device)
        arguments = (block.products_CM, b_F, scale_F, threshold_F)
        shape = {"HAS_SCALE": scale_F is not None, "BLOCK": PIECE, "num_warps": 4}
        _count[(rows, pieces)](*arguments, counts, num, pieces, **shape)
        ends_P = counts.cumsum(0)
        found = int(ends_P[-1]) if len(ends_P) else 0
        indices.append(torch.empty(found, dtype=torch.int32, device=x_BD.device))
        values.append(torch.empty(found, dtype=torch.float32, device=x_BD.device))
        _write[(rows, pieces)](*arguments, counts, ends_P, indices[-1], values[-1], num, pieces, **shape)
        ends.append(ends_P.view(rows, pieces)[:, -1] + total)
        total += found
    if len(indices) == 1:
        return torch.cat(ends), indices[0], values[0]
    empty = torch.empty(0, dtype=torch.int32, device=x_BD.device)
    return torch.cat(ends), torch.cat([empty, *indices]), torch.cat([empty.float(), *values])


@triton.jit
def _active(products, b, scale, threshold, row, column, M, HAS_SCALE: tl.constexpr):
    inside = column < M
    z = tl.load(products + row * M + column, mask=inside, other=0.0) + tl.load(b + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        z *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    return z, inside & (z > tl.load(threshold + column, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _count(products, b, scale, threshold, counts, M, pieces, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    _, active = _active(products, b, scale, threshold, row, column, M, HAS_SCALE)
    tl.store(counts + row * pieces + piece, tl.sum(active.to(tl.int32), 0))


@triton.jit
def _write(products, b, scale, threshold, counts, ends, indices, values, M, pieces, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + row * pieces + piece)
    if count > 0:
        column = piece * BLOCK + tl.arange(0, BLOCK)
        z, active = _active(products, b, scale, threshold, row, column, M, HAS_SCALE)
        slot = tl.load(ends + row * pieces + piece) - count + tl.cumsum(active.to(tl.int32), 0) - 1
        tl.store(indices + slot, column, mask=active)
        tl.store(values + slot, z, mask=active)
