"""An index of all features of a dictionary over a corpus: our feature store, and SAEDashboard's runner.

    python -m benchmarks.index                                            # 4 of the peer's 128 feature batches: some 15 minutes
    python -m benchmarks.index --batches all                              # all of them: hours
    python -m benchmarks.index --d-sae 512 --tokens 16384 --batches all   # a minute or two

Both get the same model, dictionary and contexts, and start from the text's token ids: the model runs within what is timed. In turns: in
each round ours builds a whole store, and the peer makes the dashboards of one feature batch or more. README.md says how to read the tables.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/index.py` works too

from benchmarks import report
from benchmarks.environments import SAE_DASHBOARD
from benchmarks.measure import bare_torch_mib, workers_of
from benchmarks.options import RESULTS, at_least, free_stem, names_among, new_result, run_command, say
from benchmarks.peers import Peer
from benchmarks.ratios import beyond_torch, ratio
from benchmarks.worker_process import ROOT, WorkerProcess, output_of

OURS, THEIRS = Peer("ours", "index_ours"), SAE_DASHBOARD
CONTESTANTS = {peer.name: peer for peer in (OURS, THEIRS)}
MODEL = ROOT / "saebench" / "lm" / "builtin"
MIB = 2**20
CODE_TOLERANCE = 1e-4  # of a value, as a share of it or of 1: what two ways of computing the same code may differ by
COUNT_TOLERANCE = 1  # firings of a latent that may be another's: the last ones that TopK takes, where rounding decides
EXAMPLES = 512  # latents whose examples are compared where the peer does not say which
HEAD = (
    *("contestant", "measured", "s each", "(range)", "whole s", "x ours (range)", "CPU s whole"),
    *("start s", "peak MiB", "beyond torch", "MiB written"),
)
AGREEMENT_HEAD = (
    *("beside brute force", "latents", "density agrees", "greatest difference", "largest value agrees", "greatest difference"),
    *("examples of", "strongest agrees", "20 values, greatest difference"),
)


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, "index")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    result["bare_torch_mib"] = bare_torch_mib()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"a TopK dictionary of {arguments.d_sae} latents, and its codes by brute force")
        asked = {key: getattr(arguments, key) for key in ("tokens", "d_sae", "k", "train_tokens", "seed")}
        command = ["-m", "benchmarks.workers.index_inputs", str(folder), json.dumps(asked), str(arguments.threads)]
        result["inputs"] = json.loads(output_of(command, "no dictionary to index").splitlines()[-1])
        with workers_of([CONTESTANTS[name] for name in arguments.contestants], arguments.threads) as workers:
            site = result["inputs"]["site"]
            found = result["index"] = {worker.name: begun(worker, folder, site, arguments.threads) for worker in workers}
            result["versions"] = {name: record["versions"] for name, record in found.items()}
            plans = {worker.name: turns(found[worker.name], arguments) for worker in workers}
            for number in range(arguments.rounds):
                for worker in workers:
                    take_turn(worker, plans[worker.name][number], found[worker.name], folder)
                    write(result, stem)
                say(f"round {number + 1} of {arguments.rounds}: " + ", ".join(map(latest, found, found.values())))
            exact = Exact.read(folder)
            for worker in sorted(workers, key=lambda worker: worker.name == OURS.name):  # the peer says which latents it has
                compare(worker, found, exact, folder)
    print("\n" + write(result, stem))


def begun(worker: WorkerProcess, folder: Path, site: str, threads: int) -> dict:
    """The record of a contestant that is ready for its first turn."""
    own = folder / worker.name
    own.mkdir()
    names = {"dictionary": "dictionary", "tokens": "tokens.safetensors", "exact": "exact.safetensors"}
    job = {key: str(folder / name) for key, name in names.items()}
    answer = worker.init(folder=str(own), model=str(MODEL), site=site, threads=threads, **job) or {}
    return {"batches": None, "versions": None, "agreement": {}, "rounds": [], **answer, "error": worker.error}


def turns(record: dict, arguments: argparse.Namespace) -> list[list[int]]:
    """What a contestant does in each round: numbers of feature batches spread over all latents, or of a whole store."""
    if record["batches"] is None:
        return [[number] for number in range(arguments.rounds)]
    whole = record["batches"]
    count = whole if arguments.batches == "all" else min(whole, max(arguments.rounds, arguments.batches or arguments.rounds))
    numbers = [i * whole // count for i in range(count)]
    bounds = [i * count // arguments.rounds for i in range(arguments.rounds + 1)]
    return [numbers[first:last] for first, last in pairwise(bounds)]


def take_turn(worker: WorkerProcess, numbers: list[int], record: dict, folder: Path) -> None:
    for number in numbers:
        if record["batches"] is None:
            answer = worker.ask("build", number=number)
        else:
            answer = worker.ask("batch", number=number, numbers=str(numbers_file(folder, worker.name, number)))
        record["error"] = worker.error
        if answer is None:
            return
        record["peak_rss_mib"] = answer["peak_rss_mib"]
        if numbers.index(number) == 0:
            record["rounds"].append([])
        record["rounds"][-1].append(answer | {"number": number})


def numbers_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number}.safetensors"


def latest(name: str, record: dict) -> str:
    seconds = [part["seconds"] for turn in record["rounds"] for part in turn]
    return f"{name} " + ("failed" if record["error"] else f"{seconds[-1]:.1f} s" if seconds else "-")


# --- whole times ---


def wholes(record: dict, figure: str = "seconds") -> list[float]:
    """By rounds, what the whole index takes: the model once, and what a feature batch takes without it times the number of batches. Where
    all were measured, one figure: their sum."""
    rounds, whole = record["rounds"], record["batches"]
    if whole is None:
        return [part[figure] for turn in rounds for part in turn]
    if sum(map(len, rounds)) == whole:
        return [sum(part[figure] for turn in rounds for part in turn)]
    once = once_of(record, figure)
    each = [[part[figure] - (once if part["number"] == 0 else 0) for part in turn] for turn in rounds]
    return [once + whole * mean(turn) for turn in each]


def once_of(record: dict, figure: str) -> float:
    """What the first feature batch has that the others have not: the model, whose activations it keeps on disk. Its processor time is
    taken to be in proportion."""
    first = record["rounds"][0][0]
    model = first["parts"]["model"]
    return model if figure == "seconds" else model * first[figure] / first["seconds"]


# --- agreement ---


@dataclass(frozen=True)
class Exact:
    """Every code by brute force, by latent, the largest value first."""

    latents_N: np.ndarray
    tokens_N: np.ndarray
    values_N: np.ndarray
    ids_NS: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Exact":
        found, ids_NS = load_file(folder / "exact.safetensors"), load_file(folder / "tokens.safetensors")["ids"]
        return cls(found["latents"], found["tokens"], found["values"], ids_NS)

    def under(self, rule: dict) -> "Exact":
        """Without the tokens that a contestant leaves out."""
        ids_N, positions_N = self.ids_NS.ravel()[self.tokens_N], self.tokens_N % self.ids_NS.shape[1]
        kept = ~(np.isin(ids_N, rule["ignored_ids"]) | np.isin(positions_N, rule["ignored_positions"]))
        return Exact(self.latents_N[kept], self.tokens_N[kept], self.values_N[kept], self.ids_NS)

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of a latent."""
        first, last = np.searchsorted(self.latents_N, (latent, latent + 1))
        return self.tokens_N[first:last], self.values_N[first:last]


