"""saebench: one `Member` of its trainer, which is what its training loop steps, with its default optimiser and schedule."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from benchmarks.workers.common import WARMUP_FRACTION, Job, Worker, serve
from benchmarks.workers.planted import PlantedData
from saebench.codes import SparseCodes
from saebench.dictionaries import TopK
from saebench.trainer import Member, TrainConfig


class Ours(Worker):
    def __init__(self, job: Job):
        super().__init__(job)
        shape = job.shape
        training = TrainConfig(
            num_tokens=job.steps * shape.batch_size,
            batch_size=shape.batch_size,
            lr=job.lr,
            warmup=WARMUP_FRACTION,
            seed=job.seed,
        )
        # The batch that the others initialise their decoder bias from, in their first step.
        sample_BD = PlantedData(shape, job.seed).batch_BD(0, shape.batch_size)
        self.member = Member.create(TopK(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k), training, sample_BD)
        self.n_steps = 0

    def step(self, x_BD: Tensor) -> None:
        self.member.step(x_BD, self.n_steps)
        self.n_steps += 1

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What is evaluated is what training would return now: a dictionary for raw activations."""
        self.dictionary = self.member.finished()
        yield
        del self.dictionary

    def encode(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.dictionary.encode(x_BD)
        return codes.values, codes.indices

    def decode(self, codes: tuple[Tensor, Tensor]) -> Tensor:
        values_BK, indices_BK = codes
        return self.dictionary.decode(SparseCodes(indices_BK, values_BK, self.job.shape.d_sae))

    def decoder_FD(self) -> Tensor:
        return self.dictionary.W_dec


if __name__ == "__main__":
    serve(Ours)
