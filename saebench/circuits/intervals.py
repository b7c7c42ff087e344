"""95 % intervals over prompts: Wilson's for shares, the bootstrap for means.

With few prompts the percentiles of a bootstrap lie too close together: its spread lacks a factor sqrt(n / (n - 1)), and normal tails
stand where Student's belong. Percentiles further out mend both (Hesterberg 2015, "expanded percentile"). Measured, they hold the mean of
normal figures in 91, 94 and 94 % of samples of 5, 8 and 20, of exponential ones in 86, 91 and 92 %. Fewer than five prompts have too few
different draws: means then have Student's interval, other figures none.
Shape suffixes: `P` prompts, `R` draws, `K` figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DRAWS, SEED = 1000, 0
LEAST = 5  # prompts for a bootstrap
BLOCK = 1 << 22  # means drawn that are held at once


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; NaN as bounds where there are too few prompts for one."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.3f}" if math.isnan(self.low) else f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def as_list(self) -> list[float | None]:
        """Value, low and high; None for NaN."""
        return [x if math.isfinite(x) else None for x in (self.value, self.low, self.high)]


def wilson(count: int, of: int) -> Estimate:
    """A share with Wilson's interval."""
    z = 1.959963984540054
    centre = (count + z * z / 2) / (of + z * z)
    half = z / (of + z * z) * math.sqrt(count * (of - count) / of + z * z / 4)
    return Estimate(count / of, max(0.0, centre - half), min(1.0, centre + half))


def tails(prompts: int) -> tuple[float, float]:
    """The two percentiles of the draws, as shares, that bound an interval over so many prompts."""
    from scipy.special import ndtr, stdtrit

    low = float(ndtr(-stdtrit(prompts - 1, 0.975) * math.sqrt(prompts / (prompts - 1))))
    return low, 1 - low


def draw(prompts: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each prompt is in each draw of as many with replacement: [R, P]."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)


def means(values_PK: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> list[Estimate]:
    """The mean of each column over prompts, with its interval; none for one prompt alone."""
    count, figures = values_PK.shape
    mean_K = values_PK.mean(0)
    if count < 2:
        return [Estimate(float(value)) for value in mean_K]
    if count < LEAST:
        from scipy.special import stdtrit

        half_K = stdtrit(count - 1, 0.975) * values_PK.std(0, ddof=1) / math.sqrt(count)
        return [Estimate(float(m), float(m - half), float(m + half)) for m, half in zip(mean_K, half_K, strict=True)]
    shares_RP = draw(count, draws, seed) / count
    bounds = []
    step = max(1, BLOCK // draws)
    for start in range(0, figures, step):
        bounds.append(np.quantile(shares_RP @ values_PK[:, start : start + step], tails(count), axis=0))
    low_K, high_K = np.concatenate(bounds, axis=1) if bounds else np.zeros((2, 0))
    return [Estimate(*each) for each in zip(mean_K.tolist(), low_K.tolist(), high_K.tolist(), strict=True)]
