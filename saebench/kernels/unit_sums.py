"""How often latents fire in the units of a corpus, such as documents: the sums that comparisons of two sets of units need, without the
table of latents by units.

With x_u the firings of a latent in unit u and n_u the size of the unit: sum x_u, sum x_u^2, sum x_u n_u, and how many x_u are above 0, each
over the units of set a and over those of set b.

The compiled kernel (cpu/units.cpp) goes through the postings once, with memory for one count a unit and thread; `reference_unit_sums`, in
numpy, gives the same bits: all sums are of whole numbers.
Shape suffixes: `F` latents of the range, `N` postings, `T` tokens, `U` units.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from saebench.kernels import cpu
from saebench.kernels.arrays import compiled, ready


def unit_sums(
    starts_F1: np.ndarray, tokens_N: np.ndarray, units_T: np.ndarray, in_a_U: np.ndarray, sizes_U: np.ndarray
) -> np.ndarray:
    """The sums [4, 2, F] float64: of x, x^2, x n and firing units, over set a and over set b. Postings as in posting_statistics.py, from 0
    on; `units_T` (int32) is the unit of every token, -1 for tokens that do not count; `in_a_U` (bool) says which units are of set a, all
    others are of b; `sizes_U` are their sizes, whole numbers."""
    arrays = (
        ready("starts_F1", starts_F1, np.int64),
        ready("tokens_N", tokens_N, np.int32),
        ready("units_T", units_T, np.int32),
        ready("in_a_U", in_a_U, np.bool_),
        sizes_U.astype(np.float64),
    )
    if not compiled():
        return reference_unit_sums(*arrays)
    starts_F1, tokens_N, units_T, in_a_U, sizes_U = arrays
    sums = np.empty((4, 2, len(starts_F1) - 1))
    address = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
    cpu.library().saebench_unit_sums(
        *map(address, (starts_F1, tokens_N)),
        ctypes.c_int64(len(starts_F1) - 1),
        *map(address, (units_T, in_a_U, sizes_U)),
        ctypes.c_int64(len(sizes_U)),
        torch.get_num_threads(),
        address(sums),
    )
    return sums


def reference_unit_sums(
    starts_F1: np.ndarray, tokens_N: np.ndarray, units_T: np.ndarray, in_a_U: np.ndarray, sizes_U: np.ndarray
) -> np.ndarray:
    num, units = len(starts_F1) - 1, len(sizes_U)
    latents_N, units_N = np.repeat(np.arange(num), np.diff(starts_F1)), units_T[tokens_N]
    counted_N = units_N >= 0
    keys, firings = np.unique(latents_N[counted_N] * units + units_N[counted_N], return_counts=True)
    latents, unit = np.divmod(keys, max(1, units))
    x = firings.astype(np.float64)
    slots = latents + num * ~in_a_U[unit]
    sums = [np.bincount(slots, weights, 2 * num) for weights in (x, x**2, x * sizes_U[unit], np.ones(len(x)))]
    return np.stack(sums).reshape(4, 2, num)
