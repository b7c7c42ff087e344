"""A dictionary of atoms in the atomic inner product ("Towards Atoms"; methods.md T17): z = x S D^T; f = z where z >= tau, else 0;
x_hat = f D, with S = E[x^T x]^-1 and one trainable tau per atom.

In the space of x S^(1/2) the atomic inner product is the ordinary one, and encoder and decoder are the same matrix of unit rows: training
takes place there, squared error included. Thresholds learn through JumpReLU's window (T5). The finished dictionary is an ordinary one on
raw activations: W_enc, W_dec with unit rows, threshold, and biases where a mean was subtracted.
Shape suffixes: `B` tokens, `D` width, `F` d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import Losses, TrainingBatch, register
from saebench.dictionaries.geometry import random_unit_rows
from saebench.dictionaries.l0_control import L0Controller, SparsitySettings
from saebench.dictionaries.sae import Weights
from saebench.dictionaries.scaling import Scaling
from saebench.dictionaries.thresholds import LEAST, SAMPLE, LearnedThresholds, upper_quantile
from saebench.kernels import encode_above, encode_jumprelu, sparse_decode


class Threshold(SparsitySettings):
    """Configuration of a threshold-activated dictionary of atoms; d_sae = 4 d_in is the authors' choice."""

    architecture = "threshold"
    betas = (0.0, 0.999)

    normalise: Literal["none"] = "none"
    """Whitening makes every scale of the input the same."""
    centre: bool = True
    """Whether the mean is subtracted while training, and folded into the biases afterwards; without, a large mean is one of the
    directions that whitening shrinks to the size of all others, and errors along it are large in the space of the activations."""
    floor: float = Field(default=1e-2, gt=0, lt=1)
    """Smallest eigenvalue of the second moment that is inverted as it is, as a share of the largest."""
    bandwidth: float = Field(default=0.5, gt=0)
    """Width of the window around a threshold in which entries give it a gradient, in standard deviations of whitened coordinates."""
    initial_threshold: float | None = Field(default=None, gt=0)
    """One tau for all atoms at the start, in the same units; default as high as makes target_l0 (or 32) atoms active, each equally
    often."""

    @model_validator(mode="after")
    def _writes_what_it_reads(self) -> Self:
        if not self.rewrites:
            raise ValueError("atoms are what the activations themselves are made of: leave target out")
        return self


