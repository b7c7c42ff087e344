"""Vectors and their lengths: what initialisation and the unit-decoder rule are made of (methods.md 0.5, 0.6)."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 512  # of a large matrix, so that what lies between two operations stays in the cache


def random_unit_rows(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Uniform directions: [rows, width]."""
    draw = torch.randn(rows, width, generator=generator)
    draw /= draw.norm(dim=1, keepdim=True)
    return draw


def active_subspace(x_BD: Tensor, share: float) -> Tensor:
    """The leading principal directions of a sample that hold this share of its variance, orthonormal rows: [R, D] (methods.md T15)."""
    centred_BD = (x_BD - x_BD.mean(0)).double()
    squares_D, vectors_DD = torch.linalg.eigh(centred_BD.T @ centred_BD)
    held_D = squares_D.flip(0).clamp_min(0).cumsum(0)
    count = int((held_D < share * held_D[-1] * (1 - 1e-12)).sum()) + 1
    return vectors_DD.flip(1)[:, :count].T.to(x_BD.dtype)


def random_directions(rows: int, sample_BD: Tensor, generator: torch.Generator, share: float | None = None) -> Tensor:
    """Random unit rows as wide as the sample, with `share` inside its active subspace of that share of the variance: [rows, D]."""
    width = sample_BD.shape[1]
    if share is None:
        return random_unit_rows(rows, width, generator)
    basis_RD = active_subspace(sample_BD, share)
    return random_unit_rows(rows, len(basis_RD), generator) @ basis_RD


def linear_map(x_BD: Tensor, y_BD: Tensor, ridge: float = 1e-3) -> Tensor:
    """The linear map that predicts y - mean(y) from x - mean(x) with the least squared error, a little ridge apart: [D_in, D_out]."""
    x, y = (x_BD - x_BD.mean(0)).double(), (y_BD - y_BD.mean(0)).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-30)
    return torch.linalg.solve(gram, x.T @ y).to(x_BD.dtype)


def geometric_median(x_BD: Tensor, max_iterations: int = 100, tolerance: float = 1e-5, eps: float = 1e-6) -> Tensor:
    """The point with the least summed distance to all rows (Weiszfeld's iteration from the mean): [D]."""
    y_D = x_BD.mean(0)
    for _ in range(max_iterations):
        weights_B = 1 / (x_BD - y_D).norm(dim=1).clamp_min(eps)
        new_D = weights_B @ x_BD / weights_B.sum()
        moved = (new_D - y_D).norm()
        y_D = new_D
        if moved < tolerance:
            break
    return y_D


def scale_to_unit(rows_FD: Tensor) -> None:
    """Give every row unit length, in place; a zero row stays zero."""
    for rows in rows_FD.split(ROWS_AT_ONCE):
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(1e-12)
