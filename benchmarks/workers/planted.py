"""Activations with a known answer, and how close a dictionary came to it.

A token is a sparse sum of planted unit directions plus a constant offset and a little noise:
x = scale * (sum_f a_f g_f + offset + noise). Direction f is active with a power-law rate, a_f = 1 + |N(0, 0.5)|.
The offset is there because language model activations have one, and trainers differ in how they treat it.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import Shape

DATA_SEED = 70_000_003  # far from every model seed: a model drawn from the data's own stream would start as the answer
HELD_OUT = 10**6  # batch number from which on batches are never trained on
HELD_OUT_BATCHES, HELD_OUT_TOKENS = 4, 2048
CALIBRATION = HELD_OUT + HELD_OUT_BATCHES  # held out too, and none of those that quality is measured on
CALIBRATION_TOKENS = 8192
RECOVERED_COSINE = 0.9

Codes = Tensor | tuple[Tensor | None, ...]  # dense acts_BF, or values, indices of the same shape, and what else decoding needs


class Data(Protocol):
    """What a worker trains on and is measured by."""

    directions_GD: Tensor | None

    def batch_BD(self, number: int, batch_size: int) -> Tensor: ...


class PlantedData:
    """A stream of batches that depends on the shape, the seed and the batch number only."""

    def __init__(self, shape: Shape, seed: int, *, exponent: float = 0.6, noise: float = 0.02):
        self.seed, self.noise, self.scale = seed, noise, 1.0
        generator = torch.Generator().manual_seed(DATA_SEED + seed)
        self.directions_GD = F.normalize(torch.randn(shape.n_features, shape.d_in, generator=generator), dim=1)
        self.offset_D = F.normalize(torch.randn(shape.d_in, generator=generator), dim=0)
        rates_G = torch.arange(1, shape.n_features + 1).float().pow(-exponent)
        self.rates_G = (rates_G * (shape.mean_l0 / rates_G.sum())).clamp(max=0.5)
        # Independent coins of 1024 sides for every token are slow to throw. Poisson events with these rates are few, and a
        # feature that has at least one in a token is active there, independently and with exactly its rate.
        self.hazard_G = -torch.log1p(-self.rates_G)
        self.cumulative_G = (self.hazard_G / self.hazard_G.sum()).cumsum(0)
        # All trainers get a mean squared norm of d_in, the normalisation that most of them ask for.
        self.scale = (shape.d_in / self.batch_BD(HELD_OUT, HELD_OUT_TOKENS).square().sum(1).mean().item()) ** 0.5

    def batch_BD(self, number: int, batch_size: int) -> Tensor:
        """Batch `number` of the stream."""
        generator = torch.Generator().manual_seed((DATA_SEED + self.seed) * 8_191 + 1 + number)
        n_features = len(self.rates_G)
        n_events = int(torch.poisson(self.hazard_G.sum() * batch_size, generator=generator))
        features_M = torch.searchsorted(self.cumulative_G, torch.rand(n_events, generator=generator)).clamp_(max=n_features - 1)
        tokens_M = torch.randint(batch_size, (n_events,), generator=generator)
        active_N = (tokens_M * n_features + features_M).unique()  # by token, then feature
        features_N = active_N % n_features
        strengths_N = 1 + 0.5 * torch.randn(len(features_N), generator=generator).abs()
        starts_B = torch.searchsorted(active_N, torch.arange(batch_size) * n_features)
        x_BD = F.embedding_bag(features_N, self.directions_GD, starts_B, per_sample_weights=strengths_N, mode="sum")
        noise_BD = self.noise * torch.randn(x_BD.shape, generator=generator)
        return (x_BD + self.offset_D + noise_BD) * self.scale


@torch.no_grad()
def quality(
    data: Data, encode: Callable[[Tensor], Codes], decode: Callable[[Codes], Tensor], W_dec_FD: Tensor
) -> dict[str, float]:
    """Measure a dictionary on held-out tokens.

    Returns:
        `fvu`: squared error / squared deviation from the mean token; `l0`: active latents per token; `dead`: fraction of
        latents active in no held-out token; `recovered`: fraction of planted directions to which the best decoder row has
        a cosine above 0.9; `cosine`: the mean over planted directions of that best cosine; both only where there are such.
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
    figures = {
        "fvu": error / deviation,
        "l0": active / (HELD_OUT_BATCHES * HELD_OUT_TOKENS),
        "dead": 1 - fired_F.float().mean().item(),
    }
    if data.directions_GD is None:
        return figures
    rows_FD = F.normalize(W_dec_FD, dim=1)
    cosine_G = torch.cat([(rows_GD @ rows_FD.T).amax(1) for rows_GD in data.directions_GD.split(256)])
    return figures | {"recovered": (cosine_G > RECOVERED_COSINE).float().mean().item(), "cosine": cosine_G.mean().item()}


@torch.no_grad()
def threshold_for(data: Data, encode: Callable[[Tensor, float], Codes], l0: float, start: float) -> float:
    """The one threshold of all latents with which `l0` of them are active per token, by bisection; `encode` takes it too."""
    x_BD = data.batch_BD(CALIBRATION, CALIBRATION_TOKENS)

    def too_low(threshold: float) -> bool:
        return len(active_latents(encode(x_BD, threshold))) / len(x_BD) > l0

    low, high = 0.0, max(start, 1e-6)
    while too_low(high):
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return high


def active_latents(codes: Codes) -> Tensor:
    """The latents with a positive activation, one entry for each token in which one is active."""
    if isinstance(codes, tuple):
        values, indices, *_ = codes
        return indices[values > 0].long()
    return (codes > 0).nonzero()[:, 1]
