"""What all workers share: the line protocol, and a way to run a peer's own training loop one batch at a time.

A worker is a process that answers JSON requests, one line each, that arrive on stdin. The answers go to a pipe of their own,
because peers print to stdout, some already when they are imported. Needs torch and numpy only, so it runs in every peer's
environment.
"""

import json
import os
import platform
import queue
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import peak_rss_mib
from benchmarks.shapes import Shape
from benchmarks.workers.planted import HELD_OUT, Codes, PlantedData, active_latents, quality, threshold_for
from benchmarks.workers.recorded import RecordedData

CODEC_TURNS = 5  # of encoding and of decoding a batch in a turn
WARMUP_FRACTION = 0.1  # of the steps, for all: the peers' own warm-ups (0 to 1000 steps) are meant for far longer runs


@dataclass(frozen=True)
class Job:
    """What to train: the shape, for how many steps, and at which learning rate (None: the peer's own default).

    `sparsity` is what the architecture calls it: the active latents per token k or target_l0, or a coefficient; None: shape.k.
    `decay` is the share of the steps, at the end, with a learning rate that falls to zero; None: the peer's own default.
    `warmup` is the share of the steps with a rising learning rate.
    `settings` are further settings of the dictionary, in the peer's own words; `activations` is the file of recorded ones.
    """

    shape: Shape
    steps: int
    seed: int
    lr: float | None
    threads: int
    architecture: str = "topk"
    sparsity: float | None = None
    decay: float | None = None
    warmup: float = WARMUP_FRACTION
    settings: dict[str, Any] = field(default_factory=dict)
    activations: str | None = None

    @property
    def data(self) -> PlantedData | RecordedData:
        return PlantedData(self.shape, self.seed) if self.activations is None else RecordedData(Path(self.activations), self.seed)

    @property
    def warmup_steps(self) -> int:
        return max(1, int(self.steps * self.warmup))

    @property
    def decay_steps(self) -> int:
        return int(self.steps * (self.decay or 0))

    @property
    def dead_steps(self) -> int:
        """Steps of silence after which a latent is dead, a tenth of the run: peers count in tokens or steps of far longer runs."""
        return max(1, self.steps // 10)

    @property
    def group_ends(self) -> list[int]:
        """Nested sizes of a Matryoshka dictionary: 1/16, 1/8, 1/4, 1/2 and all of it."""
        return [self.shape.d_sae // part for part in (16, 8, 4, 2, 1)]


class Worker(ABC):
    """One peer. The constructor takes a Job and builds the peer's own trainer with its default optimiser."""

    packages: tuple[str, ...] = ()  # distributions whose versions are reported
    architectures: tuple[str, ...] = ("topk",)
    trains = True  # False: only the time of `step` and `encode` means something

    def __init__(self, job: Job):
        self.job = job

    def versions(self) -> dict[str, str]:
        """What else decides the figures, by name."""
        return {}

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

    def threshold(self) -> float | None:
        """The one threshold that replaces a choice of k latents per batch, within `evaluation`; None where there is no such."""
        return None

    def set_threshold(self, threshold: float) -> None:
        """Encode with another one until the end of `evaluation`."""
        raise NotImplementedError


class SingleStepper:
    """Turns a peer's own endless training loop, run in a thread, into calls of `step`.

    The loop asks `next_batch` for data. `step` hands one batch over and returns when the loop comes back for the next one,
    which is after exactly one whole training step.
    """

    def __init__(self):
        self._batches: queue.SimpleQueue[Any] = queue.SimpleQueue()
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

    def next_batch(self) -> Any:
        self._asked.put(None)
        return self._batches.get()

    def step(self, batch: Any) -> None:
        self._batches.put(batch)
        self._wait()

    def _wait(self) -> None:
        error = self._asked.get()
        if error is not None:
            raise error


class Server:
    """Answers requests about one worker; every method but the constructor is a request."""

    def __init__(self, make: type[Worker]):
        self._make = make

    def init(self, *, shape: dict, threads: int, **rest: Any) -> dict:
        job = Job(Shape(**shape), threads=threads, **rest)
        if job.architecture not in self._make.architectures:
            raise ValueError(f"this peer has no {job.architecture!r}: {', '.join(self._make.architectures)}")
        start_rss_mib = peak_rss_mib()  # the peer is imported, nothing is built
        torch.set_num_threads(threads)
        self._data, self._batch_size, self._step = job.data, job.shape.batch_size, 0
        torch.manual_seed(job.seed)
        self._worker = self._make(job)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {name: version(name) for name in self._make.packages} | self._worker.versions()
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
        """Seconds to encode a batch and to decode its codes, medians of several after one of each that is not counted, and the active
        latents per token of these codes, on which the speed of sparse ones depends."""
        x_BD = self._data.batch_BD(HELD_OUT, self._batch_size)
        with self._worker.evaluation():
            encode, decode = partial(self._worker.encode, x_BD), self._worker.decode
            codes, _ = timed(encode)
            encode_seconds = median(timed(encode)[1] for _ in range(CODEC_TURNS))
            if not self._worker.trains:
                return {"encode_seconds": encode_seconds}
            timed(partial(decode, codes))
            decode_seconds = median(timed(partial(decode, codes))[1] for _ in range(CODEC_TURNS))
            l0 = len(active_latents(codes)) / len(x_BD)
            return {"encode_seconds": encode_seconds, "decode_seconds": decode_seconds, "l0": l0}

    def quality(self, *, l0: float | None = None) -> dict:
        """As the dictionary is; with `l0`, under `at_l0` too, with the threshold that gives this L0 where there is one threshold."""
        worker = self._worker
        with worker.evaluation():
            measured = quality(self._data, worker.encode, worker.decode, worker.decoder_FD())
            threshold = worker.threshold()
            if l0 is not None and threshold is not None:
                worker.set_threshold(threshold_for(self._data, self._encode_above, l0, threshold))
                measured["at_l0"] = quality(self._data, worker.encode, worker.decode, worker.decoder_FD())
        return {"step": self._step, **measured}

    def _encode_above(self, x_BD: Tensor, threshold: float) -> Codes:
        self._worker.set_threshold(threshold)
        return self._worker.encode(x_BD)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a piece of work returns, and its seconds."""
    start = time.perf_counter()
    done = work()
    return done, time.perf_counter() - start


def serve(make: type[Worker]) -> None:
    """Answer requests about one worker until stdin is closed."""
    answer_requests(Server(make))


def answer_requests(server: object) -> None:
    """Each request names a method of the server. The first argument of the process is the file descriptor that answers go to."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("op"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers)
    os._exit(0)  # a SingleStepper's thread still waits for a batch
