"""JumpReLU: a latent is active where its pre-activation exceeds a threshold of its own, which is learned (methods.md T5).

Rajamanoharan et al. 2024 and Gemma Scope: the penalty is L0 itself; thresholds learn it through a window around them
(kernels/encode_jumprelu.py). `penalty = "quadratic"` is the squared relative distance of L0 from its target. `penalty = "tanh"` is
Anthropic's form of January 2025: tanh(4 f_i ||d_i||), free decoder norms, the window's gradient also to z, and a pull on latents that
stay below their threshold. `frequency_limit` makes latents that fire on a large share of tokens pay more.

Widths and levels are in units of the target's standard deviation per coordinate, so they mean the same under every normalisation.
How thresholds are kept and started: thresholds.py.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `N` entries of codes.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.l0_control import L0Controller, SparsityRule
from saebench.dictionaries.sae import Fit, SparseAutoencoder, Weights
from saebench.dictionaries.thresholds import LEAST, SAMPLE, LearnedThresholds, shortfall, upper_quantile
from saebench.kernels import encode_above, encode_jumprelu

TANH_SLOPE = 4.0
TANH_FORM = {"decoder": "free", "straight_through": True, "bandwidth": 2.0, "pull": 3e-6}
QUADRATIC_WEIGHT = 5.0


class JumpReLU(SparsityRule):
    """Configuration of a JumpReLU sparse autoencoder, or transcoder where `target` is given."""

    architecture = "jumprelu"
    betas = (0.0, 0.999)

    penalty: Literal["l0", "quadratic", "tanh"] = "l0"
    """What sparsity costs: L0, (L0 / target_l0 - 1)^2, or sum_i tanh(4 f_i). `tanh` changes the defaults of decoder, straight_through,
    bandwidth and pull to Anthropic's."""
    quadratic_weight: float | None = Field(default=None, gt=0)
    """Weight of the quadratic penalty, as a share of the target's variance; default 5."""
    bandwidth: float = Field(default=0.5, gt=0)
    """Width of the window around a threshold in which entries give it a gradient, in standard deviations of the target."""
    initial_l0: float | None = Field(default=None, gt=0)
    """Latents active per token at the start: thresholds are set so that each fires equally often; default target_l0, or 32."""
    initial_threshold: float | None = Field(default=None, gt=0)
    """One threshold for all at the start instead of initial_l0, in standard deviations of the target."""
    straight_through: bool = False
    """Whether pre-activations inside the window get its gradient too, not thresholds alone."""
    pull: float = Field(default=0.0, ge=0)
    """Weight of sum_i ReLU(threshold_i - z_i), which pulls latents that do not fire towards their thresholds."""
    frequency_limit: float | None = Field(default=None, gt=0)
    """Share of tokens at which a latent's firing costs twice as much: every penalty sum_i p_i becomes sum_i p_i (1 + p_i / limit)."""
    centre: bool = True
    """Whether the mean of each site is subtracted while training, and folded into the biases afterwards."""
    subtract_b_dec: bool = False
    """Whether an autoencoder subtracts b_dec from its input; a transcoder never does."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_form(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        form: dict[str, Any] = {}
        if values.get("penalty") == "tanh":
            form = TANH_FORM | ({"coefficient_warmup": 1.0} if values.get("coefficient") is not None else {})
        elif values.get("penalty") == "quadratic":
            form = {"quadratic_weight": QUADRATIC_WEIGHT}
        return form | {name: value for name, value in values.items() if value is not None or name not in form}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.initial_l0 is not None and self.initial_threshold is not None:
            raise ValueError("initial_l0 and initial_threshold are both given: thresholds start from one of them, leave one out")
        if self.initial_l0 is not None and self.initial_l0 > self.d_sae:
            raise ValueError(f"initial_l0={self.initial_l0:g} exceeds d_sae={self.d_sae}: lower initial_l0 or raise d_sae")
        if self.penalty == "quadratic" and self.target_l0 is None:
            raise ValueError("penalty='quadratic' is a distance from target_l0: give target_l0 instead of coefficient")
        if self.penalty != "quadratic" and self.quadratic_weight is not None:
            raise ValueError(f"quadratic_weight is for penalty='quadratic', not {self.penalty!r}: leave it out")
        return self


@register(JumpReLU)
class JumpReLUDictionary(LearnedThresholds, SparseAutoencoder):
    """z = (x - c b_dec) W_enc + b_enc; f = z where z > threshold, else 0; x_hat = f W_dec + b_dec."""

    config: JumpReLU

    def __init__(self, config: JumpReLU):
        super().__init__(config)
        self.add_thresholds()
        self.sparsity = L0Controller(config)

    def threshold_for(self, weights: Weights) -> Tensor:
        """Thresholds of the latents as the rule sees them: [F]."""
        threshold_F = self.thresholds_F
        if weights.norm_F is None:
            return threshold_F
        # whether z ||d|| exceeds threshold ||d|| does not depend on ||d||: unless z gets the window's gradient too, ||d|| gets none of it
        return threshold_F * (weights.norm_F if self.config.straight_through else weights.norm_F.detach())

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return encode_above(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, self.threshold_for(weights), weights.norm_F)

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """sum-MSE + coefficient * penalty + pull * shortfall."""
        config, unit, threshold_F = self.config, self.variance.sqrt(), self.threshold_for(weights)
        codes, counts_F = encode_jumprelu(
            batch.x,
            weights.W_enc_FD,
            weights.b_enc_F,
            self.b_in,
            threshold_F,
            config.bandwidth * unit,
            config.straight_through,
            weights.norm_F,
        )
        error_BD, squares_B = self.error(codes, weights, batch)
        l0 = counts_F.detach().sum() / len(codes)
        self.steer(l0, batch, config.target_l0)
        coefficient = self.coefficient(l0, batch)
        loss = squares_B.mean() + coefficient * self.penalty(codes, counts_F, unit)
        if config.pull:
            loss = loss + config.pull * unit * shortfall(batch.x, weights, self.b_in, codes, threshold_F)
        return Fit(codes, error_BD, squares_B, loss, {"coefficient": coefficient})

    def coefficient(self, l0: Tensor, batch: TrainingBatch) -> Tensor:
        """What the penalty is multiplied by: steered or fixed; for the quadratic penalty fixed, after a linear rise."""
        weight = self.config.quadratic_weight
        if weight is None:
            self.sparsity.observe(l0, batch)
            return self.sparsity.coefficient(batch)
        rise = self.config.coefficient_warmup * batch.steps
        return weight * batch.y.shape[1] * self.variance * min(1.0, (batch.step + 1) / rise if rise else 1.0)

    def penalty(self, codes: SparseCodes, counts_F: Tensor, unit: Tensor) -> Tensor:
        """What the codes of a batch cost by this form, per token."""
        config = self.config
        if config.penalty == "tanh":
            costs_N = (TANH_SLOPE / unit * codes.values).tanh().reshape(-1)
            cost_F = torch.zeros_like(counts_F).index_add(0, codes.indices.reshape(-1), costs_N) / len(codes)
        else:
            cost_F = counts_F / len(codes)
        crowding = cost_F.square().sum() / config.frequency_limit if config.frequency_limit else 0.0
        if config.penalty == "quadratic":
            assert config.target_l0
            return (cost_F.sum() / config.target_l0 - 1).square() + crowding / config.target_l0
        return cost_F.sum() + crowding

    def set_thresholds(self, x_BD: Tensor, y_BD: Tensor) -> None:
        """Thresholds as configured; unless they were stated, latents are then scaled to fit the target. The search for the coefficient
        begins where leaving out an entry at its threshold is even."""
        config, weights, unit = self.config, self.weights(), self.variance.sqrt()
        x_BD, y_BD = x_BD[:SAMPLE], y_BD[:SAMPLE]
        if config.initial_threshold is not None:
            threshold_F = (config.initial_threshold * unit).expand(config.d_sae)
        else:
            l0 = config.initial_l0 or config.target_l0 or min(32.0, config.d_sae)
            threshold_F = upper_quantile(x_BD, weights, self.b_in, l0 / config.d_sae).clamp_min(LEAST * unit)
        self.start_thresholds(threshold_F, weights.norm_F, x_BD, y_BD, fit=config.initial_threshold is None)
        self.sparsity.start(self.threshold_for(self.weights()).square().mean())
