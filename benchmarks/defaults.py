"""The sweep behind our default settings: every library at many learning rates, and our settings one by one.

    python -m benchmarks.defaults                                   # all of it: some hours on two cores
    python -m benchmarks.defaults --data mini --study rates --peers ours,sae-lens --rates own,4e-3 --seeds 1

Study `rates` trains ours and the peers with their default settings at each learning rate; study `settings` trains ours with one setting
changed at a time. Every point goes to the JSON file as soon as it is known, and a point that is there is not measured again: run the same
command after an interruption, or with more rates or seeds. README.md says how to read the tables.
"""

import argparse
import json
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/defaults.py` works too

from benchmarks import report
from benchmarks.compare import at_l0
from benchmarks.measure import rounded
from benchmarks.options import RESULTS, UsageError, at_least, learning_rates, names_among, new_result, run_command, say
from benchmarks.peers import ARCHITECTURES, PEERS, Peer
from benchmarks.shapes import SHAPES
from benchmarks.trainings import Stopped, Trainings, install, recorded_activations, run_side_by_side

DATA = ("mini", "builtin")
RATES = "own,5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2"
SETTINGS_RATES = "own,2e-3,4e-3,8e-3"
CONTESTANTS = ("ours", "sae-lens", "sparsify", "sparsify-adam", "dictionary-learning")
DEFAULT = "default"
# Changes to our defaults, as fields of the workers' Job.
VARIANTS: dict[str, dict] = {
    "warm-up 0.02": {"warmup": 0.02},
    "warm-up 0.05": {"warmup": 0.05},
    "warm-up 0.2": {"warmup": 0.2},
    "initial_bias mean": {"settings": {"initial_bias": "mean"}},
    "initial_bias zero": {"settings": {"initial_bias": "zero"}},
    "initial_norm 0.03": {"settings": {"initial_norm": 0.03}},
    "initial_norm 0.1": {"settings": {"initial_norm": 0.1}},
    "initial_norm 0.3": {"settings": {"initial_norm": 0.3}},
    "initial_norm 1": {"settings": {"initial_norm": 1.0}},
    "decoder unit": {"settings": {"decoder": "unit"}},
    "aux_coefficient 0": {"settings": {"aux_coefficient": 0.0}},
    "aux_coefficient 1/128": {"settings": {"aux_coefficient": 1 / 128}},
    "aux_coefficient 1/8": {"settings": {"aux_coefficient": 1 / 8}},
}
Keep = Callable[[str, dict], None]  # takes the key of a point and what was found
SHOWN = {"fvu": ("FVU", 4), "recovered": ("recovered", 3), "dead": ("dead", 3)}


def main() -> int:
    arguments = parse(sys.argv[1:])
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / arguments.name
    return run_command(lambda: run(arguments, stem), stem)


def run(arguments: argparse.Namespace, stem: Path) -> None:
    result = begun(arguments, stem)
    install([PEERS[name] for name in arguments.peers])
    lock = threading.Lock()

    def keep(key: str, record: dict) -> None:
        with lock:
            result["points"][key] = record
            result["versions"][key.split("/")[2]] = record["versions"]
            write(result, stem)

    for data in arguments.data:
        series = [each for each in planned(arguments, data, keep) if each.missing(result["points"])]
        if not series:
            say(f"{data}: nothing is missing")
            continue
        with recorded_activations(data, arguments.steps) as activations:
            for each in series:
                each.activations = activations
            run_side_by_side(series, arguments.parallel, lambda each: each.run())
    print("\n" + "\n\n".join(write(result, stem)))


def begun(arguments: argparse.Namespace, stem: Path) -> dict:
    """The result to go on with. Raises UsageError where the file holds trainings of another length."""
    path = stem.with_suffix(".json")
    fresh = new_result(arguments) | {"steps": arguments.steps, "points": {}}
    if not path.exists():
        return fresh
    found = json.loads(path.read_text())
    if found["steps"] != arguments.steps:
        raise UsageError(f"{path.name} holds trainings of {found['steps']} steps, not {arguments.steps}: use another --name")
    return fresh | {name: found[name] for name in ("points", "versions")}


def planned(arguments: argparse.Namespace, data: str, keep: Keep) -> Iterator["Series"]:
    rates = dict.fromkeys(arguments.rates if "rates" in arguments.study else ())
    beside = dict.fromkeys(arguments.settings_rates if "settings" in arguments.study else ())
    for architecture in arguments.architectures:
        for peer in (PEERS[name] for name in arguments.peers):
            its_rates = [*(rates | beside if peer.name == "ours" else rates)]
            if architecture in peer.architectures and its_rates:
                yield Series(arguments, data, architecture, peer, DEFAULT, its_rates, keep)
        for variant in arguments.variants if beside and "ours" in arguments.peers else ():
            yield Series(arguments, data, architecture, PEERS["ours"], variant, [*beside], keep)


class Series:
    """One contestant with one set of settings: all rates and seeds, one after the other, in one process."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        data: str,
        architecture: str,
        peer: Peer,
        variant: str,
        rates: list[float | None],
        keep: Keep,
    ):
        self.arguments, self.data, self.architecture, self.peer, self.variant = arguments, data, architecture, peer, variant
        self.shape, self.rates, self.keep = SHAPES[data], rates, keep
        self.activations: str | None = None
        self.trainings = Trainings(peer, threads=arguments.threads, log=f"defaults-{peer.name}-{architecture}-{data}")
        self._todo: list[tuple[int, float | None]] = []

    def key(self, lr: float | None, seed: int) -> str:
        return "/".join((self.data, self.architecture, self.peer.name, self.variant.replace("/", ":"), rate_key(lr), str(seed)))

    def missing(self, points: dict[str, dict]) -> bool:
        """Whether something is left to do; what failed is tried again."""
        every = product(range(self.arguments.seeds), self.rates)  # whole seeds first: an early look compares all rates
        self._todo = [(seed, lr) for seed, lr in every if points.get(self.key(lr, seed), {"error": True})["error"]]
        return bool(self._todo)

    def run(self) -> None:
        try:
            for seed, lr in self._todo:
                self._train(seed, lr)
        except Stopped:
            pass
        finally:
            self.trainings.close()

    def _train(self, seed: int, lr: float | None) -> None:
        measured = self.trainings.train(
            self.shape,
            l0=float(self.shape.k),
            steps=self.arguments.steps,
            seed=seed,
            lr=lr,
            architecture=self.architecture,
            sparsity=None,
            activations=self.activations,
            **VARIANTS.get(self.variant, {}),
        )
        record = {name: measured[name] for name in ("seconds", "versions", "error")}
        record["point"] = None if measured["error"] else measured["points"][-1]
        key = self.key(lr, seed)
        self.keep(key, record)
        say(f"{key}: {record['error'] or shown(record['point'])}, {record['seconds']:.0f} s")


def rate_key(lr: float | None) -> str:
    return "own" if lr is None else f"{lr:g}"


def shown(point: dict) -> dict:
    return rounded({name: point[name] for name in ("fvu", "l0", "dead", "recovered") if name in point})


def write(result: dict, stem: Path) -> list[str]:
    """The tables, also on disk."""
    tables = []
    groups = dict.fromkeys(tuple(key.split("/")[:2]) for key in result["points"])
    for data, architecture in groups:
        k, found = SHAPES[data].k, gathered(result["points"], data, architecture)
        sizes = SHAPES[data]
        tables.append(f"## {architecture} on {data} (d_in {sizes.d_in}, d_sae {sizes.d_sae}, k {k}, batch {sizes.batch_size})")
        tables += [table for table in (rates_table(found), best_table(found), settings_table(found)) if table]
    about = (
        f"{result['steps']} steps, a tenth of them warm-up unless another share is named; a star marks the least mean FVU of a row; "
        "± is the standard deviation over seeds.\n\n"
    )
    report.write(result, "Learning rates and default settings", tables, stem, about)
    return tables


Found = dict[tuple[str, str], dict[str, list[dict]]]  # (peer, variant) to rate to figures at the wanted L0, one for each seed


def gathered(points: dict[str, dict], data: str, architecture: str) -> Found:
    found: Found = {}
    for key, record in points.items():
        its_data, its_architecture, peer, variant, rate, _ = key.split("/")
        if (its_data, its_architecture) == (data, architecture) and not record["error"]:
            figures = at_l0([record["point"]], float(SHAPES[data].k)) | {"l0": record["point"]["l0"]}
            found.setdefault((peer, variant), {}).setdefault(rate, []).append(figures)
    return found


def rates_in(found: Found) -> list[str]:
    rates = {rate for row in found.values() for rate in row}
    return sorted(rates, key=lambda rate: 0.0 if rate == "own" else float(rate))


def best(row: dict[str, list[dict]]) -> str:
    """The rate with the least mean FVU."""
    return min(row, key=lambda rate: mean(figures["fvu"] for figures in row[rate]))


def rates_table(found: Found, *, settings: bool = False) -> str:
    """FVU of each contestant (or of each of our settings) at each rate."""
    rows = {key: row for key, row in found.items() if settings == (key[1] != DEFAULT) or (settings and key[0] == "ours")}
    rates = rates_in(rows)
    cells = []
    for (peer, variant), row in rows.items():
        star = best(row)
        at = [f"{cell(row[rate], 'fvu')}{' *' if rate == star else ''}" if rate in row else "-" for rate in rates]
        cells.append([variant.replace(":", "/") if settings else peer, *at])
    return report.format_table(["FVU at learning rate", *rates], cells) if cells else ""


def best_table(found: Found, *, settings: bool = False) -> str:
    """Each contestant at its best rate and at its own default; how much more error ours leaves at the default than that."""
    rows = {key: row for key, row in found.items() if (key[1] == DEFAULT) != settings or (settings and key[0] == "ours")}
    ours = found.get(("ours", DEFAULT), {}).get("own")
    head = [
        "at its best rate",
        "rate",
        *(label for label, _ in SHOWN.values()),
        "L0",
        "seeds",
        "FVU of ours at its default / this",
    ]
    cells = []
    for (peer, variant), row in rows.items():
        figures = row[best(row)]
        over = f"{mean(f['fvu'] for f in ours) / mean(f['fvu'] for f in figures):.3f}" if ours else "-"
        l0 = f"{mean(each['l0'] for each in figures):.1f}"
        name = variant.replace(":", "/") if settings else peer
        cells.append([name, best(row), *(cell(figures, key) for key in SHOWN), l0, str(len(figures)), over])
    return report.format_table(head, cells) if cells else ""


def settings_table(found: Found) -> str:
    """Our settings one by one, beside the default."""
    if not any(variant != DEFAULT for _, variant in found):
        return ""
    return f"### Settings of ours\n\n{rates_table(found, settings=True)}\n\n{best_table(found, settings=True)}"


def cell(figures: list[dict], key: str) -> str:
    values, digits = [each[key] for each in figures if key in each], SHOWN[key][1]
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=names_among(SHAPES), default=list(DATA), help=f"of {','.join(SHAPES)}; default {','.join(DATA)}"
    )
    parser.add_argument("--study", type=names_among(("rates", "settings")), default=["rates", "settings"], help="default both")
    parser.add_argument("--architectures", type=names_among(ARCHITECTURES), default=["topk"], help="default topk")
    parser.add_argument("--peers", type=names_among(PEERS), default=list(CONTESTANTS), help=f"default {','.join(CONTESTANTS)}")
    parser.add_argument("--rates", type=learning_rates, default=RATES, help=f"default {RATES}; `own`: each library's default")
    parser.add_argument("--settings-rates", type=learning_rates, default=SETTINGS_RATES, help=f"default {SETTINGS_RATES}")
    parser.add_argument("--variants", type=names_among(VARIANTS), default=list(VARIANTS), help="settings to try; default all")
    parser.add_argument("--steps", type=at_least(10), default=2000, help="training steps; default 2000")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="each with its own data and initialisation; default 3")
    parser.add_argument("--parallel", type=at_least(1), default=2, help="runs at a time")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads of each run")
    parser.add_argument("--name", default="defaults", help="of the result files, which are continued where they exist")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
