"""Group lasso on a decoder (methods.md T22, experimental): a penalty on the length of every block of latents x columns, by which
whole blocks become exactly zero, so that a group of latents writes to few places.

The penalty is not differentiated: after the optimiser's step each block is shrunk by the proximal step of the penalty, by the learning
rate times the weight. Adam moves every coordinate by about the learning rate, so the weight counts in coordinates that pull together:
on noise alone a block of four numbers starts to vanish near 0.5, a longer one near 1.
Shape suffixes: `F` d_sae, `D` width of what is written, `G` groups of latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def column_blocks(widths: Sequence[int], columns: int | None) -> list[int]:
    """Widths of the blocks of columns: those of the sites, or each site's cut into blocks of `columns` (the last may be narrower)."""
    if columns is None:
        return list(widths)
    return [min(columns, width - start) for width in widths for start in range(0, width, columns)]


@torch.no_grad()
def shrink_blocks(W_dec_FD: Tensor, amount: float, latents: int, widths: Sequence[int]) -> None:
    """W <- W max(0, 1 - amount / ||W||) for every block of `latents` neighbouring rows and of columns of these widths, in place."""
    for block_FD in W_dec_FD.split(list(widths), dim=1):
        squares_G = block_FD.square().sum(1).view(-1, latents).sum(1)
        kept_G = (1 - amount / squares_G.sqrt().clamp_min(1e-30)).clamp_min(0)
        block_FD *= kept_G.repeat_interleave(latents)[:, None]


def block_lengths(W_dec_FD: Tensor, latents: int, widths: Sequence[int]) -> Tensor:
    """The length of every block: [G, blocks of columns]. Their sum is what the penalty weighs."""
    squares = torch.stack([block.square().sum(1) for block in W_dec_FD.split(list(widths), dim=1)], 1)
    return squares.view(-1, latents, squares.shape[1]).sum(1).sqrt()
