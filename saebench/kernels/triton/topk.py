"""Encode and keep the k largest pre-activations of every row, exactly (methods.md K4, K11).

Cut the latents into groups of about sqrt(F / k) neighbours. The k groups with the largest maxima (of equal ones the first) hold the k
largest scores with ties to the lowest index: a score in another group has k groups before it, each with a score that beats it. So a row
is selected from F / group maxima and k * group scores, never from all F, without an overflow case. Candidate lists kept by each tile of
the product would save writing the scores, but finding them costs more than the write once k' > 2: about k' passes over the registers.

Selection itself is a bisection on the bits of the scores, as integers in the same order: one program per row, some twenty counts over
registers, any k. Padding from ReLU keeps the index it had.
Shape suffixes: `B` tokens, `C` tokens of a block, `D` width, `F` d_sae, `K` selected, `M` latents in question.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.kernels.triton.device import on_its_device
from saebench.kernels.triton.products import Block, score_blocks

GROUPS = (16, 32, 64, 128)
SELECT_BLOCK = 8192
"""As many candidates are held in registers; more are read again from memory at every count."""


@on_its_device
def topk(
    x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int, latents_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k largest of z = (x W^T + b) * scale in each row, of equal ones by lowest index, only among `latents_M` (ascending, int32 or
    int64) where given: indices int32 and ReLU(z) float32, [B, K] each, K = min(k, F or M), ascending in index. NaN counts as the largest
    and stays NaN in the values; a row that is all NaN has the lowest indices. x is rounded to the type of W. Nothing waits for
    the device."""
    num = len(W_FD) if latents_M is None else len(latents_M)
    k = min(k, num)
    indices_BK = torch.empty(len(x_BD), k, dtype=torch.int32, device=x_BD.device)
    values_BK = torch.empty(len(x_BD), k, dtype=torch.float32, device=x_BD.device)
    if not indices_BK.numel():
        return indices_BK, values_BK
    group = group_size(num, k)
    for block in score_blocks(x_BD, W_FD, b_F, scale_F, latents_M, group):
        rows = slice(block.start, block.start + len(block.products_CM))
        select(block, b_F, scale_F, latents_M, group, indices_BK[rows], values_BK[rows])
    return indices_BK, values_BK


def group_size(num: int, k: int) -> int | None:
    """Latents that share a maximum, so that the fewest numbers are read: num / group + k * group; None where that saves nothing."""
    group = min(GROUPS, key=lambda size: num / size + k * size)
    return group if 2 * (num / group + k * group) < num else None


def select(
    block: Block,
    b_F: Tensor,
    scale_F: Tensor | None,
    latents_M: Tensor | None,
    group: int | None,
    indices_CK: Tensor,
    values_CK: Tensor,
) -> None:
    """Selects among the scores of a block of rows, by their maxima where there are groups."""
    k = indices_CK.shape[1]
    if group is None or block.maxima_CG is None:
        _launch(block.products_CM, b_F, scale_F, latents_M, None, block.products_CM.shape[1], 1, True, indices_CK, values_CK)
        return
    groups_CK = torch.empty_like(indices_CK)
    _launch(block.maxima_CG, b_F, None, None, None, block.maxima_CG.shape[1], 1, False, groups_CK, None)
    _launch(block.products_CM, b_F, scale_F, latents_M, groups_CK, k * group, group, True, indices_CK, values_CK)


def _launch(
    source: Tensor,
    b_F: Tensor,
    scale_F: Tensor | None,
    latents_M: Tensor | None,
    groups_CK: Tensor | None,
    candidates: int,
    group: int,
    affine: bool,
    indices_CK: Tensor,
    values_CK: Tensor | None,
) -> None:
    rows, k = indices_CK.shape
    block = min(SELECT_BLOCK, max(128, triton.next_power_of_2(candidates)))
    _select[(rows,)](
        source,
        b_F,
        scale_F,
        latents_M,
        groups_CK,
        indices_CK,
        values_CK,
        source.shape[1],
        candidates,
        k,
        AFFINE=affine,
        HAS_SCALE=scale_F is not None,
        HAS_LATENTS=latents_M is not None,
        GATHER=groups_CK is not None,
        GROUP=group,
        VALUES=values_CK is not None,
        ONE=candidates <= block,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )


