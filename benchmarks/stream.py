"""From language model to trained dictionary: our streaming training, sae-lens' own runner, and the model's forward pass alone.

    python -m benchmarks.stream                       # some ten minutes
    python -m benchmarks.stream --rounds 2 --contestants ours,forward-read

All of them go over the same contexts of the bundled text, in turns of some dozen steps; whose turn it is not is halted with all its
threads. README.md says how to read the table.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/stream.py` works too

from benchmarks import report
from benchmarks.measure import bare_torch_mib, workers_of
from benchmarks.options import RESULTS, at_least, free_stem, names_among, new_result, run_command, say
from benchmarks.peers import SAE_LENS, Peer
from benchmarks.ratios import beyond_torch, ratio
from benchmarks.trainings import DECAY
from benchmarks.worker_process import WorkerProcess, output_of

CONTESTANTS = {
    peer.name: peer
    for peer in (
        Peer("ours", "stream_ours"),
        Peer("sae-lens", "stream_sae_lens", SAE_LENS, job={"how": "HookedTransformer"}),
        Peer("sae-lens-hf", "stream_sae_lens", SAE_LENS, job={"how": "AutoModelForCausalLM"}),
        Peer("forward-read", "stream_forward", job={"how": "read"}, trains=False),
        Peer("forward-plain", "stream_forward", job={"how": "plain"}, trains=False),
        Peer("forward-whole", "stream_forward", job={"how": "whole"}, trains=False),
    )
}
UNCOUNTED = 1  # turns at the beginning: buffers fill up, memory is allocated
FAIR_TURN = (
    2 * 65_536
)  # tokens: ours reads groups of 65,536 at once, and a shorter turn may have more or less than its share of reading
HEAD = ("contestant", "tok/s", "(range)", "CPU s per M tokens", "start s", "peak MiB", "beyond torch", "FVU", "L0", "dead")
AGAINST = {"ours": ("forward-read", "forward-plain", "forward-whole", "sae-lens", "sae-lens-hf")}
AGAINST |= {name: ("forward-read", "forward-plain") for name in ("sae-lens", "sae-lens-hf")}


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, "stream")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    result["bare_torch_mib"] = bare_torch_mib()
    turn = arguments.steps_per_turn * arguments.batch_size
    if turn < FAIR_TURN:
        say(f"turns of {turn} tokens are for trying things out: speeds need {FAIR_TURN} at least")
    # One step more than there are turns for: a run must not end within a turn.
    num_tokens = (arguments.rounds + UNCOUNTED) * turn + arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.pt"
        output_of(["-m", "benchmarks.workers.contexts", str(tokens), str(num_tokens)], "no contexts of the bundled text")
        job = {name: getattr(arguments, name) for name in ("d_sae", "k", "batch_size", "lr", "seed", "threads")}
        job |= {"tokens": str(tokens), "num_tokens": num_tokens, "decay": DECAY}
        with workers_of([CONTESTANTS[name] for name in arguments.contestants], arguments.threads) as workers:
            speeds = result["stream"] = {worker.name: begun(worker, job) for worker in workers}
            result["versions"] = {name: found["versions"] for name, found in speeds.items()}
            for number in range(arguments.rounds + UNCOUNTED):
                for worker in workers:
                    take_turn(worker, turn, speeds[worker.name], counted=number >= UNCOUNTED)
                say(f"turn {number + 1} of {arguments.rounds + UNCOUNTED}: " + ", ".join(map(latest, speeds, speeds.values())))
                write(result, stem)
            for worker in workers:
                worker.thaw()
                speeds[worker.name]["quality"] = worker.ask("finish") or {}
                speeds[worker.name]["error"] = worker.error
    print("\n" + write(result, stem))


def begun(worker: WorkerProcess, job: dict) -> dict:
    """The record of a contestant that is ready for its first turn, and halted."""
    record = {"seconds": [], "cpu_seconds": [], "start_seconds": None, "peak_rss_mib": None, "versions": None, "quality": {}}
    record |= worker.init(**job) or {}
    worker.freeze()
    return record | {"error": worker.error}


def take_turn(worker: WorkerProcess, tokens: int, record: dict, *, counted: bool) -> None:
    """Seconds for each token go to the record; contestants may do somewhat more or less than they are told."""
    worker.thaw()
    answer = worker.ask("run", tokens=tokens)
    worker.freeze()
    record["error"] = worker.error
    if answer is not None:
        record["peak_rss_mib"] = answer["peak_rss_mib"]
        for name in ("seconds", "cpu_seconds") if counted else ():
            record[name].append(answer[name] / answer["tokens"])


def latest(name: str, record: dict) -> str:
    return f"{name} " + ("failed" if record["error"] else f"{1 / record['seconds'][-1]:.0f} tok/s" if record["seconds"] else "-")


def write(result: dict, stem: Path) -> str:
    """The tables, also on disk."""
    records = result["stream"]
    rows = [[name, *_cells(record, result["bare_torch_mib"])] for name, record in records.items()]
    tables = [report.format_table(list(HEAD), rows) + report.failures(records)]
    rows = [[f"speed of {above} over {below}", str(found)] for above, below, found in speed_ratios(records)]
    if rows:
        tables.append(report.format_table(["", "median (range)"], rows))
    given = result["arguments"]
    about = (
        f"The bundled model, TopK with {given['d_sae']} latents, k {given['k']}, batches of {given['batch_size']}; turns of "
        f"{given['steps_per_turn']} steps.\n\n"
    )
    report.write(result, "From language model to dictionary", tables, stem, about)
    return "\n\n".join(tables) + "\n"


def speed_ratios(records: dict[str, dict]) -> list[tuple[str, str, object]]:
    """Tokens per second of one over those of another, turn by turn."""
    pairs = [(above, below) for above, belows in AGAINST.items() for below in belows]
    found = [(above, below, ratio(records.get(below), records.get(above))) for above, below in pairs]
    return [entry for entry in found if entry[2] is not None]


def _cells(record: dict, bare_mib: float) -> list[str]:
    if record["error"] or not record["seconds"]:
        return ["failed" if record["error"] else "-", *["-"] * (len(HEAD) - 2)]
    speeds, quality = [1 / seconds for seconds in record["seconds"]], record["quality"]
    return [
        f"{median(speeds):.0f}",
        f"{min(speeds):.0f}-{max(speeds):.0f}",
        f"{median(record['cpu_seconds']) * 1e6:.1f}",
        f"{record['start_seconds']:.1f}",
        f"{record['peak_rss_mib']:.0f}",
        f"{beyond_torch(record, bare_mib):.0f}",
        *(f"{quality[name]:.4f}" if name in quality else "-" for name in ("fvu", "l0", "dead")),
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__.splitlines()[0])
    known = ",".join(CONTESTANTS)
    parser.add_argument(
        "--contestants", type=names_among(CONTESTANTS), default=list(CONTESTANTS), help=f"of {known}; default all"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="turns that each gets, besides one that is not counted")
    parser.add_argument("--steps-per-turn", type=at_least(1), default=64, help="training steps in a turn")
    parser.add_argument("--d-sae", type=at_least(1), default=2048, help="latents; default 8 times the model's width")
    parser.add_argument("--k", type=at_least(1), default=32)
    parser.add_argument("--batch-size", type=at_least(1), default=2048, help="tokens in a step")
    parser.add_argument("--lr", type=float, help="one learning rate for all; default: each library's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of each contestant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
