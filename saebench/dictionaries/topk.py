"""TopK sparse autoencoder with AuxK (Gao et al. 2024; methods.md T2): keeps the k largest pre-activations of every token.

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `K` active latents.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import DictionaryConfig, register
from saebench.dictionaries.geometry import random_unit_rows
from saebench.dictionaries.sae import SAEConfig, SparseAutoencoder, Weights
from saebench.kernels import encode_topk


class KSettings(DictionaryConfig):
    """Settings of whatever keeps k latents of a token."""

    k: int = Field(default=32, gt=0)
    """Latents active on each token, at most."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}: lower k or raise d_sae")
        return self

    @property
    def default_id(self) -> str:
        return f"{self.architecture}-{self.d_sae}-k{self.k}"


class KRule(KSettings, SAEConfig):
    """Settings of members of the family that keep k latents."""

    decoder: Literal["unit", "free"] = "free"
    """Decoder rows of unit length, or of any length with selection by f_i ||d_i||. Measured on planted data and on the bundled model at
    several learning rates: short free rows leave less error."""
    initial_norm: float = Field(default=0.6, gt=0)
    """Length of a free decoder's rows at the start: the shorter, the sooner they turn to where they are needed, and the more die."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, by which dead latents learn to reconstruct the residual; 0 leaves it out."""


class TopK(KRule):
    """Configuration of a TopK sparse autoencoder, or transcoder where `target` is given."""

    architecture = "topk"


class KRuleDictionary(SparseAutoencoder):
    """A member of the family that keeps k latents, by whatever comparison."""

    config: KRule
    norms_cancel = True

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """As the family, with the encoder scaled so that reconstructions of random unit vectors have unit length; with a free decoder
        encoder and decoder are as much shorter as initial_norm says, and reconstructions by both."""
        super().initialise(x, y, generator, lm)
        if self.b_in is not None:
            with torch.no_grad():
                probe_BD = random_unit_rows(256, x.shape[1], generator) + self.b_dec
                self.W_enc_FD *= self.config.first_norm**2 / (self(probe_BD) - self.b_dec).norm(dim=1).mean()


@register(TopK)
class TopKDictionary(KRuleDictionary):
    """z = (x - b_dec) W_enc + b_enc; f = ReLU(top k of z); x_hat = f W_dec + b_dec, decoder rows of unit length."""

    config: TopK

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return encode_topk(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, self.config.k, weights.norm_F)
