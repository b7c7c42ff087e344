"""Check the Triton kernels on a CUDA card, then time each of them and whole training steps beside plain and compiled torch.

    benchmarks/gpu.sh [--minutes 8] [--out FOLDER]      on a machine with a card
    TRITON_INTERPRET=1 benchmarks/gpu.sh --smoke           tiny shapes by the interpreter: tests this script

Needs torch, triton and numpy. Ends before its time is up, says what it skipped, prints a table last, and writes JSON and Markdown to
--out, $OUT or benchmarks/results. Exit code 1: there is no card, or a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHAPES = [(4096, 131072, 64, 8192), (2304, 65536, 64, 4096), (768, 24576, 32, 4096)]
"""d_in, d_sae, k, batch."""
MILLION = (2048, 1 << 20, 64, 4096)
TINY = [(24, 60, 4, 3)]


@dataclass
class Run:
    """One run of the benchmark: what it measured, and what is left to do."""

    device: str
    tiny: bool
    clock: Any
    rows: list[Any] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    checked: int = 0

    def part(self, name: str, seconds: float, work: Callable[[float], None]) -> None:
        """Do a part that takes about so many seconds, if they are left; an error ends the part, not the run."""
        from benchmarks.gpu_timing import release

        if self.clock.left() < seconds:
            self.skipped.append(f"{name}: {self.clock.left():.0f} s were left")
            return
        print(f"== {name} ({self.clock.left():.0f} s left)", flush=True)
        try:
            work(seconds)
        except Exception as error:
            traceback.print_exc()
            self.skipped.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        release(self.device)

    def record(self, shape: str, operation: str, timed: dict[str, Any], floor_ms: float | None = None) -> None:
        from benchmarks.gpu_timing import Row

        for way, result in timed.items():
            if isinstance(result, str):
                self.skipped.append(f"{shape} {operation} {way}: {result}")
                continue
            self.rows.append(Row(shape, operation, way, *result, floor_ms))
            print(line(self.rows[-1]), flush=True)

    def ms_of_bytes(self, count: float) -> float:
        return 1e3 * count / self.ceilings["bytes_per_s"]

    def ms_of_flop(self, count: float) -> float:
        return 1e3 * count / self.ceilings["flop_per_s"]


def check(run: Run, seconds: float) -> None:
    """All checks, until the time is up."""
    from benchmarks import gpu_checks

    end = time.monotonic() + seconds
    for name, call in gpu_checks.checks(run.device, run.tiny):
        if time.monotonic() > end and not run.tiny:
            run.skipped.append(f"check {name}: no time")
            continue
        try:
            problem = call()
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        run.checked += 1
        if problem:
            run.failures.append(f"{name}: {problem}")
            print(f"WRONG {name}: {problem}", flush=True)


def time_kernels(run: Run, shape: tuple[int, int, int, int], seconds: float) -> None:
    """Every kernel of a step beside stock operations, at one shape."""
    import torch
    from torch.nn.functional import embedding_bag

    from benchmarks.gpu_timing import alternate
    from saebench.codes import SparseCodes
    from saebench.kernels import triton as kernels
    from saebench.kernels.primitives import AdamRule, Gradient, Term
    from saebench.kernels.triton import products

    D, F, k, B = shape
    label, device, bf16 = name_of(shape), run.device, torch.bfloat16
    x = torch.randn(B, D, device=device).to(bf16)
    W = torch.empty(F, D, device=device, dtype=bf16).normal_(0, D**-0.5)
    b = torch.zeros(F, device=device)

    def with_product(name: str) -> Callable[[], Any]:
        def call() -> Any:
            products.PRODUCT = name
            try:
                return kernels.topk(x, W, b, None, k, None)
            finally:
                products.PRODUCT = None

        return call

    rows = max(1, (2 << 30) // (2 * F))

    def stock_topk() -> None:
        for start in range(0, B, rows):
            torch.topk(torch.addmm(b.to(bf16), x[start : start + rows], W.T), k, dim=1, sorted=False)

    def product_alone() -> None:
        for start in range(0, B, rows):
            x[start : start + rows] @ W.T

    encode = {
        "fused": with_product("fused"),
        "library": with_product("library"),
        "torch, scores rounded": stock_topk,
        "product alone": product_alone,
    }
    budget = seconds / 8
    run.record(label, "topk", alternate(encode, device, budget), run.ms_of_flop(2.0 * B * D * F))
    indices, values = kernels.topk(x, W, b, None, k, None)
    threshold = values.amin(1).median().expand(F).contiguous()  # about k entries a token
    run.record(
        label, "above", alternate({"ours": lambda: kernels.above(x, W, b, None, threshold)}, device, budget / 2),
        run.ms_of_flop(2.0 * B * D * F),
    )  # fmt: skip
    codes = SparseCodes(indices, values, F)
    error = torch.randn(B, D, device=device).to(bf16)
    values16, long = values.to(bf16), indices.long()
    gathered = run.ms_of_bytes(2 * min(B * k, F) * D)  # every row that is needed read once
    decode = {
        "ours": lambda: kernels.decode(codes, W),
        "embedding_bag": lambda: embedding_bag(long, W, per_sample_weights=values16, mode="sum"),
    }
    run.record(label, "decode", alternate(decode, device, budget), gathered)

    def stock_dots() -> None:
        for start in range(0, B, 512):
            torch.einsum("bd,bkd->bk", error[start : start + 512], W[long[start : start + 512]])

    run.record(
        label, "dots", alternate({"ours": lambda: kernels.dots(codes, error, W), "gather": stock_dots}, device, budget), gathered
    )
    run.record(label, "by_latent", alternate({"ours": lambda: kernels.by_latent(indices.view(-1), F)}, device, budget / 2))
    order = torch.sort(indices.view(-1), stable=True)
    starts = torch.searchsorted(order.values, torch.arange(F, device=device, dtype=torch.int32))
    tokens, sorted_values = order.indices // k, values16.view(-1)[order.indices]
    sums = {
        "ours": lambda: kernels.sums(codes, error),
        "embedding_bag": lambda: embedding_bag(tokens, error, starts, per_sample_weights=sorted_values, mode="sum"),
    }
    run.record(label, "sums", alternate(sums, device, budget), run.ms_of_bytes(4 * F * D))
    master, m, v = W.float(), torch.zeros(F, D, device=device), torch.zeros(F, D, device=device)
    gradient, factor = Gradient([Term(codes, error)]), torch.ones((), device=device)
    rule = AdamRule(1e-4, (0.9, 0.999), 1e-8, 10)
    stored = torch.nn.Parameter(master.clone())
    stored.grad = torch.randn_like(stored)
    adam = torch.optim.Adam([stored], fused=device == "cuda")
    update = {
        "ours": lambda: kernels.update(W, m, v, gradient, False, rule, factor, master_FD=master),
        "ours, unit rows": lambda: kernels.update(W, m, v, gradient, True, rule, factor, master_FD=master),
        "fused Adam, gradient given": adam.step,
    }
    run.record(label, "update", alternate(update, device, budget), run.ms_of_bytes(26 * F * D))
    square = {"ours": lambda: kernels.gradient_square(master, gradient, True)}
    run.record(label, "gradient_square", alternate(square, device, budget / 2), run.ms_of_bytes(4 * F * D))


def time_steps(run: Run, shape: tuple[int, int, int, int], compiled: bool, seconds: float) -> None:
    """Whole steps at one shape: ours, ours as a graph, plain torch, and (they share memory badly) dense torch by itself."""
    import torch

    from benchmarks import gpu_steps
    from benchmarks.gpu_timing import alternate, release

    D, F, k, B = shape
    label, cuda = name_of(shape), run.device == "cuda"
    batches = [torch.randn(B, D, device=run.device) for _ in range(3)]
    turn = iter(range(1 << 30))
    floor = run.ms_of_flop(gpu_steps.floor_flop(D, F, B)) + run.ms_of_bytes(gpu_steps.floor_bytes(D, F, k, B))

    def peak_of(make: Callable[[], Any]) -> tuple[Any, str | None]:
        release(run.device)
        before = torch.cuda.memory_allocated() if cuda else 0
        try:
            step = make()
            step(batches[0])
        except torch.OutOfMemoryError:
            return None, "out of memory"
        except Exception as error:
            traceback.print_exc()
            return None, f"{type(error).__name__}: {str(error)[:160]}"
        if cuda:
            run.notes.append(
                f"{label} {type(step).__name__}: peak {(torch.cuda.max_memory_allocated() - before) / 2**30:.1f} GiB"
            )
        return step, None

    def fresh(step: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: step(batches[next(turn) % len(batches)])

    if compiled:
        step, problem = peak_of(lambda: gpu_steps.DenseStep(D, F, k, run.device, compiled=cuda))
        if problem:
            run.skipped.append(f"{label} step, dense compiled torch: {problem}")
            return
        run.record(label, "step", alternate({"dense torch, compiled": fresh(step)}, run.device, seconds / 3), floor)
        return
    ways: dict[str, Callable[[], Any]] = {}
    ours, problem = peak_of(lambda: gpu_steps.OurStep(D, F, k, run.device))
    if problem:
        run.skipped.append(f"{label} step, ours: {problem}")
        return
    ways["ours"] = fresh(ours)
    losses = [float(ours(batches[0])) for _ in range(2 if run.tiny else 12)]
    run.notes.append(f"{label}: loss on one batch {losses[0]:.4g} -> {losses[-1]:.4g} in {len(losses)} steps")
    if losses[-1] >= losses[0]:
        run.failures.append(f"{label}: the loss does not fall: {losses}")
    if cuda:
        static = batches[0].clone()
        try:
            graph = gpu_steps.captured(ours, static)

            def replay() -> None:
                static.copy_(batches[next(turn) % len(batches)])
                graph.replay()

            ways["ours, CUDA graph"] = replay
        except Exception as error:
            traceback.print_exc()
            run.skipped.append(f"{label} step as a graph: {type(error).__name__}: {str(error)[:160]}")
    if shape != MILLION:
        plain, problem = peak_of(lambda: gpu_steps.TorchStep(D, F, k, run.device))
        if problem:
            run.skipped.append(f"{label} step, plain torch: {problem}")
        else:
            ways["plain torch, sparse"] = fresh(plain)
    run.record(label, "step", alternate(ways, run.device, seconds / 2), floor)


def time_others(run: Run, seconds: float) -> None:
    """A step of matching pursuit and the attention of Lorsa."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from benchmarks.gpu_timing import alternate
    from saebench.kernels import triton as kernels

    device = run.device
    B, D, F = (5, 20, 300) if run.tiny else (4096, 768, 24576)
    r, atoms = torch.randn(B, D, device=device), torch.nn.functional.normalize(torch.randn(F, D, device=device), dim=1)
    norm = r.norm(dim=1)
    half, zero = atoms.to(torch.bfloat16), torch.zeros_like(norm)
    pursuit = {
        "ours, float32": lambda: kernels.pursuit_step(r, atoms, norm, zero),
        "ours, bfloat16 atoms": lambda: kernels.pursuit_step(r, half, norm, zero),
        "torch, float32 product and argmax": lambda: (r @ atoms.T).argmax(1),
    }
    run.record(f"{D}, {F}, batch {B}", "pursuit_step", alternate(pursuit, device, seconds / 4))
    C, G, S, E, H = (1, 1, 20, 16, 2) if run.tiny else (8, 32, 1024, 64, 16)
    q, k, v = (torch.randn(C, G, S, width, device=device).to(torch.bfloat16) for width in (E, E, H))
    grad = torch.randn(C, G, S, H, device=device)
    z, lse = kernels.attention(q, k, v, 0.125)
    forward = {
        "ours": lambda: kernels.attention(q, k, v, 0.125),
        "scaled_dot_product_attention": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125),
    }
    label = f"C {C}, G {G}, S {S}, E {E}, H {H}"
    run.record(label, "attention", alternate(forward, device, seconds / 4))
    back = {"ours": lambda: kernels.attention_gradients(q, k, v, lse, z, grad, 0.125)}
    run.record(label, "attention gradients", alternate(back, device, seconds / 4))


