"""Sparse coding: dictionaries without an encoder matrix, whose code is found by an algorithm that works on the decoder's own unit rows.

A member is an algorithm that explains x - b_dec by few non-negative multiples of atoms, and leaves a residual. The rest is here, once:
initialisation, loss, dead atoms, folding. Where several sites are read side by side, lengths are measured in their normalised units;
`metric` keeps that after folding: atoms are W_dec * metric, which have unit length, while W_dec is what a latent writes.
Shape suffixes: `B` tokens, `D` width of what is read and written, `F` d_sae.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import Dictionary, FirstDirections, Losses, TrainingBatch
from saebench.dictionaries.geometry import random_directions
from saebench.dictionaries.scaling import Scaling
from saebench.kernels import matching_pursuit, sparse_decode


class SparseCodingConfig(FirstDirections):
    """What configurations of dictionaries without an encoder matrix have in common."""

    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, by which dead atoms learn to explain the residual, by matching pursuit among themselves; 0 leaves it out."""
    k_aux: int = Field(default=4, gt=0)
    """Dead atoms that AuxK uses on each token, at most."""

    @model_validator(mode="after")
    def _writes_what_it_reads(self) -> Self:
        if not self.rewrites:
            raise ValueError(f"{self.architecture} explains what it reads and has no other target: leave target out")
        return self


class SparseCoder(Dictionary):
    """x_hat = f W_dec + b_dec with unit rows, where f comes from an algorithm on x - b_dec and W_dec."""

    config: SparseCodingConfig

    def __init__(self, config: SparseCodingConfig):
        super().__init__(config)
        assert config.d_in is not None
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("variance", torch.ones(()))  # of the input per coordinate: makes the loss scale-free
        self.register_buffer("metric", torch.ones(config.d_in))
        self.folded = False
        self.variance: Tensor
        self.metric: Tensor

    # --- what a member defines ---

    @abstractmethod
    def solve(self, x_BD: Tensor, atoms_FD: Tensor) -> tuple[SparseCodes, Tensor]:
        """The code of x, which is centred, by unit atoms, and the residual x - f D [B, D]; both differentiable."""

    def penalty(self, codes: SparseCodes, batch: TrainingBatch) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What sparsity adds to the summed squared error per token, and its parts by name."""
        return 0.0, {}

    def set_thresholds(self, x_BD: Tensor) -> None:
        """Initialise what the algorithm has besides atoms, given a normalised sample, centred."""

    @torch.no_grad()
    def scale_thresholds(self, factor: float) -> None:
        """Latents are about to be multiplied by a positive number: take thresholds along."""

    # --- the same for all ---

    @property
    def atoms(self) -> Tensor:
        """Unit rows, in the units in which lengths are measured: [F, D]."""
        return self.W_dec * self.metric

    def centred(self, x_BD: Tensor) -> Tensor:
        """x - b_dec in the units in which lengths are measured."""
        return (x_BD - self.b_dec) * self.metric

    def encode(self, x_BD: Tensor) -> SparseCodes:
        self.check_rows(x_BD)
        return self.solve(self.centred(x_BD), self.atoms)[0]

    def decode(self, codes: SparseCodes) -> Tensor:
        return sparse_decode(codes, self.W_dec) + self.b_dec

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """Random unit atoms around the mean, anywhere or in the active subspace."""
        with torch.no_grad():
            self.variance.copy_((x - x.mean(0)).square().mean())
            self.b_dec.copy_(x.mean(0))
            self.W_dec.copy_(random_directions(len(self.W_dec), x, generator, self.config.drawn_share))
            self.set_thresholds(self.centred(x))

    def losses(self, batch: TrainingBatch) -> Losses:
        """(squared error + penalty) / (width * variance) + aux_coefficient * AuxK."""
        codes, residual_BD = self.solve(self.centred(batch.x), self.atoms)
        squared_error_B = residual_BD.square().sum(1)
        scale = batch.x.shape[1] * self.variance
        penalty, parts = self.penalty(codes, batch)
        total = (squared_error_B.mean() + penalty) / scale
        parts = {"reconstruction": squared_error_B.detach().mean() / scale, **parts}
        if self.config.aux_coefficient:
            aux = self._auxk(residual_BD.detach(), batch.dead_F, batch.most_dead)
            total = total + self.config.aux_coefficient * aux
            parts["auxk"] = aux.detach()
        return Losses(total, parts, codes.detach(), squared_error_B.detach(), batch.x)

    def _auxk(self, residual_BD: Tensor, dead_F: Tensor, most_dead: int | None = None) -> Tensor:
        """||e - e_hat||^2 / ||e - mean(e)||^2 where e_hat explains the residual e by dead atoms; reaches no others. Matching pursuit takes
        the place of TopK: a sum of the k largest products with unit atoms that overlap would overshoot."""
        dead = dead_F.nonzero()[:, 0] if most_dead != 0 else ()
        if len(dead) == 0:
            return residual_BD.new_zeros(())
        missed = matching_pursuit(residual_BD, self.atoms[dead], self.config.k_aux).residual_BD.square().mean()
        spread = (residual_BD - residual_BD.mean(0)).square().mean()
        defined = spread > 0
        return torch.where(defined, missed / torch.where(defined, spread, 1.0), 0.0)

    def unit_rows(self) -> Sequence[Tensor]:
        return (self.W_dec,)

    @torch.no_grad()
    def resample(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Dead atoms take the direction of inputs drawn with probability proportional to their squared loss squared (methods.md 0.6)."""
        dead = batch.dead_F.nonzero()[:, 0].cpu()
        if len(dead) == 0 or len(dead) == len(batch.dead_F):
            return {}
        x_BD = self.centred(batch.x)
        loss_B = self.solve(x_BD, self.atoms)[1].square().sum(1).double().cpu()
        drawn = torch.multinomial(loss_B.square(), len(dead), replacement=len(dead) > len(loss_B), generator=batch.generator())
        self.W_dec[dead] = x_BD[drawn] / x_BD[drawn].norm(dim=1, keepdim=True).clamp_min(1e-12)
        return {"W_dec": dead}

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        """Rows of W_dec keep their length where all sites have one scale; latents take on the units of what is written."""
        out = write.uniform or float(write.scale_D.log().mean().exp())
        self.scale_thresholds(1 / out)
        self.W_dec *= out / write.scale_D
        self.metric *= write.scale_D / out
        self.b_dec /= write.scale_D
        self.b_dec += write.shift_D
        self.variance /= out**2
        self.folded = True
        self.drop_training()


@torch.no_grad()
def amortisation_gap(dictionary: Dictionary, x_BD: Tensor) -> float:
    """How much of the variance of x [B, D] a dictionary's own codes miss that matching pursuit on its decoder explains, with no more
    latents on any token than the dictionary uses there. Near 0, or below, where the encoder is as good as a greedy search.

    For autoencoders with unit decoder rows; the excess over matching pursuit in units of FVU.
    """
    dictionary = dictionary.settled()
    codes = dictionary.encode(x_BD)
    own_B = (x_BD - dictionary.decode(codes)).square().sum(1)
    centred_BD, l0_B = x_BD - dictionary.b_dec, codes.l0()
    norms_BT = matching_pursuit(centred_BD, dictionary.W_dec, max(1, int(l0_B.max()))).norms_BT
    norms_BT = torch.cat([centred_BD.norm(dim=1, keepdim=True), norms_BT], 1)  # with no latent, nothing is explained
    greedy_B = norms_BT.gather(1, l0_B[:, None])[:, 0].square()
    return float((own_B - greedy_B).sum() / (x_BD - x_BD.mean(0)).square().sum())
