"""Progress of long work: a bar with rate and time left when a person watches, plain lines otherwise.

Everything goes to standard error, so that `--json` leaves standard output to the result.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_EVERY_SECONDS = 10.0


class Report(Protocol):
    def __call__(self, amount: int, note: str = "") -> None:
        """Say that `amount` more units are done."""


def say(message: str) -> None:
    """One plain line for the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, unit: str, done: int = 0) -> Iterator[Report]:
    """Show progress of `total` units of work, of which `done` were done in an earlier run."""
    if sys.stderr.isatty() and threading.current_thread() is threading.main_thread():  # a terminal has room for one bar
        yield from _bar(what, total, unit, done)
    else:
        yield from _lines(what, total, unit, done)


def _bar(what: str, total: int, unit: str, done: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    started = time.monotonic()
    fresh = 0
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="", note="")

        def report(amount: int, note: str = "") -> None:
            nonlocal fresh
            fresh += amount
            rate = fresh / max(1e-9, time.monotonic() - started)
            bar.update(task, advance=amount, rate=f"{rate:,.0f} {unit}/s")
            if note:
                bar.update(task, note=note)

        yield report


def _lines(what: str, total: int, unit: str, done: int) -> Iterator[Report]:
    started = last = time.monotonic()
    fresh = 0

    def report(amount: int, note: str = "") -> None:
        nonlocal fresh, last
        fresh += amount
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS or done + fresh >= total:
            last = now
            rate = fresh / max(1e-9, now - started)
            left = (total - done - fresh) / max(1e-9, rate)
            say(
                f"{what}: {done + fresh:,}/{total:,} {unit}, {rate:,.0f} {unit}/s, {left:.0f} s left{'; ' + note if note else ''}"
            )

    yield report
