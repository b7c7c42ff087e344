"""sae-lens: its `SAETrainer.step`, the seam that its own `fit` loop calls, with its default Adam.

What is evaluated is what it would publish: its inference model, saved and loaded by its own code, which turns the choice of a
batch's strongest latents into a threshold.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.workers.common import Job, Worker, serve

DEFAULT_LR = SAETrainerConfig.lr


class SaeLens(Worker):
    packages = ("sae-lens", "transformer-lens")
    architectures = ("topk", "batchtopk", "jumprelu", "gated", "matryoshka")

    def __init__(self, job: Job):
        super().__init__(job)
        self.sae = build(job)
        lr = DEFAULT_LR if job.lr is None else job.lr
        config = SAETrainerConfig(
            total_training_samples=job.steps * job.shape.batch_size,
            train_batch_size_samples=job.shape.batch_size,
            lr=lr,
            lr_end=lr,  # must be set, though the default constant schedule does not use it
            lr_warm_up_steps=job.warmup_steps,
            lr_decay_steps=job.decay_steps,
            dead_feature_window=job.dead_steps,
        )
        self.trainer = SAETrainer(cfg=config, sae=self.sae, data_provider=iter(()))

    def step(self, x_BD: Tensor) -> None:
        self.trainer.step(x_BD)
        self.trainer.n_training_steps += 1

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        self.published = published(self.sae)
        yield
        del self.published

    def encode(self, x_BD: Tensor) -> Tensor:
        return self.published.encode(x_BD)

    def decode(self, codes: Tensor) -> Tensor:
        return self.published.decode(codes)

    def decoder_FD(self) -> Tensor:
        return self.published.W_dec.detach()

    def threshold(self) -> float | None:
        return self.published.threshold[0].item() if isinstance(self.sae, BatchTopKTrainingSAE) else None

    @torch.no_grad()
    def set_threshold(self, threshold: float) -> None:
        self.published.threshold.fill_(threshold)


def published(sae: TrainingSAE) -> SAE:
    """What others would get of a trained one."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def build(job: Job):
    """Its training class for the architecture; a coefficient rises from zero over as many steps as the learning rate."""
    sizes = {"d_in": job.shape.d_in, "d_sae": job.shape.d_sae}
    k = job.shape.k if job.sparsity is None else job.sparsity
    if job.architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=int(k)))
    if job.architecture == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=k))
    if job.architecture == "matryoshka":
        config = MatryoshkaBatchTopKTrainingSAEConfig(**sizes, k=k, matryoshka_widths=job.group_ends)
        return MatryoshkaBatchTopKTrainingSAE(config)
    rise, coefficient = job.warmup_steps, 1.0 if job.sparsity is None else job.sparsity  # 1: its defaults
    if job.architecture == "jumprelu":
        return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**sizes, l0_coefficient=coefficient, l0_warm_up_steps=rise))
    return GatedTrainingSAE(GatedTrainingSAEConfig(**sizes, l1_coefficient=coefficient, l1_warm_up_steps=rise))


if __name__ == "__main__":
    serve(SaeLens)
