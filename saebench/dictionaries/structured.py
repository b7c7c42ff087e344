"""Structured sparse autoencoder (methods.md T18): what the latents hold is a sparse part, penalised by an annealed p-norm, and a part
of low rank, penalised by its nuclear norm.

The sparse part S is that of the ReLU autoencoder with p-annealing, and it is what `encode` gives: the codes that are browsed, counted
and steered. The low-rank part R = (x - c b_dec) P Q is dense over the latents and is never made: what it writes is
(x - c b_dec) P (Q W_dec). The nuclear norm is that of the batch's R divided by the square root of the number of tokens, so that it does
not depend on their number. It is held down through its bound (mean_n ||x_n P||^2 + ||Q||_F^2) / 2, which equals it where the factors
are balanced.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `R` rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.relu import PNormRule, ReLUDictionary
from saebench.dictionaries.sae import Fit, Weights
from saebench.dictionaries.scaling import Scaling

FIRST_FACTORS = 0.01  # length of the columns of P and the rows of Q at the start


class Structured(PNormRule):
    """Configuration of a structured sparse autoencoder, or transcoder where `target` is given."""

    architecture = "structured"

    p_final: float = Field(default=0.5, gt=0, le=1)
    """The power p of the penalty sum_i f_i^p at the end; below 1 it is annealed down from 1."""
    rank: int = Field(default=8, gt=0)
    """Rank of the part that is not sparse."""
    low_rank_coefficient: float = Field(default=4.0, gt=0)
    """Weight of the nuclear norm, in standard deviations of the target."""


@register(Structured)
class StructuredDictionary(ReLUDictionary):
    """x_hat = S W_dec + (x - c b_dec) P Q W_dec + b_dec, S = ReLU((x - c b_dec) W_enc + b_enc)."""

    config: Structured

    def __init__(self, config: Structured):
        super().__init__(config)
        assert config.d_in is not None
        self.P = nn.Parameter(torch.zeros(config.d_in, config.rank))
        self.Q = nn.Parameter(torch.zeros(config.rank, config.d_sae))

    def low_rank_scores(self, x_BD: Tensor) -> Tensor:
        """(x - c b_dec) P: [B, R]."""
        return (x_BD if self.b_in is None else x_BD - self.b_in) @ self.P

    def bypass(self, weights: Weights, x_BD: Tensor) -> Tensor:
        """The low-rank latents' part, and the family's."""
        written_BD = self.low_rank_scores(x_BD) @ (weights.over_norm(self.Q) @ weights.W_dec_FD)
        skipped_BD = super().bypass(weights, x_BD)
        return written_BD if skipped_BD is None else written_BD + skipped_BD

    def latent_rows(self) -> Sequence[Tensor]:
        return ()  # W_dec is multiplied by Q too

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """sum-MSE + coefficient * sum_i S_i^p + low_rank_coefficient * bound on ||R||_*."""
        fit = super().objective(batch, weights)
        bound = nuclear_bound(self.low_rank_scores(batch.x), self.Q)
        fit.loss = fit.loss + self.config.low_rank_coefficient * self.variance.sqrt() * bound
        fit.parts["nuclear"] = bound.detach()
        return fit

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        super().initialise(x, y, generator, lm)
        with torch.no_grad():
            for factor in (self.P.T, self.Q):
                draw = torch.randn(factor.shape, generator=generator).to(factor)
                factor.copy_(FIRST_FACTORS * draw / draw.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        if self.b_in is None:
            weights = self.weights()
            self.b_dec -= (read.shift_D * read.scale_D) @ self.P @ (weights.over_norm(self.Q) @ weights.W_dec_FD)
        self.P *= read.scale_D[:, None]
        super().fold(read, write)
        self.Q /= write.uniform or float(write.scale_D.log().mean().exp())


def nuclear_bound(scores_BR: Tensor, Q_RF: Tensor) -> Tensor:
    """(mean_n ||scores_n||^2 + ||Q||_F^2) / 2, at least the nuclear norm of scores Q / sqrt(B)."""
    return (scores_BR.square().sum() / len(scores_BR) + Q_RF.square().sum()) / 2
