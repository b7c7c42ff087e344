"""dictionary-learning: its trainers' `update`, which its own `trainSAE` loop calls, with their default Adam.

Its training loop divides activations by the root of their mean squared norm when told to normalise, which its authors
recommend and its default learning rates are made for; so does this worker.
"""

from itertools import pairwise
from typing import Any

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from benchmarks.workers.common import Job, Worker, serve


class DictionaryLearning(Worker):
    packages = ("dictionary-learning",)
    architectures = ("topk", "batchtopk", "jumprelu", "gated", "matryoshka")

    def __init__(self, job: Job):
        super().__init__(job)
        self.norm = job.shape.d_in**0.5  # of the planted data
        self.n_steps = 0
        self.trainer = build(job)
        self.trainer.dead_feature_threshold = job.dead_steps * job.shape.batch_size
        self.has_threshold = job.architecture in ("batchtopk", "matryoshka")

    def step(self, x_BD: Tensor) -> None:
        self.trainer.update(self.n_steps, x_BD / self.norm)
        self.n_steps += 1

    def encode(self, x_BD: Tensor) -> Tensor:
        return self.trainer.ae.encode(x_BD / self.norm)

    def decode(self, codes: Tensor) -> Tensor:
        return self.trainer.ae.decode(codes) * self.norm

    def decoder_FD(self) -> Tensor:
        ae = self.trainer.ae
        return ae.W_dec.detach() if hasattr(ae, "W_dec") else ae.decoder.weight.detach().T

    def threshold(self) -> float | None:
        return self.trainer.ae.threshold.item() if self.has_threshold else None

    def set_threshold(self, threshold: float) -> None:
        self.trainer.ae.threshold.fill_(threshold)  # nothing is trained after the last evaluation


def build(job: Job) -> Any:
    """Its trainer for the architecture. A run is much shorter than its constants are made for: they become shares of it."""
    shape = job.shape
    common: dict[str, Any] = {
        "steps": job.steps,
        "activation_dim": shape.d_in,
        "dict_size": shape.d_sae,
        "layer": 0,
        "lm_name": "none",
        "warmup_steps": job.warmup_steps,
        "decay_start": job.steps - job.decay_steps if job.decay_steps else None,
        "seed": job.seed,
        "device": "cpu",
    }
    k = int(shape.k if job.sparsity is None else job.sparsity)
    if job.architecture == "topk":
        return TopKTrainer(**common, lr=job.lr, k=k)
    starts = {"threshold_start_step": job.warmup_steps}
    if job.architecture == "batchtopk":
        return BatchTopKTrainer(**common, **starts, lr=job.lr, k=k)
    if job.architecture == "matryoshka":
        ends = [0, *job.group_ends]
        fractions = [(end - start) / shape.d_sae for start, end in pairwise(ends)]
        return MatryoshkaBatchTopKTrainer(**common, **starts, lr=job.lr, k=k, group_fractions=fractions)
    if job.lr is not None:
        common["lr"] = job.lr
    common["sparsity_warmup_steps"] = 2 * job.warmup_steps  # as its defaults are, 2000 and 1000
    if job.architecture == "jumprelu":
        return JumpReluTrainer(**common, target_l0=float(k) if job.sparsity is None else job.sparsity)
    return GatedSAETrainer(**common, **({} if job.sparsity is None else {"l1_penalty": job.sparsity}))


if __name__ == "__main__":
    serve(DictionaryLearning)
