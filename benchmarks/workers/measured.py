"""What a piece of work costs: its time, and the memory that it adds to that of the process."""

import gc
import time
from collections.abc import Callable
from typing import Any

from benchmarks.machine import anonymous_mib, anonymous_peak


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work returns, with `seconds`, `cpu_seconds`, and the largest memory of the process while it ran, `peak_mib`, beside what it
    had before, `before_mib`; both without mapped files."""
    gc.collect()
    before_mib = anonymous_mib() or 0.0
    cpu, wall = time.process_time(), time.perf_counter()
    with anonymous_peak() as peak:
        done = work()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return done, {"seconds": seconds, "cpu_seconds": cpu_seconds, "before_mib": before_mib, "peak_mib": peak.mib}
