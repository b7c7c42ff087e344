"""What the command lines of the benchmarks have in common: arguments, result files, messages, Ctrl-C."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Container
from datetime import date
from pathlib import Path

from benchmarks import machine
from benchmarks.shapes import SHAPES

RESULTS = Path(__file__).parent / "results"


def names_among(known: Container[str]) -> Callable[[str], list[str]]:
    """An argument type: names out of `known`, with commas between them."""

    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    return names


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def learning_rates(text: str) -> list[float | None]:
    """An argument type: rates with commas between them; `own`: each library's default, here None."""
    return [None if part == "own" else float(part) for part in text.split(",")]


def rate_name(lr: float | None) -> str:
    return "their own learning rates" if lr is None else f"learning rate {lr:g}"


def free_stem(folder: Path, name: str) -> Path:
    """A file name without suffix that no earlier result of the day has."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{name}-{date.today().isoformat()}"
    stems = [folder / name, *(folder / f"{name}-{number}" for number in range(2, 1000))]
    return next(stem for stem in stems if not stem.with_suffix(".json").exists())


def new_result(arguments: argparse.Namespace) -> dict:
    """The head of every result: when, where, and what was asked for; without paths, which differ between machines."""
    return {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "arguments": {key: _without_folder(value) for key, value in vars(arguments).items() if key != "out"},
        "load_average_start": os.getloadavg()[0],
        "load_average_end": os.getloadavg()[0],
        "versions": {},
    }


def _without_folder(value: object) -> object:
    if isinstance(value, list):
        return [_without_folder(each) for each in value]
    return value.name if isinstance(value, Path) else value


def run_command(run: Callable[[], None], stem: Path) -> int:
    """The exit code of a benchmark. Ctrl-C and SIGTERM end it alike, so that workers are ended in either case; what was written
    under `stem` until then is named."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        say("interrupted; the workers have been ended")
        return 130
    except UsageError as error:
        say(f"error: {error}")
        return 2
    finally:
        if stem.with_suffix(".json").exists():
            say(f"results: {stem.with_suffix('.md')} and {stem.with_suffix('.json').name}")
    return 0


class UsageError(Exception):
    """What cannot be measured as it was asked for, in one line."""


def describe(shape: str) -> str:
    sizes = SHAPES[shape]
    return f"{shape} (d_in {sizes.d_in}, d_sae {sizes.d_sae}, k {sizes.k}, batch {sizes.batch_size})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
