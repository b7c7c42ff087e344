"""What follows from the weights alone: which latents are alike, and what each adds to the logits of the next token.

Shape suffixes: `M` some latents, `F` d_sae, `D` width, `V` vocabulary, `K` entries that are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.dictionaries.attention_output import SITE as ATTENTION_OUTPUT
from saebench.kernels import encode_topk
from saebench.kernels.nearest_rows import nearest_rows
from saebench.lm.unembedding import writes_residual

EMPTY = -1


def largest(rows_MD: Tensor, W_FD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each row the `count` rows of W with the largest positive product: indices [M, K] int64, -1 where there are fewer, and
    the products."""
    codes = encode_topk(rows_MD, W_FD, torch.zeros(len(W_FD), device=W_FD.device), None, min(count, len(W_FD)))
    order = codes.values.sort(dim=1, descending=True, stable=True)
    indices = codes.indices.long().gather(1, order.indices)
    return indices.masked_fill(order.values <= 0, EMPTY), order.values


class Neighbours:
    """Cosines between latents by what they write, or by what they read."""

    def __init__(self, rows_FD: Tensor | None):
        self.unit_FD = None if rows_FD is None else torch.nn.functional.normalize(rows_FD.float(), dim=1)

    def nearest(self, count: int) -> tuple[Tensor, Tensor] | None:
        """The nearest others of every latent: numbers [F, K], -1 where fewer have a positive cosine, and cosines. None where there are no
        rows."""
        if self.unit_FD is None:
            return None
        indices_FK, cosines_FK = nearest_rows(self.unit_FD, count)
        return indices_FK, cosines_FK.clamp(0, 1)


def encoder_rows(dictionary: Dictionary) -> Tensor | None:
    """What each latent reads, by rows [F, D], where that is one vector for each."""
    W_enc_FD = getattr(dictionary, "W_enc_FD", None)
    return W_enc_FD.detach() if isinstance(W_enc_FD, Tensor) else None


class LogitEffects:
    """What one unit of a latent adds to the logits through the final norm, its scale taken as 1, relative to the mean over the vocabulary:
    (d centred if the norm centres) * gain . W_U. For dictionaries that write the residual stream, or what a layer adds to it; heads'
    outputs go through their layer's output matrix first; several sites count together. Others have no direct effect."""

    def __init__(self, dictionary: Dictionary, lm: Any):
        self.rows_FD = None if lm is None else _residual_rows(dictionary, lm)
        if self.rows_FD is not None:
            self.W_U_VD = lm.direct_unembedding_VD - lm.direct_unembedding_VD.mean(0)

    def of(self, first: int, last: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Promoted and suppressed tokens of latents first to last: ids [M, K] and logits, twice; strongest first."""
        if self.rows_FD is None:
            nothing = torch.full((last - first, 0), EMPTY), torch.zeros(last - first, 0)
            return *nothing, *nothing
        rows_MD = self.rows_FD[first:last]
        promoted, raised = largest(rows_MD, self.W_U_VD, count)
        suppressed, lowered = largest(-rows_MD, self.W_U_VD, count)
        return promoted, raised, suppressed, -lowered

    def on(self, token: int) -> Tensor | None:
        """The effect of every latent on one token: [F]."""
        return None if self.rows_FD is None else self.rows_FD @ self.W_U_VD[token]


def _residual_rows(dictionary: Dictionary, lm: Any) -> Tensor | None:
    """What each latent adds to the residual stream, all sites together [F, D], or None where that is not one vector."""
    rows_FD, config = dictionary.directions, dictionary.config
    if rows_FD is None or not config.writes:
        return None
    total = torch.zeros(())
    for site, block_FD in zip(config.writes, rows_FD.float().split(list(config.blocks_out), dim=1), strict=True):
        if ATTENTION_OUTPUT.fullmatch(site):
            mix = lm.site(site).module(lm.hf)
            block_FD = block_FD.to(lm.device, next(mix.parameters()).dtype)
            with torch.no_grad():
                block_FD = (mix(block_FD) - mix(torch.zeros_like(block_FD[:1]))).float()
        elif not writes_residual(site):
            return None
        total = total + block_FD.cpu()
    return total
