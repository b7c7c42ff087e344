"""Which implementation of the kernels serves a tensor.

`auto` takes the fastest that can: `triton` for CUDA tensors, `cpu` for float32 tensors in memory, `stock` for everything else. One of these
names, by `use_implementation` or in the environment variable SAEBENCH_KERNELS, is an order instead: where it cannot be followed, UserError
says why. `reference` replaces whole operations by dense algebra under autograd.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.kernels.primitives import Primitives

IMPLEMENTATIONS = ("auto", "stock", "cpu", "triton", "reference")
VARIABLE = "SAEBENCH_KERNELS"
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_inside: str | None = None  # of `use_implementation`


def current_implementation() -> str:
    """The name that is in force: `auto`, or an order."""
    name = _inside or os.environ.get(VARIABLE, "auto")
    if name not in IMPLEMENTATIONS:
        raise UserError(f"{VARIABLE}={name!r} is no implementation of the kernels: use one of {', '.join(IMPLEMENTATIONS)}")
    return name


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Run the kernels by another implementation inside the block. Raises ValueError for an unknown one."""
    global _inside
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown kernel implementation {name!r}: use one of {', '.join(IMPLEMENTATIONS)}")
    before, _inside = _inside, name
    try:
        yield
    finally:
        _inside = before


def primitives_for(*tensors: Tensor) -> Primitives:
    """The implementation that serves tensors like these together. Raises UserError where the one that was ordered cannot."""
    wanted = current_implementation()
    if wanted in ("auto", "cpu") and all(map(_fits_cpu, tensors)):
        built, problem = _cpu()
        if built is not None:
            return built
        if wanted == "cpu":
            raise UserError(f"the compiled kernels are not available: {problem}")
        _warn(f"kernels run on torch operations, which takes about twice as long: {problem}")
    elif wanted in ("auto", "triton") and all(map(_fits_triton, tensors)):
        built, problem = _triton()
        if built is not None:
            return built
        if wanted == "triton":
            raise UserError(f"the Triton kernels are not available: {problem}")
        _warn(f"kernels run on torch operations, which takes several times as long: {problem}")
    elif wanted in ("cpu", "triton"):
        kinds = " with ".join(dict.fromkeys(f"{tensor.dtype} on {tensor.device}" for tensor in tensors))
        raise UserError(f"the {wanted} kernels were ordered ({VARIABLE}, use_implementation) and do not serve {kinds}")
    from saebench.kernels import stock

    return stock


def report() -> dict[str, str]:
    """For each kind of tensor the implementation that serves it, and why."""
    wanted = current_implementation()
    if wanted != "auto":
        return {"all tensors": f"{wanted}, by order"}
    cpu, triton = _cpu()[1], _triton()[1] if torch.cuda.is_available() else None
    found = {"float32 in memory": f"cpu ({_screen()})" if cpu is None else f"stock torch operations: {cpu}"}
    if torch.cuda.is_available():
        found["CUDA"] = "triton" if triton is None else f"stock torch operations: {triton}"
    return found | {"other types in memory": "stock torch operations"}


def _fits_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _fits_triton(tensor: Tensor) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and current_implementation() == "triton"
    return (tensor.is_cuda or interpreted) and tensor.dtype in TRITON_TYPES


@cache
def _cpu() -> tuple[Primitives | None, str | None]:
    from saebench.kernels.cpu.build import BuildError

    try:
        from saebench.kernels import cpu

        cpu.library()
    except BuildError as error:
        return None, str(error)
    return cpu, None


def _screen() -> str:
    from saebench.kernels import cpu

    bits = cpu.screen_bits()
    if bits == 32:
        return "scores screened in float32"
    by = " by the matrix unit" if cpu.matrix_unit() else ""
    return f"scores screened in {bits}-bit integers{by}, exact"


@cache
def _triton() -> tuple[Primitives | None, str | None]:
    if find_spec("triton") is None:
        return None, "triton is not installed (pip install 'saebench[triton]')"
    from saebench.kernels import triton

    return triton, None


@cache
def _warn(text: str) -> None:
    warnings.warn(f"{text} (told once; see `saebench doctor`)", RuntimeWarning, stacklevel=3)
