"""What every worker shares: the line protocol, and a way to run a peer's own training loop one batch at a time.

A worker is a process that answers JSON requests, one line each, that arrive on stdin. The answers go to a pipe of their own,
because peers print to stdout, some already when they are imported. Needs torch and numpy only, so it runs in every peer's
environment.
"""

import json
import os
import platform
import queue
import resource
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from benchmarks.workers.planted import HELD_OUT, Codes, PlantedData, quality

WARMUP_FRACTION = 0.1  # of the steps, for all: the peers' own warm-ups (0 to 1000 steps) are meant for far longer runs


@dataclass(frozen=True)
class Job:
    """What to train: the shape, for how many steps, and at which learning rate (None: the peer's own default)."""

    shape: Shape
    steps: int
    seed: int
    lr: float | None
    threads: int

    @property
    def warmup_steps(self) -> int:
        return max(1, int(self.steps * WARMUP_FRACTION))


class Worker(ABC):
    """One peer. The constructor takes a Job and builds the peer's own trainer with its default optimiser."""

    packages: tuple[str, ...] = ()  # distributions whose versions are reported

    def __init__(self, job: Job):
        self.job = job

    @abstractmethod
    def step(self, x_BD: Tensor) -> None:
        """One whole training step of the peer's trainer."""

    @abstractmethod
    def encode(self, x_BD: Tensor) -> Codes: ...

    @abstractmethod
    def decode(self, codes: Codes) -> Tensor: ...

    @abstractmethod
    def decoder_FD(self) -> Tensor: ...

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around encode, decode and decoder_FD, for a peer that evaluates at other weights than it trains."""
        yield


class SingleStepper:
    """Turns a peer's own endless training loop, run in a thread, into calls of `step`.

    The loop asks `next_batch` for data. `step` hands one batch over and returns when the loop comes back for the next one,
    which is after exactly one whole training step.
    """

    def __init__(self):
        self._batches: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def start(self, loop: Callable[[], object]) -> None:
        def run() -> None:
            torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number per calling thread
            try:
                loop()
                raise RuntimeError("the training loop ended by itself")
            except BaseException as error:
                self._asked.put(error)

        threading.Thread(target=run, daemon=True).start()
        self._wait()

    def next_batch(self) -> Tensor:
        self._asked.put(None)
        return self._batches.get()

    def step(self, x_BD: Tensor) -> None:
        self._batches.put(x_BD)
        self._wait()

    def _wait(self) -> None:
        error = self._asked.get()
        if error is not None:
            raise error


class Server:
    """Answers requests about one worker; every method but the constructor is a request."""

    def __init__(self, make: type[Worker]):
        self._make = make

    def init(self, *, shape: dict, steps: int, seed: int, lr: float | None, threads: int) -> dict:
        job = Job(Shape(**shape), steps, seed, lr, threads)
        start_rss_mib = peak_rss_mib()  # the peer is imported, nothing is built
        torch.set_num_threads(threads)
        self._data, self._batch_size, self._step = PlantedData(job.shape, seed), job.shape.batch_size, 0
        torch.manual_seed(seed)
        self._worker = self._make(job)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {name: version(name) for name in self._make.packages}
        return {"versions": versions, "start_rss_mib": start_rss_mib}

    def step(self, *, n: int) -> dict:
        seconds, cpu_seconds = [], []
        for _ in range(n):
            x_BD = self._data.batch_BD(self._step, self._batch_size)
            cpu, wall = time.process_time(), time.perf_counter()
            self._worker.step(x_BD)
            seconds.append(time.perf_counter() - wall)
            cpu_seconds.append(time.process_time() - cpu)
            self._step += 1
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss_mib": peak_rss_mib()}

    @torch.no_grad()
    def codec(self) -> dict:
        """Seconds to encode a batch and to decode its codes, after one of each that is not counted."""
        x_BD = self._data.batch_BD(HELD_OUT, self._batch_size)
        with self._worker.evaluation():
            codes = self._worker.encode(x_BD)
            self._worker.decode(codes)
            start = time.perf_counter()
            codes = self._worker.encode(x_BD)
            encoded = time.perf_counter()
            self._worker.decode(codes)
            return {"encode_seconds": encoded - start, "decode_seconds": time.perf_counter() - encoded}

    def quality(self) -> dict:
        with self._worker.evaluation():
            measured = quality(self._data, self._worker.encode, self._worker.decode, self._worker.decoder_FD())
        return {"step": self._step, **measured}


def serve(make: type[Worker]) -> None:
    """Answer requests until stdin is closed. The first argument is the file descriptor that the answers go to."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    server = Server(make)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("op"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers)
    os._exit(0)  # a SingleStepper's thread still waits for a batch


def peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
