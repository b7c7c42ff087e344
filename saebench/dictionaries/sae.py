"""The family that shares one encoder matrix and one decoder matrix: z = (x - c b_dec) W_enc + b_enc, y_hat = f W_dec + b_dec.

A member of the family is a rule that turns z into sparse f, and what that adds to the loss. Everything else is here, once: reading
and writing any sites (autoencoder, transcoder, crosscoder), initialisation, decoder norms, AuxK, resampling, folding.

With `decoder = "unit"` rows of W_dec are kept at length 1. With `"free"` they are not, and the dictionary works on the equal one whose
latents are f_i ||d_i||: the kernels multiply what comes out of the encoder by ||d_i||, so that rules and penalties see f_i ||d_i||, and
what goes into the decoder is divided by it. ||d_i|| is the sum of the row's norms over the sites written (methods.md T1, T11). A finished
dictionary has its norms folded in.
Shape suffixes: `B` tokens, `D` width of what is read or written, `F` d_sae.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.auxk import auxk_loss, default_k_aux
from saebench.dictionaries.base import Dictionary, FirstDirections, Losses, TrainingBatch
from saebench.dictionaries.geometry import geometric_median, linear_map, random_directions, scale_to_unit
from saebench.dictionaries.group_penalty import column_blocks, shrink_blocks
from saebench.dictionaries.orthogonality import orthogonality_penalty
from saebench.dictionaries.scaling import Scaling
from saebench.errors import UserError
from saebench.kernels import decode_error, sparse_decode
from saebench.kernels.latent_numbers import at_entries
from saebench.kernels.row_lengths import row_lengths


class SAEConfig(FirstDirections):
    """What the family's configurations have in common."""

    decoder: Literal["unit", "free"] = "unit"
    """Decoder rows of unit length, or of any length with sparsity measured on f_i ||d_i||."""
    initial_norm: float = Field(default=0.1, gt=0)
    """Length of a free decoder's rows at the start: the shorter, the sooner they turn to where they are needed."""
    subtract_b_dec: bool = True
    """Whether an autoencoder subtracts b_dec from its input; a transcoder never does."""
    skip: bool = False
    """Whether a linear map from input to output bypasses the latents (skip transcoder)."""
    initial_bias: Literal["median", "mean", "zero"] = "median"
    """Where b_dec starts: geometric median or mean of what is written, or 0."""
    aux_coefficient: float = Field(default=0.0, ge=0)
    """Weight of AuxK, by which dead latents learn to reconstruct the residual; 0 leaves it out."""
    k_aux: int | None = Field(default=None, gt=0)
    """Dead latents that AuxK uses on each token; default the power of two nearest half the width."""
    orthogonality: float = Field(default=0.0, ge=0)
    """Weight of the penalty on decoder rows that are alike (OrtSAE, methods.md T8), in units of AuxK; 0 leaves it out."""
    orthogonality_chunk: int = Field(default=8192, gt=1)
    """Latents that are compared with each other; the split into chunks is drawn anew each time."""
    orthogonality_every: int = Field(default=1, gt=0)
    """Steps from one such penalty to the next, each as many times as heavy."""
    group_penalty: float = Field(default=0.0, ge=0)
    """Weight of the group lasso on blocks of a free decoder (methods.md T22, experimental), which about 1 begins to empty; 0 leaves it
    out."""
    group_latents: int = Field(default=1, gt=0)
    """Neighbouring latents in a block."""
    group_columns: int | None = Field(default=None, gt=0)
    """Neighbouring columns in a block, within a site; default all columns of a site."""

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.group_penalty and self.decoder != "free":
            raise ValueError("group_penalty shrinks decoder rows, which decoder=unit keeps at length 1: set decoder=free")
        if self.d_sae % self.group_latents:
            raise ValueError(f"group_latents={self.group_latents} does not divide d_sae={self.d_sae}")
        return self

    @property
    def first_norm(self) -> float:
        """Length of the decoder's rows at the start."""
        return self.initial_norm if self.decoder == "free" else 1.0


