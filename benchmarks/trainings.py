"""Many whole trainings, several at a time: a process for each peer, an orderly end after Ctrl-C, recorded activations for all."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Protocol

from benchmarks.environments import python_of
from benchmarks.measure import train_and_measure
from benchmarks.options import say
from benchmarks.peers import Peer
from benchmarks.shapes import SHAPES, Shape
from benchmarks.worker_process import WorkerProcess, output_of

DECAY = 0.2  # share of the steps with a falling learning rate, for all: what every one of them recommends


class Stopped(Exception):
    """The benchmark was interrupted."""


class Trainings:
    """One peer's trainings, one after the other, in one process that begins with the first."""

    def __init__(self, peer: Peer, *, threads: int, log: str):
        self.peer, self.threads, self.log = peer, threads, log
        self._worker: WorkerProcess | None = None
        self._stopped = False

    def train(self, shape: Shape, **job: object) -> dict:
        """One training with its measurements at the start and the end, as of `train_and_measure`, and its `seconds`. Raises Stopped."""
        if self._stopped:
            raise Stopped
        if self._worker is None or self._worker.error is not None:
            self._worker = WorkerProcess(self.peer, threads=self.threads, log=self.log)
        start = perf_counter()
        measured = train_and_measure(self._worker, shape, n_points=1, threads=self.threads, decay=DECAY, **job)
        if self._stopped:
            raise Stopped
        return measured | {"seconds": perf_counter() - start}

    def stop(self) -> None:
        """From another thread: end what is running, and begin nothing more."""
        self._stopped = True
        if self._worker is not None:
            self._worker.end()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


class Task(Protocol):
    """A piece of work of its own thread."""

    trainings: Trainings

    def run(self) -> None: ...


def install(peers: Sequence[Peer]) -> None:
    """Make the environments one after the other, before processes start side by side."""
    for peer in peers:
        try:
            python_of(peer)
        except (RuntimeError, OSError) as error:
            say(f"{peer.name}: installation failed: {error}")


def run_side_by_side(tasks: Sequence[Task], parallel: int, run: Callable[[Task], None]) -> None:
    """`run` each task, `parallel` at a time. After an interruption the processes are ended before it is raised."""
    pool = ThreadPoolExecutor(parallel)
    try:
        for future in [pool.submit(run, task) for task in tasks]:
            future.result()
    finally:
        for task in tasks:
            task.trainings.stop()
        pool.shutdown(cancel_futures=True)
        for task in tasks:
            task.trainings.close()


@contextmanager
def recorded_activations(shape: str, steps: int) -> Iterator[str | None]:
    """The file of the bundled model's activations, enough for so many steps, while the block runs; None for a shape with planted
    data. Raises UsageError where they cannot be recorded."""
    sizes = SHAPES[shape]
    if sizes.n_features:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder) / "activations.pt", steps * sizes.batch_size
        say(f"recording {rows} activations of the bundled model, and some to measure with")
        output_of(["-m", "benchmarks.workers.recorded", str(path), str(rows)], "no activations of the bundled model")
        yield str(path)
