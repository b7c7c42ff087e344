"""Five architectures beside installed peers on planted data: FVU at equal L0 and recovery, over several seeds, with a verdict.

    python -m benchmarks.quality
    python -m benchmarks.quality --architectures topk,gated --peers ours,sae-lens --seeds 5
    python -m benchmarks.quality --shape small --steps 2000 --lr 2e-3

README.md says how to read the table. Nothing here imports torch: the workers do, each in its own process.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/quality.py` works too

from benchmarks import compare, machine
from benchmarks.environments import python_of
from benchmarks.measure import rounded, train_and_measure
from benchmarks.peers import PEERS, Peer
from benchmarks.report import format_table
from benchmarks.shapes import SHAPES
from benchmarks.train import at_least, free_stem, names_among
from benchmarks.worker_process import WorkerProcess

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "gated", "matryoshka")
CONTESTANTS = ("ours", "ours-reviving", "sae-lens", "dictionary-learning")
# Of `ours-reviving`: what docs/architectures.md recommends where many latents die. The others have their best settings by default.
REVIVING: dict[str, dict] = {"jumprelu": {"decoder": "free", "straight_through": True, "bandwidth": 2.0}}
DECAY = 0.2  # share of the steps with a falling learning rate, for all: what every one of them recommends
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
    name = f"quality-{arguments.shape}-{date.today().isoformat()}"
    stem = free_stem(arguments.out, name)
    result = {
        "date": date.today().isoformat(),
        "machine": machine.describe(),
        "arguments": vars(arguments) | {"out": None, "reuse": arguments.reuse and arguments.reuse.name},
        "shape": vars(SHAPES[arguments.shape]),
        "load_average_start": os.getloadavg()[0],
        "versions": {},
        "quality": {a: {str(lr): dict.fromkeys(CONTESTANTS) for lr in arguments.lr} for a in arguments.architectures},
    }
    if arguments.reuse is not None:
        take_over(json.loads(arguments.reuse.read_text()), result)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers must be ended in either case
    start = perf_counter()
    for peer in arguments.peers:
        try:
            python_of(library(peer))  # one after the other, before processes start side by side
        except (RuntimeError, OSError) as error:
            say(f"{peer}: installation failed: {error}")
    lock = threading.Lock()
    contests = [
        Contest(arguments, *which)
        for which in product(arguments.architectures, arguments.peers, arguments.lr)
        if which[1] != "ours-reviving" or which[0] in REVIVING
    ]
    contests.sort(key=lambda contest: (contest.architecture, contest.peer) not in SEARCHED)  # the longest first

    def run(contest: Contest) -> None:
        outcome = contest.result()
        with lock:
            result["quality"][contest.architecture][str(contest.lr)][contest.peer] = outcome
            result["versions"][contest.peer] = outcome["versions"] or result["versions"].get(contest.peer)
            result["minutes"] = (perf_counter() - start) / 60
            result["load_average_end"] = os.getloadavg()[0]
            write(result, stem)

    folder = tempfile.TemporaryDirectory()
    arguments.activations = None
    if not SHAPES[arguments.shape].n_features:
        arguments.activations = Path(folder.name) / "activations.pt"
        rows = arguments.steps * SHAPES[arguments.shape].batch_size
        say(f"recording {rows} activations of the bundled model, and some to measure with")
        command = [sys.executable, "-m", "benchmarks.workers.recorded", str(arguments.activations), str(rows)]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    pool = ThreadPoolExecutor(arguments.parallel)
    tasks = [pool.submit(run, contest) for contest in contests]
    try:
        for task in tasks:
            task.result()
    except KeyboardInterrupt:
        say("interrupted; the workers are being ended")
        return 130
    finally:
        for contest in contests:
            contest.stop()
        pool.shutdown(cancel_futures=True)
        folder.cleanup()
        if stem.with_suffix(".md").exists():
            say(f"results: {stem.with_suffix('.md')} and {stem.with_suffix('.json').name}")
    print("\n" + tables(result["quality"]))
    return 0


def library(contestant: str) -> Peer:
    """Whose trainer a contestant runs."""
    return PEERS["ours" if contestant in ("ours", "ours-reviving") else contestant]


class Stopped(Exception):
    """The benchmark was interrupted."""


class Contest:
    """One peer's runs for one architecture: all seeds, one after the other, in one process."""

    def __init__(self, arguments: argparse.Namespace, architecture: str, peer: str, lr: float | None):
        self.arguments, self.architecture, self.peer, self.lr = arguments, architecture, peer, lr
        self.shape = SHAPES[arguments.shape]
        self.l0 = float(arguments.l0 or self.shape.k)
        self.runs: list[dict] = []
        self.worker: WorkerProcess | None = None
        self.stopped = False

    def __str__(self) -> str:
        return f"{self.architecture} {self.peer} {_rate(self.lr)}"

    def stop(self) -> None:
        """From another thread: end what is running, and begin nothing more."""
        self.stopped = True
        if self.worker is not None:
            self.worker.end()

    def result(self) -> dict:
        """`runs` (seed, sparsity, point, seconds, error), `at_l0` (one entry per seed), `versions`, `error`."""
        answer: dict = {"runs": self.runs, "at_l0": [], "error": None}
        try:
            for seed in range(self.arguments.seeds):
                points = self._search(seed) if (self.architecture, self.peer) in SEARCHED else [self._train(seed, self.l0)]
                answer["at_l0"].append(compare.at_l0(points, self.l0))
        except (RuntimeError, ValueError) as error:
            answer["error"] = str(error)
            say(f"{self} failed: {error}")
        except Stopped:
            answer["error"] = "interrupted"
        finally:
            if self.worker is not None:
                self.worker.close()
        answer["versions"] = next((run["versions"] for run in self.runs if run["versions"]), None)
        return answer

    def _search(self, seed: int) -> list[dict]:
        """Runs with an L0 on both sides of the wanted one. Later seeds begin with the two values that served the first."""
        value, sign = SEARCHED[self.architecture, self.peer]
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
        if self.stopped:
            raise Stopped
        if self.worker is None:
            log = f"{self.peer}-{self.architecture}-{self.lr or 'own'}"
            self.worker = WorkerProcess(library(self.peer), threads=self.arguments.threads, log=log)
        start = perf_counter()
        measured = train_and_measure(
            self.worker,
            self.shape,
            n_points=1,
            l0=self.l0,
            steps=self.arguments.steps,
            seed=seed,
            lr=self.lr,
            threads=self.arguments.threads,
            architecture=self.architecture,
            sparsity=sparsity,
            decay=DECAY,
            settings=REVIVING[self.architecture] if self.peer == "ours-reviving" else {},
            activations=self.arguments.activations and str(self.arguments.activations),
        )
        point = None if measured["error"] else measured["points"][-1]
        run = {"seed": seed, "sparsity": sparsity, "first": next(iter(measured["points"]), None), "point": point}
        run |= {"seconds": perf_counter() - start, "versions": measured["versions"], "error": measured["error"]}
        self.runs.append(run)
        if self.stopped:
            raise Stopped
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
            raise SystemExit(f"--reuse: {name} was {then} there and is {now} now")
    for architecture, rates in result["quality"].items():
        for rate, peers in rates.items():
            found = earlier["quality"].get(architecture, {}).get(rate, {})
            peers |= {name: found.get(name) for name in peers if name not in result["arguments"]["peers"]}
    result["versions"] |= earlier["versions"]