@triton.jit
def ordered(z):
    """float32 as int32 in the same order; both zeros are one number, NaN is above everything."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(z != z, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _candidates(
    source,
    b,
    scale,
    latents,
    groups,
    position,
    width,
    count,
    AFFINE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    GATHER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Key, value and latent of the candidates at some positions of a row; in the order of latents, as groups are ascending."""
    column = position
    inside = position < count
    if GATHER:
        column = tl.load(groups + position // GROUP, mask=inside, other=0) * GROUP + position % GROUP
        inside = inside & (column < width)
    z = tl.load(source + column, mask=inside, other=0.0)
    latent = column
    if HAS_LATENTS:
        latent = tl.load(latents + column, mask=inside, other=0).to(tl.int32)
    if AFFINE:
        z += tl.load(b + latent, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            z *= tl.load(scale + latent, mask=inside, other=0.0).to(tl.float32)
    # no number has the lowest key: that of -inf is above it
    return tl.where(inside, ordered(z), -0x80000000), z, latent


@triton.jit
def _select(
    source,
    b,
    scale,
    latents,
    groups,
    indices,
    values,
    width,
    count,
    k,
    AFFINE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    GATHER: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source += row * width
    if GATHER:
        groups += row * k
    at = tl.arange(0, BLOCK)
    key, z, latent = _candidates(
        source, b, scale, latents, groups, at, width, count, AFFINE, HAS_SCALE, HAS_LATENTS, GATHER, GROUP
    )
    high = tl.max(key, 0)
    low = tl.min(tl.where(key == -0x80000000, 0x7FFFFFFF, key), 0)
    if not ONE:
        for start in range(BLOCK, count, BLOCK):
            key, z, latent = _candidates(
                source, b, scale, latents, groups, start + at, width, count, AFFINE, HAS_SCALE, HAS_LATENTS, GATHER, GROUP
            )
            high = tl.maximum(high, tl.max(key, 0))
            low = tl.minimum(low, tl.min(tl.where(key == -0x80000000, 0x7FFFFFFF, key), 0))

    # the largest border that at least k keys reach; int64, as the difference of two keys needs 33 bits
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        border = low + (high - low + 1) // 2
        if ONE:
            reached = tl.sum((key >= border.to(tl.int32)).to(tl.int32), 0)
        else:
            reached = tl.zeros((), tl.int32)
            for start in range(0, count, BLOCK):
                key, z, latent = _candidates(
                    source, b, scale, latents, groups, start + at, width, count, AFFINE, HAS_SCALE, HAS_LATENTS, GATHER, GROUP
                )
                reached += tl.sum((key >= border.to(tl.int32)).to(tl.int32), 0)
        high = tl.where(reached > k, high, tl.where(reached == k, border, border - 1))
        low = tl.where(reached >= k, border, low)
    border = low.to(tl.int32)

    above = tl.zeros((), tl.int32)
    for start in range(0, count, BLOCK):
        if not ONE:
            key, z, latent = _candidates(
                source, b, scale, latents, groups, start + at, width, count, AFFINE, HAS_SCALE, HAS_LATENTS, GATHER, GROUP
            )
        above += tl.sum((key > border).to(tl.int32), 0)

    ties = k - above  # of the keys at the border the first so many
    written = tl.zeros((), tl.int32)
    for start in range(0, count, BLOCK):
        if not ONE:
            key, z, latent = _candidates(
                source, b, scale, latents, groups, start + at, width, count, AFFINE, HAS_SCALE, HAS_LATENTS, GATHER, GROUP
            )
        tied = key == border
        chosen = (key > border) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= ties))
        slot = row * k + written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices + slot, latent, mask=chosen)
        if VALUES:
            tl.store(values + slot, tl.where(z < 0, 0.0, z), mask=chosen)
        ties -= tl.sum(tied.to(tl.int32), 0)
        written += tl.sum(chosen.to(tl.int32), 0)
