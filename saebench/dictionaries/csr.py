"""CSR, contrastive sparse representation: turns frozen embedding vectors into sparse codes to search with (Wen et al. 2025;
methods.md T21).

A TopK autoencoder with tied weights, trained at k and at 4 k at once, so that one model serves several sparsities, and with a
contrastive term that keeps the codes of different inputs apart. Both views of an input are the same, so the term only repels.
While training, W_enc_FD follows W_dec; folding may scale the two differently.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `K` active latents.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.sae import Fit, SparseAutoencoder, Weights, block_norms
from saebench.dictionaries.scaling import Scaling
from saebench.dictionaries.topk import KRule
from saebench.errors import UserError
from saebench.kernels import encode_topk
from saebench.kernels.code_dots import self_contrast
from saebench.kernels.stock import select_topk

WIDER = 4  # the second sparsity that is trained, as a multiple of k


class CSR(KRule):
    """Configuration of a contrastive sparse representation of embedding vectors."""

    architecture = "csr"

    decoder: Literal["unit", "free"] = "free"
    """Rows of unit length, or of any length with selection by f_i ||d_i||; the encoder has the same rows."""
    wide_coefficient: float = Field(default=1 / 8, ge=0)
    """Weight of the squared error with 4 k active latents."""
    contrast_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the contrastive term, beside a squared error of 1 for predicting the mean."""
    temperature: float = Field(default=0.2, gt=0)
    """Of the contrastive term: cosines are divided by it."""

    @model_validator(mode="after")
    def _is_tied(self) -> Self:
        if not self.rewrites or self.skip:
            raise ValueError(
                "csr has the same weights for encoder and decoder, so it writes what it reads: leave target and skip out"
            )
        return self


@register(CSR)
class CSRDictionary(SparseAutoencoder):
    """f = ReLU(top k of (x - b_dec) W_dec^T + b_enc); x_hat = f W_dec + b_dec."""

    config: CSR

    def weights(self) -> Weights:
        """As the family, with the decoder's rows in both places until folding."""
        if self.folded:
            return super().weights()
        free = self.config.decoder == "free"
        norm_F = block_norms(self.W_dec, self.config.blocks_out).clamp_min(1e-8) if free else None
        return Weights(self.W_dec, self.b_enc, self.W_dec, norm_F)

    def select(self, x_BD: Tensor, weights: Weights, k: int | None = None) -> SparseCodes:
        k = self.config.k if k is None else k
        return encode_topk(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, k, weights.norm_F)

    def encode(self, x_BD: Tensor, k: int | None = None) -> SparseCodes:
        """The code with k active latents, or another number than in training: the k largest of it for a smaller k. Raises UserError
        for k below 1 or above d_sae."""
        if k is not None and not 1 <= k <= self.config.d_sae:
            raise UserError(f"k={k} is not between 1 and d_sae={self.config.d_sae}")
        self.check_rows(x_BD)
        return self.select(x_BD, self.weights(), k)

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """SSE at k + wide_coefficient * SSE at 4 k + contrast_coefficient * contrast, the last in units of the variance. Only
        latents among the k count as fired."""
        config = self.config
        wide = self.select(batch.x, weights, min(WIDER * config.k, config.d_sae))
        first_BK = select_topk(wide.values.detach(), config.k)[1]
        codes = SparseCodes(wide.indices.gather(1, first_BK), wide.values.gather(1, first_BK), config.d_sae)
        error_BD, squares_B = self.error(codes, weights, batch)
        loss, parts = squares_B.mean(), {}
        unit = batch.y.shape[1] * self.variance
        if config.wide_coefficient:
            missed = self.error(wide, weights, batch)[1].mean()
            loss = loss + config.wide_coefficient * missed
            parts["wide"] = missed.detach() / unit
        if config.contrast_coefficient:
            contrast = self_contrast(codes, config.temperature)
            loss = loss + config.contrast_coefficient * unit * contrast
            parts["contrast"] = contrast.detach()
        return Fit(codes, error_BD, squares_B, loss, parts)

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """As the family, all rows of the length with which a sample is best reconstructed at k."""
        super().initialise(x, y, generator, lm)
        if self.config.decoder == "free":
            with torch.no_grad():
                written_BD = self(x) - self.b_dec  # goes with the square of the rows' length
                best = (written_BD * (x - self.b_dec)).sum() / written_BD.square().sum().clamp_min(1e-30)
                self.W_dec *= best.clamp_min(1e-6).sqrt()
        self._tie()

    @torch.no_grad()
    def _tie(self) -> None:
        self.W_enc_FD.copy_(self.W_dec)

    @torch.no_grad()
    def constrain(self, lr: float = 0.0) -> None:
        super().constrain(lr)
        self._tie()

    @torch.no_grad()
    def resample(self, batch: TrainingBatch) -> dict[str, Tensor]:
        rows = super().resample(batch)
        if rows and self.config.decoder == "free":
            self.W_dec[rows["W_dec"]] = self.W_enc_FD[rows["W_enc_FD"]]
        self._tie()
        return {name: dead for name, dead in rows.items() if name != "W_enc_FD"}

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        if not self.folded:
            self._tie()
        super().fold(read, write)
