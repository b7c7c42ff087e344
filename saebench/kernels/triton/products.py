"""Scores x . w of rows with latents, a block of rows at a time, and the largest of every few: what selecting encoders read.

Two ways to the same numbers (both in float32, which selection compares in):

- `library`: torch's matrix product with float32 output, then a pass over the scores for the maxima of groups of latents. cuBLAS reaches
  more of Hopper's matrix units than a Triton loop over plain loads does (expected: 750 against 600 TFLOP/s), and the pass costs 4 bytes
  a score, 1 ms of 13 at 8192 x 131072 x 4096; so this is the first choice for 16-bit weights, to be confirmed by benchmarks/gpu.sh.
- `fused`: one Triton kernel whose epilogue has the tile in registers, where maxima of groups cost a few shuffles. It also gathers the
  rows of W that it needs, so a part of the latents costs no copy, and multiplies float32 without rounding to tf32. It saves the pass,
  which counts where d_in is small.

Scores exist for so many rows at once as fit in SCORE_BYTES, so memory does not grow with tokens x latents.
Shape suffixes: `B` tokens, `C` tokens of a block, `D` width, `F` d_sae, `M` latents in question, `G` groups of latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SCORE_BYTES = 2 << 30
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
PRODUCT: str | None = None
"""`library`, `fused`, or None: library where it gives float32 scores without rounding, and all latents are asked for."""


@dataclass(frozen=True)
class Tiles:
    rows: int
    latents: int
    depth: int
    warps: int
    stages: int


# Hopper: the largest tile whose accumulator still fits the registers of two warpgroups (wgmma); fewer bytes from L2 per product. Cards
# before have less shared memory. float32: there is no exact matrix unit, so the tile is what plain multiply-adds can hold.
TILES_HOPPER = Tiles(128, 256, 64, warps=8, stages=3)
TILES_AMPERE = Tiles(128, 128, 32, warps=8, stages=3)
TILES_TURING = Tiles(64, 128, 32, warps=4, stages=2)
TILES_32 = Tiles(64, 128, 16, warps=8, stages=3)
MAXIMA_BLOCK = 4096
WITHOUT_CARD = 9
"""The generation of cards to choose tiles for where there is none: for the interpreter, and for compiling alone."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Block:
    """Products of some rows with all latents in question, before bias and scale, and maxima of groups of latents after both."""

    start: int
    products_CM: Tensor
    maxima_CG: Tensor | None


