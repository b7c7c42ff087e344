"""The baseline without a library: a TopK SAE in plain PyTorch, dense autograd, torch's Adam at its own defaults."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workers.common import Job, Worker, serve


class Dense(Worker):
    def __init__(self, job: Job):
        super().__init__(job)
        d_in, d_sae = job.shape.d_in, job.shape.d_sae
        W_dec_FD = F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_dec_FD = W_dec_FD.requires_grad_()
        self.W_enc_DF = W_dec_FD.detach().T.clone().requires_grad_()
        self.b_enc_F = torch.zeros(d_sae, requires_grad=True)
        self.b_dec_D = torch.zeros(d_in, requires_grad=True)
        parameters = [self.W_dec_FD, self.W_enc_DF, self.b_enc_F, self.b_dec_D]
        self.optimizer = torch.optim.Adam(parameters, **({} if job.lr is None else {"lr": job.lr}))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / job.warmup_steps))

    def step(self, x_BD: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = (self.decode(self.encode(x_BD)) - x_BD).square().sum(1).mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    def encode(self, x_BD: Tensor) -> Tensor:
        scores_BF = torch.relu((x_BD - self.b_dec_D) @ self.W_enc_DF + self.b_enc_F)
        values_BK, indices_BK = scores_BF.topk(self.job.shape.k, sorted=False)
        return torch.zeros_like(scores_BF).scatter(1, indices_BK, values_BK)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec_FD + self.b_dec_D

    def decoder_FD(self) -> Tensor:
        return self.W_dec_FD.detach()


if __name__ == "__main__":
    serve(Dense)
