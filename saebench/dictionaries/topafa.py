"""top-AFA (methods.md T7): the number of active latents of a token is whatever makes the code as long as the token.

With nearly orthogonal unit atoms ||f|| is close to ||x_hat||, so the largest scores are taken until ||f|| comes nearest to ||x - b_dec||.
L0 is an outcome, not a setting. The method has no encoder bias: b_enc is there as in the whole family, but fixed at 0.
The book normalises every token to length sqrt(d - 1) (`token_ln`), which cannot be folded into weights; the nearest of ours is the
default `sqrt_d` with `centre`, by which tokens have that length around their mean, as a root mean square. Without `centre` a large
mean breaks the method: latents are counted by ||x - b_dec|| while the loss compares with ||x||, and a code that is too long for its count
ends with one latent a token.
Shape suffixes: `B` tokens, `b` tokens of a block, `D` width, `F` d_sae, `K` candidates, `N` entries.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.sae import Fit, SAEConfig, SparseAutoencoder, Weights
from saebench.kernels import current_implementation, with_gradient
from saebench.kernels.scores import score_blocks
from saebench.kernels.stock import select_topk

CANDIDATES = 64  # scores of a token that are sorted at first; tokens that need more get GROWTH times as many
GROWTH = 4


class TopAFA(SAEConfig):
    """Configuration of a top-AFA sparse autoencoder."""

    architecture = "topafa"

    afa_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of (||f|| - ||x||)^2 beside the mean squared error of a coordinate; published 1/128 to 1/16."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, by which dead latents learn to reconstruct the residual; 0 leaves it out."""
    centre: bool = True
    """Whether the mean of each site is subtracted while training, and folded into the biases afterwards."""

    @model_validator(mode="after")
    def _an_autoencoder_of_one_site(self) -> Self:
        wrong = None
        if not self.rewrites:
            wrong = f"target={self.target!r}: the length of what is to be written is not known when encoding"
        elif len(self.reads) > 1:
            wrong = f"site={self.site!r}: lengths at several sites do not compare"
        elif self.skip:
            wrong = "skip=true: latents would write only a part of what they are counted by"
        if wrong:
            raise ValueError(f"{wrong}; topafa is for autoencoders of one site")
        return self


