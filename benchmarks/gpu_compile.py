"""Compile every Triton kernel for a CUDA card that is not there, through the code that launches it, and print what the compiler made of it.

    python benchmarks/gpu_compile.py [--arch 90]

Tensors are of device `meta`: they have shapes and no memory, so shapes are those of real training. Launches stop after compilation. The
table shows registers a thread, bytes spilled to local memory, and shared memory; what a card of that architecture cannot hold is an error.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from saebench.codes import SparseCodes
from saebench.kernels import triton as kernels
from saebench.kernels.primitives import AdamRule, Gradient, Term
from saebench.kernels.triton import products
from saebench.kernels.triton.above import PIECE, _count, _write

SHAPES = (
    (4096, 131072, 64, 8192),
    (2304, 65536, 64, 4096),
    (768, 24576, 32, 4096),
    (2048, 1 << 20, 64, 4096),
    (123, 999, 7, 5),
    (1, 1, 1, 1),
)
"""d_in, d_sae, k, batch: what benchmarks/gpu.py times, something odd, and ones, of which the compiler makes constants."""
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that a program may have."""


class Absent:
    """As much of a driver as compilation asks for."""

    def __init__(self, arch: int):
        self.arch = arch
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch] << 10, "multiprocessor_count": 132}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of a compiled kernel, by the disassembler that Triton brings."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every operation at shapes of real training: (name, call)."""
    rule = AdamRule(1e-3, (0.9, 0.999), 1e-8, 10)
    for D, F, k, B in SHAPES:
        for dtype in (torch.bfloat16, torch.float32) if D > 1 else (torch.float16, torch.float32):
            label = f"D={D} F={F} k={k} B={B} {str(dtype)[6:]}"
            x, W, b, some = empty(B, D, dtype=dtype), empty(F, D, dtype=dtype), empty(F), empty(5001, dtype=torch.int32)
            fixed = SparseCodes(empty(B, k, dtype=torch.int32), empty(B, k), F)
            ragged = SparseCodes(empty(B * k, dtype=torch.int32), empty(B * k), F, empty(B + 1, dtype=torch.int64))
            yield f"topk {label}", lambda x=x, W=W, b=b, k=k: kernels.topk(x, W, b, None, k, None)
            yield f"topk scaled part {label}", lambda x=x, W=W, b=b, k=k, some=some: kernels.topk(x, W, b, b, k, some)
            yield f"topk large k {label}", lambda x=x, W=W, b=b, F=F: kernels.topk(x[:64], W, b, None, max(1, F // 2), None)
            yield f"above {label}", lambda W=W, b=b: compile_above(W, b)
            for codes, name in ((fixed, "fixed"), (ragged, "ragged")):
                terms = Gradient([Term(codes, x), Term(codes, empty(B, D))])
                full = Gradient(terms.terms, empty(F, D), b)
                yield f"decode {name} {label}", lambda codes=codes, W=W: kernels.decode(codes, W)
                yield f"dots {name} {label}", lambda codes=codes, x=x, W=W: kernels.dots(codes, x, W)
                yield f"sums {name} {label}", lambda codes=codes, x=x: kernels.sums(codes, x)
                for unit in (False, True):
                    square = lambda W=W, full=full, unit=unit: kernels.gradient_square(W, full, unit)  # noqa: E731
                    yield f"gradient_square {name} {label} unit={unit}", square
                    moments = (empty(F, D), empty(F, D))
                    master = empty(F, D) if dtype == torch.bfloat16 else None
                    for gradient, many in ((Gradient([Term(codes, x)]), "1 term"), (full, "all")):
                        step = lambda W=W, moments=moments, gradient=gradient, unit=unit, master=master: kernels.update(  # noqa: E731
                            W, *moments, gradient, unit, rule, empty(), master_FD=master
                        )
                        yield f"update {name} {many} {label} unit={unit}", step
            yield f"pursuit_step {label}", lambda W=W, B=B, D=D: kernels.pursuit_step(empty(B, D), W, empty(B), empty(B))
    for dtype in (torch.bfloat16, torch.float32):
        for E, H in ((64, 1), (128, 16), (128, 128), (256, 64)):
            q, v = empty(8, 32, 1024, E, dtype=dtype), empty(8, 32, 1024, H, dtype=dtype)
            for cap, window in ((None, None), (50.0, 512)):
                z, lse = empty(8, 32, 1024, H), empty(8, 32, 1024)
                label = f"E={E} H={H} cap={cap} {str(dtype)[6:]}"
                forward = lambda q=q, v=v, cap=cap, window=window: kernels.attention(q, q, v, 0.1, cap, window)  # noqa: E731
                yield f"attention {label}", forward
                backward = lambda q=q, v=v, z=z, lse=lse, cap=cap, window=window: kernels.attention_gradients(  # noqa: E731
                    q, q, v, lse, z, z, 0.1, cap, window
                )
                yield f"attention gradients {label}", backward


def compile_above(W_FD: Tensor, b_F: Tensor) -> None:
    """The launches of `above`, which waits for a number that shapes alone do not give."""
    num, pieces = len(W_FD), triton.cdiv(len(W_FD), PIECE)
    scores, counts, ends = empty(64, num), empty(64 * pieces, dtype=torch.int32), empty(64 * pieces, dtype=torch.int64)
    shape = {"HAS_SCALE": True, "BLOCK": PIECE, "num_warps": 4}
    _count[(64, pieces)](scores, b_F, b_F, b_F, counts, num, pieces, **shape)
    _write[(64, pieces)](scores, b_F, b_F, b_F, counts, ends, counts, b_F, num, pieces, **shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED))
    parser.add_argument("--only", default="", help="cases whose name begins so")
    arguments = parser.parse_args()
    driver.set_active(Absent(arguments.arch))
    seen: dict[str, tuple[dict[str, int], int, int]] = {}
    original, failures = JITFunction.run, 0

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            usage = resources(compiled.asm["cubin"])
            seen[compiled.hash] = (usage, compiled.metadata.shared, compiled.metadata.num_warps)
            spilled = usage.get("STACK", 0) + usage.get("LOCAL", 0)
            shared = compiled.metadata.shared / 1024
            too_much = "  TOO MUCH SHARED MEMORY" if shared > SHARED[arguments.arch] else ""
            print(
                f"  {self.__name__:16s} {compiled.metadata.num_warps:2d} warps {usage['REG']:4d} registers {spilled:5d} B spilled "
                f"{shared:6.1f} KiB shared{too_much}",
                flush=True,
            )
        return compiled

    JITFunction.run = compile_only
    products.WITHOUT_CARD = arguments.arch // 10
    for product in ("fused", "library"):
        products.PRODUCT = product
        for name, call in cases():
            if not name.startswith(arguments.only) or (product == "library" and not name.startswith("topk")):
                continue
            print(name, product if name.startswith("topk") else "")
            try:
                call()
            except Exception as error:
                failures += 1
                print("  FAILED", type(error).__name__, str(error)[:2000])
    over = [key for key, (_, shared, _) in seen.items() if shared > SHARED[arguments.arch] << 10]
    spills = [usage.get("STACK", 0) + usage.get("LOCAL", 0) for usage, _, _ in seen.values()]
    print(
        f"{len(seen)} kernels compiled for sm_{arguments.arch}, {failures} failed, {len(over)} need too much shared memory, "
        f"{sum(s > 0 for s in spills)} use local memory (most: {max(spills, default=0)} B)"
    )
    return int(bool(failures or over))


if __name__ == "__main__":
    sys.exit(main())
