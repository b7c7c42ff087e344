"""The measurements: quality after a fixed number of steps, seconds per step with all workers alive in turns, bare memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from time import perf_counter

from benchmarks.peers import Peer
from benchmarks.shapes import Shape
from benchmarks.worker_process import WorkerProcess, output_of

QUALITY_POINTS = 4  # how often quality is measured on the way; the last point is the result
CODEC_ROUNDS = 5
LEAST_ROUNDS = 2
UNCOUNTED = 1  # steps at the head of a burst: memory that a worker handed back while it waited must be faulted in again
TOLD_STEPS = 2000  # what schedules are told in a speed run; only a few of them are taken
BARE_TORCH = "import torch; from benchmarks.machine import peak_rss_mib; print(peak_rss_mib())"


def bare_torch_mib() -> float:
    """The resident size of a process that imported torch and did nothing else."""
    return float(output_of(["-c", BARE_TORCH], "torch could not be imported"))


def measure_quality(peer: Peer, shape: Shape, *, threads: int, say: Callable[[str], None], **job: object) -> dict:
    """Train one peer alone, in a process of its own; what is returned is what `train_and_measure` returns."""
    with workers_of([peer], threads) as (worker,):
        result = train_and_measure(worker, shape, threads=threads, **job)
        say(f"quality {peer.name} seed {job['seed']}: {result['error'] or rounded(result['points'][-1])}")
        return result


def train_and_measure(
    worker: WorkerProcess, shape: Shape, *, n_points: int = QUALITY_POINTS, l0: float | None = None, steps: int, **job: object
) -> dict:
    """Train with a live worker. `job` are the other fields of the workers' Job; `l0` goes to the last measurement.

    Returns:
        `points`: step, fvu, l0, dead, recovered, cosine and cpu_seconds so far, from before the first step to the last;
        `versions` and `error`.
    """
    start = worker.init(shape=asdict(shape), steps=steps, **job)
    points, cpu_seconds = [], 0.0
    for point in range(n_points + 1):
        n = steps * point // n_points - steps * max(point - 1, 0) // n_points
        stepped = worker.ask("step", n=n)
        quality = worker.ask("quality", l0=l0 if point == n_points else None)
        if worker.error is not None:
            break
        cpu_seconds += sum(stepped["cpu_seconds"])
        points.append(quality | {"cpu_seconds": cpu_seconds})
    return {"points": points, "versions": start and start["versions"], "error": worker.error}


def measure_speed(
    peers: list[Peer],
    shape: Shape,
    *,
    architecture: str = "topk",
    rounds: int,
    burst: int,
    threads: int,
    say: Callable[[str], None],
    told_steps: int = TOLD_STEPS,
    codec_rounds: int = CODEC_ROUNDS,
    most_seconds: float = float("inf"),
) -> dict[str, dict]:
    """Time whole training steps of live workers that take turns, so that a change of the machine's speed hits all alike.

    After `most_seconds` no new round begins but the first two.

    Returns:
        For each peer `seconds` and `cpu_seconds` (one median per round, so that ratios can be taken round by round),
        `encode_seconds` and `decode_seconds` of a batch with the `l0` of its codes, `peak_rss_mib`, `start_rss_mib`, `versions` and
        `error`.
    """
    with workers_of(peers, threads) as workers:
        results = {}
        for worker in workers:
            job = {"steps": told_steps, "seed": 0, "lr": None, "threads": threads, "architecture": architecture}
            start = worker.init(shape=asdict(shape), **job)
            worker.ask("step", n=1)
            results[worker.name] = {name: [] for name in ("seconds", "cpu_seconds", "encode_seconds", "decode_seconds")}
            results[worker.name] |= start or {}
        began = perf_counter()
        for number in range(rounds):
            if number >= LEAST_ROUNDS and perf_counter() - began > most_seconds:
                break
            for worker in workers:
                answer = worker.ask("step", n=burst)
                if answer is not None:
                    results[worker.name]["seconds"].append(median(answer["seconds"][UNCOUNTED:]))
                    results[worker.name]["cpu_seconds"].append(median(answer["cpu_seconds"][UNCOUNTED:]))
                    results[worker.name]["peak_rss_mib"] = answer["peak_rss_mib"]
            say(f"round {number + 1} of {rounds}: " + ", ".join(_latest(worker, results) for worker in workers))
        for _ in range(codec_rounds):
            for worker in workers:
                answer = worker.ask("codec") or {}
                for name in ("encode_seconds", "decode_seconds"):
                    results[worker.name][name] += [answer[name]] if name in answer else []
                results[worker.name]["l0"] = answer.get("l0")
        for worker in workers:
            results[worker.name]["error"] = worker.error
        return results


@contextmanager
def workers_of(peers: list[Peer], threads: int) -> Iterator[list[WorkerProcess]]:
    """Live workers of all peers, ended with the block."""
    workers: list[WorkerProcess] = []
    try:
        for peer in peers:
            workers.append(WorkerProcess(peer, threads=threads))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _latest(worker: WorkerProcess, results: dict[str, dict]) -> str:
    return f"{worker.name} " + ("failed" if worker.error else f"{results[worker.name]['seconds'][-1] * 1e3:.1f} ms")


def rounded(point: dict) -> dict:
    return {name: rounded(value) if isinstance(value, dict) else round(value, 3) for name, value in point.items()}
