"""What the figures were measured on, without which a time means nothing, and how much memory there is and was used."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")  # what matrix kernels choose by


def describe() -> dict:
    """CPU, cores, memory and system, for the head of a result."""
    processor, flags = _processor()
    return {
        "cpu": processor,
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def peak_rss_mib() -> float:
    """The largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


STATUS = Path("/proc/self/status")
SAMPLED_EVERY = 0.05  # seconds


def anonymous_mib() -> float | None:
    """Memory of this process that is not pages of mapped files, which the system takes back at will; None where it does not say."""
    if not STATUS.exists():
        return None
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) / 2**10 if lines else None


@dataclass
class Peak:
    """The most memory there was at once."""

    mib: float = 0.0


@contextmanager
def anonymous_peak() -> Iterator[Peak]:
    """The peak of `anonymous_mib` while the block runs, sampled every 50 ms; known when it has ended. Where the system does not say, it
    is that of `peak_rss_mib`."""
    peak, ended = Peak(), Event()

    def look() -> None:
        found = anonymous_mib()
        peak.mib = max(peak.mib, peak_rss_mib() if found is None else found)

    def sample() -> None:
        while not ended.wait(SAMPLED_EVERY):
            look()

    look()
    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        look()
        ended.set()
        thread.join()


def free_mib() -> float | None:
    """Memory that a new process can have without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) / 2**10


def _processor() -> tuple[str, set[str]]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor(), set()
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    family = ", ".join(f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields)
    return f"{fields.get('model name', platform.processor())} ({family})", set(fields.get("flags", "").split())
