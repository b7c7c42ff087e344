"""A stated L0 instead of a hand-tuned sparsity coefficient: a feedback controller that every rule with a sparsity penalty shares.

The coefficient is steered while training: proportional and integral feedback, in the logarithm of the coefficient, on the logarithm of
how far L0 is from a reference that glides from the first L0 to the target. As the learning rate falls at the end, L0 moves less and
less and is locked. (A target L0 by a quadratic penalty instead of feedback: dictionary_learning; methods.md T5.) All state is in
buffers, so that a resumed run is bit-identical. Biases set from data let training start near the target: thousands of latents active per
token, as biases of 0 give, cost time and end in worse dictionaries.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import DictionaryConfig, TrainingBatch
from saebench.dictionaries.geometry import ROWS_AT_ONCE
from saebench.dictionaries.sae import SAEConfig, SparseAutoencoder

PROPORTIONAL = 3.0  # rise of the log coefficient where L0 is e times the reference
INTEGRAL = 45.0  # what the log coefficient rises by over the whole run in that case,
FASTEST = 0.2  # and at most in a step: short runs must not integrate faster than L0 can follow
BELOW, ABOVE = 20, 200  # times the first coefficient, where the integral ends: going on would change nothing but the way back
START_TOKENS = 8192  # by which biases are set
FIRST_SHRINKAGE = 0.2  # of a typical latent, by the first coefficient


class SparsitySettings(DictionaryConfig):
    """Settings of every dictionary whose loss has a sparsity penalty."""

    target_l0: float | None = Field(default=32.0, gt=0)
    """Latents active per token on average; the sparsity coefficient is found by itself."""
    coefficient: float | None = Field(default=None, gt=0)
    """Fixed sparsity coefficient instead of target_l0, for the summed squared error of normalised activations."""
    coefficient_warmup: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps over which a fixed coefficient rises from 0, or L0 glides to target_l0."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("coefficient") is not None:
            if values.get("target_l0") is not None:
                raise ValueError("target_l0 and coefficient are both given: the one is found from the other, leave one out")
            return {**values, "target_l0": None}
        if "target_l0" in values and values["target_l0"] is None:
            raise ValueError("neither target_l0 nor coefficient is given: set one of them")
        return values

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target_l0 is not None and self.target_l0 > self.d_sae:
            raise ValueError(f"target_l0={self.target_l0:g} exceeds d_sae={self.d_sae}: lower target_l0 or raise d_sae")
        return self

    @property
    def default_id(self) -> str:
        aim = f"l0-{self.target_l0:g}" if self.target_l0 is not None else f"coefficient-{self.coefficient:g}"
        return f"{self.architecture}-{self.d_sae}-{aim}"


class SparsityRule(SparsitySettings, SAEConfig):
    """Settings of members of the family whose loss has a sparsity penalty."""

    starts_above: ClassVar[float] = 2.0
    """How many times target_l0 latents are active per token at the start, where nothing else is said."""

    initial_l0: float | None = Field(default=None, gt=0)
    """Latents active per token at the start, by biases that let every latent fire equally often; default twice target_l0 (gated: four
    times), and biases of 0 where the coefficient is fixed."""

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        if self.initial_l0 is not None and self.initial_l0 > self.d_sae:
            raise ValueError(f"initial_l0={self.initial_l0:g} exceeds d_sae={self.d_sae}: lower initial_l0 or raise d_sae")
        return self

    @property
    def first_l0(self) -> float | None:
        """Where L0 starts; None for biases of 0."""
        if self.initial_l0 is not None or self.target_l0 is None:
            return self.initial_l0
        return min(self.starts_above * self.target_l0, self.d_sae / 2)


@torch.no_grad()
def start_at_l0(dictionary: SparseAutoencoder, x_BD: Tensor, y_BD: Tensor, l0: float) -> None:
    """Give an untrained dictionary biases with which every latent is active on the same share of a sample's tokens, `l0` latents on an
    average one, and scale its encoder so that what it writes fits best."""
    x_BD, y_BD = x_BD[:START_TOKENS], y_BD[:START_TOKENS]
    centred_BD = x_BD if dictionary.b_in is None else x_BD - dictionary.b_in
    above = min(max(round(l0 / len(dictionary.W_enc_FD) * len(x_BD)), 1), len(x_BD) - 1)
    rows = dictionary.W_enc_FD.split(ROWS_AT_ONCE)
    quantile_F = torch.cat([torch.topk(rows_FD @ centred_BD.T, above + 1, dim=1).values[:, -1] for rows_FD in rows])
    dictionary.shift_scores(-quantile_F - dictionary.b_enc)
    written_BD = dictionary(x_BD) - dictionary.b_dec
    scale = ((y_BD - dictionary.b_dec) * written_BD).sum() / written_BD.square().sum().clamp_min(1e-30)
    if scale > 0:
        dictionary.W_enc_FD *= scale
        dictionary.scale_biases(scale)


def first_l1_coefficient(config: SparsitySettings, y_BD: Tensor) -> Tensor | float:
    """Where the search for the coefficient of sum_i f_i begins: a lasso shrinks by coefficient / 2, and that is a fifth of a latent if the
    target's variance were spread evenly over target_l0 orthogonal ones."""
    total = (y_BD - y_BD.mean(0)).square().sum(1).mean()
    return 2 * FIRST_SHRINKAGE * (total / config.target_l0).sqrt() if config.target_l0 else 1.0


