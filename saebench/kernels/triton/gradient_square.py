"""The squared length of a gradient that is not stored, for clipping.

Shape suffixes: `D` width, `F` d_sae, `M` some latents.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.kernels.primitives import Gradient
from saebench.kernels.triton.device import on_its_device
from saebench.kernels.triton.latents import gradient_arguments, row_gradient, without_component
from saebench.kernels.triton.wide import MAX_WIDTH, gradient_blocks, row_shape


@on_its_device
def gradient_square(W_FD: Tensor, gradient: Gradient, unit: bool) -> Tensor:
    """The sum of squares of a gradient, 0-dim float32; with `unit`, of what is left of it when each row's component along W's row
    is removed."""
    num, width = W_FD.shape
    squares_F = torch.zeros(num, dtype=torch.float32, device=W_FD.device)
    if width > MAX_WIDTH:
        for rows, g_MD in gradient_blocks(W_FD, gradient, unit):
            torch.sum(g_MD.square(), 1, out=squares_F[rows])
    elif squares_F.numel():
        _square[(num,)](
            W_FD,
            squares_F,
            width,
            **gradient_arguments(gradient),
            READS_W=unit or gradient.own_F is not None,
            UNIT=unit,
            ENTRIES=4,
            **row_shape(width),
        )
    return squares_F.sum()


@triton.jit
def _square(
    W,
    squares,
    D,
    tokens,
    positions,
    starts,
    values,
    rows,
    befores,
    parts,
    dense,
    own,
    READS_W: tl.constexpr,
    UNIT: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PART_SIZE: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    w = tl.zeros((BLOCK,), tl.float32)
    if READS_W:
        w = tl.load(W + latent * D + d, mask=inside, other=0.0).to(tl.float32)
    g = row_gradient(
        latent,
        w,
        tokens,
        positions,
        starts,
        values,
        rows,
        befores,
        parts,
        dense,
        own,
        d,
        inside,
        D,
        IN_PARTS,
        PART_SIZE,
        HAS_DENSE,
        HAS_OWN,
        ENTRIES,
        BLOCK,
    )
    if UNIT:
        g = without_component(g, w)
    tl.store(squares + latent, tl.sum(g * g, 0))
