"""saebench: one `Member` of its trainer, which is what its training loop steps, with its default optimiser and schedule."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from benchmarks.workers.common import Job, Worker, serve
from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary, parse_dictionary
from saebench.kernels.implementations import report
from saebench.trainer import Member, TrainConfig

Entries = tuple[Tensor, Tensor, Tensor | None]  # values, indices, and for ragged codes where each row begins
SPARSITY_KEYS = {"topk": "k", "batchtopk": "k", "matryoshka": "k", "jumprelu": "target_l0", "gated": "target_l0"}


class Ours(Worker):
    architectures = tuple(SPARSITY_KEYS)

    def __init__(self, job: Job):
        super().__init__(job)
        shape = job.shape
        training = TrainConfig(
            num_tokens=job.steps * shape.batch_size,
            batch_size=shape.batch_size,
            lr=job.lr,
            warmup=job.warmup,
            seed=job.seed,
            **({} if job.decay is None else {"decay": job.decay}),
        )
        # The batch that the others initialise their decoder bias from, in their first step.
        sample_BD = job.data.batch_BD(0, shape.batch_size)
        key = SPARSITY_KEYS[job.architecture]
        sparsity = shape.k if job.sparsity is None else job.sparsity
        values = {"architecture": job.architecture, "d_in": shape.d_in, "d_sae": shape.d_sae, **job.settings}
        values[key] = int(sparsity) if key == "k" else sparsity
        self.member = Member.create(parse_dictionary(values, "benchmark"), training, sample_BD)
        self.n_steps = 0

    def versions(self) -> dict[str, str]:
        return kernels()

    def step(self, x_BD: Tensor) -> None:
        self.member.step(x_BD, self.n_steps)
        self.n_steps += 1

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What is evaluated is what training would return now: a dictionary for raw activations."""
        self.dictionary = self.member.finished()
        yield
        del self.dictionary

    def encode(self, x_BD: Tensor) -> Entries:
        return encode(self.dictionary, x_BD)

    def decode(self, codes: Entries) -> Tensor:
        return decode(self.dictionary, codes)

    def decoder_FD(self) -> Tensor:
        return self.dictionary.W_dec

    def threshold(self) -> float | None:
        return self.dictionary.threshold.item() if self.job.architecture in ("batchtopk", "matryoshka") else None

    def set_threshold(self, threshold: float) -> None:
        self.dictionary.threshold.fill_(threshold)


def kernels() -> dict[str, str]:
    """Which kernels serve float32 tensors here, as `saebench doctor` says it."""
    return {"kernels": next(iter(report().values()))}


def encode(dictionary: Dictionary, x_BD: Tensor) -> Entries:
    codes = dictionary.encode(x_BD)
    return codes.values, codes.indices, codes.offsets


def decode(dictionary: Dictionary, codes: Entries) -> Tensor:
    values, indices, offsets_B = codes
    return dictionary.decode(SparseCodes(indices, values, dictionary.config.d_sae, offsets_B))


if __name__ == "__main__":
    serve(Ours)
