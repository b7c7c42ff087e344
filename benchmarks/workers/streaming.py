"""What the workers that go from language model to trained dictionary share: a whole training run that can be halted between steps.

A run is an endless matter of milliseconds per step, threads that read ahead, and buffers; what is timed is a stretch of some dozen steps
in the middle of it, so that all of this is in the figure and the start of the run is not.
"""

import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import peak_rss_mib
from benchmarks.workers.common import WARMUP_FRACTION, SingleStepper
from benchmarks.workers.contexts import HeldOutRows, Tokens
from benchmarks.workers.planted import HELD_OUT, Codes, quality

END = math.inf  # tokens to go on for, to the end of the run


@dataclass(frozen=True)
class StreamJob:
    """What is trained on which tokens, or only read (`how`, of the workers that do not train)."""

    tokens: str
    num_tokens: int
    d_sae: int
    k: int
    batch_size: int
    lr: float | None
    seed: int
    threads: int
    decay: float
    how: str = ""

    @property
    def steps(self) -> int:
        return self.num_tokens // self.batch_size

    @property
    def warmup_steps(self) -> int:
        return max(1, int(self.steps * WARMUP_FRACTION))

    @property
    def decay_steps(self) -> int:
        return int(self.steps * self.decay)

    @property
    def dead_steps(self) -> int:
        """A tenth of the run, as elsewhere in these benchmarks."""
        return max(1, self.steps // 10)


class Halting:
    """Halts a training loop of its own thread after as many tokens as it was let run for."""

    def __init__(self):
        self._stepper, self._left, self._passed = SingleStepper(), 0, 0

    def start(self, loop: Callable[[], object]) -> None:
        """Begin; returns where the loop comes to its first step."""

        def run() -> None:
            loop()
            while True:
                self._stepper.next_batch()  # halted for good

        self._stepper.start(run)

    def passed(self, tokens: int) -> None:
        """To be called by the loop: so many more tokens were trained on. Returns when it may go on."""
        self._left -= tokens
        self._passed += tokens
        if self._left <= 0:
            self._left = self._stepper.next_batch()

    def go_on(self, tokens: float) -> int:
        """Let the loop run for this many tokens, or to its end, and a part of a step more; returns how many it were."""
        before = self._passed
        self._stepper.step(tokens)
        if self._passed == before and tokens != END:
            raise RuntimeError("the training run ended before its turns did")
        return self._passed - before


class StreamWorker(ABC):
    """One contestant. The constructor loads the model and checks it against the file of tokens."""

    packages: tuple[str, ...] = ()

    def __init__(self, job: StreamJob, tokens: Tokens):
        self.job, self.tokens = job, tokens

    @abstractmethod
    def begin(self) -> None:
        """Everything that comes before the first step."""

    @abstractmethod
    def run(self, tokens: int) -> int:
        """Work on so many tokens; returns how many it were."""

    def versions(self) -> dict[str, str]:
        return {}

    def finish(self) -> tuple[Tensor, Callable[[Tensor], Codes], Callable[[Codes], Tensor], Tensor] | None:
        """End the training: held-out activations [R, D], encode, decode, decoder rows [F, D]; None where nothing was trained."""
        return None


class StreamServer:
    """Answers requests about one contestant; every method but the constructor is a request."""

    def __init__(self, make: type[StreamWorker]):
        self._make = make

    def init(self, **job: Any) -> dict:
        parsed = StreamJob(**job)
        torch.set_num_threads(parsed.threads)
        torch.manual_seed(parsed.seed)
        self._worker = self._make(parsed, Tokens.read(parsed.tokens))
        start = time.perf_counter()
        self._worker.begin()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {name: version(name) for name in self._make.packages} | self._worker.versions()
        return {"versions": versions, "start_seconds": time.perf_counter() - start}

    def run(self, *, tokens: int) -> dict:
        cpu, wall = time.process_time(), time.perf_counter()
        done = self._worker.run(tokens)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        return {"tokens": done, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss_mib": peak_rss_mib()}

    def finish(self) -> dict:
        """FVU, L0 and dead latents on the held-out tokens, where there is a dictionary."""
        finished = self._worker.finish()
        if finished is None:
            return {}
        rows_RD, encode, decode, W_dec_FD = finished
        return quality(HeldOutRows(rows_RD, HELD_OUT), encode, decode, W_dec_FD)
