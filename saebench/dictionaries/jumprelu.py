"""JumpReLU: a latent is active where its pre-activation exceeds a threshold of its own, which is learned (methods.md T5).

Rajamanoharan et al. 2024 and Gemma Scope: the penalty is L0 itself; thresholds learn it through a window around them
(kernels/encode_jumprelu.py). `penalty = "quadratic"` is the squared relative distance of L0 from its target. `penalty = "tanh"` is
Anthropic's form of January 2025: tanh(4 f_i ||d_i||), free decoder norms, the window's gradient also to z, and a pull on latents that
stay below their threshold. `frequency_limit` makes latents that fire on a large share of tokens pay more.

While training the parameter is log(threshold) / SPEED, so that an optimiser's steps are relative ones, and large enough for thresholds to
get anywhere in a run of some hundred steps; files and finished dictionaries hold `threshold` itself, in the units of the latents. Widths
and levels are in units of the target's standard deviation per coordinate, so they mean the same under every normalisation.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `N` entries of codes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.l0_control import L0Controller, SparsityRule
from saebench.dictionaries.sae import Fit, SparseAutoencoder, Weights
from saebench.dictionaries.scaling import Scaling
from saebench.kernels import encode_above, encode_jumprelu, with_gradient

TANH_SLOPE = 4.0
TANH_FORM = {"decoder": "free", "straight_through": True, "bandwidth": 2.0, "pull": 3e-6}
QUADRATIC_WEIGHT = 5.0
SAMPLE = 8192  # tokens from which thresholds are set
SPEED = 4.0
SETTLED = 0.8  # share of the steps after which thresholds also move together, straight towards the target,
LAST_RATE = 0.05  # by this part of log(L0 / target) a step
LEAST = 1e-3  # the smallest threshold set from data, in standard deviations: those of Gemma Scope start near 0.05


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
class JumpReLUDictionary(SparseAutoencoder):
    """z = (x - c b_dec) W_enc + b_enc; f = z where z > threshold, else 0; x_hat = f W_dec + b_dec."""

    config: JumpReLU

    def __init__(self, config: JumpReLU):
        super().__init__(config)
        self.slow_log_threshold = nn.Parameter(torch.zeros(config.d_sae))
        self.sparsity = L0Controller(config)
        self.shift: Tensor | None = None  # of log thresholds, after the step that is being taken

    def threshold_for(self, weights: Weights) -> Tensor:
        """Thresholds of the latents as the rule sees them: [F]."""
        if self.folded:
            return self.threshold
        threshold_F = (SPEED * self.slow_log_threshold).exp()
        if weights.norm_F is None:
            return threshold_F
        # whether z ||d|| exceeds threshold ||d|| does not depend on ||d||: unless z gets the window's gradient too, ||d|| gets none of it
        return threshold_F * (weights.norm_F if self.config.straight_through else weights.norm_F.detach())

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return encode_above(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, self.threshold_for(weights))

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """sum-MSE + coefficient * penalty + pull * shortfall."""
        config, unit, threshold_F = self.config, self.variance.sqrt(), self.threshold_for(weights)
        codes, counts_F = encode_jumprelu(
            batch.x, weights.W_enc_FD, weights.b_enc_F, self.b_in, threshold_F, config.bandwidth * unit, config.straight_through
        )
        error_BD = self.write(codes, weights, batch.x) - batch.y
        l0 = counts_F.detach().sum() / len(codes)
        self.shift = last_shift(l0, batch, config.target_l0) if self.training else None
        coefficient = self.coefficient(l0, batch)
        loss = error_BD.square().sum(1).mean() + coefficient * self.penalty(codes, counts_F, unit)
        if config.pull:
            loss = loss + config.pull * unit * shortfall(batch.x, weights, self.b_in, codes, threshold_F)
        return Fit(codes, error_BD, loss, {"coefficient": coefficient})

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
        """Thresholds as configured; unless they were stated, latents are then scaled to fit the target best, because ones that overshoot
        raise their thresholds at once. The search for the coefficient begins where leaving out an entry at its threshold is even."""
        config, weights, unit = self.config, self.weights(), self.variance.sqrt()
        x_BD, y_BD = x_BD[:SAMPLE], y_BD[:SAMPLE]
        if config.initial_threshold is not None:
            threshold_F = (config.initial_threshold * unit).expand(config.d_sae)
        else:
            l0 = config.initial_l0 or config.target_l0 or min(32.0, config.d_sae)
            threshold_F = upper_quantile(x_BD, weights, self.b_in, l0 / config.d_sae).clamp_min(LEAST * unit)
        if weights.norm_F is not None:
            threshold_F = threshold_F / weights.norm_F
        self.slow_log_threshold.copy_(threshold_F.log() / SPEED)
        if config.initial_threshold is None:
            written_BD = self(x_BD) - self.b_dec
            square = written_BD.square().sum()
            factor = torch.where(square > 0, ((y_BD - self.b_dec) * written_BD).sum() / square, 1.0).clamp(1e-3, 1e3)
            self.W_enc_FD *= factor
            self.scale_biases(factor)
        self.sparsity.start(self.threshold_for(self.weights()).square().mean())

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

    # --- the finished dictionary: `threshold` itself, and nothing of the training ---

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        finished = self.folded
        super().fold(read, write)
        if not finished:
            self._settle()

    def public_tensors(self) -> dict[str, Tensor]:
        own = {name: t for name, t in super().public_tensors().items() if not name.startswith("sparsity.")}
        if not self.folded:
            own["threshold"] = (SPEED * own.pop("slow_log_threshold")).exp()
        return own

    def load_public(self, tensors: dict[str, Tensor]) -> None:
        self._settle()
        super().load_public(tensors)

    @torch.no_grad()
    def _settle(self) -> None:
        threshold_F = (SPEED * self.slow_log_threshold).exp()
        del self.slow_log_threshold, self.sparsity
        self.register_buffer("threshold", threshold_F)
        self.threshold: Tensor


def last_shift(l0: Tensor, batch: TrainingBatch, target: float | None) -> Tensor | None:
    """What to add to all log thresholds towards the end of training, so that L0 ends at its target: the coefficient acts slowly, and no
    more once the learning rate has fallen; how latents share the L0 is settled by then. None where thresholds are left alone."""
    if target is None or batch.progress < SETTLED:
        return None
    return LAST_RATE * (l0 / target).clamp(0.5, 2).log()


def upper_quantile(x_BD: Tensor, weights: Weights, b_in_D: Tensor | None, share: float) -> Tensor:
    """What each latent's pre-activation exceeds on this share of the tokens, halfway between two of them: [F]."""
    centred_BD = x_BD if b_in_D is None else x_BD - b_in_D
    count = min(len(x_BD) - 1, max(1, round(share * len(x_BD))))
    found = []
    for start in range(0, len(weights.W_enc_FD), 512):
        rows = slice(start, start + 512)
        z_fB = torch.addmm(weights.b_enc_F[rows, None], weights.W_enc_FD[rows], centred_BD.T)
        found.append(z_fB.topk(count + 1, dim=1).values[:, -2:].mean(1))
    return torch.cat(found)


def shortfall(x_BD: Tensor, weights: Weights, b_in_D: Tensor | None, codes: SparseCodes, threshold_F: Tensor) -> Tensor:
    """The mean over tokens of sum_i ReLU(threshold_i - z_i), by all entries less the active ones: no [B, F] matrix is made."""
    mean_D = x_BD.mean(0) if b_in_D is None else x_BD.mean(0) - b_in_D
    everything = (threshold_F - weights.b_enc_F - weights.W_enc_FD @ mean_D).sum()
    active = with_gradient(codes.detach(), x_BD, weights.W_enc_FD, weights.b_enc_F, b_in_D)
    at = active.indices.reshape(-1)
    beyond = ((threshold_F[at] - active.values.reshape(-1)) * (codes.values.detach().reshape(-1) != 0)).sum()
    return everything - beyond / len(codes)
