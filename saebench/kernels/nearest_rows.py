"""The nearest others of every row of a matrix by product, for neighbours among latents.

The compiled kernel (cpu/nearest.cpp) screens each pair once, for both of its rows; elsewhere every row is compared with all by
`encode_topk`, with the same result.

Shape suffixes: `F` rows, `D` width, `M` some of the rows, `K` listed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.kernels import cpu
from saebench.kernels.arrays import compiled
from saebench.kernels.encode_topk import encode_topk

AT_ONCE = 8192
FEW = 2048  # rows that are compared with all as fast


def nearest_rows(rows_FD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each row the `count` others with the largest positive products, largest first, ties to the lowest: numbers [F, K] int64, -1 where
    there are fewer, and products, 0 there. K is `count`, or the number of rows where that is less."""
    num = len(rows_FD)
    kept = min(count + 1, num)  # each row is near to itself
    if num > FEW and rows_FD.device.type == "cpu" and compiled() is cpu:
        indices_FK, values_FK, again_M = cpu.nearest(rows_FD, kept)
        indices_FK[again_M], values_FK[again_M] = _compared(rows_FD, again_M, kept)
    else:
        indices_FK, values_FK = _compared(rows_FD, torch.arange(num, device=rows_FD.device), kept)
    left_out_FK = (indices_FK == torch.arange(num, device=rows_FD.device)[:, None]) | (values_FK <= 0)
    values_FK = values_FK.masked_fill(left_out_FK, 0)
    order_FK = values_FK.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return indices_FK.masked_fill(left_out_FK, -1).gather(1, order_FK), values_FK.gather(1, order_FK)


def _compared(rows_FD: Tensor, rows_M: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Some rows with all: the largest, largest first."""
    zeros_F = rows_FD.new_zeros(len(rows_FD))
    parts = [encode_topk(rows_FD[part_M], rows_FD, zeros_F, None, kept) for part_M in rows_M.split(AT_ONCE)]
    indices_MK, values_MK = torch.cat([part.indices for part in parts]).long(), torch.cat([part.values for part in parts])
    by_index_MK = indices_MK.sort(dim=1).indices
    order_MK = by_index_MK.gather(1, values_MK.gather(1, by_index_MK).sort(dim=1, descending=True, stable=True).indices)
    return indices_MK.gather(1, order_MK), values_MK.gather(1, order_MK)
