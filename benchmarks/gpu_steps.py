"""Whole training steps of a TopK sparse autoencoder: ours, the same in plain torch operations, and a dense one for torch.compile.

All three compute z = (x - b_dec) W_enc^T + b_enc, keep the k largest, reconstruct, take the mean squared error, and take a step of Adam
with float32 weights and moments on every parameter; products are of bfloat16. Decoder rows are kept at length 1.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `K` k.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.kernels import triton as kernels
from saebench.kernels.primitives import AdamRule, Gradient, Term

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-3


@dataclass
class Weights:
    """A matrix in float32, its bfloat16 copy that products read, and moments."""

    master_FD: Tensor
    copy_FD: Tensor = field(init=False)
    m_FD: Tensor = field(init=False)
    v_FD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.copy_FD = self.master_FD.to(torch.bfloat16)
        self.m_FD, self.v_FD = torch.zeros_like(self.master_FD), torch.zeros_like(self.master_FD)


class OurStep:
    """encode, decode, error, dots, two updates. The step's number is on the device, so that a graph can be replayed."""

    def __init__(self, d_in: int, d_sae: int, k: int, device: str):
        rows = unit_rows(d_sae, d_in, device)
        self.k, self.decoder, self.encoder = k, Weights(rows.clone()), Weights(rows)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))
        self.biases = torch.optim.Adam(
            [self.b_enc, self.b_dec], LR, BETAS, EPS, fused=device == "cuda", capturable=device == "cuda"
        )
        self.factor, self.step = torch.ones((), device=device), torch.zeros((), device=device, dtype=torch.float64)
        self.ones_1 = torch.ones(1, device=device)

    @torch.no_grad()
    def __call__(self, x_BD: Tensor) -> Tensor:
        self.step += 1
        corrections = [1 - beta**self.step for beta in BETAS]
        step_3 = torch.stack([torch.full_like(self.step, LR), *corrections]).float()
        rule = AdamRule(LR, BETAS, EPS, 1)
        centred_BD = (x_BD - self.b_dec).to(torch.bfloat16)
        indices_BK, values_BK = kernels.topk(centred_BD, self.encoder.copy_FD, self.b_enc, None, self.k, None)
        codes = SparseCodes(indices_BK, values_BK, len(self.b_enc))
        error_BD = kernels.decode(codes, self.decoder.copy_FD, self.b_dec) - x_BD
        loss = error_BD.square().sum(1).mean()
        grad_BD = (error_BD * (2 / len(x_BD))).to(torch.bfloat16)
        by_z = codes.replaced(kernels.dots(codes, grad_BD, self.decoder.copy_FD) * (values_BK > 0))
        self.b_enc.grad = kernels.sums(by_z, self.ones_1.expand(len(x_BD), 1).contiguous())[:, 0]
        self.b_dec.grad = grad_BD.sum(0, dtype=torch.float32) - self.b_enc.grad.to(torch.bfloat16) @ self.encoder.copy_FD
        self.biases.step()
        for weights, term, unit in (
            (self.decoder, Term(codes, grad_BD), True),
            (self.encoder, Term(by_z, centred_BD), False),
        ):
            kernels.update(
                weights.copy_FD,
                weights.m_FD,
                weights.v_FD,
                Gradient([term]),
                unit,
                rule,
                self.factor,
                master_FD=weights.master_FD,
                step_3=step_3,
            )
        return loss


