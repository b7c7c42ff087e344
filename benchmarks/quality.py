"""Five architectures beside installed peers on planted data: FVU at equal L0 and recovery, over several seeds, with a verdict.

    python -m benchmarks.quality
    python -m benchmarks.quality --architectures topk,gated --peers ours,sae-lens --seeds 5
    python -m benchmarks.quality --shape small --steps 2000 --lr 2e-3

README.md says how to read the table. Nothing here imports torch: the workers do, each in its own process.
"""

import argparse
import json
import math
import sys
import threading
from itertools import product
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/quality.py` works too

from benchmarks import compare, report
from benchmarks.measure import rounded
from benchmarks.options import (
    RESULTS,
    UsageError,
    at_least,
    free_stem,
    learning_rates,
    names_among,
    new_result,
    rate_name,
    run_command,
    say,
)
from benchmarks.peers import ARCHITECTURES, PEERS, Peer
from benchmarks.shapes import SHAPES
from benchmarks.trainings import Stopped, Trainings, install, recorded_activations, run_side_by_side

# What docs/architectures.md recommends where many latents die. The other architectures have their best settings by default.
REVIVING = {"decoder": "free", "straight_through": True, "bandwidth": 2.0}
CONTESTANTS = {
    "ours": PEERS["ours"],
    "ours-reviving": Peer("ours-reviving", "ours", architectures=("jumprelu",), job={"settings": REVIVING}),
    "sae-lens": PEERS["sae-lens"],
    "dictionary-learning": PEERS["dictionary-learning"],
}
MOST_SEARCHES = 8
AIM = 1.08  # the search aims at runs this factor above and below the wanted L0

# Where L0 is not a choice of k: the first value to try for what sets it, and its sign in d log L0 / d log value.
SEARCHED = {
    ("jumprelu", "ours"): (1.0, 1),  # target_l0, as a multiple of the wanted L0
    ("jumprelu", "ours-reviving"): (1.0, 1),
    ("gated", "ours"): (1.0, 1),
    ("jumprelu", "dictionary-learning"): (1.0, 1),
    ("jumprelu", "sae-lens"): (3.0, -1),  # coefficients
    ("gated", "sae-lens"): (10.0, -1),
    ("gated", "dictionary-learning"): (0.3, -1),
}


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, f"quality-{arguments.shape}")
    return run_command(lambda: run(arguments, stem), stem)


def run(arguments: argparse.Namespace, stem: Path) -> None:
    """All contests, several at a time; what is finished is on disk after each."""
    quality = {a: {str(lr): dict.fromkeys(CONTESTANTS) for lr in arguments.lr} for a in arguments.architectures}
    result = new_result(arguments) | {"shape": vars(SHAPES[arguments.shape]), "quality": quality}
    if arguments.reuse is not None:
        take_over(json.loads(arguments.reuse.read_text()), result)
    start, lock = perf_counter(), threading.Lock()
    install([CONTESTANTS[name] for name in arguments.peers])
    contests = [
        Contest(arguments, architecture, CONTESTANTS[peer], lr)
        for architecture, peer, lr in product(arguments.architectures, arguments.peers, arguments.lr)
        if architecture in CONTESTANTS[peer].architectures
    ]
    contests.sort(key=lambda contest: contest.key not in SEARCHED)  # the longest first

    def finish(contest: Contest) -> None:
        contest.run()
        with lock:
            quality[contest.architecture][str(contest.lr)][contest.peer.name] = contest.outcome
            result["versions"][contest.peer.name] = contest.outcome["versions"] or result["versions"].get(contest.peer.name)
            result["minutes"] = (perf_counter() - start) / 60
            write(result, stem)

    with recorded_activations(arguments.shape, arguments.steps) as activations:
        for contest in contests:
            contest.activations = activations
        run_side_by_side(contests, arguments.parallel, finish)
    print("\n" + "\n\n".join(tables(quality)))


class Contest:
    """One peer's runs for one architecture: all seeds, one after the other, in one process."""

    def __init__(self, arguments: argparse.Namespace, architecture: str, peer: Peer, lr: float | None):
        self.arguments, self.architecture, self.peer, self.lr = arguments, architecture, peer, lr
        self.shape = SHAPES[arguments.shape]
        self.l0 = float(arguments.l0 or self.shape.k)
        self.runs: list[dict] = []
        self.outcome: dict = {"runs": self.runs, "at_l0": [], "error": None}
        self.activations: str | None = None
        self.trainings = Trainings(peer, threads=arguments.threads, log=f"{peer.name}-{architecture}-{lr or 'own'}")

    def __str__(self) -> str:
        return f"{self.architecture} {self.peer.name} {rate_name(self.lr)}"

    @property
    def key(self) -> tuple[str, str]:
        return self.architecture, self.peer.name

    def run(self) -> None:
        """Into `outcome`: `runs` (seed, sparsity, point, seconds, error), `at_l0` (one entry per seed), `versions`, `error`."""
        try:
            for seed in range(self.arguments.seeds):
                points = self._search(seed) if self.key in SEARCHED else [self._train(seed, self.l0)]
                self.outcome["at_l0"].append(compare.at_l0(points, self.l0))
        except (RuntimeError, ValueError) as error:
            self.outcome["error"] = str(error)
            say(f"{self} failed: {error}")
        except Stopped:
            self.outcome["error"] = "interrupted"
        finally:
            self.trainings.close()
        self.outcome["versions"] = next((run["versions"] for run in self.runs if run["versions"]), None)

    def _search(self, seed: int) -> list[dict]:
        """Runs with an L0 on both sides of the wanted one. Later seeds begin with the two values that served the first."""
        value, sign = SEARCHED[self.key]
        earlier = [run for run in self.runs if not run["error"]]
        tried: list[tuple[float, dict]] = []
        for _ in range(MOST_SEARCHES):
            below, above = self._bracket(tried)
            if below and above:
                break
            known = tried or [(run["sparsity"], run["point"]) for run in earlier]
            if known:
                value = self._next(known, sign, self.l0 / AIM if not below else self.l0 * AIM)
            else:
                value *= self.l0 if sign > 0 else 1.0
            tried.append((value, self._train(seed, value)))
        return [point for _, point in tried]

    def _bracket(self, tried: list[tuple[float, dict]]) -> tuple[bool, bool]:
        ratios = [point["l0"] / self.l0 for _, point in tried]
        return any(1 / compare.FAR <= ratio <= 1 for ratio in ratios), any(1 < ratio <= compare.FAR for ratio in ratios)

    def _next(self, known: list[tuple[float, dict]], sign: int, aim: float) -> float:
        """The value that should give L0 = aim: along the line through the two runs next to it, in logarithms."""
        usable = [(math.log(value), math.log(max(point["l0"], 0.01))) for value, point in known]
        usable.sort(key=lambda pair: abs(pair[1] - math.log(aim)))
        slope = 1.0 if sign > 0 else -0.7
        if len(usable) > 1:
            (value, l0), *rest = usable
            other, other_l0 = next((pair for pair in rest if abs(pair[0] - value) > 1e-3), (value, l0))
            if other != value and 0.15 < sign * (other_l0 - l0) / (other - value) < 5:
                slope = (other_l0 - l0) / (other - value)
        step = (math.log(aim) - usable[0][1]) / slope
        return math.exp(usable[0][0] + max(-1.6, min(1.6, step)))

    def _train(self, seed: int, sparsity: float) -> dict:
        """The last measurement of one run. Raises RuntimeError with the worker's message."""
        measured = self.trainings.train(
            self.shape,
            l0=self.l0,
            steps=self.arguments.steps,
            seed=seed,
            lr=self.lr,
            architecture=self.architecture,
            sparsity=sparsity,
            activations=self.activations,
        )
        point = None if measured["error"] else measured["points"][-1]
        run = {"seed": seed, "sparsity": sparsity, "first": next(iter(measured["points"]), None), "point": point}
        run |= {name: measured[name] for name in ("seconds", "versions", "error")}
        self.runs.append(run)
        if point is None:
            raise RuntimeError(measured["error"])
        shown = rounded({key: point[key] for key in ("l0", "fvu", "recovered", "dead") if key in point})
        say(f"{self} seed {seed} sparsity {sparsity:.4g}: {shown}, {run['seconds']:.0f} s")
        return point


def take_over(earlier: dict, result: dict) -> None:
    """What an earlier run, under the same conditions, found about the peers that are not run now."""
    for name in ("shape", "seeds", "steps", "l0"):
        now, then = ((r["shape"] if name == "shape" else r["arguments"][name]) for r in (result, earlier))
        if now != then:
            raise UsageError(f"--reuse: {name} was {then} there and is {now} now")
    for architecture, rates in result["quality"].items():
        for rate, peers in rates.items():
            found = earlier["quality"].get(architecture, {}).get(rate, {})
            peers |= {name: found.get(name) for name in peers if name not in result["arguments"]["peers"]}
    result["versions"] |= earlier["versions"]


def write(result: dict, stem: Path) -> None:
    """`stem`.json with every run, `stem`.md with the tables under a head that says where and when."""
    arguments, shape = result["arguments"], result["shape"]
    planted = f"{shape['n_features']} planted directions, {shape['mean_l0']:g} active"
    about = (
        f"{arguments['steps']} steps of {shape['batch_size']} tokens at {arguments['shape']} (d_in {shape['d_in']}, d_sae "
        f"{shape['d_sae']}, {planted if shape['n_features'] else 'activations of the bundled model'}), wanted L0 "
        f"{arguments['l0'] or shape['k']:g}, {arguments['seeds']} seeds; {arguments['parallel']} runs at a time; "
        f"{result['minutes']:.0f} minutes.\n\n"
    )
    if arguments["reuse"]:
        about += f"Run now: {', '.join(arguments['peers'])}; the others' runs are those of {arguments['reuse']}.\n\n"
    report.write(result, "Quality", tables(result["quality"]), stem, about)


def tables(quality: dict[str, dict]) -> list[str]:
    """One table per architecture and learning rate, and the errors below it."""
    parts = []
    for architecture, rates in quality.items():
        for rate, peers in rates.items():
            peers = {name: result for name, result in peers.items() if result is not None}
            if not peers:
                continue
            parts.append(f"## {architecture}, {rate_name(None if rate == 'None' else float(rate))}")
            ours = [name for name in peers if CONTESTANTS[name].worker == "ours"]
            for base in ours or ["ours"]:
                rows = compare.table({name: peer for name, peer in peers.items() if name == base or name not in ours}, base)
                parts.append(report.format_table(rows[0], rows[1:]))
            parts += [failed] if (failed := report.failures(peers).strip()) else []
    return parts


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architectures",
        type=names_among(ARCHITECTURES),
        default=list(ARCHITECTURES),
        help=f"of {','.join(ARCHITECTURES)}; default all",
    )
    parser.add_argument("--peers", type=names_among(CONTESTANTS), default=list(CONTESTANTS), help=f"of {','.join(CONTESTANTS)}")
    parser.add_argument("--shape", choices=SHAPES, default="mini", help="sizes and data; default mini")
    parser.add_argument("--l0", type=float, help="the L0 at which all are compared; default the shape's k")
    parser.add_argument("--steps", type=at_least(10), default=2000, help="training steps; default 2000")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="each with its own data and initialisation; default 3")
    parser.add_argument(
        "--lr", type=learning_rates, default=[4e-3], help="peak learning rates, each for all; `own`: their defaults"
    )
    parser.add_argument("--parallel", type=at_least(1), default=2, help="runs at a time")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads of each run")
    parser.add_argument("--reuse", type=Path, help="an earlier result (JSON) to take the peers from that are not run now")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