def name_of(shape: tuple[int, int, int, int]) -> str:
    return "{}, {}, k {}, batch {}".format(*shape)


def line(row: Any) -> str:
    floor = f"{row.ms / row.floor_ms:6.2f} x" if row.floor_ms else "        "
    return f"{row.shape:32s} {row.operation:20s} {row.way:34s} {row.ms:9.3f} ms [{row.low:.3f} {row.high:.3f}] {floor}"


def machine() -> dict[str, Any]:
    import torch
    import triton

    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "card": card.name if card else "none",
        "capability": f"{card.major}.{card.minor}" if card else None,
        "memory_gib": round(card.total_memory / 2**30, 1) if card else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


def write(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    stem = f"gpu-{'smoke-' if run.tiny else ''}{about['date']}"
    result = {
        "machine": about,
        "ceilings": run.ceilings,
        "checks": {"run": run.checked, "failed": run.failures},
        "rows": [asdict(row) for row in run.rows],
        "skipped": run.skipped,
        "notes": run.notes,
    }
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = [
        f"# Triton kernels on {about['card']}, {about['date']}",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items()),
        "",
        f"Checks against float64: {run.checked} run, {len(run.failures)} failed.",
        f"Ceilings: copy {run.ceilings.get('bytes_per_s', 0) / 1e12:.2f} TB/s, bfloat16 product "
        f"{run.ceilings.get('flop_per_s', 0) / 1e12:.0f} TFLOP/s. Times: medians of CUDA events after warm-up, taken in turns.",
        "",
        "| d_in, d_sae, k, batch | operation | way | ms | least | most | x floor |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in run.rows:
        floor = f"{row.ms / row.floor_ms:.2f}" if row.floor_ms else ""
        text.append(f"| {row.shape} | {row.operation} | {row.way} | {row.ms:.3f} | {row.low:.3f} | {row.high:.3f} | {floor} |")
    for title, lines in (("Failed", run.failures), ("Notes", run.notes), ("Skipped", run.skipped)):
        text += ["", f"## {title}", "", *(f"- {item}" for item in lines)] if lines else []
    (folder / f"{stem}.md").write_text("\n".join(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes by Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or Path(__file__).parent / "results"))
    arguments = parser.parse_args()
    if arguments.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        print("no CUDA device here: nothing checked, nothing measured (--smoke tests this script without one)")
        return 1
    from benchmarks.gpu_timing import Clock, ceilings

    torch.manual_seed(0)
    tiny = arguments.smoke
    run = Run("cpu" if tiny else "cuda", tiny, Clock(60 * arguments.minutes))
    run.ceilings = ceilings(run.device, tiny)
    run.part("checks", 100, lambda seconds: check(run, seconds))
    shapes = TINY if tiny else SHAPES
    run.part(f"steps {name_of(shapes[0])}", 40, lambda seconds: time_steps(run, shapes[0], False, seconds))
    run.part(f"kernels {name_of(shapes[0])}", 40, lambda seconds: time_kernels(run, shapes[0], seconds))
    run.part(f"dense {name_of(shapes[0])}", 60, lambda seconds: time_steps(run, shapes[0], True, seconds))
    for shape in shapes[1:]:
        run.part(f"steps {name_of(shape)}", 25, lambda seconds, s=shape: time_steps(run, s, False, seconds))
        run.part(f"kernels {name_of(shape)}", 25, lambda seconds, s=shape: time_kernels(run, s, seconds))
    if not tiny:
        run.part(f"steps {name_of(MILLION)}", 30, lambda seconds: time_steps(run, MILLION, False, seconds))
    run.part("pursuit and attention", 20, lambda seconds: time_others(run, seconds))
    for shape in shapes[1:]:
        run.part(f"dense {name_of(shape)}", 40, lambda seconds, s=shape: time_steps(run, s, True, seconds))
    write(run, arguments.out)
    print("\n" + "\n".join(line(row) for row in run.rows))
    for title, lines in (("note", run.notes), ("skipped", run.skipped), ("WRONG", run.failures)):
        print("\n".join(f"{title}: {item[:200]}" for item in lines[:40]))
    print(f"{run.checked} checks, {len(run.failures)} failed; {len(run.skipped)} parts skipped; {machine()}")
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())
