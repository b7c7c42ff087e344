"""Which implementation of the kernels runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

IMPLEMENTATIONS = ("torch", "reference")
_current = "torch"


def current_implementation() -> str:
    """The name of the implementation in use."""
    return _current


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Run the kernels by another implementation inside the block. Raises ValueError for an unknown one."""
    global _current
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown kernel implementation {name!r}: use one of {', '.join(IMPLEMENTATIONS)}")
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before
