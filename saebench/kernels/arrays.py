"""What the kernels on numpy arrays in memory share: whether compiled code serves them, and arrays as it takes them."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from saebench.kernels import cpu
from saebench.kernels.implementations import current_implementation, primitives_for, use_implementation


def compiled() -> ModuleType | None:
    """The compiled kernels, or None where there is no compiler, or `reference` or `stock` is ordered."""
    wanted = current_implementation()
    if wanted in ("reference", "stock"):
        return None
    with use_implementation("auto" if wanted == "triton" else wanted):  # that order is about what is on a GPU
        return cpu if primitives_for(torch.empty(0)) is cpu else None


def ready(name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    """The array, aligned and without gaps. Raises ValueError for another type."""
    if array.dtype != dtype:
        raise ValueError(f"{name} is {array.dtype}: it must be {np.dtype(dtype)}")
    return np.require(array, requirements=["C", "A"])
