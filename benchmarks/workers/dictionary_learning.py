"""dictionary-learning: its `TopKTrainer.update`, which its own `trainSAE` loop calls, with its default Adam.

Its training loop divides activations by the root of their mean squared norm when told to normalise, which its authors
recommend and its default learning rate is made for; so does this worker.
"""

from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from benchmarks.workers.common import Job, Worker, serve


class DictionaryLearning(Worker):
    packages = ("dictionary-learning",)

    def __init__(self, job: Job):
        super().__init__(job)
        shape = job.shape
        self.norm = shape.d_in**0.5  # of the planted data
        self.n_steps = 0
        self.trainer = TopKTrainer(
            steps=job.steps,
            activation_dim=shape.d_in,
            dict_size=shape.d_sae,
            k=shape.k,
            layer=0,
            lm_name="none",
            lr=job.lr,
            warmup_steps=job.warmup_steps,
            seed=job.seed,
            device="cpu",
        )

    def step(self, x_BD: Tensor) -> None:
        self.trainer.update(self.n_steps, x_BD / self.norm)
        self.n_steps += 1

    def encode(self, x_BD: Tensor) -> Tensor:
        return self.trainer.ae.encode(x_BD / self.norm)

    def decode(self, codes: Tensor) -> Tensor:
        return self.trainer.ae.decode(codes) * self.norm

    def decoder_FD(self) -> Tensor:
        return self.trainer.ae.decoder.weight.detach().T


if __name__ == "__main__":
    serve(DictionaryLearning)
