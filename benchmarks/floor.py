"""The least time that a step can take on this machine, from two rates measured here and now.

    python -m benchmarks.floor [--threads 2]

A floor adds arithmetic at the achieved fp32 `torch.mm` rate and compulsory memory traffic at the achieved copy rate, without
overlap. NOTES.md derives the counts.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.shapes import SHAPES, Shape

REPEATS = 7
MATRIX, COPIED_FLOATS = 3072, 64 << 20


def sparse_counts(shape: Shape) -> tuple[float, float]:
    """FLOPs and bytes of a step that multiplies densely in the encoder only and never stores a gradient or a [B, F] matrix."""
    n_scores, n_weights = shape.batch_size * shape.d_sae, 2 * shape.d_in * shape.d_sae
    row_passes = 4 * 2 * shape.batch_size * shape.k * shape.d_in
    return 2 * n_scores * shape.d_in + row_passes, 26 * n_weights


def dense_counts(shape: Shape) -> tuple[float, float]:
    """FLOPs and bytes of dense autograd: six matrix products, gradients stored, seven passes over a [B, F] matrix."""
    n_scores, n_weights = shape.batch_size * shape.d_sae, 2 * shape.d_in * shape.d_sae
    return 6 * 2 * n_scores * shape.d_in, 40 * n_weights + 28 * n_scores


def seconds(run: Callable[[], object]) -> float:
    """The median of several runs after one that is not counted."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)

    a, b, product = (torch.rand(MATRIX, MATRIX) for _ in range(3))
    flops_per_s = 2 * MATRIX**3 / seconds(lambda: torch.mm(a, b, out=product))
    source, target = torch.rand(COPIED_FLOATS), torch.empty(COPIED_FLOATS)
    bytes_per_s = 8 * COPIED_FLOATS / seconds(lambda: target.copy_(source))
    print(f"torch.mm fp32 {flops_per_s / 1e9:.0f} GFLOP/s, copy {bytes_per_s / 1e9:.1f} GB/s (read + written)\n")

    print("| shape | sparse GFLOP | GB | floor ms | dense GFLOP | GB | floor ms |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, shape in SHAPES.items():
        cells = [name]
        for flops, traffic in (sparse_counts(shape), dense_counts(shape)):
            floor_ms = (flops / flops_per_s + traffic / bytes_per_s) * 1e3
            cells += [f"{flops / 1e9:.3g}", f"{traffic / 1e9:.3g}", f"{floor_ms:.3g}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
