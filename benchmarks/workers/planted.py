"""Activations with a known answer, and how close a dictionary came to it.

A token is a sparse sum of planted unit directions plus a constant offset and a little noise:
x = scale * (sum_f a_f g_f + offset + noise). Direction f is active with a power-law rate, a_f = 1 + |N(0, 0.5)|.
The offset is there because language model activations have one, and trainers differ in how they treat it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import Shape

DATA_SEED = 70_000_003  # far from every model seed: a model drawn from the data's own stream would start as the answer
HELD_OUT = 10**6  # batch number from which on batches are never trained on
HELD_OUT_BATCHES, HELD_OUT_TOKENS = 4, 2048
RECOVERED_COSINE = 0.9

Codes = Tensor | tuple[Tensor, Tensor]  # dense acts_BF, or (values_BK, indices_BK)


class PlantedData:
    """A stream of batches that depends on the shape, the seed and the batch number only."""

    def __init__(self, shape: Shape, seed: int, *, exponent: float = 0.6, noise: float = 0.02):
        self.seed, self.noise, self.scale = seed, noise, 1.0
        generator = torch.Generator().manual_seed(DATA_SEED + seed)
        self.directions_GD = F.normalize(torch.randn(shape.n_features, shape.d_in, generator=generator), dim=1)
        self.offset_D = F.normalize(torch.randn(shape.d_in, generator=generator), dim=0)
        rates_G = torch.arange(1, shape.n_features + 1).float().pow(-exponent)
        self.rates_G = (rates_G * (shape.mean_l0 / rates_G.sum())).clamp(max=0.5)
        # All trainers get a mean squared norm of d_in, the normalisation that most of them ask for.
        self.scale = (shape.d_in / self.batch_BD(HELD_OUT, HELD_OUT_TOKENS).square().sum(1).mean().item()) ** 0.5

    def batch_BD(self, number: int, batch_size: int) -> Tensor:
        """Batch `number` of the stream."""
        generator = torch.Generator().manual_seed((DATA_SEED + self.seed) * 8_191 + 1 + number)
        active_BG = torch.rand(batch_size, len(self.rates_G), generator=generator) < self.rates_G
        features_N = active_BG.nonzero()[:, 1]
        strengths_N = 1 + 0.5 * torch.randn(len(features_N), generator=generator).abs()
        counts_B = active_BG.sum(1)
        x_BD = F.embedding_bag(
            features_N, self.directions_GD, counts_B.cumsum(0) - counts_B, per_sample_weights=strengths_N, mode="sum"
        )
        noise_BD = self.noise * torch.randn(x_BD.shape, generator=generator)
        return (x_BD + self.offset_D + noise_BD) * self.scale


@torch.no_grad()
def quality(
    data: PlantedData, encode: Callable[[Tensor], Codes], decode: Callable[[Codes], Tensor], W_dec_FD: Tensor
) -> dict[str, float]:
    """Measure a dictionary on held-out tokens.

    Returns:
        `fvu`: squared error / squared deviation from the mean token; `l0`: active latents per token; `dead`: fraction of
        latents active in no held-out token; `recovered`: fraction of planted directions to which the best decoder row has
        a cosine above 0.9.
    """
    batches = [data.batch_BD(HELD_OUT + i, HELD_OUT_TOKENS) for i in range(HELD_OUT_BATCHES)]
    mean_D = torch.cat(batches).mean(0)
    error = deviation = active = 0.0
    fired_F = torch.zeros(len(W_dec_FD), dtype=torch.bool)
    for x_BD in batches:
        codes = encode(x_BD)
        error += (x_BD - decode(codes)).double().square().sum().item()
        deviation += (x_BD - mean_D).double().square().sum().item()
        latents_N = active_latents(codes)
        active += len(latents_N)
        fired_F[latents_N] = True
    rows_FD = F.normalize(W_dec_FD, dim=1)
    cosine_G = torch.cat([(rows_GD @ rows_FD.T).amax(1) for rows_GD in data.directions_GD.split(256)])
    return {
        "fvu": error / deviation,
        "l0": active / (HELD_OUT_BATCHES * HELD_OUT_TOKENS),
        "dead": 1 - fired_F.float().mean().item(),
        "recovered": (cosine_G > RECOVERED_COSINE).float().mean().item(),
    }


def active_latents(codes: Codes) -> Tensor:
    """The latents with a positive activation, one entry for each token in which one is active."""
    if isinstance(codes, tuple):
        values_BK, indices_BK = codes
        return indices_BK[values_BK > 0].long()
    return (codes > 0).nonzero()[:, 1]