def compare(worker: WorkerProcess, found: dict[str, dict], exact: Exact, folder: Path) -> None:
    """What a contestant says of its latents beside brute force, to its record."""
    record = found[worker.name]
    if record["error"] or not record["rounds"]:
        return
    if record["batches"] is None:
        files = [folder / f"{worker.name}.safetensors"]
        worker.ask("numbers", tops=examples_of(found, folder, int(exact.latents_N.max()) + 1), numbers=str(files[0]))
        record["error"] = worker.error
        if worker.error:
            return
    else:
        files = [numbers_file(folder, worker.name, part["number"]) for turn in record["rounds"] for part in turn]
    parts = [load_file(file) for file in files]
    said = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    record["agreement"] |= agreement(said, exact.under(record["rule"]), record["rule"])


def examples_of(found: dict[str, dict], folder: Path, d_sae: int) -> list[int]:
    """The latents that the peer has made dashboards of, or some of all."""
    theirs = found.get(THEIRS.name)
    if theirs is None or theirs["error"]:
        return list(range(0, d_sae, max(1, d_sae // EXAMPLES)))
    files = [numbers_file(folder, THEIRS.name, part["number"]) for turn in theirs["rounds"] for part in turn]
    return [int(latent) for file in files for latent in load_file(file)["latents"]]


def agreement(said: dict[str, np.ndarray], exact: Exact, rule: dict) -> dict:
    """How many latents agree within what the contestant rounds by, and the greatest differences."""
    num_tokens, (absolute, relative) = rule["num_tokens"], rule["value_rounding"]

    def value_tolerance(value: float) -> float:
        return absolute + relative * value + CODE_TOLERANCE * max(1.0, value)

    counts, values, agree = [], [], {"density": 0, "max": 0, "strongest": 0}
    for latent, density, largest in zip(said["latents"], said["density"], said["max"], strict=True):
        _, exact_values = exact.of(int(latent))
        exact_largest = float(exact_values[0]) if len(exact_values) else 0.0
        counts.append(abs(density * num_tokens - len(exact_values)))
        values.append(abs(largest - exact_largest))
        agree["density"] += counts[-1] <= COUNT_TOLERANCE + rule["density_rounding"] * num_tokens
        agree["max"] += values[-1] <= value_tolerance(exact_largest)
    top_differences, fire = [], 0
    for latent, tokens, top_values in zip(said["top_latents"], said["top_tokens"], said["top_values"], strict=True):
        exact_tokens, exact_values = exact.of(int(latent))
        expected = np.zeros(len(top_values))
        expected[: len(exact_values)] = exact_values[: len(expected)]
        top_differences.append(float(np.abs(top_values - expected).max()))
        if len(exact_values):
            fire += 1
            there, strongest = exact_values[exact_tokens == tokens[0]], float(exact_values[0])
            agree["strongest"] += len(there) > 0 and strongest - float(there[0]) <= value_tolerance(strongest)
    return {
        "latents": len(said["latents"]),
        "density_agrees": int(agree["density"]),
        "density_difference": float(max(counts)) / num_tokens,
        "max_agrees": int(agree["max"]),
        "max_difference": float(max(values)),
        "examples_of": fire,
        "strongest_agrees": int(agree["strongest"]),
        "top_difference": max(top_differences),
    }


# --- tables ---


def write(result: dict, stem: Path) -> str:
    """The tables, also on disk."""
    records, given, inputs = result["index"], result["arguments"], result["inputs"]
    ours = _timed(records.get(OURS.name))
    rows = [[name, *_cells(record, ours, result["bare_torch_mib"])] for name, record in records.items()]
    tables = [report.format_table(list(HEAD), rows) + report.failures(records)]
    tables += [table for name, record in records.items() if (table := _parts_table(name, record))]
    compared = {name: record["agreement"] for name, record in records.items() if "latents" in record["agreement"]}
    rows = [[name, *_agreement_cells(agreed)] for name, agreed in compared.items()]
    if rows:
        tables.append(report.format_table(list(AGREEMENT_HEAD), rows))
    about = (
        f"The bundled model's {inputs['site']}, {inputs['contexts']} contexts of {inputs['context_size']} tokens, TopK with "
        f"{given['d_sae']} latents, k {given['k']}, trained on {given['train_tokens']} tokens ({inputs['silent']} latents never fire).\n"
        + "".join(map(_measured, records.values()))
        + "\n"
    )
    report.write(result, "An index of all features", tables, stem, about)
    return "\n\n".join(tables) + "\n"


def _measured(record: dict) -> str:
    """What of the peer's time was measured and what was multiplied, in plain words."""
    whole, done = record["batches"], sum(map(len, record["rounds"]))
    if whole is None or not done:
        return ""
    latents = f"feature batches of {record['features_in_batch']} latents"
    if done == whole:
        return f"\nsae-dashboard: all {whole} {latents} were measured.\n"
    return (
        f"\nsae-dashboard: **{done} of {whole} {latents} were measured; whole s is not measured**, but is the model once plus {whole} "
        f"times the mean of a measured batch without the model.\n"
    )


def _timed(record: dict | None) -> dict | None:
    """Whole seconds by round, as `ratio` takes them."""
    if record is None or record["error"] or not record["rounds"]:
        return None
    return {"seconds": wholes(record), "error": None}


def _cells(record: dict, ours: dict | None, bare_mib: float) -> list[str]:
    timed = _timed(record)
    if timed is None:
        return ["failed" if record["error"] else "-", *["-"] * (len(HEAD) - 2)]
    parts = [part for turn in record["rounds"] for part in turn]
    each, whole, batches = [part["seconds"] for part in parts], timed["seconds"], record["batches"]
    if ours is None:
        against = "-"
    elif len(whole) == len(ours["seconds"]):
        against = str(ratio(timed, ours))
    else:
        against = f"{median(whole) / median(ours['seconds']):.2f}"
    return [
        f"{len(parts)} of {batches} batches" if batches else f"whole, {len(parts)} times",
        f"{median(each):.1f}",
        f"{min(each):.1f}-{max(each):.1f}",
        f"{median(whole):.1f}",
        against,
        f"{median(wholes(record, 'cpu_seconds')):.1f}",
        f"{record['start_seconds']:.1f}",
        f"{record['peak_rss_mib']:.0f}",
        f"{beyond_torch(record, bare_mib):.0f}",
        f"{mean(part['bytes'] for part in parts) * (batches or 1) / MIB:.0f}",
    ]


def _parts_table(name: str, record: dict) -> str:
    """Where the time of what was measured went, largest first; the model, which runs in the first batch only, apart."""
    if record["error"] or not record["rounds"]:
        return ""
    measured = [part["parts"] for turn in record["rounds"] for part in turn]
    sums = {key: sum(parts.get(key, 0.0) for parts in measured) for key in measured[0]}
    once = record["batches"] is not None
    pieces = {key: total for key, total in sums.items() if not (once and key == "model")}
    rows = [
        [key, f"{total / len(measured):.2f}", f"{100 * total / sum(pieces.values()):.0f} %"]
        for key, total in sorted(pieces.items(), key=lambda item: -item[1])
    ]
    if once:
        rows.append(["the model, once", f"{sums['model']:.2f}", "-"])
    return report.format_table([f"{name}: part", "s of a feature batch" if once else "s", "share"], rows)


def _agreement_cells(found: dict) -> list[str]:
    return [
        f"{found['latents']}",
        f"{found['density_agrees']}",
        f"{found['density_difference']:.1e}",
        f"{found['max_agrees']}",
        f"{found['max_difference']:.1e}",
        f"{found['examples_of']}",
        f"{found['strongest_agrees']}",
        f"{found['top_difference']:.1e}",
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--contestants", type=names_among(CONTESTANTS), default=list(CONTESTANTS), help=f"of {','.join(CONTESTANTS)}; default all"
    )
    parser.add_argument("--rounds", type=at_least(1), default=4, help="in each ours builds a whole store")
    parser.add_argument(
        "--batches", type=some_or_all, help="feature batches of the peer, one a round at least, or `all`; default one a round"
    )
    parser.add_argument("--tokens", type=at_least(1024), default=131_072, help="tokens of the corpus, in contexts of 256")
    parser.add_argument("--d-sae", type=at_least(1), default=16_384, help="latents")
    parser.add_argument("--k", type=at_least(1), default=32)
    parser.add_argument("--train-tokens", type=at_least(1), default=65_536, help="tokens that the dictionary is trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of each contestant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


def some_or_all(text: str) -> int | str:
    """An argument type: `all`, or a number of at least 1."""
    return text if text == "all" else at_least(1)(text)


if __name__ == "__main__":
    sys.exit(main())
