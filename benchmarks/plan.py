"""Does `saebench plan` tell the truth? Its seconds and bytes beside what the run then takes, for a few small recipes.

    python -m benchmarks.plan                         # benchmarks/recipes/*.toml: some minutes
    python -m benchmarks.plan --recipes path/to/recipe.toml --rounds 1

In each round every recipe is planned, trained and evaluated in a fresh directory, one command after the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/plan.py` works too

from benchmarks import report
from benchmarks.options import RESULTS, UsageError, at_least, free_stem, new_result, run_command, say
from benchmarks.worker_process import LOGS, ROOT

RECIPES = Path(__file__).parent / "recipes"
MIB = 2**20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
HEAD = (
    *(
        "recipe",
        "harvest + train s",
        "took",
        "took / planned (range)",
        "evaluate s",
        "took",
        "peak MiB",
        "took",
        "took / planned",
    ),
    "process wall s",
)


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, "plan")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    result["recipes"] = {path.stem: [] for path in arguments.recipes}
    for number in range(arguments.rounds):
        for path in arguments.recipes:
            found = planned_and_done(path.resolve(), arguments.threads)
            result["recipes"][path.stem].append(found)
            say(f"round {number + 1}, {path.stem}: planned {found['planned']}, took {found['took']}")
            write(result, stem)
    print("\n" + write(result, stem))


def planned_and_done(recipe: Path, threads: int) -> dict:
    """`planned` and `took`: seconds of harvesting and training together and of evaluating, peak MiB; `took` also has the wall time of
    the training process from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "runs" / recipe.stem  # activations go to `acts` beside `runs`
        plan = command(["plan", str(recipe)], folder, threads)[0]
        trained, wall, peak_mib = command(["train", str(recipe), "--out", str(out)], folder, threads)
        command(["evaluate", str(out)], folder, threads)
        seconds = json.loads((out / "run.json").read_text())["seconds"]
    evaluating = seconds.pop("evaluation")
    return {
        "planned": {
            "train": plan["seconds"]["harvest"] + plan["seconds"]["train"],
            "evaluate": plan["seconds"]["evaluate"],
            "peak_mib": plan["bytes"]["memory"] / MIB,
        },
        "took": {"train": sum(trained["seconds"].values()), "evaluate": evaluating, "peak_mib": peak_mib, "wall": wall},
        "plan": plan,
        "seconds": seconds,
    }


def command(arguments: list[str], folder: str, threads: int) -> tuple[dict, float, float]:
    """The JSON of one of our commands, its seconds, and the largest resident size of its process in MiB. Raises UsageError with its
    last words where it fails."""
    LOGS.mkdir(exist_ok=True)
    log = LOGS / f"plan-{arguments[0]}.log"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    start = perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "saebench", *arguments, "--json"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends the command
        )
        try:
            answer = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
            process.stdout.close()
    if process.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["it left no message"])[-1]
        raise UsageError(f"saebench {' '.join(arguments[:2])} failed: {last[:300]}")
    return json.loads(answer), perf_counter() - start, usage.ru_maxrss * RSS_UNIT / MIB


def write(result: dict, stem: Path) -> str:
    """The table, also on disk."""
    rows = [[name, *_cells(rounds)] for name, rounds in result["recipes"].items() if rounds]
    table = report.format_table(list(HEAD), rows)
    about = f"Medians of {result['arguments']['rounds']} rounds.\n\n"
    report.write(result, "What `saebench plan` foretells, and what came of it", [table], stem, about)
    return table + "\n"


def _cells(rounds: list[dict]) -> list[str]:
    middle = lambda which, what: median(found[which][what] for found in rounds)  # noqa: E731
    ratios = [found["took"]["train"] / found["planned"]["train"] for found in rounds]
    memory = median(found["took"]["peak_mib"] / found["planned"]["peak_mib"] for found in rounds)
    return [
        *(f"{middle(which, 'train'):.1f}" for which in ("planned", "took")),
        f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        *(f"{middle(which, 'evaluate'):.1f}" for which in ("planned", "took")),
        *(f"{middle(which, 'peak_mib'):.0f}" for which in ("planned", "took")),
        f"{memory:.2f}",
        f"{middle('took', 'wall'):.1f}",
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=existing, default=sorted(RECIPES.glob("*.toml")), help="toml files with commas between")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


def existing(text: str) -> list[Path]:
    paths = [Path(part) for part in text.split(",")]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise argparse.ArgumentTypeError(f"no such recipe: {', '.join(missing)}")
    return paths


if __name__ == "__main__":
    sys.exit(main())