@register(TopAFA)
class TopAFADictionary(SparseAutoencoder):
    """p = ReLU((x - b_dec) W_enc); f = the k(x) largest p, by which ||f|| comes nearest to ||x - b_dec||."""

    config: TopAFA

    def __init__(self, config: TopAFA):
        super().__init__(config)
        self.b_enc.requires_grad_(False)

    def set_thresholds(self, x_BD: Tensor, y_BD: Tensor) -> None:
        """Encoder rows as long as makes up for short rows of a free decoder: what latents write is to be as long as the input."""
        self.W_enc_FD /= self.config.first_norm

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        length_B = (x_BD - self.b_dec).detach().norm(dim=1)
        return encode_to_length(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, length_B, weights.norm_F)

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """The squared error, and how far the length of the code is from that of the token."""
        codes = self.select(batch.x, weights)
        error_BD, squares_B = self.error(codes, weights, batch)
        length_B = code_lengths(codes)
        gap = (length_B - batch.x.norm(dim=1)).square().mean()
        width = batch.x.shape[1]  # the book's coefficient belongs to the mean over coordinates, our loss is the sum
        loss = squares_B.mean() + width * self.config.afa_coefficient * gap
        return Fit(codes, error_BD, squares_B, loss, {"afa": gap.detach()})

    @torch.no_grad()
    def resample(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """As the family; b_enc is not trained, so the optimiser knows nothing of it."""
        return {name: rows for name, rows in super().resample(batch).items() if name != "b_enc"}


def code_lengths(codes: SparseCodes) -> Tensor:
    """||f|| of every token, differentiable; 0 without gradient where nothing is active: [B]."""
    squares_B = codes.values.new_zeros(len(codes)).index_add(0, codes.tokens, codes.values.reshape(-1).square())
    some = squares_B > 0
    return torch.where(some, torch.where(some, squares_B, 1.0).sqrt(), 0.0)


def encode_to_length(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    length_B: Tensor,
    scale_F: Tensor | None = None,
) -> SparseCodes:
    """The largest positive z = ((x - b_in) W_enc^T + b_enc) * scale of each token, as many as bring the code's length nearest to the
    one given; of two counts the lower, of equal scores the lowest index, never all latents. Ragged codes, largest first; differentiable
    with the selection held constant."""
    if current_implementation() == "reference":
        z_BF = (x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
        z_BF = (z_BF if scale_F is None else z_BF * scale_F).relu()
        scores, order = torch.sort(z_BF.detach(), dim=1, descending=True, stable=True)
        lengths = scores.square().cumsum(1).sqrt()
        if lengths.shape[1] > 1:
            lengths[:, -1] = torch.inf
        kept = torch.arange(len(W_enc_FD), device=x_BD.device) < nearest_count(lengths, length_B)[:, None]
        return SparseCodes.from_dense(z_BF * torch.zeros_like(z_BF).scatter(1, order, kept.to(z_BF.dtype)))
    with torch.no_grad():
        entries = []
        for start, z_bF in score_blocks(x_BD if b_in_D is None else x_BD - b_in_D, W_enc_FD, b_enc_F, scale_F):
            row_N, latent_N, value_N = _to_length(z_bF, length_B[start : start + len(z_bF)])
            entries.append((row_N + start, latent_N, value_N))
        tokens_N, latents_N, values_N = (torch.cat(parts) for parts in zip(*entries, strict=True))
        codes = SparseCodes.ragged(tokens_N, latents_N, values_N, len(x_BD), len(W_enc_FD))
    return with_gradient(codes, x_BD, W_enc_FD, b_enc_F, b_in_D, scale_F)


def nearest_count(lengths_BK: Tensor, length_B: Tensor) -> Tensor:
    """How many scores bring the length nearest to the wanted one, the fewest on a tie; `lengths` are those of 1, 2, ... scores: [B]."""
    gap_BK = (lengths_BK - length_B[:, None]).abs()
    nearest_BK = gap_BK == gap_BK.amin(1, keepdim=True)
    counts_K = torch.arange(1, gap_BK.shape[1] + 1, device=gap_BK.device)
    return torch.where(nearest_BK, counts_K, gap_BK.shape[1] + 1).amin(1)


def _to_length(z_bF: Tensor, length_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and score of what is kept in a block, by row. A row is settled once the length of its candidates exceeds the
    wanted one, or no positive score is left: more candidates would not change it."""
    most = max(1, z_bF.shape[1] - 1)
    candidates = min(CANDIDATES, most)
    pending_b: Tensor | None = None  # all
    found = []
    while True:
        scores_bK, latents_bK = _ranked(z_bF if pending_b is None else z_bF[pending_b], candidates)
        wanted_b = length_b if pending_b is None else length_b[pending_b]
        rows_b = torch.arange(len(z_bF), device=z_bF.device) if pending_b is None else pending_b
        scores_bK = scores_bK.relu()
        lengths_bK = scores_bK.square().cumsum(1).sqrt()
        settled_b = (lengths_bK[:, -1] >= wanted_b) | (scores_bK[:, -1] == 0)
        if candidates == most:
            settled_b = torch.ones_like(settled_b)
        count_b = nearest_count(lengths_bK, wanted_b) * settled_b
        kept_bK = (torch.arange(candidates, device=z_bF.device) < count_b[:, None]) & (scores_bK > 0)
        at_N, position_N = kept_bK.nonzero(as_tuple=True)
        found.append((rows_b[at_N], latents_bK[at_N, position_N], scores_bK[at_N, position_N]))
        pending_b = rows_b[~settled_b]
        if not len(pending_b):
            break
        candidates = min(GROWTH * candidates, most)
    rows_N, latents_N, values_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(found) > 1:
        order_N = torch.argsort(rows_N, stable=True)
        rows_N, latents_N, values_N = rows_N[order_N], latents_N[order_N], values_N[order_N]
    return rows_N, latents_N, values_N


def _ranked(z_bF: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row in descending order, equal ones by ascending latent: values and latents [b, count]."""
    scores_bK, latents_bK = select_topk(z_bF, count)
    latents_bK, order_bK = torch.sort(latents_bK, dim=1)
    scores_bK, order_bK = torch.sort(scores_bK.gather(1, order_bK), dim=1, descending=True, stable=True)
    return scores_bK, latents_bK.gather(1, order_bK)
