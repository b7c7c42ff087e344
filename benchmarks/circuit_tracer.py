"""Attribution graphs: ours and circuit-tracer's, edge by edge on the same models and transcoders, and what each costs.

    python -m benchmarks.circuit_tracer                                      # some ten minutes
    python -m benchmarks.circuit_tracer --lengths 32,128 --rounds 1          # two minutes

Both get the models and JumpReLU transcoders of `workers/circuit_inputs.py` from local files. On one short prompt both make the whole
graph, every active feature a node and every edge kept. These are compared edge by edge; circuit-tracer's own file of its graph is read and
compared too, and ours is given to its classes. Then both make a graph of at most `--features` features at each length, in turns.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/circuit_tracer.py` works too

from benchmarks import report
from benchmarks.environments import CIRCUIT_TRACER as THEIRS
from benchmarks.measure import workers_of
from benchmarks.options import RESULTS, at_least, free_stem, new_result, run_command, say
from benchmarks.peers import Peer
from benchmarks.worker_process import WorkerProcess, output_of
from saebench.circuits import Graph, load_graph
from saebench.errors import UserError
from saebench.interop import read_circuit_tracer
from saebench.interop.circuit_tracer_schema import validate

OURS = Peer("ours", "circuit_ours")
MODELS = ("llama", "bundled")
STRONG = 0.01  # of the strongest edge into a target: edges whose own relative difference is looked at
COST_HEAD = (
    *("model and prompt", "graph of", "active features", "nodes", "edges kept", "s", "(range)", "x ours", "CPU s"),
    "peak MiB",
)
AGREEMENT_HEAD = (
    *("model, sources", "features of both", "of ours only", "of theirs only", "their influence", "edges", "largest difference"),
    *("of edges above 1 %", "largest relative difference"),
)


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, "circuit-tracer")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    result |= {"agreement": {}, "files": {}, "costs": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("models, transcoders and prompts")
        asked = {
            "lengths": [arguments.whole, *arguments.lengths],
            "d_sae": arguments.d_sae,
            "l0": arguments.l0,
            "seed": arguments.seed,
        }
        command = ["-m", "benchmarks.workers.circuit_inputs", str(folder), json.dumps(asked), str(arguments.threads)]
        output_of(command, "no transcoders to trace through")
        with workers_of([OURS, THEIRS], arguments.threads) as workers:
            starts = {w.name: w.init(folder=str(folder), threads=arguments.threads, batch=arguments.batch) for w in workers}
            result["versions"] = {name: start and start["versions"] for name, start in starts.items()}
            for model in MODELS:
                loaded = {worker.name: worker.ask("load", model=model) for worker in workers}
                compare(workers, model, arguments.whole, folder, result)
                time_them(workers, model, arguments, loaded, result, lambda: write(result, stem))
            result["errors"] = {worker.name: {"error": worker.error} for worker in workers}
    print("\n" + write(result, stem))


# --- agreement ---


def compare(workers: list[WorkerProcess], model: str, length: int, folder: Path, result: dict) -> None:
    """The whole graphs of both, edge by edge, and each other's files."""
    say(f"{model}: whole graphs of {length} tokens")
    paths = {worker.name: folder / f"{worker.name}-{model}" for worker in workers}
    for worker in workers:
        worker.ask("whole", length=length, out=str(paths[worker.name]))
    ours, theirs = paths[OURS.name], paths[THEIRS.name]
    taken = workers[1].ask("accepts", path=f"{ours}-export.json")
    if any(worker.error for worker in workers):
        return
    graph = load_graph(f"{ours}.json")
    result["agreement"][model] = agreement(graph, load_file(f"{theirs}.safetensors"))
    result["files"][model] = {"taken": taken, **file_agreement(graph, Path(f"{theirs}.json"))}