class L0Controller(nn.Module):
    """The sparsity coefficient of a rule: fixed with a warm-up, or steered so that L0 reaches its target.

    A rule calls `start` once from `set_thresholds`, and in `objective`, in this order, `observe` and `coefficient`.
    """

    def __init__(self, config: SparsitySettings):
        super().__init__()
        self.config = config
        self.register_buffer("log_coefficient", torch.zeros(()))
        self.register_buffer("integral", self.log_coefficient.clone())
        self.register_buffer("first_log_coefficient", self.log_coefficient.clone())
        self.register_buffer("first_gap", torch.full((), math.inf))
        self.log_coefficient: Tensor
        self.integral: Tensor
        self.first_log_coefficient: Tensor
        self.first_gap: Tensor

    @torch.no_grad()
    def start(self, coefficient: float | Tensor) -> None:
        """Where the search begins: at most 20 times too high or 200 times too low. Nothing where the coefficient is fixed."""
        if self.config.coefficient is None:
            self.log_coefficient.copy_(torch.as_tensor(coefficient).log())
            self.integral.copy_(self.log_coefficient)
            self.first_log_coefficient.copy_(self.log_coefficient)

    @torch.no_grad()
    def observe(self, l0: Tensor | SparseCodes, batch: TrainingBatch) -> None:
        """Take note of a training batch's mean L0 (0-dim, or its codes). Nothing outside of training."""
        target = self.config.target_l0
        if target is None or not self.training:
            return
        if isinstance(l0, SparseCodes):
            l0 = torch.count_nonzero(l0.values) / len(l0)
        gap = (l0.to(self.integral.dtype) / target).clamp_min(1e-3).log()
        self.first_gap.copy_(torch.where(self.first_gap.isinf(), gap, self.first_gap))
        glide = self.config.coefficient_warmup
        ahead = max(0.0, 1 - (batch.progress / glide if glide else 1.0))
        error = (gap - ahead * self.first_gap).clamp(-1, 1)
        self.integral += min(INTEGRAL / batch.steps, FASTEST) * error
        self.integral.clamp_(self.first_log_coefficient - math.log(BELOW), self.first_log_coefficient + math.log(ABOVE))
        self.log_coefficient.copy_(self.integral + PROPORTIONAL * error)

    def coefficient(self, batch: TrainingBatch) -> Tensor:
        """The coefficient of this step: 0-dim, without gradient."""
        fixed, rise = self.config.coefficient, self.config.coefficient_warmup * batch.steps
        if fixed is None:
            return self.log_coefficient.exp()
        return torch.full_like(self.log_coefficient, fixed * (min(1.0, (batch.step + 1) / rise) if rise else 1.0))
