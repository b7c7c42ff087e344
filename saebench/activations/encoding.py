"""How activations are stored: float32, bfloat16, float16, or int8 with one scale per token.

Shape suffixes: `N` contexts, `S` positions, `D` width of a site, `R` rows (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.errors import UserError

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
INT8_MAX = 127


@dataclass(frozen=True)
class Encoded:
    """Activations as stored: `values` [N, S, D] and, for int8, the scale of every token `scales` [N, S] float32."""

    values: Tensor
    scales: Tensor | None = None

    def flat(self) -> Encoded:
        """The same tokens as rows: [R, D] and [R]."""
        return Encoded(self.values.flatten(0, -2), None if self.scales is None else self.scales.flatten())

    def take(self, index_R: Tensor) -> Tensor:
        """Some rows of flat activations, as float32 [R, D]."""
        rows_RD = self.values.index_select(0, index_R).float()
        return rows_RD if self.scales is None else rows_RD.mul_(self.scales.index_select(0, index_R)[:, None])

    def decode(self) -> Tensor:
        """All of it as float32."""
        values = self.values.float()
        return values if self.scales is None else values * self.scales[..., None]


def encode(x: Tensor, storage: str) -> Encoded:
    """Store float activations [..., D]. int8 keeps round(x / s) with s = max|x| / 127 of each token."""
    if storage != "int8":
        return Encoded(x.to(STORAGE[storage]))
    scales = x.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / INT8_MAX
    return Encoded((x.float() / scales[..., None]).round().to(torch.int8), scales)


def check_storage(name: str) -> str:
    """Raises UserError for an unknown storage type."""
    if name not in STORAGE:
        raise UserError(f"unknown storage type {name!r}: use one of {', '.join(STORAGE)}")
    return name
