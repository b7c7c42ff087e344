"""The two measurements: quality after a fixed number of steps, and seconds per step with all workers alive in turns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median

from benchmarks.peers import Peer
from benchmarks.shapes import Shape
from benchmarks.worker_process import WorkerProcess

QUALITY_POINTS = 4  # how often quality is measured on the way; the last point is the result
CODEC_ROUNDS = 3
UNCOUNTED = 1  # steps at the head of a burst: memory that a worker handed back while it waited must be faulted in again
SPEED_STEPS = 2000  # what the peers' schedules are told in a speed run; only a few of them are taken


def measure_quality(
    peer: Peer, shape: Shape, *, steps: int, seed: int, lr: float | None, threads: int, say: Callable[[str], None]
) -> dict:
    """Train one peer alone, in a process of its own; what is returned is what `train_and_measure` returns."""
    with _workers([peer], threads) as (worker,):
        result = train_and_measure(worker, shape, steps=steps, seed=seed, lr=lr, threads=threads)
        say(f"quality {peer.name} seed {seed}: {result['error'] or rounded(result['points'][-1])}")
        return result


def train_and_measure(
    worker: WorkerProcess, shape: Shape, *, n_points: int = QUALITY_POINTS, l0: float | None = None, steps: int, **job: object
) -> dict:
    """Train with a live worker. `job` are the other fields of the workers' Job; `l0` goes to the last measurement.

    Returns:
        `points`: step, fvu, l0, dead, recovered, cosine and cpu_seconds so far, from before the first step to the last;
        `versions` and `error`.
    """
    start = worker.ask("init", shape=asdict(shape), steps=steps, **job)
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
    peers: list[Peer], shape: Shape, *, rounds: int, burst: int, threads: int, say: Callable[[str], None]
) -> dict[str, dict]:
    """Time whole training steps of live workers that take turns, so that a change of the machine's speed hits all alike.

    Returns:
        For each peer `seconds` and `cpu_seconds` (one median per round, so that ratios can be taken round by round),
        `encode_seconds` and `decode_seconds` of a batch, `peak_rss_mib`, `start_rss_mib`, `versions` and `error`.
    """
    with _workers(peers, threads) as workers:
        results = {}
        for worker in workers:
            start = worker.ask("init", shape=asdict(shape), steps=SPEED_STEPS, seed=0, lr=None, threads=threads)
            worker.ask("step", n=1)
            results[worker.name] = {name: [] for name in ("seconds", "cpu_seconds", "encode_seconds", "decode_seconds")}
            results[worker.name] |= start or {}
        for number in range(rounds):
            for worker in workers:
                answer = worker.ask("step", n=burst)
                if answer is not None:
                    results[worker.name]["seconds"].append(median(answer["seconds"][UNCOUNTED:]))
                    results[worker.name]["cpu_seconds"].append(median(answer["cpu_seconds"][UNCOUNTED:]))
                    results[worker.name]["peak_rss_mib"] = answer["peak_rss_mib"]
            say(f"round {number + 1} of {rounds}: " + ", ".join(_latest(worker, results) for worker in workers))
        for _ in range(CODEC_ROUNDS):
            for worker in workers:
                for name, seconds in (worker.ask("codec") or {}).items():
                    results[worker.name][name].append(seconds)
        for worker in workers:
            results[worker.name]["error"] = worker.error
        return results


@contextmanager
def _workers(peers: list[Peer], threads: int) -> Iterator[list[WorkerProcess]]:
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
