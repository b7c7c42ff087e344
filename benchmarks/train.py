"""One TopK SAE training step beside installed peers: how long it takes, and what the dictionary is worth after equal tokens.

    python -m benchmarks.train                                  # speed at A, B, C with quality beside it
    python -m benchmarks.train --shapes A --peers ours,sparsify --rounds 3
    python -m benchmarks.train --quality --steps 2000 --seeds 3 --lr 4e-3

README.md says how to read the tables. Nothing here imports torch: the workers do, each in its own process.
"""

import argparse
import os
import signal
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/train.py` works too

from benchmarks import machine, report
from benchmarks.measure import measure_quality, measure_speed
from benchmarks.peers import PEERS
from benchmarks.shapes import SHAPES

QUALITY_SHAPE = "small"


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, f"{'quality' if arguments.quality else 'train'}-{date.today().isoformat()}")
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "arguments": vars(arguments) | {"out": None},
        "load_average_start": os.getloadavg()[0],
        "versions": {},
        "quality": {},
        "speed": {},
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers must be ended in either case
    try:
        run(arguments, result, stem)
    except KeyboardInterrupt:
        say("interrupted; the workers have been ended")
        return 130
    finally:
        if stem.with_suffix(".md").exists():
            say(f"results: {stem.with_suffix('.md')} and {stem.with_suffix('.json').name}")
    return 0


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    """Measure into `result`; what is finished is on disk after each table."""
    tables = []

    def finish(table: str, title: str) -> None:
        tables.append(f"## {title}\n\n{table}")
        print(f"\n{tables[-1]}\n", flush=True)
        result["load_average_end"] = os.getloadavg()[0]
        report.write(result, tables, stem)

    for shape in arguments.shapes if arguments.quality else [QUALITY_SHAPE]:
        runs = result["quality"][shape] = {peer: [] for peer in arguments.peers}
        for seed in range(arguments.seeds):
            for peer in arguments.peers:
                runs[peer].append(quality_run(arguments, shape, peer, seed))
                result["versions"][peer] = runs[peer][-1]["versions"]
        rate = "each peer's default learning rate" if arguments.lr is None else f"learning rate {arguments.lr:g}"
        finish(report.quality_table(runs), f"Quality at {describe(shape)} after {arguments.steps} steps, {rate}")

    for shape in [] if arguments.quality else arguments.shapes:
        result["speed"][shape] = measure_speed(
            [PEERS[peer] for peer in arguments.peers],
            SHAPES[shape],
            rounds=arguments.rounds,
            burst=arguments.burst,
            threads=arguments.threads,
            say=say,
        )
        table = report.speed_table(result["speed"][shape], result["quality"][QUALITY_SHAPE], SHAPES[shape].batch_size)
        finish(table, f"Speed at {describe(shape)}; quality at {QUALITY_SHAPE} after {arguments.steps} steps")


def quality_run(arguments: argparse.Namespace, shape: str, peer: str, seed: int) -> dict:
    steps, lr, threads = arguments.steps, arguments.lr, arguments.threads
    return measure_quality(PEERS[peer], SHAPES[shape], steps=steps, seed=seed, lr=lr, threads=threads, say=say)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=names_among(SHAPES), help=f"of {','.join(SHAPES)}; default A,B,C (--quality: small)")
    parser.add_argument("--peers", type=names_among(PEERS), default=list(PEERS), help=f"of {','.join(PEERS)}; default all")
    parser.add_argument("--rounds", type=at_least(1), default=7, help="turns that each worker gets")
    parser.add_argument("--burst", type=at_least(2), default=3, help="steps in a turn, the first not counted")
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of each worker")
    parser.add_argument("--quality", action="store_true", help="quality only, at --shapes")
    parser.add_argument("--steps", type=at_least(1), default=500, help="training steps before quality is measured")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="runs per peer, each with its own data and initialisation")
    parser.add_argument("--lr", type=float, help="one learning rate for all in the quality runs; default: each peer's own")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parsed = parser.parse_args(arguments)
    parsed.shapes = parsed.shapes or ([QUALITY_SHAPE] if parsed.quality else ["A", "B", "C"])
    return parsed


def names_among(known: dict):
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    return names


def at_least(least: int):
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def free_stem(folder: Path, name: str) -> Path:
    """A file name without suffix that no earlier result of the day has."""
    folder.mkdir(parents=True, exist_ok=True)
    stems = [folder / name, *(folder / f"{name}-{number}" for number in range(2, 1000))]
    return next(stem for stem in stems if not stem.with_suffix(".json").exists())


def describe(shape: str) -> str:
    sizes = SHAPES[shape]
    return f"{shape} (d_in {sizes.d_in}, d_sae {sizes.d_sae}, k {sizes.k}, batch {sizes.batch_size})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
