"""What every way of choosing features ends in."""

from __future__ import annotations

from dataclasses import dataclass

from saebench.errors import UserError


@dataclass(frozen=True)
class Chosen:
    """Latents that a method picked for a goal, best first."""

    method: str
    """What it is called in tables and figures."""
    latents: tuple[int, ...]
    scores: tuple[float, ...]
    """How good each is, in the method's own units."""
    weights: tuple[float, ...] = ()
    """What each latent's direction is multiplied by where one direction is made of them; none for equal parts."""

    def __post_init__(self) -> None:
        if not self.latents:
            raise UserError(f"{self.method} found no latent: relax its thresholds, or give it more text")
        if len(self.scores) != len(self.latents) or len(self.weights) not in (0, len(self.latents)):
            raise ValueError(f"{len(self.latents)} latents have {len(self.scores)} scores and {len(self.weights)} weights")

    def __len__(self) -> int:
        return len(self.latents)

    def best(self, count: int) -> Chosen:
        """The first few of them."""
        return Chosen(self.method, self.latents[:count], self.scores[:count], self.weights[:count])
