"""ReLU sparse autoencoder with an L1 penalty (Bricken et al. 2023, Anthropic's April 2024 update; methods.md T1), optionally with
p-annealing (Karvonen et al. 2024).

The classic form has a decoder of unit rows and subtracts b_dec from its input: the defaults. The April form is `decoder = "free"`,
`subtract_b_dec = false`: its penalty is f_i ||d_i||, which is what the family's latents are then.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `N` entries of codes, `Q` recent batches.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.l0_control import L0Controller, SparsityRule, first_l1_coefficient, start_at_l0
from saebench.dictionaries.sae import Fit, SparseAutoencoder, Weights
from saebench.kernels import encode_above

RECENT = 10  # batches whose penalties say how to go on after a change of p
SMOOTHING = (
    0.01  # what is added to a latent under the power p, in units of the target's standard deviation: bounds the slope at 0
)


class PNormRule(SparsityRule):
    """Settings of rules that penalise sum_i f_i^p."""

    p_final: float = Field(default=1.0, gt=0, le=1)
    """The power p of the penalty sum_i f_i^p at the end; below 1 it is annealed down from 1."""
    p_updates: int = Field(default=10, gt=0)
    """Number of equal steps in which p falls."""
    p_start: float = Field(default=0.2, ge=0, lt=1)
    """Share of the steps before p first changes."""
    p_end: float = Field(default=0.6, gt=0, le=1)
    """Share of the steps after which p is p_final."""

    @model_validator(mode="after")
    def _annealing_has_room(self) -> Self:
        if self.p_start >= self.p_end:
            raise ValueError(f"p_start={self.p_start:g} is not before p_end={self.p_end:g}: lower p_start or raise p_end")
        return self


class PNormPenalty(nn.Module):
    """coefficient * mean over tokens of sum_i f_i^p, with p annealed and the coefficient held or steered.

    At a change of p the coefficient is multiplied by the ratio of the penalty's recent mean under the old p to that under the new one,
    so that the term is continuous; a controller that steers to an L0 starts from there.
    """

    def __init__(self, config: PNormRule):
        super().__init__()
        self.config, self.sparsity = config, L0Controller(config)
        self.annealed = config.p_final < 1
        if self.annealed:
            self.register_buffer("rescaling", torch.ones(()))
            self.register_buffer("recent_2Q", torch.zeros(2, RECENT))
            self.rescaling: Tensor
            self.recent_2Q: Tensor

    def power(self, step: int, steps: int) -> tuple[float, float]:
        """p at a step, and p after the next change. Changes are evenly spaced, the first at p_start, the last at p_end."""
        config, n = self.config, self.config.p_updates
        passed = (step / steps - config.p_start) / (config.p_end - config.p_start) + 1e-9  # a step that is just there counts
        changes = 0 if passed < 0 else min(n, 1 + int(passed * (n - 1)))
        return self._power_after(changes), self._power_after(min(n, changes + 1))

    def _power_after(self, changes: int) -> float:
        return 1 - (1 - self.config.p_final) * changes / self.config.p_updates

    def forward(self, codes: SparseCodes, batch: TrainingBatch, unit: Tensor) -> Tensor:
        """The penalty on a batch's codes; `unit` is the target's standard deviation per coordinate."""
        self.sparsity.observe(codes, batch)
        coefficient = self.sparsity.coefficient(batch)
        if not self.annealed:
            return coefficient * powers(codes, 1.0)
        p, p_next = self.power(batch.step, batch.steps)
        penalty = powers(codes, p, SMOOTHING * unit)
        if self.training:
            with torch.no_grad():
                if p != self.power(batch.step - 1, batch.steps)[0]:
                    old, new = self.recent_2Q.sum(1)
                    self.rescaling *= torch.where(new > 0, old / new, 1.0)
                    self.recent_2Q.zero_()
                self.recent_2Q[0, batch.step % RECENT] = penalty
                self.recent_2Q[1, batch.step % RECENT] = powers(codes, p_next, SMOOTHING * unit)
        return coefficient * self.rescaling * penalty


def powers(codes: SparseCodes, p: float, smoothing: Tensor | float = 0.0) -> Tensor:
    """The mean over tokens of sum_i (f_i + s)^p - s^p, which is 0 for latents that are not active."""
    if p == 1:
        return codes.values.sum() / len(codes)
    floor = torch.as_tensor(smoothing) ** p
    return ((codes.values + smoothing).pow(p) - floor).sum() / len(codes)


class ReLU(PNormRule):
    """Configuration of a ReLU sparse autoencoder, or transcoder where `target` is given."""

    architecture = "relu"


@register(ReLU)
class ReLUDictionary(SparseAutoencoder):
    """z = (x - c b_dec) W_enc + b_enc; f = ReLU(z); x_hat = f W_dec + b_dec."""

    config: PNormRule
    training_only = ("penalty",)

    def __init__(self, config: PNormRule):
        super().__init__(config)
        self.penalty = PNormPenalty(config)

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return encode_above(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, 0.0, weights.norm_F)

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """sum-MSE + coefficient * sum_i f_i^p, p = 1 unless annealed."""
        fit = super().objective(batch, weights)
        penalty = self.penalty(fit.codes, batch, self.variance.sqrt())
        fit.loss = fit.loss + penalty
        fit.parts["coefficient"] = self.penalty.sparsity.coefficient(batch)
        return fit

    def set_thresholds(self, x_BD: Tensor, y_BD: Tensor) -> None:
        if self.config.first_l0 is not None:
            start_at_l0(self, x_BD, y_BD, self.config.first_l0)
        else:
            super().set_thresholds(x_BD, y_BD)
        self.penalty.sparsity.start(first_l1_coefficient(self.config, y_BD))