def write(result: dict, stem: Path) -> None:
    """`stem`.json with every run, `stem`.md with the tables under a head that says where and when."""
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    machine, arguments, shape = result["machine"], result["arguments"], result["shape"]
    versions = "\n".join(
        f"- {name}: " + ", ".join(f"{package} {number}" for package, number in versions.items())
        for name, versions in sorted(result["versions"].items())
        if versions is not None
    )
    planted = f"{shape['n_features']} planted directions, {shape['mean_l0']:g} active"
    head = (
        f"# Quality, {result['date']}\n\n"
        f"{arguments['steps']} steps of {shape['batch_size']} tokens at {arguments['shape']} (d_in {shape['d_in']}, d_sae "
        f"{shape['d_sae']}, {planted if shape['n_features'] else 'activations of the bundled model'}), wanted L0 "
        f"{arguments['l0'] or shape['k']:g}, {arguments['seeds']} seeds.\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; {arguments['parallel']} "
        f"runs at a time with {arguments['threads']} threads each; {result['minutes']:.0f} minutes; load average "
        f"{result['load_average_start']:.1f} at the start, {result['load_average_end']:.1f} at the end.\n\n{versions}\n\n"
    )
    if arguments["reuse"]:
        head += f"Run now: {', '.join(arguments['peers'])}; the others' runs are those of {arguments['reuse']}.\n\n"
    stem.with_suffix(".md").write_text(head + tables(result["quality"]))


def tables(quality: dict[str, dict]) -> str:
    """One table per architecture and learning rate, and the errors below it."""
    parts = []
    for architecture, rates in quality.items():
        for rate, peers in rates.items():
            peers = {name: result for name, result in peers.items() if result is not None}
            if not peers:
                continue
            errors = "".join(f"\n{name} failed: {result['error']}\n" for name, result in peers.items() if result["error"])
            title = f"{architecture}, {_rate(None if rate == 'None' else float(rate))}"
            parts.append(f"## {title}\n")
            ours = [name for name in peers if name.startswith("ours")]
            for base in ours or [CONTESTANTS[0]]:
                rows = compare.table({name: peer for name, peer in peers.items() if name == base or name not in ours}, base)
                parts.append(f"{format_table(rows[0], rows[1:])}\n")
            parts.append(errors)
    return "\n".join(parts)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    known = {name: name for name in ARCHITECTURES}
    contestants = {name: name for name in CONTESTANTS}
    parser.add_argument(
        "--architectures", type=names_among(known), default=list(known), help=f"of {','.join(known)}; default all"
    )
    parser.add_argument("--peers", type=names_among(contestants), default=list(contestants), help=f"of {','.join(contestants)}")
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser.parse_args(arguments)


def learning_rates(text: str) -> list[float | None]:
    return [None if part == "own" else float(part) for part in text.split(",")]


def _rate(lr: float | None) -> str:
    return "their own learning rates" if lr is None else f"learning rate {lr:g}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