def agreement(graph: Graph, theirs: dict[str, np.ndarray]) -> dict:
    """Edges of both by kind of source: those into features and logits that both have."""
    positions = len(graph.ids)
    layers = (len(theirs["adjacency"]) - len(theirs["features"]) - positions - len(theirs["logit_tokens"])) // positions
    names = [f"feature/mlp-{layer}/{position}/{latent}" for layer, position, latent in theirs["features"].tolist()]
    ends = [len(names)]
    names += [f"error/blocks.{layer}.hook_mlp_out/{position}" for layer in range(layers) for position in range(positions)]
    ends.append(len(names))
    names += [f"token/{position}" for position in range(positions)]
    ends.append(len(names))
    names += [f"logit/{positions - 1}/{token}" for token in theirs["logit_tokens"].tolist()]
    numbers = {graph.id(number): number for number in range(len(graph))}
    rows = np.array([numbers.get(name, -1) for name in names])
    matrix = graph.matrix().toarray()
    found_NN = matrix[np.ix_(rows, rows)] * (rows >= 0)[:, None] * (rows >= 0)
    targets = np.array([name.startswith(("feature", "logit")) for name in names]) & (rows >= 0)
    found_NN = found_NN[targets]
    features = {name for name in numbers if name.startswith("feature")}
    alone = np.array([name not in features for name in names[: ends[0]]])
    influence_N = influence(theirs["adjacency"], theirs["logit_probabilities"])[: ends[0]]
    sides = {
        "both": len(features & set(names[: ends[0]])),
        "ours_only": len(features - set(names[: ends[0]])),
        "theirs_only": int(alone.sum()),
        "influence_of_theirs_only": float(influence_N[alone].max(initial=0.0)),
    }
    by_kind = {}
    parts = [("feature", "adjacency", 0, ends[0]), ("error", "adjacency", *ends[:2]), ("token", "adjacency", *ends[1:])]
    for kind, matrix, first, last in [*parts, ("token with its position", "adjacency_with_positions", *ends[1:])]:
        part, said_NN = slice(first, last), theirs[matrix][targets]
        strongest_N = np.abs(said_NN).max(1, keepdims=True)
        difference_NN = np.abs(found_NN - said_NN)
        strong = np.abs(said_NN[:, part]) > STRONG * strongest_N
        relative = difference_NN[:, part][strong] / np.abs(said_NN[:, part][strong])
        by_kind[kind] = {
            "edges": int((said_NN[:, part] != 0).sum()),
            "difference": float((difference_NN[:, part] / strongest_N).max()),
            "strong": int(strong.sum()),
            "relative": float(relative.max(initial=0.0)),
        }
    return {"features": sides, "sources": by_kind}


