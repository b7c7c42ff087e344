"""Cross-layer transcoder with JumpReLU latents and a tanh penalty (Ameisen et al. 2025; methods.md T12, T5).

A latent is active where its pre-activation exceeds a threshold of its own, which learns through a window around it, as the encoder does
(kernels/encode_jumprelu.py). Sparsity costs tanh(slope f_i ||d_i||), ||d_i|| being the norm of all that latent i writes to any
layer, and latents that stay below their thresholds are pulled up a little. Files and finished dictionaries hold `threshold` [F], in
the units of the latents. Slope, window and thresholds are in units of the targets' standard deviation per coordinate.
Shape suffixes: `B` tokens, `D` width of a site, `M` latents of a layer, `F` d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.clt import CrossLayerConfig, CrossLayerTranscoder, LayerFit
from saebench.dictionaries.l0_control import L0Controller, SparsitySettings
from saebench.dictionaries.sae import Weights
from saebench.dictionaries.thresholds import LEAST, SAMPLE, LearnedThresholds, shortfall, upper_quantile
from saebench.kernels import encode_above, encode_jumprelu


class CLTJumpReLU(SparsitySettings, CrossLayerConfig):
    """Configuration of a cross-layer transcoder with a learned threshold for each latent."""

    architecture = "clt_jumprelu"
    betas = (0.0, 0.999)

    target_l0: float | None = Field(default=128.0, gt=0)
    """Latents active per token on average, of all layers together; the sparsity coefficient is found by itself."""
    coefficient_warmup: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps over which L0 glides to target_l0, or a fixed coefficient rises from 0; with a coefficient the default is 1."""
    slope: float = Field(default=1.0, gt=0)
    """c of the penalty tanh(c f_i ||d_i||): how fast the cost of a latent saturates."""
    bandwidth: float = Field(default=2.0, gt=0)
    """Width of the window around a threshold in which entries give it, and the encoder, a gradient."""
    pull: float = Field(default=3e-6, ge=0)
    """Weight of sum_i ReLU(threshold_i - z_i) ||d_i||."""
    initial_threshold: float | None = Field(default=None, gt=0)
    """One threshold for all at the start; default as high as makes target_l0 latents active, each equally often."""
    centre: bool = True
    """Whether the mean of each site is subtracted while training, and folded into the biases afterwards."""

    @model_validator(mode="before")
    @classmethod
    def _rise_over_the_whole_run(cls, values: Any) -> Any:
        fixed = isinstance(values, dict) and values.get("coefficient") is not None
        return {"coefficient_warmup": 1.0, **values} if fixed else values


@register(CLTJumpReLU)
class JumpReLUCrossLayerTranscoder(LearnedThresholds, CrossLayerTranscoder):
    """f^l = z^l where z^l = x^l W_enc^l + b_enc^l exceeds threshold^l, else 0."""

    config: CLTJumpReLU

    def __init__(self, config: CLTJumpReLU):
        super().__init__(config)
        self.add_thresholds()
        self.sparsity = L0Controller(config)

    def layer_threshold(self, layer: int, weights: Weights) -> Tensor:
        """Thresholds of one layer's latents as the rule sees them: [M]."""
        threshold_M = self.thresholds_F.split(self.config.per_layer)[layer]
        return threshold_M if weights.norm_F is None else threshold_M * weights.norm_F

    def select_layer(self, layer: int, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return encode_above(x_BD, weights.W_enc_FD, weights.b_enc_F, None, self.layer_threshold(layer, weights), weights.norm_F)

    def objective(self, batch: TrainingBatch, weights: Sequence[Weights]) -> LayerFit:
        """sum-MSE + coefficient * sum_i tanh(slope f_i ||d_i||) + pull * sum_i ReLU(threshold_i - z_i) ||d_i||."""
        config, unit = self.config, self.variance.sqrt()
        thresholds = [self.layer_threshold(number, layer) for number, layer in enumerate(weights)]
        layers = list(zip(self.split(batch.x), weights, thresholds, strict=True))
        encoded = [
            encode_jumprelu(x_BD, layer.W_enc_FD, layer.b_enc_F, None, threshold_M, config.bandwidth * unit, True, layer.norm_F)
            for x_BD, layer, threshold_M in layers
        ]
        codes = [code for code, _ in encoded]
        error_BW = self.write(codes, weights) - batch.y
        self.sparsity.observe(sum(counts_M.detach().sum() for _, counts_M in encoded) / len(batch.x), batch)
        coefficient = self.sparsity.coefficient(batch)
        cost = sum((config.slope / unit * code.values).tanh().sum() for code in codes) / len(batch.x)
        loss = error_BW.square().sum(1).mean() + coefficient * cost
        if config.pull:
            short = (shortfall(x, layer, None, code, t) for (x, layer, t), code in zip(layers, codes, strict=True))
            loss = loss + config.pull * unit * sum(short)
        return LayerFit(codes, error_BW, loss, {"coefficient": coefficient})

    def set_thresholds(self, x_BW: Tensor, y_BW: Tensor) -> None:
        """As for JumpReLU."""
        config, weights, unit = self.config, self.weights(), self.variance.sqrt()
        x_BW, y_BW = x_BW[:SAMPLE], y_BW[:SAMPLE]
        if config.initial_threshold is not None:
            threshold_F = (config.initial_threshold * unit).expand(config.d_sae)
        else:
            share = (config.target_l0 or min(128.0, config.d_sae)) / config.d_sae
            layers = zip(self.split(x_BW), weights, strict=True)
            threshold_F = torch.cat([upper_quantile(x_BD, layer, None, share) for x_BD, layer in layers]).clamp_min(LEAST * unit)
        norms = [layer.norm_F for layer in weights if layer.norm_F is not None]
        norm_F = torch.cat(norms) if norms else None
        self.start_thresholds(threshold_F, norm_F, x_BW, y_BW, fit=config.initial_threshold is None)
        thresholds = [self.layer_threshold(number, layer) for number, layer in enumerate(self.weights())]
        self.sparsity.start(torch.cat(thresholds).square().mean())