class TorchStep:
    """The same arithmetic from stock operations: cuBLAS, torch.topk, embedding_bag, fused Adam on stored gradients."""

    def __init__(self, d_in: int, d_sae: int, k: int, device: str):
        rows = unit_rows(d_sae, d_in, device)
        self.k, self.device = k, device
        self.W_dec, self.W_enc = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))
        self.parameters = [self.W_dec, self.W_enc, self.b_enc, self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, LR, BETAS, EPS, fused=True)

    @torch.no_grad()
    def __call__(self, x_BD: Tensor) -> Tensor:
        encoder, decoder = self.W_enc.to(torch.bfloat16), self.W_dec.to(torch.bfloat16)
        centred_BD = (x_BD - self.b_dec).to(torch.bfloat16)
        z_BF = torch.addmm(self.b_enc.to(torch.bfloat16), centred_BD, encoder.T)
        values_BK, indices_BK = torch.topk(z_BF, self.k, dim=1, sorted=False)
        del z_BF
        values_BK = values_BK.relu()
        x_hat = nn.functional.embedding_bag(indices_BK, decoder, per_sample_weights=values_BK, mode="sum")
        error_BD = x_hat + self.b_dec - x_BD
        loss = error_BD.square().sum(1).mean()
        grad_BD = (error_BD * (2 / len(x_BD))).to(torch.bfloat16)
        by_z = torch.cat([
            torch.einsum("bd,bkd->bk", grad_BD[rows], decoder[indices_BK[rows]])
            for rows in (slice(start, start + 512) for start in range(0, len(x_BD), 512))
        ]) * (values_BK > 0)  # fmt: skip
        flat = indices_BK.reshape(-1)
        ranked = torch.sort(flat, stable=True)
        starts = torch.searchsorted(ranked.values, torch.arange(len(self.b_enc), device=flat.device))
        tokens = ranked.indices // self.k
        for weights, rows, values in ((self.W_dec, grad_BD, values_BK), (self.W_enc, centred_BD, by_z)):
            weights.grad = nn.functional.embedding_bag(
                tokens, rows, starts, per_sample_weights=values.reshape(-1)[ranked.indices].to(rows.dtype), mode="sum"
            ).float()
        self.b_enc.grad = torch.zeros_like(self.b_enc).index_add_(0, flat, by_z.reshape(-1).float())
        self.b_dec.grad = grad_BD.sum(0, dtype=torch.float32) - self.b_enc.grad.to(torch.bfloat16) @ encoder
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.adam.step()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        return loss


class DenseStep:
    """What most libraries do: a dense code, autograd, bfloat16 autocast, fused Adam. Compiled where asked for."""

    def __init__(self, d_in: int, d_sae: int, k: int, device: str, compiled: bool):
        rows = unit_rows(d_sae, d_in, device)
        self.W_dec, self.W_enc = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))
        self.adam = torch.optim.Adam([self.W_dec, self.W_enc, self.b_enc, self.b_dec], LR, BETAS, EPS, fused=True)
        self.device = device

        def loss(x_BD: Tensor) -> Tensor:
            z_BF = (x_BD - self.b_dec) @ self.W_enc.T + self.b_enc
            values, indices = torch.topk(z_BF, k, dim=1)
            f_BF = torch.zeros_like(z_BF).scatter(1, indices, values.relu())
            return (f_BF @ self.W_dec + self.b_dec - x_BD).square().sum(1).mean()

        def constrain() -> None:
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

        def project() -> None:
            grad = self.W_dec.grad
            assert grad is not None
            grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

        wrap = torch.compile if compiled else lambda function: function
        self.loss, self.project, self.constrain = wrap(loss), wrap(project), wrap(constrain)

    def __call__(self, x_BD: Tensor) -> Tensor:
        self.adam.zero_grad(set_to_none=True)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = self.loss(x_BD)
        loss.backward()
        with torch.no_grad():
            self.project()
            self.adam.step()
            self.constrain()
        return loss.detach()


def unit_rows(rows: int, width: int, device: str) -> Tensor:
    """Random rows of length 1, without a second matrix of that size."""
    W = torch.randn(rows, width, device=device)
    for part in W.split(1 << 14):
        part /= part.norm(dim=1, keepdim=True)
    return W


def captured(step: OurStep, x_BD: Tensor) -> torch.cuda.CUDAGraph:
    """The step as a graph: replaying it is one launch, and reads whatever is in x then."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(x_BD)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x_BD)
    return graph


def floor_flop(d_in: int, d_sae: int, batch: int) -> float:
    """Operations of the encoder product, the only dense one."""
    return 2.0 * batch * d_in * d_sae


def floor_bytes(d_in: int, d_sae: int, k: int, batch: int) -> float:
    """Bytes besides it: weights and moments read and written, copies written, rows of bfloat16 gathered four times."""
    return 2 * d_in * d_sae * (3 * 8 + 2) + 4 * 2 * batch * k * d_in
