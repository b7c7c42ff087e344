"""Keep decoder rows apart (OrtSAE; methods.md T8): a penalty on the squared cosine of each row with the one most like it, within random
chunks of latents that are drawn anew at every step, so that the cost is linear in the number of latents.

The largest cosine is looked up without gradient, block by block; only the pairs found are differentiated, so no chunk x chunk matrix
is kept. The penalty lies between 0 and 1 and is added to the loss in the units of AuxK, those of the share of variance missed.
Shape suffixes: `F` d_sae, `D` width, `C` latents of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels import sparse_decode

CPU_BLOCK, BLOCK = 512, 8192  # rows and columns of the cosines that exist at once: in the cache, or one piece
SHORTEST = 1e-8


def orthogonality_penalty(W_dec_FD: Tensor, chunk: int, generator: torch.Generator) -> Tensor:
    """The mean over random chunks of at most `chunk` latents of mean_i max_{j != i} cos(d_i, d_j)^2 (the largest signed cosine, then
    squared). Differentiable through the one nearest row of every row. 0 for a single latent."""
    d_sae = len(W_dec_FD)
    unit_FD = W_dec_FD / torch.linalg.vector_norm(W_dec_FD, dim=1, keepdim=True).clamp_min(SHORTEST)
    with torch.no_grad():
        chunks = torch.randperm(d_sae, generator=generator).to(W_dec_FD.device).tensor_split(-(-d_sae // chunk))
        nearest_F = torch.empty(d_sae, dtype=torch.int64, device=W_dec_FD.device)
        weights_F = W_dec_FD.new_zeros(d_sae)
        for latents_C in chunks:
            if len(latents_C) > 1:
                nearest_F[latents_C] = latents_C[nearest_rows(unit_FD[latents_C])]
                weights_F[latents_C] = 1 / (len(chunks) * len(latents_C))
            else:
                nearest_F[latents_C] = latents_C  # alone in its chunk: counts for nothing
    pairs = SparseCodes(nearest_F[:, None], torch.ones_like(weights_F)[:, None], d_sae)
    cosine_F = (unit_FD * sparse_decode(pairs, unit_FD)).sum(1)  # the kernel's gradient sums rows in a fixed order
    return weights_F @ cosine_F.square()


def nearest_rows(unit_CD: Tensor) -> Tensor:
    """For every row the other one with the largest dot product: [C]. Each pair of blocks is multiplied once, for both."""
    best_C = unit_CD.new_full((len(unit_CD),), -torch.inf)
    nearest_C = torch.zeros(len(unit_CD), dtype=torch.int64, device=unit_CD.device)
    block = CPU_BLOCK if unit_CD.device.type == "cpu" else BLOCK

    def take(first: int, dots: Tensor, offset: int) -> None:
        """Rows from `first` on were multiplied with those from `offset` on. Where the largest product lies is asked only of rows that it
        improves, ever fewer: finding a place is much slower than finding a maximum."""
        largest = dots.amax(1)
        better = (largest > best_C[first : first + len(dots)]).nonzero()[:, 0]
        best_C[first + better] = largest[better]
        nearest_C[first + better] = dots[better].argmax(1) + offset

    for first in range(0, len(unit_CD), block):
        for second in range(first, len(unit_CD), block):
            dots = unit_CD[first : first + block] @ unit_CD[second : second + block].T
            if first == second:
                dots.fill_diagonal_(-torch.inf)  # not 0: where all others are negative, the row itself would win
            else:
                take(second, dots.T, first)
            take(first, dots, second)
    return nearest_C
