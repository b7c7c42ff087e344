"""How well a label says where a latent fires: measured on contexts that no label was made from.

Contexts are divided in two by a hash of their number: one half is for labelling, the other for scoring, so that no example of the one can
be in the other. A label is right about a token when it says that the latent fires there and it does, or that it does not and it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHANCE = 0.5
"""Balanced accuracy of a label that says nothing: whatever it claims, it is right about firings as often as it is wrong about others."""
SURE = 2.0  # standard errors above chance from which on a score is no accident


def halves(num_contexts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which contexts are for labelling and which for scoring [C]: every context is in exactly one of the two."""
    with np.errstate(over="ignore"):  # splitmix64
        mixed_C = np.arange(num_contexts, dtype=np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed_C = (mixed_C ^ (mixed_C >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed_C = (mixed_C ^ (mixed_C >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        labelling_C = (mixed_C >> np.uint64(63)) == 0
    return labelling_C, ~labelling_C


@dataclass(frozen=True)
class Score:
    """What a label is worth on held-out examples."""

    balanced_accuracy: float
    """Mean of `recall` and of the share of random tokens without a firing that the label leaves out; `CHANCE` for one that says nothing."""
    error: float
    """Standard error of the balanced accuracy, from the number of examples."""
    recall: float
    """Share of firings that the label covers."""
    recall_by_value: float
    """Share of the summed values of these firings."""
    precision: float
    """Share of the places that the label names at which the latent fires; not a number where it names none."""
    positives: int
    negatives: int

    @property
    def fit(self) -> float:
        """Harmonic mean of `precision` and `recall_by_value`: 0 for a label that names nothing, 1 for one that names firings alone."""
        if not self.precision > 0:
            return 0.0
        return 2 * self.precision * self.recall_by_value / (self.precision + self.recall_by_value)

    @property
    def above_chance(self) -> bool:
        return self.balanced_accuracy - SURE * self.error > CHANCE


def score(hits_P: np.ndarray, values_P: np.ndarray, false_N: np.ndarray, precision: float) -> Score:
    """The score of a label that covers firings `hits_P` with values `values_P`, and of tokens without one `false_N` (both boolean)."""
    recall, false = float(hits_P.mean()), float(false_N.mean()) if len(false_N) else 0.0
    # a share of n draws that came out 0 or 1 still has an error: one more of each kind is counted in
    spread = sum(p * (1 - p) / n for p, n in ((_shrunk(hits_P), len(hits_P)), (_shrunk(false_N), max(1, len(false_N)))))
    return Score(
        balanced_accuracy=(recall + 1 - false) / 2,
        error=spread**0.5 / 2,
        recall=recall,
        recall_by_value=float((np.abs(values_P) * hits_P).sum() / np.abs(values_P).sum()),
        precision=precision,
        positives=len(hits_P),
        negatives=len(false_N),
    )


def _shrunk(draws: np.ndarray) -> float:
    return (float(draws.sum()) + 1) / (len(draws) + 2)
