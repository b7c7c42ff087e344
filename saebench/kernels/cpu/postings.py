"""Statistics of postings, compiled (posting_statistics.py has the contract; postings.cpp the work)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from saebench.kernels.cpu.calls import address, addresses, library


def moments(
    starts_F1: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray, context_size: int, bins: int, position_bins: int
) -> tuple[np.ndarray, ...]:
    num = len(starts_F1) - 1
    found: tuple[np.ndarray, ...] = (
        np.zeros((4, num)),
        *(np.zeros(num, np.float32) for _ in range(2)),
        *(np.zeros(shape, np.int64) for shape in (num, (num, bins), (num, position_bins))),
    )
    library().saebench_moments(
        *map(address, (starts_F1, tokens_N, values_N)),
        *map(ctypes.c_int64, (num, context_size, bins, position_bins)),
        torch.get_num_threads(),
        *map(address, found),
    )
    return *found[0], *found[1:]


def top_tokens(
    starts_F1: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray, ids_T: np.ndarray, vocabulary: int, count: int
) -> tuple[np.ndarray, ...]:
    """Raises ValueError where an id is outside the vocabulary."""
    num = len(starts_F1) - 1
    found = (*_ranked(num, count), np.zeros(num, np.int64))
    valid = library().saebench_top_tokens(
        *map(address, (starts_F1, tokens_N, values_N, ids_T)),
        *map(ctypes.c_int64, (num, vocabulary, count)),
        torch.get_num_threads(),
        *map(address, found),
    )
    if not valid:
        raise ValueError(f"ids_T holds ids outside a vocabulary of {vocabulary}")
    return found


def coactivation(
    starts_F1: np.ndarray,
    tokens_N: np.ndarray,
    codes: Sequence[tuple[int, np.ndarray, np.ndarray]],
    counts_G: np.ndarray,
    spreads_G: np.ndarray,
    num_tokens: int,
    first_latent: int,
    count: int,
) -> tuple[np.ndarray, ...]:
    """`codes`: of each chunk its first token, starts and latents."""
    num = len(starts_F1) - 1
    found = _ranked(num, count)
    firsts = np.array([first for first, _, _ in codes], np.int64)
    sizes = np.array([len(starts) - 1 for _, starts, _ in codes], np.int64)
    library().saebench_coactivation(
        *map(address, (starts_F1, tokens_N)),
        *map(ctypes.c_int64, (num, len(codes))),
        *map(address, (firsts, sizes)),
        addresses([starts for _, starts, _ in codes]),
        addresses([latents for _, _, latents in codes]),
        *map(address, (counts_G, spreads_G)),
        *map(ctypes.c_int64, (len(counts_G), num_tokens, first_latent, count)),
        torch.get_num_threads(),
        *map(address, found),
    )
    return found


def merge_runs(
    runs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], first_latent: int, starts_F1: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`runs`: of each its starts, tokens and values; `starts_F1` are those of the result."""
    found = np.empty(starts_F1[-1], np.int32), np.empty(starts_F1[-1], np.float16)
    library().saebench_merge_runs(
        ctypes.c_int64(len(runs)),
        *(addresses([run[part] for run in runs]) for part in range(3)),
        *map(ctypes.c_int64, (first_latent, len(starts_F1) - 1)),
        address(starts_F1),
        torch.get_num_threads(),
        *map(address, found),
    )
    return found


def _ranked(num: int, count: int) -> tuple[np.ndarray, ...]:
    """Room for the best of each latent, [num, count] each: what it is (-1: nothing), how often, and a sum."""
    return np.full((num, count), -1, np.int32), np.zeros((num, count), np.int64), np.zeros((num, count))
