"""The yardstick: the encoder's dense product alone, in fp32, without selection, loss, gradients or optimiser.

It is the only dense work that a sparse step needs. Scores go to memory that is there already, which flatters the product: a
trainer that allocates them for every step would pay for fresh pages too.
"""

import torch
from torch import Tensor

from benchmarks.workers.common import Job, Worker, serve


class Matmul(Worker):
    architectures = ("topk", "batchtopk", "jumprelu", "gated", "matryoshka")
    trains = False

    def __init__(self, job: Job):
        super().__init__(job)
        shape = job.shape
        self.W_enc_FD = torch.randn(shape.d_sae, shape.d_in)
        self.b_enc_F = torch.randn(shape.d_sae)
        self.scores_BF = torch.empty(shape.batch_size, shape.d_sae)

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> None:
        torch.addmm(self.b_enc_F, x_BD, self.W_enc_FD.T, out=self.scores_BF)

    def encode(self, x_BD: Tensor) -> Tensor:
        self.step(x_BD)
        return self.scores_BF

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("the product has nothing to decode")

    def decoder_FD(self) -> Tensor:
        raise NotImplementedError("the product has no decoder")


if __name__ == "__main__":
    serve(Matmul)
