"""sae-lens: its `SAETrainer.step`, the seam that its own `fit` loop calls, with its default Adam."""

from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.workers.common import Job, Worker, serve

DEFAULT_LR = SAETrainerConfig.lr


class SaeLens(Worker):
    packages = ("sae-lens", "transformer-lens")

    def __init__(self, job: Job):
        super().__init__(job)
        shape = job.shape
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k))
        lr = DEFAULT_LR if job.lr is None else job.lr
        config = SAETrainerConfig(
            total_training_samples=job.steps * shape.batch_size,
            train_batch_size_samples=shape.batch_size,
            lr=lr,
            lr_end=lr,  # must be set, though the default constant schedule does not use it
            lr_warm_up_steps=job.warmup_steps,
        )
        self.trainer = SAETrainer(cfg=config, sae=self.sae, data_provider=iter(()))

    def step(self, x_BD: Tensor) -> None:
        self.trainer.step(x_BD)
        self.trainer.n_training_steps += 1

    def encode(self, x_BD: Tensor) -> Tensor:
        return self.sae.encode(x_BD)

    def decode(self, codes: Tensor) -> Tensor:
        return self.sae.decode(codes)

    def decoder_FD(self) -> Tensor:
        return self.sae.W_dec.detach()


if __name__ == "__main__":
    serve(SaeLens)
