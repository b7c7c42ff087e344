"""Matryoshka (Bussmann et al. 2025; methods.md T6): every prefix of the latents must reconstruct by itself, so early latents stay general
and late ones add detail.

The loss is the mean of the squared errors of all prefixes, that of no latents at all (b_dec) included. Prefixes are fixed shares of
d_sae, or drawn anew at every step from a Pareto distribution (Nabeshima). Latents are not reordered by importance: the loss itself
makes the early ones the important ones.
A prefix is decoded from the entries of its latents alone: the reconstruction of one prefix plus one decode of the next group's entries.
Shape suffixes: `B` tokens, `D` width of what is written, `F` d_sae, `G` groups, `N` entries.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.batchtopk import BatchTopK, BatchTopKDictionary
from saebench.dictionaries.sae import Fit, Weights
from saebench.kernels import encode_topk, prefix_errors, sparse_decode, stable_order

PARETO = 0.5


class Matryoshka(BatchTopK):
    """Configuration of a Matryoshka sparse autoencoder, or transcoder where `target` is given."""

    architecture = "matryoshka"

    rule: Literal["batchtopk", "topk"] = "batchtopk"
    """What is kept: the k * B largest of a batch, or the k largest of each token."""
    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Shares of d_sae of the nested groups, first to last; prefixes end where groups do."""
    random_prefixes: int = Field(default=0, ge=0)
    """Prefixes drawn at every step, besides the whole, instead of those of `groups`; 0 for fixed groups."""

    @model_validator(mode="after")
    def _groups_cover_all_latents(self) -> Self:
        if abs(sum(self.groups) - 1) > 1e-6:
            raise ValueError(
                f"groups={self.groups} add up to {sum(self.groups):g} of d_sae: make them add up to 1, "
                "or latents are left over that no prefix trains"
            )
        if any(size < 1 for size in self.group_sizes):
            raise ValueError(
                f"groups={self.groups} give sizes {self.group_sizes} of d_sae={self.d_sae}: every group needs a latent"
            )
        if self.rule == "topk" and self.inference == "batch":
            raise ValueError("inference=batch is for rule=batchtopk: rule=topk compares within a token always")
        return self

    @property
    def group_sizes(self) -> list[int]:
        """Latents in each group."""
        ends = [0, *(round(share * self.d_sae) for share in accumulate(self.groups))]
        return [stop - start for start, stop in pairwise(ends)]


@register(Matryoshka)
class MatryoshkaDictionary(BatchTopKDictionary):
    """BatchTopK or TopK over all latents, trained so that each prefix of them reconstructs."""

    config: Matryoshka

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return self.select_batch(x_BD, weights) if self.config.rule == "topk" else super().select(x_BD, weights)

    def select_batch(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        if self.config.rule == "topk":
            return encode_topk(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, self.config.k, weights.norm_F)
        return super().select_batch(x_BD, weights)

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """The mean of the squared errors of all prefixes, from none of the latents to all."""
        codes = self.select_batch(batch.x, weights)
        sizes = self.drawn_sizes(batch) if self.config.random_prefixes else self.config.group_sizes
        bypass_BD = self.bypass(weights, batch.x)
        first_BD = self.b_dec - batch.y if bypass_BD is None else self.b_dec + bypass_BD - batch.y
        losses_G, error_BD, squares_B = prefix_errors(first_BD, decode_groups(weights.unscaled(codes), weights.W_dec_FD, sizes))
        parts = {} if self.config.rule == "topk" else self.follow(codes, batch)
        if not self.config.random_prefixes:
            scale = batch.y.shape[1] * self.variance
            shares_G = losses_G.detach()[1:] / scale
            parts |= {f"prefix_{end}": share for end, share in zip(accumulate(sizes), shares_G, strict=True)}
        return Fit(codes, error_BD, squares_B, losses_G.mean(), parts)

    def drawn_sizes(self, batch: TrainingBatch) -> list[int]:
        """Group sizes of this step's prefixes: lengths l with P(l <= n) proportional to 1 - n ** -0.5, each once, and the whole."""
        d_sae = self.config.d_sae
        u_G = torch.rand(self.config.random_prefixes, generator=batch.generator(), dtype=torch.float64)
        lengths_G = (1 - u_G * (1 - d_sae**-PARETO)).pow(-1 / PARETO).long().clamp(1, d_sae)
        ends = sorted({*lengths_G.tolist(), d_sae})
        return [stop - start for start, stop in pairwise([0, *ends])]


def decode_groups(codes: SparseCodes, W_dec_FD: Tensor, sizes: list[int]) -> Tensor:
    """What each group of neighbouring latents writes, [G, B, D], from its own entries; the sum over groups is the decoded code.

    Each token is decoded as G tokens, one for each group, so that there is one pass over the entries and one gradient of the decoder."""
    indices_N, groups = codes.indices.reshape(-1), len(sizes)
    group_F = torch.zeros(codes.d_sae, dtype=torch.int64, device=indices_N.device)
    for end in accumulate(sizes[:-1]):
        group_F[end:] += 1
    group_N = group_F[indices_N]
    at_N = stable_order(group_N, groups)
    rows_N = codes.tokens[at_N] + group_N[at_N] * len(codes)
    values_N = codes.values.reshape(-1).index_select(0, at_N)
    apart = SparseCodes.ragged(rows_N, indices_N[at_N], values_N, groups * len(codes), codes.d_sae)
    return sparse_decode(apart, W_dec_FD).unflatten(0, (groups, len(codes)))
