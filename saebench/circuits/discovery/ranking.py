"""What rankings of components are judged by: against a known circuit, and by what the model still does with the best of them alone.

A ranking is one score a component, larger in size the more it matters. Equal scores have no order: every figure is the mean over all
orders of them.
Shape suffixes: `N` components, `K` sizes of a circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.errors import UserError


def roc_auc(scores_N: Tensor, true_N: Tensor) -> float:
    """The chance that a component of the circuit scores above one outside it, equal scores counted half. Raises UserError where all
    components are inside or all outside, and for scores that are not numbers."""
    scores_N, true_N = _checked(scores_N, true_N)
    inside, outside = int(true_N.sum()), int((~true_N).sum())
    if not inside or not outside:
        raise UserError(f"{inside} of {len(true_N)} components are in the circuit: ROC needs some inside and some outside")
    values, place_N = scores_N.unique(return_inverse=True)
    counts = torch.bincount(place_N, minlength=len(values)).double()
    ranks_N = (counts.cumsum(0) - (counts - 1) / 2)[place_N]  # equal scores share the mean of their ranks
    return float((ranks_N[true_N].sum() - inside * (inside + 1) / 2) / (inside * outside))


@dataclass(frozen=True)
class AtK:
    """How the k best of a ranking agree with the circuit."""

    k: int
    precision: float
    """Share of the k that are in the circuit."""
    recall: float
    """Share of the circuit that is among the k."""

    @property
    def f1(self) -> float:
        """Harmonic mean of the two."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def precision_recall(scores_N: Tensor, true_N: Tensor, k: int | None = None) -> AtK:
    """Precision and recall of the k best, by default as many as the circuit has. Where equal scores stand across the cut, each of them
    counts with the share that fits. Raises UserError for a k outside 1 to N, and an empty circuit."""
    scores_N, true_N = _checked(scores_N, true_N)
    inside = int(true_N.sum())
    if not inside:
        raise UserError("the circuit is empty: precision and recall need at least one component in it")
    k = inside if k is None else k
    if not 1 <= k <= len(scores_N):
        raise UserError(f"k={k} is not between 1 and the {len(scores_N)} components")
    cut = scores_N.sort(descending=True).values[k - 1]
    above_N, level_N = scores_N > cut, scores_N == cut
    share = (k - int(above_N.sum())) / int(level_N.sum())
    found = float((above_N & true_N).sum() + share * (level_N & true_N).sum())
    return AtK(k, found / k, found / inside)


def _checked(scores_N: Tensor, true_N: Tensor) -> tuple[Tensor, Tensor]:
    scores_N, true_N = scores_N.detach().flatten().cpu().double(), true_N.detach().flatten().cpu().bool()
    if len(scores_N) != len(true_N):
        raise UserError(f"{len(scores_N)} scores are given for {len(true_N)} components: give one each")
    if scores_N.isnan().any():
        raise UserError(f"{int(scores_N.isnan().sum())} of {len(scores_N)} scores are not numbers: leave these components out")
    return scores_N, true_N


# --- faithfulness ---


@dataclass(frozen=True)
class Curve:
    """What the model does with the k best components alone, and without them, for several k: shares of (full - none)."""

    sizes_K: list[int]
    faithfulness_K: list[float]
    """(m(circuit) - m(none)) / (m(full) - m(none)); 1 where the circuit does all that the model does."""
    completeness_K: list[float]
    """The same of everything but the circuit; 0 where nothing is left of it outside."""
    full: float
    """The metric of the model as it is."""
    none: float
    """The metric with every component taken away."""

    def smallest(self, share: float = 0.8) -> int | None:
        """The fewest components from which on faithfulness stays at this share or above; None where it never does."""
        found = None
        for size, value in zip(self.sizes_K, self.faithfulness_K, strict=True):
            found = (size if found is None else found) if value >= share else None
        return found


def faithfulness_curve(
    evaluate: Callable[[Tensor], float], scores_N: Tensor, sizes: Sequence[int] | None = None, *, points: int = 12
) -> Curve:
    """Faithfulness and completeness (Marks et al. 2024) of the k components of largest absolute score.

    `evaluate` gets which components are kept, [N] bool, and returns the metric with the others taken away. `sizes` default to 0, N and
    numbers spread geometrically between them, `points` at most. Raises UserError for sizes that there are not, and where taking all
    away changes nothing, so that there is nothing to be faithful to.
    """
    count = len(scores_N)
    sizes = spread_sizes(count, points) if sizes is None else sorted(set(sizes))
    if not sizes or sizes[0] < 0 or sizes[-1] > count:
        raise UserError(f"sizes {sizes} do not lie between 0 and the {count} components that are scored")
    order_N = scores_N.detach().abs().argsort(descending=True, stable=True).cpu()

    def kept(size: int, inside: bool) -> Tensor:
        mask_N = torch.full((count,), not inside)
        mask_N[order_N[:size]] = inside
        return mask_N

    full, none = evaluate(kept(count, True)), evaluate(kept(0, True))
    if abs(full - none) <= 1e-6 * max(1.0, abs(full)):
        raise UserError(
            f"the metric is {full:.4g} with and without all components: faithfulness is not defined, choose another metric or patch"
        )
    share = lambda value: (value - none) / (full - none)  # noqa: E731
    inside = [share(evaluate(kept(size, True))) for size in sizes]
    outside = [share(evaluate(kept(size, False))) for size in sizes]
    return Curve(sizes, inside, outside, full, none)


def spread_sizes(count: int, points: int = 12) -> list[int]:
    """0, `count` and numbers spread geometrically between them, `points` at most."""
    inner = torch.logspace(0, torch.tensor(float(max(count, 1))).log10().item(), max(points - 1, 2)).round().int().tolist()
    return sorted({0, *(min(size, count) for size in inner), count})
