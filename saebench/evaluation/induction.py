"""Induction: attention from a token to the one behind its previous occurrence, on random tokens that are repeated (Olsson et al. 2022).

Measured alike for the heads of a model and for those of a Lorsa dictionary, whose heads in a group share attention but not what they do
with it.
Shape suffixes: `C` contexts, `S` positions, `L` layers, `H` heads of a layer, `F` d_sae, `D` width, `T` tokens of the second copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.dictionaries.lorsa import LorsaDictionary
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.lm.attention import attention_input, attention_weights
from saebench.lm.random_tokens import repeated_random


@dataclass(frozen=True)
class InductionScores:
    """How much each head of a Lorsa dictionary does induction."""

    attention_F: Tensor
    """Mean attention from the second copy to the token behind the first occurrence of the same token; equal within a group."""
    share_F: Tensor
    """What that place adds to z, as a share of what all places add in absolute size, over second-copy tokens at which the head is
    active and weighted by its z there; NaN for a head that is never active on them."""
    active_F: Tensor
    """Share of the second copy's tokens at which the head is active."""
    weight_F: Tensor
    """Sum of |z| over the second copy where active, as a share of that of all heads."""


def _on_induction(pattern: Tensor, length: int) -> Tensor:
    """The entries of a [..., S, S] matrix from each token of the second copy to the token behind its first occurrence: [..., T]."""
    rows = torch.arange(length + 1, 2 * length + 1, device=pattern.device)
    return pattern[..., rows, rows - length + 1]


@torch.inference_mode()
def head_induction_scores(lm: LanguageModel, *, count: int = 8, length: int = 60, seed: int = 0) -> Tensor:
    """Mean attention of every head of the model to the place of induction: [L, H]. Raises UserError for unknown attention."""
    layers = lm.site_table.num_layers
    seen = lm.read(repeated_random(lm, count, length, seed), [attention_input(layer) for layer in range(layers)])
    patterns = (attention_weights(lm, layer).pattern(seen[attention_input(layer)].float()) for layer in range(layers))
    return torch.stack([_on_induction(pattern_CHSS, length).mean((0, 2)) for pattern_CHSS in patterns])


@torch.inference_mode()
def induction_scores(
    lorsa: LorsaDictionary, lm: LanguageModel, *, count: int = 8, length: int = 60, seed: int = 0
) -> InductionScores:
    """Induction of every head of a Lorsa dictionary, at the site it reads. Raises UserError for a dictionary of another kind."""
    if not isinstance(lorsa, LorsaDictionary):
        raise UserError(f"induction is measured on attention: {lorsa.config.architecture!r} has none, use a lorsa dictionary")
    site, d_sae, size = lorsa.config.reads[0], lorsa.config.d_sae, lorsa.group_size
    x_CSD = lm.read(repeated_random(lm, count, length, seed), [site])[site].float()
    z_CTF = lorsa.encode(x_CSD).to_dense().view(count, -1, d_sae)[:, length + 1 :].abs()
    v_CSF = x_CSD @ lorsa.W_V_FD.T + lorsa.b_V
    attention, shares = [], []
    for start in range(0, d_sae, size):  # one group after the other: patterns are large
        pattern_CSS = lorsa.attention_pattern(x_CSD, [start])[:, 0]
        heads = slice(start, start + size)
        rows = slice(length + 1, None)
        there_CT = _on_induction(pattern_CSS, length)
        attention.append(there_CT.mean().expand(size))
        all_CTF = pattern_CSS[:, rows] @ v_CSF[..., heads].abs()
        there_CTF = there_CT[..., None] * v_CSF[:, 2 : length + 2, heads].abs()
        weight_CTF = z_CTF[..., heads]
        share_CTF = there_CTF / all_CTF.clamp_min(1e-30)
        shares.append((share_CTF * weight_CTF).sum((0, 1)) / weight_CTF.sum((0, 1)))
    total_F = z_CTF.sum((0, 1))
    return InductionScores(
        torch.cat(attention), torch.cat(shares), (z_CTF > 0).float().mean((0, 1)), total_F / total_F.sum().clamp_min(1e-30)
    )
