"""Running mean, norms and covariance of the activations at one site, in float64.

Shape suffixes: `R` rows (tokens), `D` width of the site.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SiteStatistics:
    """Sums over the tokens seen so far; everything a person asks for is derived. `error` is the squared error of storing."""

    count: Tensor
    total_D: Tensor
    norms: Tensor
    squares: Tensor
    outer_DD: Tensor
    error: Tensor

    @classmethod
    def empty(cls, width: int) -> SiteStatistics:
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)  # noqa: E731
        return cls(zeros(()), zeros(width), zeros(()), zeros(()), zeros(width, width), zeros(()))

    def update(self, x_RD: Tensor, stored_RD: Tensor | None = None) -> None:
        """Add tokens; `stored_RD` is what reading them back will give, where that differs."""
        x_RD = x_RD.float()
        squares_R = x_RD.square().sum(1)
        self.count += len(x_RD)
        self.total_D += x_RD.sum(0, dtype=torch.float64).cpu()
        self.norms += squares_R.sqrt().sum(dtype=torch.float64).cpu()
        self.squares += squares_R.sum(dtype=torch.float64).cpu()
        self.outer_DD += (x_RD.T @ x_RD).double().cpu()
        if stored_RD is not None:
            self.error += (x_RD - stored_RD).square().sum(dtype=torch.float64).cpu()

    @property
    def mean_D(self) -> Tensor:
        return self.total_D / self.count

    @property
    def mean_norm(self) -> float:
        """E||x||"""
        return float(self.norms / self.count)

    @property
    def mean_square(self) -> float:
        """E||x||^2"""
        return float(self.squares / self.count)

    @property
    def variance(self) -> float:
        """E||x - mean||^2"""
        return self.mean_square - float(self.mean_D.square().sum())

    @property
    def gamma(self) -> float:
        """||mean|| / sqrt(variance): how far the activations lie from 0 in units of their spread. Large values foretell latents
        that are dead from the start, unless the mean is subtracted."""
        return float(self.mean_D.norm()) / max(self.variance, 1e-300) ** 0.5

    @property
    def covariance_DD(self) -> Tensor:
        return self.outer_DD / self.count - torch.outer(self.mean_D, self.mean_D)

    @property
    def storage_fvu(self) -> float:
        """Squared error of the storage type as a fraction of the variance."""
        return float(self.error / self.count) / self.variance

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{name}": value for name, value in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> SiteStatistics:
        return cls(**{name: tensors[f"{prefix}.{name}"] for name in cls.__dataclass_fields__})