def whitening(second_moment_DD: Tensor, floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """S^(1/2) and S^(-1/2) for S = second moment^-1, eigenvalues below `floor` times the largest raised to that: [D, D] twice, float64."""
    squares_D, vectors_DD = torch.linalg.eigh(second_moment_DD.double())
    roots_D = squares_D.clamp_min(floor * squares_D[-1]).sqrt()
    return (vectors_DD / roots_D) @ vectors_DD.T, (vectors_DD * roots_D) @ vectors_DD.T


def just_below(threshold_F: Tensor) -> Tensor:
    """The next smaller numbers: to exceed them is to reach the thresholds. The gradient is that of the thresholds."""
    with torch.no_grad():
        gap_F = torch.nextafter(threshold_F, torch.zeros_like(threshold_F)) - threshold_F
    return threshold_F + gap_F


@register(Threshold)
class ThresholdDictionary(LearnedThresholds):
    """z = x S D^T; f = z where z >= tau, else 0; x_hat = f D."""

    config: Threshold
    training_only = (*LearnedThresholds.training_only, "atoms_FD", "whiten_DD", "colour_DD")

    def __init__(self, config: Threshold):
        super().__init__(config)
        d_in, d_sae = config.d_in, config.d_sae
        assert d_in is not None
        self.atoms_FD = nn.Parameter(torch.zeros(d_sae, d_in))  # D S^(1/2)
        self.add_thresholds()
        self.register_buffer("whiten_DD", torch.eye(d_in))
        self.register_buffer("colour_DD", torch.eye(d_in))
        self.sparsity = L0Controller(config)
        self.whiten_DD: Tensor
        self.colour_DD: Tensor
        self.folded = False

    @property
    def W_enc(self) -> Tensor:
        """S D^T: [d_in, d_sae]"""
        return self.weights().W_enc_FD.T

    def weights(self) -> Weights:
        """Encoder and decoder as those of any dictionary."""
        if self.folded:
            return Weights(self.W_enc_FD, self.b_enc, self.W_dec)
        zeros_F = self.atoms_FD.new_zeros(self.config.d_sae)
        return Weights(self.atoms_FD @ self.whiten_DD, zeros_F, self.atoms_FD @ self.colour_DD)

    def encode(self, x_BD: Tensor) -> SparseCodes:
        self.check_rows(x_BD)
        weights = self.weights()
        return encode_above(x_BD, weights.W_enc_FD, weights.b_enc_F, None, just_below(self.thresholds_F))

    def decode(self, codes: SparseCodes) -> Tensor:
        x_hat_BD = sparse_decode(codes, self.weights().W_dec_FD)
        return x_hat_BD + self.b_dec if self.folded else x_hat_BD

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """Whitening as measured on the sample, atoms random in the whitened space."""
        config = self.config
        whiten_DD, colour_DD = whitening(x.double().T @ x.double() / len(x), config.floor)
        self.whiten_DD.copy_(whiten_DD)
        self.colour_DD.copy_(colour_DD)
        self.atoms_FD.copy_(random_unit_rows(config.d_sae, x.shape[1], generator))
        tau_F = self.atoms_FD.new_full((config.d_sae,), config.initial_threshold or LEAST)
        if config.initial_threshold is None:
            share = (config.target_l0 or min(32.0, config.d_sae)) / config.d_sae
            unbiased = Weights(self.atoms_FD, torch.zeros_like(tau_F), self.atoms_FD)
            tau_F = upper_quantile(x[:SAMPLE] @ self.whiten_DD, unbiased, None, share).clamp_min(LEAST)
        self.start_thresholds(tau_F, None, x, y, fit=False)
        self.sparsity.start(tau_F.square().mean())

    def losses(self, batch: TrainingBatch) -> Losses:
        """(squared error in the whitened space + coefficient * L0) / width. Squared errors are told in the space of the activations."""
        x_BD, zeros_F = batch.x @ self.whiten_DD, self.atoms_FD.new_zeros(self.config.d_sae)
        codes, counts_F = encode_jumprelu(
            x_BD, self.atoms_FD, zeros_F, None, just_below(self.thresholds_F), self.config.bandwidth
        )
        error_BD = sparse_decode(codes, self.atoms_FD) - x_BD
        l0 = counts_F.sum() / len(codes)
        self.sparsity.observe(l0.detach(), batch)
        self.steer(l0.detach(), batch, self.config.target_l0)
        coefficient = self.sparsity.coefficient(batch)
        width = batch.x.shape[1]
        whitened = error_BD.square().sum(1).mean() / width
        squared_error_B = (error_BD.detach() @ self.colour_DD).square().sum(1)
        parts = {"whitened": whitened.detach(), "coefficient": coefficient}
        return Losses(whitened + coefficient * l0 / width, parts, codes, squared_error_B, batch.y)

    def unit_rows(self) -> Sequence[Tensor]:
        return () if self.folded else (self.atoms_FD,)

    # --- the finished dictionary is an ordinary one ---

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        """The whitening and the shift go into matrices and biases; decoder rows are scaled to unit length, latents accordingly."""
        self.drop_training()
        offset_D = read.shift_D * read.scale_D
        self.b_enc -= self.W_enc_FD @ offset_D
        self.W_enc_FD *= read.scale_D
        self.W_dec /= write.scale_D
        self.b_dec.copy_(self.b_dec / write.scale_D + write.shift_D)
        norm_F = self.W_dec.norm(dim=1).clamp_min(1e-30)
        self.W_dec /= norm_F[:, None]
        self.W_enc_FD *= norm_F[:, None]
        self.b_enc *= norm_F
        self.threshold *= norm_F

    @torch.no_grad()
    def drop_training(self) -> None:
        """Become an ordinary dictionary."""
        if self.folded:
            return
        weights, b_dec_D = self.weights(), self.colour_DD.new_zeros(len(self.colour_DD))
        super().drop_training()
        self.register_buffer("W_enc_FD", weights.W_enc_FD.contiguous())
        self.register_buffer("W_dec", weights.W_dec_FD)
        self.register_buffer("b_enc", weights.b_enc_F)
        self.register_buffer("b_dec", b_dec_D)
        self.folded = True
        self.W_enc_FD: Tensor
        self.W_dec: Tensor
        self.b_enc: Tensor
        self.b_dec: Tensor