def score_blocks(
    x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, latents_M: Tensor | None, group: int | None
) -> Iterator[Block]:
    """Blocks of rows; the memory of one is used again by the next. `group` latents, a power of two up to 128, share a maximum (None: no
    maxima). Rows of x are rounded to the type of W, in which the product is taken."""
    x_BD = x_BD.to(W_FD.dtype).contiguous()
    num = len(W_FD) if latents_M is None else len(latents_M)
    at_once = max(1, min(len(x_BD), score_bytes(x_BD) // (4 * max(1, num))))
    products = torch.empty(at_once, num, dtype=torch.float32, device=x_BD.device)
    maxima = None if group is None else torch.empty(at_once, triton.cdiv(num, group), dtype=torch.float32, device=x_BD.device)
    library = PRODUCT == "library" if PRODUCT else latents_M is None and _library_is_exact(W_FD)
    if library and latents_M is not None:
        W_FD, b_F, scale_F = W_FD[latents_M], b_F[latents_M], None if scale_F is None else scale_F[latents_M]
        latents_M = None
    for start in range(0, len(x_BD), at_once):
        rows_CD = x_BD[start : start + at_once]
        block = Block(start, products[: len(rows_CD)], None if maxima is None else maxima[: len(rows_CD)])
        (_library if library else _fused)(rows_CD, W_FD, b_F, scale_F, latents_M, block, group)
        yield block


def score_bytes(x: Tensor) -> int:
    """Room for scores: not more than a sixteenth of the device's memory."""
    if not x.is_cuda:
        return SCORE_BYTES
    return min(SCORE_BYTES, torch.cuda.get_device_properties(x.device).total_memory // 16)


def tiles_for(W_FD: Tensor) -> Tiles:
    """The tiles in which products with W are taken on its device."""
    if W_FD.dtype not in SIXTEEN_BITS:
        return TILES_32
    cards = generation(W_FD)
    return TILES_HOPPER if cards >= 9 else TILES_AMPERE if cards == 8 else TILES_TURING


def generation(tensor: Tensor) -> int:
    """The generation of cards that a tensor is on: 9 is Hopper, 8 Ampere and Ada, 7 Turing."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else WITHOUT_CARD


def _library_is_exact(W_FD: Tensor) -> bool:
    if not W_FD.is_cuda:
        return False
    if W_FD.dtype in SIXTEEN_BITS:
        return True
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to say when precisions were set in its old and its new way
        return False


def _library(
    x_CD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, _: Tensor | None, block: Block, group: int | None
) -> None:
    if x_CD.dtype == torch.float32:
        torch.mm(x_CD, W_FD.T, out=block.products_CM)
    elif x_CD.is_cuda:
        torch.mm(x_CD, W_FD.T, out_dtype=torch.float32, out=block.products_CM)
    else:
        torch.mm(x_CD.float(), W_FD.float().T, out=block.products_CM)
    if group is None or block.maxima_CG is None:
        return
    num = block.products_CM.shape[1]
    _maxima[(len(x_CD), triton.cdiv(num, MAXIMA_BLOCK))](
        block.products_CM,
        b_F,
        scale_F,
        block.maxima_CG,
        num,
        block.maxima_CG.shape[1],
        HAS_SCALE=scale_F is not None,
        GROUP=group,
        BLOCK=MAXIMA_BLOCK,
        num_warps=4,
    )


def _fused(
    x_CD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, latents_M: Tensor | None, block: Block, group: int | None
) -> None:
    tiles = tiles_for(W_FD)
    rows, num = block.products_CM.shape
    width = x_CD.shape[1]
    _product[(triton.cdiv(rows, tiles.rows) * triton.cdiv(num, tiles.latents),)](
        x_CD,
        W_FD,
        b_F,
        scale_F,
        latents_M,
        block.products_CM,
        block.maxima_CG,
        rows,
        num,
        width,
        1 if block.maxima_CG is None else block.maxima_CG.shape[1],
        HAS_SCALE=scale_F is not None,
        HAS_LATENTS=latents_M is not None,
        GROUP=group or 0,
        EVEN=width % tiles.depth == 0,
        BLOCK_C=tiles.rows,
        BLOCK_M=tiles.latents,
        BLOCK_D=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit
def larger(a, b):
    """The larger of two, NaN if one is: plain maxima drop it, and a NaN must reach whoever looks at the selected values."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. The interpreter multiplies the bits of bfloat16 as if they were whole numbers, so it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_product(
    x, W, row, latent, rows, D, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """x[row] . W[latent] for BLOCK_C rows and BLOCK_M latents, in float32. Rows past the end count around, latents are valid."""
    d = tl.arange(0, BLOCK_D)
    x_at = x + (row % rows).to(tl.int64)[:, None] * D + d[None, :]
    W_at = W + latent.to(tl.int64)[None, :] * D + d[:, None]
    acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN:
            x_tile, W_tile = tl.load(x_at), tl.load(W_at)
        else:
            x_tile = tl.load(x_at, mask=(d < D - start)[None, :], other=0.0)
            W_tile = tl.load(W_at, mask=(d < D - start)[:, None], other=0.0)
        acc = dot(x_tile, W_tile, acc, "ieee")
        x_at += BLOCK_D
        W_at += BLOCK_D
    return acc


@triton.jit
def tile_order(tile, num_rows, num_latents, TOGETHER: tl.constexpr):
    """Which tile a program takes: TOGETHER blocks of rows go through the latents side by side, so that W is read from L2."""
    band = tile // (TOGETHER * num_latents)
    first = band * TOGETHER
    height = tl.minimum(num_rows - first, TOGETHER)
    inside = tile % (TOGETHER * num_latents)
    return first + inside % height, inside // height


@triton.jit
def _product(
    x,
    W,
    b,
    scale,
    latents,
    products,
    maxima,
    rows,
    M,
    D,
    num_groups,
    HAS_SCALE: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i, j = tile_order(tl.program_id(0), tl.cdiv(rows, BLOCK_C), tl.cdiv(M, BLOCK_M), 8)
    row = i * BLOCK_C + tl.arange(0, BLOCK_C)
    column = j * BLOCK_M + tl.arange(0, BLOCK_M)
    if HAS_LATENTS:
        latent = tl.load(latents + column % M)
    else:
        latent = column % M
    acc = tile_product(x, W, row, latent, rows, D, EVEN, BLOCK_C, BLOCK_M, BLOCK_D)
    inside = (row < rows)[:, None] & (column < M)[None, :]
    tl.store(products + row.to(tl.int64)[:, None] * M + column[None, :], acc, mask=inside)
    if GROUP > 0:
        z = acc + tl.load(b + latent).to(tl.float32)[None, :]
        if HAS_SCALE:
            z *= tl.load(scale + latent).to(tl.float32)[None, :]
        z = tl.where((column < M)[None, :], z, float("-inf"))
        most = tl.reduce(tl.reshape(z, (BLOCK_C, BLOCK_M // GROUP, GROUP)), 2, larger)
        group = j * (BLOCK_M // GROUP) + tl.arange(0, BLOCK_M // GROUP)
        here = (row < rows)[:, None] & (group < num_groups)[None, :]
        tl.store(maxima + row.to(tl.int64)[:, None] * num_groups + group[None, :], most, mask=here)


@triton.jit
def _maxima(products, b, scale, maxima, M, num_groups, HAS_SCALE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = j * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    z = tl.load(products + row * M + column, mask=inside, other=0.0) + tl.load(b + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        z *= tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z, float("-inf"))
    most = tl.reduce(tl.reshape(z, (BLOCK // GROUP, GROUP)), 1, larger)
    group = j * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(maxima + row * num_groups + group, most, mask=group < num_groups)
