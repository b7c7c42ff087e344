"""Kernels start on the device that holds their tensors, whichever is current."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from saebench.codes import SparseCodes

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose first argument, a tensor or codes, says on which device its kernels start."""

    @wraps(function)
    def started(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else next(iter(kwargs.values()))
        with torch.cuda.device_of(first.values if isinstance(first, SparseCodes) else first):
            return function(*args, **kwargs)

    return started
