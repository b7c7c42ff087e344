"""One training step beside installed peers: how long it takes, and what the dictionary is worth after equal tokens.

    python -m benchmarks.train                                  # TopK: speed at A, B, C with quality beside it
    python -m benchmarks.train --architecture batchtopk,jumprelu,gated,matryoshka --shapes A
    python -m benchmarks.train --shapes A --peers ours,sparsify,matmul --rounds 3 --no-quality
    python -m benchmarks.train --architecture gated --shapes A --whole --rounds 40 --burst 5    # a whole training in turns
    python -m benchmarks.train --quality --steps 2000 --seeds 3 --lr 4e-3

README.md says how to read the tables. Nothing here imports torch: the workers do, each in its own process.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/train.py` works too

from benchmarks import report
from benchmarks.measure import TOLD_STEPS, bare_torch_mib, measure_quality, measure_speed
from benchmarks.options import (
    RESULTS,
    at_least,
    describe,
    free_stem,
    names_among,
    new_result,
    rate_name,
    run_command,
    say,
)
from benchmarks.peers import ARCHITECTURES, PEERS, USUAL, Peer
from benchmarks.shapes import SHAPES

QUALITY_SHAPE = "small"


def main() -> int:
    arguments = parse(sys.argv[1:])
    name = "-".join(["quality" if arguments.quality else "train", *(a for a in arguments.architecture if a != "topk")])
    stem = free_stem(arguments.out, name)
    result = new_result(arguments) | {"quality": {}, "speed": {}}
    return run_command(lambda: run(arguments, result, stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    """Measure into `result`; what is finished is on disk after each table."""
    tables: list[str] = []

    def finish(table: str, title: str) -> None:
        tables.append(f"## {title}\n\n{table}")
        print(f"\n{tables[-1]}\n", flush=True)
        result["load_average_end"] = os.getloadavg()[0]
        report.write(result, "Training step", tables, stem)

    if not arguments.quality:
        result["bare_torch_mib"] = bare_torch_mib()
    for architecture in arguments.architecture:
        peers = [PEERS[peer] for peer in arguments.peers if architecture in PEERS[peer].architectures]
        qualities = result["quality"][architecture] = {}
        if arguments.beside:
            for shape in arguments.shapes if arguments.quality else [QUALITY_SHAPE]:
                qualities[shape] = quality_runs(arguments, architecture, shape, peers, result["versions"])
                title = f"Quality of {architecture} at {describe(shape)} after {arguments.steps} steps, {rate_name(arguments.lr)}"
                finish(report.quality_table(qualities[shape]), title)
        speeds = result["speed"][architecture] = {}
        for shape in [] if arguments.quality else arguments.shapes:
            speeds[shape] = measure_speed(
                peers,
                SHAPES[shape],
                architecture=architecture,
                rounds=arguments.rounds,
                burst=arguments.burst,
                threads=arguments.threads,
                told_steps=arguments.told_steps,
                say=say,
            )
            result["versions"] |= {name: found["versions"] for name, found in speeds[shape].items() if "versions" in found}
            beside = qualities.get(QUALITY_SHAPE, {})
            table = report.speed_table(speeds[shape], beside, SHAPES[shape].batch_size, result["bare_torch_mib"])
            quality = f"; quality at {QUALITY_SHAPE} after {arguments.steps} steps" if beside else ""
            finish(table, f"Speed of {architecture} at {describe(shape)}{quality}")
            for base, table in report.ratio_tables(speeds[shape], result["bare_torch_mib"], arguments.whole).items():
                finish(table, f"{architecture} at {shape} against {base}")


def quality_runs(arguments: argparse.Namespace, architecture: str, shape: str, peers: list[Peer], versions: dict) -> dict:
    """By peer, one result per seed; versions of the peers go to `versions`."""
    runs: dict[str, list[dict]] = {peer.name: [] for peer in peers if peer.trains}
    for seed in range(arguments.seeds):
        for name, found in runs.items():
            found.append(
                measure_quality(
                    PEERS[name],
                    SHAPES[shape],
                    architecture=architecture,
                    steps=arguments.steps,
                    seed=seed,
                    lr=arguments.lr,
                    threads=arguments.threads,
                    say=say,
                )
            )
            versions[name] = found[-1]["versions"]
    return runs


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    known = ",".join(ARCHITECTURES)
    parser.add_argument("--architecture", type=names_among(ARCHITECTURES), default=["topk"], help=f"of {known}; default topk")
    parser.add_argument("--shapes", type=names_among(SHAPES), help=f"of {','.join(SHAPES)}; default A,B,C (--quality: small)")
    parser.add_argument(
        "--peers", type=names_among(PEERS), default=list(USUAL), help=f"of {','.join(PEERS)}; default all but ours-reference"
    )
    parser.add_argument("--rounds", type=at_least(1), default=7, help="turns that each worker gets")
    parser.add_argument("--burst", type=at_least(2), default=3, help="steps in a turn, the first not counted")
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of each worker")
    parser.add_argument(
        "--told-steps",
        type=at_least(30),
        help="length of a run that schedules are told, default 2000; 30: latents die, AuxK runs",
    )
    parser.add_argument(
        "--whole", action="store_true", help="the rounds are a whole training: --told-steps is as many as they take"
    )
    parser.add_argument("--quality", action="store_true", help="quality only, at --shapes")
    parser.add_argument("--no-quality", dest="beside", action="store_false", help="speed only")
    parser.add_argument("--steps", type=at_least(1), default=500, help="training steps before quality is measured")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="runs per peer, each with its own data and initialisation")
    parser.add_argument("--lr", type=float, help="one learning rate for all in the quality runs; default: each peer's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parsed = parser.parse_args(arguments)
    parsed.shapes = parsed.shapes or ([QUALITY_SHAPE] if parsed.quality else ["A", "B", "C"])
    if parsed.quality and not parsed.beside:
        parser.error("--quality and --no-quality leave nothing to measure")
    taken = 1 + parsed.rounds * parsed.burst  # one before the rounds
    if parsed.whole and (parsed.quality or parsed.told_steps not in (None, taken)):
        parser.error(f"--whole measures speed and tells schedules {taken} steps: leave out --quality and --told-steps")
    parsed.told_steps = parsed.told_steps or (taken if parsed.whole else TOLD_STEPS)
    if taken > parsed.told_steps:
        parser.error(f"{parsed.rounds} rounds of {parsed.burst} steps need more than {parsed.told_steps} --told-steps")
    return parsed


if __name__ == "__main__":
    sys.exit(main())
