"""Gated sparse autoencoder (Rajamanoharan et al. 2024; methods.md T4): one bias decides which latents are active, another with a
scale of its own how much, so that the L1 penalty on the gate does not shrink the values.

Gate and magnitude share their directions, and a latent that the gate leaves out is 0 whatever its magnitude. So both exist at the
entries where the gate is open, and one sparse encoder pass serves both: the gate's pre-activations there, from which the magnitudes
follow. All that is done as the decoder takes latents; only the penalty weighs them by the lengths of its rows.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `N` entries of codes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.l0_control import L0Controller, SparsityRule, first_l1_coefficient, start_at_l0
from saebench.dictionaries.sae import Fit, SparseAutoencoder, Weights
from saebench.kernels import decode_error_beside, encode_above
from saebench.kernels.latent_numbers import at_entries, latent_totals


class Gated(SparsityRule):
    """Configuration of a Gated sparse autoencoder, or transcoder where `target` is given."""

    architecture = "gated"
    betas = (0.0, 0.999)
    starts_above = 4.0

    # Measured on planted data and on the bundled model: short free rows and a long way down to the target leave least error and find
    # most directions.
    decoder: Literal["unit", "free"] = "free"
    """Decoder rows of unit length, or of any length with sparsity measured on f_i ||d_i||."""
    coefficient_warmup: float = Field(default=0.8, ge=0, le=1)
    """Share of the steps over which a fixed coefficient rises from 0, or L0 glides to target_l0."""


@register(Gated)
class GatedDictionary(SparseAutoencoder):
    """p = (x - c b_dec) W_enc; f = ReLU(exp(r_mag) p + b_mag) where p + b_enc > 0, else 0; x_hat = f W_dec + b_dec.

    `b_enc` is the bias of the gate.
    """

    config: Gated
    training_only = ("sparsity",)

    def __init__(self, config: Gated):
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.sparsity = L0Controller(config)

    def gate_and_values(self, x_BD: Tensor, weights: Weights) -> tuple[SparseCodes, SparseCodes]:
        """g = p + b_enc and f at the entries where g > 0, as the decoder takes them. An entry of f may be 0: its gate is open and its
        magnitude is not positive."""
        # the encoder's pass holds the gate's bias constant: f = f(p) must not move it, and g gets its gradient back
        b_held_F = weights.b_enc_F.detach()
        open_gates = encode_above(x_BD, weights.W_enc_FD, b_held_F, self.b_in)
        r_F = self.r_mag.exp()
        f_N = at_entries(r_F, open_gates) * open_gates.values + at_entries(self.b_mag - r_F * b_held_F, open_gates)
        g_N = open_gates.values + at_entries(weights.b_enc_F - b_held_F, open_gates)
        return open_gates.replaced(g_N), open_gates.replaced(f_N.relu())

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return weights.scaled(self.gate_and_values(x_BD, weights)[1])

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """sum-MSE + coefficient * sum_i g_i ||d_i|| + squared error of decoding g in place of f with a decoder held constant."""
        gate, codes = self.gate_and_values(batch.x, weights)
        bypass_BD = self.bypass(weights, batch.x)
        left_BD = batch.y if bypass_BD is None else batch.y - bypass_BD
        gate_values = gate.values
        if weights.norm_F is not None:  # what is held constant are directions: lengths of rows belong to g
            gate_values = gate_values * at_entries(weights.norm_F / weights.norm_F.detach(), gate)
        error_BD, squares_B, gate_B = decode_error_beside(codes, gate_values, weights.W_dec_FD, self.b_dec, left_BD)
        gate_loss = gate_B.mean()
        self.sparsity.observe(codes, batch)
        coefficient = self.sparsity.coefficient(batch)
        penalty = weights.times_norm(latent_totals(gate)).sum() / len(gate)
        loss = squares_B.mean() + coefficient * penalty + gate_loss
        parts = {"coefficient": coefficient, "gate": gate_loss.detach() / (batch.y.shape[1] * self.variance)}
        return Fit(weights.held().scaled(codes.detach()), error_BD, squares_B, loss, parts)

    def set_thresholds(self, x_BD: Tensor, y_BD: Tensor) -> None:
        self.b_mag.copy_(self.b_enc)
        if self.config.first_l0 is not None:
            start_at_l0(self, x_BD, y_BD, self.config.first_l0)
        self.sparsity.start(first_l1_coefficient(self.config, y_BD))

    @torch.no_grad()
    def scale_biases(self, factor: Tensor | float) -> None:
        super().scale_biases(factor)
        self.b_mag *= factor

    @torch.no_grad()
    def shift_scores(self, delta_F: Tensor) -> None:
        super().shift_scores(delta_F)
        self.b_mag += self.r_mag.exp() * delta_F

    @torch.no_grad()
    def resample(self, batch: TrainingBatch) -> dict[str, Tensor]:
        rows = super().resample(batch)
        if rows:
            dead = rows["b_enc"]
            self.r_mag[dead] = 0.0
            self.b_mag[dead] = 0.0
            rows |= {"r_mag": dead, "b_mag": dead}
        return rows