def influence(adjacency: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What comes through each node of all that comes to the logits, which are the last."""
    shares = np.abs(adjacency) / np.maximum(np.abs(adjacency).sum(1, keepdims=True), 1e-30)
    wave = np.zeros(len(shares))
    wave[-len(weights) :] = weights
    total = np.zeros(len(shares))
    while wave.any():
        wave = wave @ shares
        total += wave
    return total


def file_agreement(graph: Graph, path: Path) -> dict:
    """circuit-tracer's own file: what the validator says, and its links beside our edges."""
    problems = validate(json.loads(path.read_text()))
    found = {"bytes": path.stat().st_size, "problems": problems}
    try:
        read = read_circuit_tracer(path)
    except UserError as error:
        return found | {"refused": str(error).replace(str(path), path.name)}
    numbers = {graph.id(number): number for number in range(len(graph))}
    matrix, differences = graph.matrix().toarray(), {"token": [], "other": []}
    for target in range(len(read)):
        edges = read.edges_into(target)
        strongest = max((abs(weight) for _, weight in edges), default=1.0)
        for source, weight in edges:
            beside = abs(matrix[numbers[read.id(target)], numbers[read.id(source)]] - weight) / strongest
            differences["token" if read.id(source).startswith("token") else "other"].append(beside)
    return found | {
        "nodes": len(read),
        "links": read.num_edges,
        "difference": float(max(differences["other"], default=0.0)),
        "of_tokens": float(max(differences["token"], default=0.0)),
    }


# --- cost ---


def time_them(workers: list[WorkerProcess], model: str, arguments: argparse.Namespace, loaded: dict, result: dict, keep) -> None:
    """In turns, from the shortest prompt to the longest, so that peaks of memory are of the length that they stand beside."""
    for worker in workers:
        worker.ask("trace", length=arguments.whole, features=arguments.features)  # what is made once only is made here
    for length in sorted(arguments.lengths):
        found = result["costs"].setdefault(f"{model}, {length} tokens", {worker.name: [] for worker in workers})
        for _ in range(arguments.rounds):
            for worker in workers:
                if (answer := worker.ask("trace", length=length, features=arguments.features)) is not None:
                    found[worker.name].append(answer | {"loaded_mib": loaded[worker.name]["loaded_mib"]})
        said = [f"{name} {median(part['seconds'] for part in parts):.1f} s" for name, parts in found.items() if parts]
        say(f"{model}, {length} tokens: {', '.join(said)}")
        keep()


# --- tables ---


def write(result: dict, stem: Path) -> str:
    """The tables, also on disk."""
    given = result["arguments"]
    rows = [
        [f"{model}, {kind}", *_agreement_cells(found["features"], cells)]
        for model, found in result["agreement"].items()
        for kind, cells in found["sources"].items()
    ]
    tables = [report.format_table(list(AGREEMENT_HEAD), rows)] if rows else []
    tables += [_file_line(model, found) for model, found in result["files"].items()]
    rows = [
        [where, *_cost_cells(name, parts, found[OURS.name])]
        for where, found in result["costs"].items()
        for name, parts in found.items()
    ]
    if rows:
        tables.append(report.format_table(list(COST_HEAD), rows) + report.failures(result.get("errors", {})))
    about = (
        f"4 layers of width 256 each: a Llama with random weights, and the bundled model. Transcoders of every MLP, JumpReLU, "
        f"{given['d_sae']} latents. Agreement: whole graphs of {given['whole']} tokens, differences as shares of the strongest edge into "
        f"their target; relative ones of edges above {STRONG:.0%} of it. Cost: at most {given['features']} features, medians of "
        f"{given['rounds']} rounds taken in turns; circuit-tracer with batches of {given['batch']}. Other work ran on the machine "
        "meanwhile: times are rough. Peaks are of the process; one makes the graphs of both models in turn, so that those of the second "
        "contain what it kept of the first, some 0.2 GiB.\n\n"
        "circuit-tracer's tokens are embeddings alone; ours are what the stream begins with, positions of the bundled model included, so "
        "that edges into a node add up. Counted its way these edges differ where a model has positions; with positions added to its tokens "
        "they agree. Features that nothing of the targets comes through are nodes of its graphs alone.\n\n"
    )
    report.write(result, "Attribution graphs beside circuit-tracer", tables, stem, about)
    return "\n\n".join(tables) + "\n"


def _agreement_cells(features: dict, cells: dict) -> list[str]:
    figures = [f"{cells['edges']:,}", f"{cells['difference']:.1e}", f"{cells['strong']:,}", f"{cells['relative']:.1e}"]
    names = [f"{features[key]:,}" for key in ("both", "ours_only", "theirs_only")]
    return [*names, f"{features['influence_of_theirs_only']:.0e}", *figures]


def _file_line(model: str, found: dict) -> str:
    taken = f"{model}: circuit-tracer's classes take our file ({found['taken']['nodes']:,} nodes, {found['taken']['links']:,} links); "
    if "refused" in found:
        return taken + f"its own file is refused: {found['refused']}."
    return taken + (
        f"its own file ({found['bytes'] / 1e6:.1f} MB, {found['nodes']:,} nodes, {found['links']:,} links) is read with no problem found; "
        f"its weights differ from our edges by at most {found['difference']:.1e} of the strongest link into their target, "
        f"those of tokens by {found['of_tokens']:.1e}."
    )


def _cost_cells(name: str, parts: list[dict], ours: list[dict]) -> list[str]:
    if not parts:
        return [name, "failed", *["-"] * (len(COST_HEAD) - 3)]
    seconds, last = [part["seconds"] for part in parts], parts[-1]
    peak = max(part["peak_mib"] for part in parts)
    return [
        name,
        f"{last['active']:,}",
        f"{last['nodes']:,}",
        f"{last['edges']:,}",
        f"{median(seconds):.2f}",
        f"{min(seconds):.2f}-{max(seconds):.2f}",
        f"{median(seconds) / median(part['seconds'] for part in ours):.2f}" if ours else "-",
        f"{median(part['cpu_seconds'] for part in parts):.2f}",
        f"{peak:.0f}",
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuit_tracer", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=numbers, default=[32, 128, 256, 512], help="tokens of prompts; default 32,128,256,512")
    parser.add_argument("--whole", type=at_least(2), default=12, help="tokens of the prompt whose whole graphs are compared")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--features", type=at_least(1), default=1024, help="features of a graph, at most")
    parser.add_argument(
        "--batch", type=at_least(1), default=16, help="of circuit-tracer, which keeps as many copies of the prompt"
    )
    parser.add_argument("--d-sae", type=at_least(1), default=2048, help="latents of a transcoder")
    parser.add_argument("--l0", type=at_least(1), default=16, help="of these active on a token, where thresholds are set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of each contestant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


def numbers(text: str) -> list[int]:
    """An argument type: whole numbers with commas between them."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text} is no list such as 32,128")
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
