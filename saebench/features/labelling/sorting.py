"""Sorting by whole numbers in linear time, and sums over the runs that it makes.

Shape suffixes: `P` places, `N` runs.
"""

from __future__ import annotations

import numpy as np


def order_by(group_P: np.ndarray, number_P: np.ndarray) -> np.ndarray:
    """The order of places by group, then by number, both not negative: sorted by 16 bits at a time, which numpy does in linear time."""
    order_P = np.argsort((number_P & 0xFFFF).astype(np.uint16), kind="stable")
    for key_P in (number_P >> 16, group_P & 0xFFFF, group_P >> 16):
        if key_P.any():
            order_P = order_P[np.argsort(key_P[order_P].astype(np.uint16), kind="stable")]
    return order_P


def changes(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it; the first does."""
    return np.concatenate([np.ones(min(1, len(values)), dtype=bool), values[1:] != values[:-1]])


def sums(amounts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of the parts of an array that begin at `starts`, the first of which is 0."""
    return np.add.reduceat(amounts, starts, axis=0) if len(starts) else amounts[:0]