@dataclass(frozen=True)
class Weights:
    """Encoder and decoder, and what latents are multiplied by between them, `norm_F`, None for 1."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    norm_F: Tensor | None = None

    def times_norm(self, values_F: Tensor) -> Tensor:
        """One number a latent in the units that the rules see: [F]."""
        return values_F if self.norm_F is None else values_F * self.norm_F

    def over_norm(self, numbers: Tensor) -> Tensor:
        """What multiplies latents in the units of the rules, [..., F], as something that multiplies rows of the decoder."""
        return numbers if self.norm_F is None else numbers / self.norm_F

    def unscaled(self, codes: SparseCodes) -> SparseCodes:
        """Codes as the decoder takes them."""
        if self.norm_F is None:
            return codes
        return codes.replaced(codes.values / at_entries(self.norm_F, codes))

    def scaled(self, codes: SparseCodes) -> SparseCodes:
        """Codes in the units of the rules, from those that the decoder takes."""
        return codes if self.norm_F is None else codes.replaced(codes.values * at_entries(self.norm_F, codes))

    def held(self) -> Weights:
        """The same without gradient."""
        norm_F = None if self.norm_F is None else self.norm_F.detach()
        return Weights(self.W_enc_FD.detach(), self.b_enc_F.detach(), self.W_dec_FD.detach(), norm_F)

    def folded(self) -> Weights:
        """The equal encoder and decoder with nothing between them: copies as large as the weights, for whoever looks at single rows."""
        if self.norm_F is None:
            return self
        norm_F1 = self.norm_F[:, None]
        return Weights(self.W_enc_FD * norm_F1, self.b_enc_F * self.norm_F, self.W_dec_FD / norm_F1)

    def decode(self, codes: SparseCodes, b_dec_D: Tensor | None = None) -> Tensor:
        """What the codes stand for, [B, D], plus b_dec."""
        return sparse_decode(self.unscaled(codes), self.W_dec_FD, b_dec_D)


@dataclass
class Fit:
    """What a rule made of a batch: codes, error y_hat - y, the loss in units of the summed squared error per token, and its parts."""

    codes: SparseCodes
    error_BD: Tensor
    squared_error_B: Tensor
    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class SparseAutoencoder(Dictionary):
    """One encoder matrix, one decoder matrix, and a rule for what stays active."""

    config: SAEConfig
    norms_cancel: ClassVar[bool] = False
    """Whether the loss is a function of f_i ||d_i|| times d_i / ||d_i|| alone, so that ||d_i|| itself has no gradient: where no penalty is
    on latents. Saves several passes over the weights in a step."""

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        d_in, d_out, d_sae = config.d_in, config.width_out, config.d_sae
        assert d_in is not None
        self.W_enc_FD = nn.Parameter(torch.zeros(d_sae, d_in))  # by rows: the kernels gather and sum rows
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))
        self.register_buffer("variance", torch.ones(()))  # of the target per coordinate: makes the loss scale-free
        self.variance: Tensor
        self.k_aux = config.k_aux or default_k_aux(d_out)
        self.folded = False

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae]"""
        return self.W_enc_FD.T

    @property
    def b_in(self) -> Tensor | None:
        """What is subtracted from the input, if anything: [D]."""
        return self.b_dec if self.config.subtract_b_dec and self.config.rewrites else None

    def weights(self) -> Weights:
        """Encoder and decoder, and what makes latents be in units of what they write."""
        if self.config.decoder == "unit" or self.folded:
            return Weights(self.W_enc_FD, self.b_enc, self.W_dec)
        norm_F = block_norms(self.W_dec, self.config.blocks_out)
        if self.norms_cancel:
            norm_F = norm_F.detach()
        return Weights(self.W_enc_FD, self.b_enc, self.W_dec, norm_F.clamp_min(1e-8))

    # --- what a member of the family defines ---

    @abstractmethod
    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        """The active latents of each token by this rule, differentiable."""

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """The rule's training objective; here the squared error alone."""
        codes = self.select(batch.x, weights)
        error_BD, squares_B = self.error(codes, weights, batch)
        return Fit(codes, error_BD, squares_B, squares_B.mean(-1))

    def set_thresholds(self, x_BD: Tensor, y_BD: Tensor) -> None:
        """Initialise what the rule has besides matrices and biases, given a normalised sample and decoder rows of length 1. Here, where
        latents are only compared with each other: encoder rows as long as those of the decoder are about to be."""
        self.W_enc_FD *= self.config.first_norm
        self.b_enc *= self.config.first_norm

    @torch.no_grad()
    def scale_biases(self, factor: Tensor | float) -> None:
        """Latents are about to be multiplied by a positive factor, a number or one each [F]: take biases and thresholds along. Rules
        with some of their own extend this."""
        self.b_enc *= factor

    @torch.no_grad()
    def shift_scores(self, delta_F: Tensor) -> None:
        """Add a constant to every latent's pre-activation. Rules with biases of their own extend this."""
        self.b_enc += delta_F

    # --- the same for all ---

    def encode(self, x_BD: Tensor) -> SparseCodes:
        self.check_rows(x_BD)
        return self.select(x_BD, self.weights())

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.weights().decode(codes, self.b_dec)

    def reconstruct(self, x_BD: Tensor, codes: SparseCodes) -> Tensor:
        return self.write(codes, self.weights(), x_BD)

    def write(self, codes: SparseCodes, weights: Weights, x_BD: Tensor) -> Tensor:
        """What the codes, and the bypass if there is one, say of the target: [B, D]."""
        y_hat_BD = weights.decode(codes, self.b_dec)
        bypass_BD = self.bypass(weights, x_BD)
        return y_hat_BD if bypass_BD is None else y_hat_BD + bypass_BD

    def bypass(self, weights: Weights, x_BD: Tensor) -> Tensor | None:
        """What is written past the codes, if anything: [B, D]."""
        return x_BD @ self.W_skip if self.config.skip else None

    def error(self, codes: SparseCodes, weights: Weights, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """What `write` misses of the target, y_hat - y [B, D], and its squared length [B]."""
        bypass_BD = self.bypass(weights, batch.x)
        left_BD = batch.y if bypass_BD is None else batch.y - bypass_BD
        return decode_error(weights.unscaled(codes), weights.W_dec_FD, self.b_dec, left_BD)

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """Decoder directions random, or in the active subspace; an autoencoder's encoder is tied to them, a transcoder has random
        encoder directions and writes what the best linear map makes of them."""
        config = self.config
        with torch.no_grad():
            self.variance.copy_((y - y.mean(0)).square().mean())
            self.b_dec.copy_(
                {"median": geometric_median, "mean": lambda v: v.mean(0), "zero": lambda _: 0.0}[config.initial_bias](y)
            )
            self.b_enc.zero_()
            self.W_enc_FD.copy_(random_directions(len(self.W_enc_FD), x, generator, config.drawn_share))
            if config.rewrites:
                self.W_dec.copy_(self.W_enc_FD)
            else:
                self.W_dec.copy_(self.W_enc_FD @ linear_map(x, y))
                self.b_enc.copy_(-self.W_enc_FD @ x.mean(0))
            scale_to_unit(self.W_dec)
            self.set_thresholds(x, y)
            self.W_dec *= config.first_norm

    def losses(self, batch: TrainingBatch) -> Losses:
        """(squared error + the rule's penalties) / (width * variance) + aux_coefficient * AuxK."""
        weights = self.weights()
        fit = self.objective(batch, weights)
        squared_error_B = fit.squared_error_B.detach()
        scale = batch.y.shape[-1] * self.variance
        parts = {"reconstruction": squared_error_B.mean(-1) / scale, **fit.parts}
        total = fit.loss / scale
        if self.config.aux_coefficient:
            aux = self.auxk(batch, fit.error_BD, weights)
            total = total + self.config.aux_coefficient * aux
            parts["auxk"] = aux.detach()
        if self.config.orthogonality and batch.step % self.config.orthogonality_every == 0:
            rows_FD = self.W_dec.to(self.b_dec.dtype)  # cosines are compared in float32
            alike = orthogonality_penalty(rows_FD, self.config.orthogonality_chunk, batch.generator())
            alike = self.config.orthogonality_every * alike  # so that means over steps, logged ones too, are those of every step
            total = total + self.config.orthogonality * alike
            parts["orthogonality"] = alike.detach()
        return Losses(total, parts, fit.codes, squared_error_B, batch.y)

    def auxk(self, batch: TrainingBatch, error_BD: Tensor, weights: Weights) -> Tensor:
        """What dead latents miss of what living ones leave over."""
        return auxk_loss(batch.x, error_BD, weights, self.b_in, batch.dead_F, self.k_aux, batch.most_dead)

    def unit_rows(self) -> Sequence[Tensor]:
        return (self.W_dec,) if self.config.decoder == "unit" else ()

    def latent_rows(self) -> Sequence[Tensor]:
        return self.W_enc_FD, self.W_dec

    @torch.no_grad()
    def constrain(self, lr: float = 0.0) -> None:
        super().constrain(lr)
        if self.config.group_penalty:
            self._shrink_groups(lr)

    def _shrink_groups(self, lr: float) -> None:
        """The proximal step of the group lasso. Encoder rows are brought to length 1 first, their length to the decoder, or else
        the decoder could shrink at no cost while the encoder grows."""
        config = self.config
        length_F = self.W_enc_FD.norm(dim=1).clamp_min(1e-8)
        self.scale_biases(1 / length_F)
        self.W_enc_FD /= length_F[:, None]
        self.W_dec *= length_F[:, None]
        widths = column_blocks(config.blocks_out, config.group_columns)
        shrink_blocks(self.W_dec, lr * config.group_penalty, config.group_latents, widths)

    @torch.no_grad()
    def resample(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Dead latents take the direction of inputs drawn with probability proportional to their squared loss squared, an encoder
        of a fifth of the living ones' length, and no bias (methods.md 0.6)."""
        if not self.config.rewrites:
            raise UserError("resample_every is for autoencoders: a transcoder revives latents by aux_coefficient")
        dead = batch.dead_F.nonzero()[:, 0].cpu()
        if len(dead) == 0 or len(dead) == len(batch.dead_F):
            return {}
        loss_B = (self(batch.x) - batch.x).square().sum(1).double().cpu()
        drawn = torch.multinomial(loss_B.square(), len(dead), replacement=len(dead) > len(loss_B), generator=batch.generator())
        u_ND = batch.x[drawn] - (self.b_in if self.b_in is not None else 0.0)
        u_ND = u_ND / u_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.W_enc_FD[dead] = 0.2 * self.W_enc_FD[~batch.dead_F].norm(dim=1).mean() * u_ND
        self.W_dec[dead] = u_ND
        self.b_enc[dead] = 0.0
        return {"W_enc_FD": dead, "W_dec": dead, "b_enc": dead}

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        """Norms of a free decoder go into the latents; then shifts go into biases and scales into matrices. Where all sites have
        one scale, decoder rows keep their length and the latents take on the units of what is written."""
        weights = self.weights()
        if weights.norm_F is not None:
            self.scale_biases(weights.norm_F)
            self.W_enc_FD *= weights.norm_F[:, None]
            self.W_dec /= weights.norm_F[:, None]
        offset_D = read.shift_D * read.scale_D
        if self.config.skip:
            bypassed_D = offset_D @ self.W_skip
            self.b_dec -= bypassed_D
            if self.b_in is not None:  # b_dec is subtracted from the input too, where nothing must change
                self.shift_scores(-self.W_enc_FD @ bypassed_D)
            self.W_skip *= read.scale_D[:, None] / write.scale_D
        if self.b_in is None:
            self.shift_scores(-self.W_enc_FD @ offset_D)
        out = write.uniform or float(write.scale_D.log().mean().exp())
        self.scale_biases(1 / out)
        self.W_enc_FD *= read.scale_D / out  # factors of exactly 1 for an autoencoder of one site
        self.W_dec *= out / write.scale_D
        self.b_dec /= write.scale_D
        self.b_dec += write.shift_D
        self.variance /= out**2
        self.folded = True
        self.drop_training()


def block_norms(W_dec_FD: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The length of every row, summed over the blocks of columns that belong to different sites: [F], float32 or better."""
    if len(widths) == 1:
        return row_lengths(W_dec_FD)
    dtype = torch.promote_types(W_dec_FD.dtype, torch.float32)
    return torch.stack([block.norm(dim=1, dtype=dtype) for block in W_dec_FD.split(list(widths), dim=1)]).sum(0)
