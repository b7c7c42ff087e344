"""Normalisation of activations (methods.md 0.4): per site a shift and a scalar scale, in force while training, folded into the
weights afterwards.

Shape suffixes: `D` width of all sites together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Statistics(Protocol):
    """What is known of a site's activations; `activations.SiteStatistics` is one."""

    @property
    def mean_D(self) -> Tensor: ...
    @property
    def mean_norm(self) -> float: ...
    @property
    def mean_square(self) -> float: ...
    @property
    def variance(self) -> float: ...


@dataclass(frozen=True)
class Scaling:
    """x -> (x - shift) * scale, coordinate by coordinate; the scale is the same within a site."""

    shift_D: Tensor
    scale_D: Tensor

    @classmethod
    def measured(cls, rule: str, centre: bool, sites: Sequence[Statistics]) -> Scaling:
        """The scaling by a rule (`sqrt_d`, `unit_ms` or `none`) of sites side by side; with `centre` their means become 0, and
        norms are those around the mean."""
        shifts, scales = [], []
        for site in sites:
            width = len(site.mean_D)
            shifts.append(site.mean_D if centre else torch.zeros(width))
            # E||x - mean|| is not among the statistics; its root mean square is close to it and is what normalises variance
            norm = math.sqrt(site.variance) if centre else site.mean_norm
            square = site.variance if centre else site.mean_square
            scale = {"sqrt_d": math.sqrt(width) / max(norm, 1e-30), "unit_ms": 1 / math.sqrt(max(square, 1e-30)), "none": 1.0}[
                rule
            ]
            scales.append(torch.full((width,), scale, dtype=torch.float64))
        return cls(torch.cat(shifts).float(), torch.cat(scales).float())

    @classmethod
    def identity(cls, width: int) -> Scaling:
        return cls(torch.zeros(width), torch.ones(width))

    @property
    def uniform(self) -> float | None:
        """The scale, where it is the same for all coordinates."""
        first = float(self.scale_D[0])
        return first if bool((self.scale_D == first).all()) else None

    @cached_property
    def _plain(self) -> tuple[bool, float | None]:
        """Whether nothing is subtracted, and the one scale; looked up once, because a device would have to be waited for."""
        return not bool(self.shift_D.any()), self.uniform

    def __call__(self, x: Tensor) -> Tensor:
        unshifted, scale = self._plain
        shifted = x if unshifted else x - self.shift_D
        return shifted * (self.scale_D if scale is None else scale)

    def to(self, device: torch.device | str) -> Scaling:
        return Scaling(self.shift_D.to(device), self.scale_D.to(device))
