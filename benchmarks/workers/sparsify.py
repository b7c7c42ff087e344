"""sparsify: its whole `Trainer.fit` loop with its default optimiser, schedule-free sign descent.

sparsify trains on the layers of a language model only, so it is given a model whose one layer hands out our activations, and a
data set of as many empty sequences as there are steps.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from torch import Tensor, nn

from benchmarks.workers.common import Job, SingleStepper, Worker, serve


class OneLayerModel(nn.Module):
    """What the trainer needs of a language model: one layer, `layer`, that puts out the next batch as one sequence."""

    device = torch.device("cpu")

    def __init__(self, d_in: int, next_batch: Callable[[], Tensor]):
        super().__init__()
        self.d_in, self.next_batch, self.layer = d_in, next_batch, nn.Identity()
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        is_dummy = input_ids.numel() == 1
        x_1BD = torch.zeros(1, 1, self.d_in) if is_dummy else self.next_batch().unsqueeze(0)
        return self.layer(x_1BD)


class EmptySequences(torch.utils.data.Dataset):
    def __init__(self, n_sequences: int, length: int):
        self.n_sequences, self.length = n_sequences, length

    def __len__(self) -> int:
        return self.n_sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(self.length, dtype=torch.long)}


class Sparsify(Worker):
    packages = ("eai-sparsify", "schedulefree", "transformers")
    optimizer = "signum"

    def __init__(self, job: Job):
        super().__init__(job)
        shape = job.shape
        config = TrainConfig(
            SaeConfig(num_latents=shape.d_sae, k=shape.k),
            batch_size=1,
            optimizer=self.optimizer,
            lr=job.lr,
            lr_warmup_steps=job.warmup_steps,
            hookpoints=["layer"],
            init_seeds=[job.seed],
            log_to_wandb=False,
            save_every=job.steps + 2,
            save_dir=tempfile.gettempdir(),
        )
        self.stepper = SingleStepper()
        # One sequence more than there are steps, so that the loop still waits for data after the last step.
        sequences = EmptySequences(job.steps + 1, shape.batch_size)
        self.trainer = Trainer(config, sequences, OneLayerModel(shape.d_in, self.stepper.next_batch))
        (self.sae,) = self.trainer.saes.values()
        self.stepper.start(self.trainer.fit)

    def step(self, x_BD: Tensor) -> None:
        self.stepper.step(x_BD)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A schedule-free optimiser trains at one point and is evaluated at another, the average."""
        schedule_free = [optimizer for optimizer in self.trainer.optimizers if hasattr(optimizer, "eval")]
        for optimizer in schedule_free:
            optimizer.eval()
        yield
        for optimizer in schedule_free:
            optimizer.train()

    def encode(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        values_BK, indices_BK, _ = self.sae.encode(x_BD)
        return values_BK, indices_BK

    def decode(self, codes: tuple[Tensor, Tensor]) -> Tensor:
        return self.sae.decode(*codes)

    def decoder_FD(self) -> Tensor:
        return self.sae.W_dec.detach()


if __name__ == "__main__":
    serve(Sparsify)
