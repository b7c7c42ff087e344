"""Discrete SAE: the outputs of attention heads as integers, by which heads of a circuit are told from others (O'Neill and Bui 2024;
methods.md T19).

A small ReLU autoencoder is trained on the outputs of all heads on a few examples; the code of a head on an example is its strongest latent.
A head whose codes on positive examples never occur on negative ones takes part in what distinguishes them.
Shape suffixes: `B` tokens, `N` entries, `P` positive and `M` negative examples, `H` heads, `D` width of a head.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from saebench.dictionaries.base import register
from saebench.dictionaries.relu import ReLU, ReLUDictionary


class Discrete(ReLU):
    """Configuration of a small ReLU autoencoder whose codes are read as one integer."""

    architecture = "discrete"

    target_l0: float | None = Field(default=4.0, gt=0)
    """Latents active per token on average; few, as the strongest one is to stand for all. The sparsity coefficient is found by itself."""


@register(Discrete)
class DiscreteDictionary(ReLUDictionary):
    """A ReLU autoencoder with `codes_of`."""

    config: Discrete

    @torch.no_grad()
    def codes_of(self, x: Tensor) -> Tensor:
        """The strongest latent of each vector, x [..., D] -> int64 [...]; of equal ones the lowest. d_sae where no latent is active."""
        codes = self.encode(x.reshape(-1, x.shape[-1]))
        tokens_N, latents_N, values_N = codes.nonzero()
        largest_B = values_N.new_zeros(len(codes)).scatter_reduce(0, tokens_N, values_N, "amax")
        strongest_N = values_N == largest_B[tokens_N]
        none_B = torch.full((len(codes),), codes.d_sae, device=x.device)
        return none_B.scatter_reduce(0, tokens_N[strongest_N], latents_N[strongest_N], "amin").reshape(x.shape[:-1])


def equal_heads(outputs_BHD: Tensor) -> Tensor:
    """Every head's outputs scaled to a root mean square norm of 1, so that none dominates the dictionary; a silent head stays 0."""
    rms_H = outputs_BHD.square().sum(2).mean(0).sqrt()
    return outputs_BHD / rms_H.clamp_min(1e-12)[:, None]


def head_scores(codes_positive_PH: Tensor, codes_negative_MH: Tensor) -> Tensor:
    """The share of a head's codes on positive examples that it never shows on negative ones, each code counted once: [H], from 0 to 1."""
    scores = []
    for positive_P, negative_M in zip(codes_positive_PH.T, codes_negative_MH.T, strict=True):
        codes = positive_P.unique()
        scores.append(~torch.isin(codes, negative_M))
    return torch.stack([exclusive.float().mean() for exclusive in scores])


def edge_scores(codes_positive_PH: Tensor, codes_negative_MH: Tensor) -> Tensor:
    """The share of positive examples on which both of two heads show a code that they never show on negative ones: [H, H]."""
    exclusive_PH = torch.stack(
        [~torch.isin(p, n) for p, n in zip(codes_positive_PH.T, codes_negative_MH.T, strict=True)], 1
    ).float()
    return exclusive_PH.T @ exclusive_PH / len(exclusive_PH)
