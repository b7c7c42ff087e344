"""Rows too wide for the registers of one program: their gradient is made a few latents at a time, and the rest is torch's.

Shape suffixes: `D` width, `F` d_sae, `M` some latents.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from saebench.kernels.primitives import Gradient
from saebench.kernels.triton.sums import add_term

MAX_WIDTH = 16384
BLOCK_BYTES = 256 << 20


def row_shape(width: int) -> dict[str, int]:
    """A row in the registers of a program: sixteen numbers a thread where that can be, of each of gradient, weight and moments."""
    block = triton.next_power_of_2(max(width, 32))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def gradient_blocks(W_FD: Tensor, gradient: Gradient, unit: bool) -> Iterator[tuple[slice, Tensor]]:
    """The gradient of some rows after the other, float32, with `unit` without its component along the row. Memory is used again."""
    num, width = W_FD.shape
    at_once = min(num, max(1, BLOCK_BYTES // (4 * width)))
    out_MD = torch.empty(at_once, width, dtype=torch.float32, device=W_FD.device)
    for start in range(0, num, at_once):
        rows = slice(start, min(start + at_once, num))
        g_MD = out_MD[: rows.stop - rows.start]
        g_MD.zero_()
        for term in gradient.terms:
            add_term(term, g_MD, start, add=True)
        if gradient.dense_FD is not None:
            g_MD += gradient.dense_FD[rows]
        w_MD = W_FD[rows].float()
        if gradient.own_F is not None:
            g_MD.addcmul_(gradient.own_F[rows, None].float(), w_MD)
        if unit:
            along_M = (g_MD * w_MD).sum(1, keepdim=True) / w_MD.square().sum(1, keepdim=True).clamp_min_(1e-24)
            g_MD.addcmul_(along_M, w_MD, value=-1)
        yield rows, g_MD
