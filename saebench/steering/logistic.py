"""Logistic regression on standardised features, with classes of equal weight: what the probes are fitted by.

With y = +1 or -1, s_u half the number of texts over that of text u's class, v the weights and b the intercept, it minimises

    C sum_u s_u log(1 + exp(-y_u (v . (x_u - mean) / deviation + b)))  +  ||v||^2 / 2   or   ||v||_1

by L-BFGS, for L1 in its orthant-wise form (Andrew and Gao 2007). Means are taken off and deviations divided by on the fly, so that sparse
features stay sparse. SciPy's L-BFGS-B solves its little triangular systems by as many threads as there are cores, and took 40 to 200
times as long on two cores that had other work; this one takes inner products alone.
Shape suffixes: `U` texts, `F` features, `X` the weights and the intercept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from scipy.special import expit

Penalty = Literal["l1", "l2"]
Features: TypeAlias = np.ndarray | sp.csr_array
ITERATIONS, TOLERANCE, ROUNDING = 2000, 1e-7, 1e-14
MEMORY, LEAST_STEP = 20, 1e-10


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of each feature; a feature that does not vary has an inverse deviation of 0, and so counts for nothing."""

    mean_F: np.ndarray
    inverse_F: np.ndarray

    @classmethod
    def of(cls, x_UF: Features) -> Standard:
        mean_F = np.asarray(x_UF.mean(axis=0)).ravel()
        square_F = np.asarray((x_UF * x_UF).mean(axis=0)).ravel()
        deviation_F = np.sqrt(np.maximum(square_F - mean_F**2, 0))
        varies_F = deviation_F > 1e-6 * np.sqrt(square_F)  # less is rounding
        return cls(mean_F, np.divide(1.0, deviation_F, out=np.zeros(len(mean_F)), where=varies_F))

    def __getitem__(self, units: np.ndarray) -> Standard:
        """Of some features."""
        return Standard(self.mean_F[units], self.inverse_F[units])


@dataclass(frozen=True)
class Logistic:
    """A fitted regression."""

    weights_F: np.ndarray
    """Per standard deviation."""
    intercept: float
    standard: Standard

    def scores(self, x_UF: Features) -> np.ndarray:
        """The log-odds of the positive class: [U]."""
        v_F = self.weights_F * self.standard.inverse_F
        return x_UF @ v_F - self.standard.mean_F @ v_F + self.intercept


def fit_logistic(x_UF: Features, positive_U: np.ndarray, *, penalty: Penalty = "l2", C: float = 1.0) -> Logistic:
    """Fit to features and classes [U, bool], both of which must occur."""
    standard = Standard.of(x_UF)
    mean_F, inverse_F = standard.mean_F, standard.inverse_F
    x_FU = x_UF.T
    sign_U = np.where(positive_U, 1.0, -1.0)
    size_U = np.where(positive_U, positive_U.sum(), (~positive_U).sum())
    weight_U = C * len(sign_U) / (2 * size_U)
    penalised_X = np.append(np.ones(x_UF.shape[1]), 0.0)
    ridge_X = penalised_X if penalty == "l2" else 0 * penalised_X

    def loss(values_X: np.ndarray) -> tuple[float, np.ndarray]:
        scaled_F = values_X[:-1] * inverse_F
        margin_U = sign_U * (x_UF @ scaled_F - mean_F @ scaled_F + values_X[-1])
        pull_U = -weight_U * sign_U * expit(-margin_U)
        slope_X = np.append(inverse_F * (x_FU @ pull_U - mean_F * pull_U.sum()), pull_U.sum())
        return float(weight_U @ np.logaddexp(0, -margin_U) + ridge_X @ values_X**2 / 2), slope_X + ridge_X * values_X

    values_X = _minimum(loss, penalised_X - ridge_X)
    return Logistic(values_X[:-1], float(values_X[-1]), standard)


def _minimum(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], l1_X: np.ndarray) -> np.ndarray:
    """Where a smooth convex function, given with its gradient, plus sum_i l1_i |x_i| is least, from zero on."""
    x_X = np.zeros(len(l1_X))
    value, slope_X = loss(x_X)
    first = 0.0
    seen: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=MEMORY)
    for _ in range(ITERATIONS):
        pull_X = np.where(x_X != 0, slope_X + l1_X * np.sign(x_X), slope_X - np.clip(slope_X, -l1_X, l1_X))
        steepest = np.abs(pull_X).max()
        first = first or steepest
        if steepest <= TOLERANCE * first:
            break
        way_X = -_curved(pull_X, seen)
        way_X[(way_X * pull_X >= 0) & (l1_X > 0)] = 0
        side_X = np.where(x_X != 0, np.sign(x_X), -np.sign(pull_X))
        total, step = value + l1_X @ np.abs(x_X), 1.0 if seen else min(1.0, 1 / np.abs(pull_X).sum())
        while True:
            new_X = x_X + step * way_X
            new_X[(new_X * side_X < 0) & (l1_X > 0)] = 0  # a weight stops at zero before it changes its sign
            new_value, new_slope_X = loss(new_X)
            new_total = new_value + l1_X @ np.abs(new_X)
            if new_total <= total + 1e-4 * pull_X @ (new_X - x_X):
                break
            step /= 2
            if step < LEAST_STEP:
                return x_X
        if total - new_total <= ROUNDING * total:
            return new_X
        moved_X, turned_X = new_X - x_X, new_slope_X - slope_X
        if moved_X @ turned_X > 1e-12 * (moved_X @ moved_X):
            seen.append((moved_X, turned_X))
        x_X, value, slope_X = new_X, new_value, new_slope_X
    return x_X


def _curved(pull_X: np.ndarray, seen: deque[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The gradient times the inverse curvature that the last steps have shown (Nocedal's two loops)."""
    way_X, parts = pull_X.copy(), []
    for moved_X, turned_X in reversed(seen):
        parts.append((moved_X @ way_X) / (moved_X @ turned_X))
        way_X -= parts[-1] * turned_X
    if seen:
        moved_X, turned_X = seen[-1]
        way_X *= (moved_X @ turned_X) / (turned_X @ turned_X)
    for (moved_X, turned_X), part in zip(seen, reversed(parts), strict=True):
        way_X += (part - (turned_X @ way_X) / (moved_X @ turned_X)) * moved_X
    return way_X
