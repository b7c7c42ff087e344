"""Thresholds that are learned: what JumpReLU, its cross-layer form and dictionaries of atoms share.

While training the parameter is log(threshold) / SPEED, so that an optimiser's steps are relative ones, and large enough for thresholds to
get anywhere in a run of some hundred steps; files and finished dictionaries hold `threshold` itself, in the units of the latents.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `N` entries of codes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import Dictionary, TrainingBatch
from saebench.dictionaries.sae import Weights
from saebench.kernels import with_gradient

SAMPLE = 8192  # tokens from which thresholds are set
SPEED = 4.0
SETTLED = 0.8  # share of the steps after which thresholds also move together, straight towards the target,
LAST_RATE = 0.05  # by this part of log(L0 / target) a step
LEAST = 1e-3  # the smallest threshold set from data, in standard deviations: those of Gemma Scope start near 0.05


class LearnedThresholds(Dictionary):
    """A dictionary of a family with `W_enc_FD`, `b_dec`, `scale_biases` and `folded`, whose latents have thresholds of their own."""

    W_enc_FD: Tensor
    b_dec: Tensor
    training_only: ClassVar[tuple[str, ...]] = ("slow_log_threshold", "sparsity")

    def add_thresholds(self) -> None:
        """To be called once from the constructor."""
        self.slow_log_threshold = nn.Parameter(torch.zeros(self.config.d_sae))
        self.shift: Tensor | None = None  # of log thresholds, after the step that is being taken

    @property
    def thresholds_F(self) -> Tensor:
        """[F]"""
        return self.threshold if self.folded else (SPEED * self.slow_log_threshold).exp()

    @torch.no_grad()
    def start_thresholds(self, threshold_F: Tensor, norm_F: Tensor | None, x_BD: Tensor, y_BD: Tensor, *, fit: bool) -> None:
        """Set thresholds as the rule sees them, in units of f_i ||d_i||; `fit` then scales latents so that a sample is written best,
        because latents that overshoot raise their thresholds at once."""
        self.slow_log_threshold.copy_((threshold_F if norm_F is None else threshold_F / norm_F).log() / SPEED)
        if fit:
            written_BD = self(x_BD) - self.b_dec
            square = written_BD.square().sum()
            factor = torch.where(square > 0, ((y_BD - self.b_dec) * written_BD).sum() / square, 1.0).clamp(1e-3, 1e3)
            self.W_enc_FD *= factor
            self.scale_biases(factor)

    def steer(self, l0: Tensor, batch: TrainingBatch, target: float | None) -> None:
        """Towards the end of training let all log thresholds move together after this step, so that L0, which is that of the batch, ends
        at its target: the coefficient acts slowly, and no more once the learning rate has fallen; how latents share the L0 is settled by
        then."""
        last = self.training and target is not None and batch.progress >= SETTLED
        self.shift = LAST_RATE * (l0 / target).clamp(0.5, 2).log() if last else None

    @torch.no_grad()
    def scale_biases(self, factor: Tensor | float) -> None:
        super().scale_biases(factor)
        if self.folded:
            self.threshold *= factor
        else:
            self.slow_log_threshold += (factor.log() if isinstance(factor, Tensor) else math.log(factor)) / SPEED

    @torch.no_grad()
    def constrain(self, lr: float = 0.0) -> None:
        super().constrain(lr)
        if self.shift is not None:
            self.slow_log_threshold += self.shift / SPEED
            self.shift = None

    def drop_training(self) -> None:
        if "slow_log_threshold" in self._parameters:
            self.register_buffer("threshold", (SPEED * self.slow_log_threshold.detach()).exp())
            self.threshold: Tensor
        super().drop_training()


def upper_quantile(x_BD: Tensor, weights: Weights, b_in_D: Tensor | None, share: float) -> Tensor:
    """What each latent's pre-activation exceeds on this share of the tokens, halfway between two of them: [F]."""
    centred_BD = x_BD if b_in_D is None else x_BD - b_in_D
    count = min(len(x_BD) - 1, max(1, round(share * len(x_BD))))
    found = []
    for start in range(0, len(weights.W_enc_FD), 512):
        rows = slice(start, start + 512)
        z_fB = torch.addmm(weights.b_enc_F[rows, None], weights.W_enc_FD[rows], centred_BD.T)
        if weights.norm_F is not None:
            z_fB *= weights.norm_F[rows, None]
        found.append(z_fB.topk(count + 1, dim=1).values[:, -2:].mean(1))
    return torch.cat(found)


def shortfall(x_BD: Tensor, weights: Weights, b_in_D: Tensor | None, codes: SparseCodes, threshold_F: Tensor) -> Tensor:
    """The mean over tokens of sum_i ReLU(threshold_i - z_i), by all entries less the active ones: no [B, F] matrix is made."""
    mean_D = x_BD.mean(0) if b_in_D is None else x_BD.mean(0) - b_in_D
    everything = (threshold_F - weights.times_norm(weights.b_enc_F + weights.W_enc_FD @ mean_D.to(weights.W_enc_FD.dtype))).sum()
    active = with_gradient(codes.detach(), x_BD, weights.W_enc_FD, weights.b_enc_F, b_in_D, weights.norm_F)
    at = active.indices.reshape(-1)
    beyond = ((threshold_F[at] - active.values.reshape(-1)) * (codes.values.detach().reshape(-1) != 0)).sum()
    return everything - beyond / len(codes)
