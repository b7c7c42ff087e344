"""Unrolled sparse coding: the encoder is a fixed number of proximal gradient steps on the decoder's own atoms, with learned step sizes
(deep-unfolded ISTA and IHT, after Gregor and LeCun 2010).

    r = x - b_dec - f D;   f <- S_t(f + eta_t r D^T)     from f = 0, t = 1 .. T

ISTA shrinks by a learned threshold (the proximal map of an l1 penalty), IHT keeps the k largest. One step is a ReLU or TopK
autoencoder with tied weights; each further step takes back what atoms that overlap explained twice. `lasso` and `best_k` are the
same iterations with a fixed step size, run until they settle: codes to hold an encoder's against.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `T` steps.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.l0_control import L0Controller, SparsitySettings
from saebench.dictionaries.sparse_coding import SparseCoder, SparseCodingConfig
from saebench.dictionaries.topk import KSettings
from saebench.kernels import encode_above, gathered_dot, proximal_step, sparse_decode

SAMPLE = 1024  # tokens by which step sizes and thresholds are initialised


class UnrolledConfig(SparseCodingConfig):
    """Settings of unrolled encoders."""

    steps: int = Field(default=3, gt=0)
    """Steps of the encoder, each with its own learned step size; 1 is an autoencoder with tied weights."""


class UnrolledDictionary(SparseCoder):
    """f <- S_t(f + eta_t (x - b_dec - f D) D^T)."""

    config: UnrolledConfig

    def __init__(self, config: UnrolledConfig):
        super().__init__(config)
        self.eta = nn.Parameter(torch.ones(config.steps))

    @abstractmethod
    def step(self, t: int, codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor) -> SparseCodes:
        """The code after step t."""

    @abstractmethod
    def first_support(self, x_BD: Tensor, atoms_FD: Tensor) -> SparseCodes:
        """Scores x D^T of about the entries that the first step should keep."""

    def set_threshold(self, t: int, codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor) -> None:
        """Initialise what step t has besides its step size, given a sample before it."""

    def solve(self, x_BD: Tensor, atoms_FD: Tensor) -> tuple[SparseCodes, Tensor]:
        codes: SparseCodes | None = None
        r_BD = x_BD
        for t in range(self.config.steps):
            codes = self.step(t, codes, r_BD, atoms_FD)
            r_BD = x_BD - sparse_decode(codes, atoms_FD)
        assert codes is not None
        return codes, r_BD

    def set_thresholds(self, x_BD: Tensor) -> None:
        """Each step gets the size that lowers the squared error of a sample most, along its gradient at the active entries."""
        x_BD, atoms_FD = x_BD[:SAMPLE], self.atoms
        codes: SparseCodes | None = None
        r_BD = x_BD
        for t in range(self.config.steps):
            along = self.first_support(r_BD, atoms_FD) if codes is None else codes
            dots = gathered_dot(along, r_BD, atoms_FD) * (along.values != 0)
            moved_BD = sparse_decode(along.replaced(dots), atoms_FD)
            self.eta[t] = dots.square().sum() / moved_BD.square().sum() if moved_BD.any() else 1.0
            self.set_threshold(t, codes, r_BD, atoms_FD)
            codes = self.step(t, codes, r_BD, atoms_FD)
            r_BD = x_BD - sparse_decode(codes, atoms_FD)


class IHT(KSettings, UnrolledConfig):
    """Configuration of an autoencoder whose encoder is unrolled iterative hard thresholding with learned step sizes."""

    architecture = "iht"


@register(IHT)
class IHTDictionary(UnrolledDictionary):
    """S(u) keeps the k largest of each token, those above zero; loss: squared error."""

    config: IHT

    def step(self, t: int, codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor) -> SparseCodes:
        return proximal_step(codes, r_BD, atoms_FD, self.eta[t], k=self.config.k)

    def first_support(self, x_BD: Tensor, atoms_FD: Tensor) -> SparseCodes:
        return proximal_step(None, x_BD, atoms_FD, x_BD.new_ones(()), k=self.config.k)


class ISTA(SparsitySettings, UnrolledConfig):
    """Configuration of an autoencoder whose encoder is unrolled ISTA with learned step sizes and thresholds."""

    architecture = "ista"


@register(ISTA)
class ISTADictionary(UnrolledDictionary):
    """S_t(u) = max(u - threshold_t, 0); loss: squared error + coefficient * sum_i f_i."""

    config: ISTA
    training_only = ("sparsity",)

    def __init__(self, config: ISTA):
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.steps))
        self.sparsity = L0Controller(config)

    def step(self, t: int, codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor) -> SparseCodes:
        return proximal_step(codes, r_BD, atoms_FD, self.eta[t], self.threshold[t])

    def first_support(self, x_BD: Tensor, atoms_FD: Tensor) -> SparseCodes:
        """Above what the penalty shrinks by; to reach a target_l0, above the score that as many exceed, and the search for the
        coefficient starts there."""
        coefficient, target_l0 = self.config.coefficient, self.config.target_l0
        if target_l0 is not None:
            codes = encode_above(x_BD, atoms_FD, x_BD.new_zeros(len(atoms_FD)), None)
            coefficient = float(2 * quantile_above(codes, target_l0))
            self.sparsity.start(coefficient)
        assert coefficient is not None
        return encode_above(x_BD, atoms_FD, x_BD.new_zeros(len(atoms_FD)), None, coefficient / 2)

    def set_threshold(self, t: int, codes: SparseCodes | None, r_BD: Tensor, atoms_FD: Tensor) -> None:
        """What the l1 penalty says, eta * coefficient / 2; to reach a target_l0, what leaves as many active."""
        if self.config.target_l0 is None:
            assert self.config.coefficient is not None
            self.threshold[t] = self.eta[t] * self.config.coefficient / 2
        else:
            u = proximal_step(codes, r_BD, atoms_FD, self.eta[t], r_BD.new_zeros(()))
            self.threshold[t] = quantile_above(u, self.config.target_l0)

    def penalty(self, codes: SparseCodes, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.sparsity.observe(codes, batch)
        coefficient = self.sparsity.coefficient(batch)
        return coefficient * codes.values.sum() / len(codes), {"coefficient": coefficient}

    @torch.no_grad()
    def scale_thresholds(self, factor: float) -> None:
        self.threshold *= factor

    @torch.no_grad()
    def constrain(self, lr: float = 0.0) -> None:
        super().constrain(lr)
        self.threshold.clamp_(min=0)


def quantile_above(codes: SparseCodes, l0: float) -> Tensor:
    """The value that `l0` entries per token exceed, about; the least value where there are fewer."""
    values_N = codes.values.flatten()
    return torch.topk(values_N, max(1, min(len(values_N), round(l0 * len(codes))))).values[-1]


def lipschitz(atoms_FD: Tensor) -> float:
    """The largest eigenvalue of D^T D: the inverse of the largest step size with which every step lowers the objective."""
    return float(torch.linalg.eigvalsh(atoms_FD.T @ atoms_FD)[-1])


@torch.no_grad()
def lasso(x_BD: Tensor, atoms_FD: Tensor, penalty: float, steps: int = 500) -> SparseCodes:
    """The code f >= 0 that minimises ||x - f D||^2 / 2 + penalty * sum_i f_i, for centred x [B, D] and atoms [F, D] of any length, after
    `steps` of ISTA (Daubechies et al. 2004) with step size 1 / L; the objective falls with every step, its excess as 1 / steps."""
    eta = x_BD.new_tensor(1 / lipschitz(atoms_FD))
    return _iterate(x_BD, atoms_FD, eta, eta * penalty, None, steps)


@torch.no_grad()
def best_k(x_BD: Tensor, atoms_FD: Tensor, k: int, steps: int = 100, eta: float | None = None) -> SparseCodes:
    """A code f >= 0 with at most k latents per token that minimises ||x - f D||^2 locally, after `steps` of IHT (Blumensath and
    Davies 2009); with step size 1 / L, the default, the error never rises; larger steps may find better minima."""
    return _iterate(x_BD, atoms_FD, x_BD.new_tensor(1 / lipschitz(atoms_FD) if eta is None else eta), None, k, steps)


def _iterate(x_BD: Tensor, atoms_FD: Tensor, eta: Tensor, threshold: Tensor | None, k: int | None, steps: int) -> SparseCodes:
    codes = proximal_step(None, x_BD, atoms_FD, eta, threshold, k)
    for _ in range(steps - 1):
        codes = proximal_step(codes, x_BD - sparse_decode(codes, atoms_FD), atoms_FD, eta, threshold, k)
    return codes
