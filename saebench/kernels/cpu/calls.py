"""The compiled library, and how tensors and arrays are given to it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
from torch import Tensor

from saebench.kernels.cpu.build import load


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises BuildError."""
    found = load()
    found.saebench_topk.restype = ctypes.c_int64
    found.saebench_nearest.restype = ctypes.c_int64
    found.saebench_above.restype = ctypes.c_void_p
    for name in ("saebench_latents", "saebench_gradient_bound"):
        getattr(found, name).restype = ctypes.c_double
    return found


def at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def addresses(arrays: Sequence[np.ndarray]) -> ctypes.Array:
    return (ctypes.c_void_p * max(1, len(arrays)))(*[array.ctypes.data for array in arrays])
