"""Timing on a device, in turns and within a budget of time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Clock:
    """What is left of the whole run."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)


@dataclass(frozen=True)
class Row:
    """One line of the table. `floor` is the least time that the operation could take by the measured ceilings of this card."""

    shape: str
    operation: str
    way: str
    ms: float
    low: float
    high: float
    floor_ms: float | None = None


def release(device: str) -> None:
    """Give unused memory back and forget the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_once(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call, by events on the device."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def alternate(
    ways: dict[str, Callable[[], Any]], device: str, seconds: float, rounds: int = 20
) -> dict[str, tuple[float, float, float] | str]:
    """Median, least and largest milliseconds of every way, taken in turns after two calls each that do not count; or why there are none.
    Stops after `rounds`, or when the time is up and each has been timed three times."""
    times: dict[str, list[float]] = {}
    failed: dict[str, tuple[float, float, float] | str] = {}
    for name, call in ways.items():
        try:
            for _ in range(2):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name] = []
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            if isinstance(error, torch.OutOfMemoryError):
                failed[name] = "out of memory"
            release(device)
    end = time.monotonic() + seconds
    for round_ in range(rounds if device == "cuda" else 2):
        for name in times:
            times[name].append(time_once(ways[name], device))
        if round_ >= 2 and time.monotonic() > end:
            break
    measured = {name: (statistics.median(each), min(each), max(each)) for name, each in times.items()}
    return {name: measured.get(name) or failed[name] for name in ways}


def ceilings(device: str, tiny: bool) -> dict[str, float]:
    """What this card does: bytes a second of a copy, operations a second of a bfloat16 product of random matrices."""
    side = 256 if tiny else 8192
    source = torch.empty(1 << (16 if tiny else 30), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = alternate({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, 3, 10)
    copy, product = times["copy"], times["product"]
    assert not isinstance(copy, str) and not isinstance(product, str)
    found = {"bytes_per_s": 2 * source.numel() / copy[0] * 1e3, "flop_per_s": 2 * side**3 / product[0] * 1e3}
    release(device)
    return found
