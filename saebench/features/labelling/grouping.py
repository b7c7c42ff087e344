"""Statistics of many groups of places at once: what the firings of each have in common, against other places.

A group is a latent, or a rule being tried for one. Each of its rows is a place: a firing, with its share of the group's summed weight, or
a place without one, with the number of such places that it stands for, counted in firings. A condition on a group is worth
f1 = 2 covered / (covered + 1 + wrong): covered is the summed share of firings, wrong the summed count of others.

Shape suffixes: `P` rows, by group; `G` groups; `N` pairs of a group and a number, by group; `K` values of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from saebench.features.labelling.corpus import View
from saebench.features.labelling.sorting import changes, order_by, sums

LEAST_SHARE, LEAST_FIRINGS = 0.01, 2  # that a value must account for to be told of
MOST_VALUES = 24
NEARLY = 0.03  # of f1, that a shorter list may cost


def f1(covered: Any, wrong: Any) -> Any:
    return 2 * covered / (covered + 1 + wrong)


@dataclass(frozen=True)
class Rows:
    """The places of some groups."""

    view: View
    group_P: np.ndarray
    """The group of each place, ascending."""
    share_P: np.ndarray
    """Share of its group's summed weight; 0 for a place without a firing."""
    wrong_P: np.ndarray
    """Places without a firing that it stands for, in firings; 0 for a firing."""
    groups: int

    def total(self, amounts_P: np.ndarray) -> np.ndarray:
        """Summed by group [G]."""
        return np.bincount(self.group_P, amounts_P, minlength=self.groups)


@dataclass(frozen=True)
class Pairs:
    """What stands at the places of each group, with how much of the group it accounts for."""

    group_N: np.ndarray
    number_N: np.ndarray
    share_N: np.ndarray
    wrong_N: np.ndarray
    firings_N: np.ndarray

    @classmethod
    def of(cls, rows: Rows, numbers_P: np.ndarray) -> Pairs:
        """Count the numbers that the places of each group have."""
        order_P = order_by(rows.group_P, numbers_P)
        group_P, numbers_P, share_P = rows.group_P[order_P], numbers_P[order_P], rows.share_P[order_P]
        starts_N = np.flatnonzero(changes(group_P) | changes(numbers_P))
        return cls(
            group_P[starts_N],
            numbers_P[starts_N],
            sums(share_P, starts_N),
            sums(rows.wrong_P[order_P], starts_N),
            sums((share_P > 0).astype(np.int64), starts_N),
        )


@dataclass(frozen=True)
class Chosen:
    """The best condition of one kind for each group: a list of numbers, of which a place has to have one."""

    covered_G: np.ndarray
    wrong_G: np.ndarray
    count_G: np.ndarray
    """Numbers in each list."""
    numbers_GK: np.ndarray

    def of(self, group: int) -> np.ndarray:
        """The numbers of a group, by their share."""
        return self.numbers_GK[group, : self.count_G[group]]


def choose(pairs: Pairs, wrong_N: np.ndarray, none: int, groups: int) -> Chosen:
    """For each group the numbers that together make the best condition: of those at which firings are most of what there is, as many as
    pay; then of these no more than it takes to be nearly as good. `none` is a number that is no value.

    A value was chosen for its firings, so one of them says nothing about how often it comes with others: of k, k - 1 count."""
    kept = (pairs.number_N != none) & (pairs.firings_N >= LEAST_FIRINGS) & (pairs.share_N >= LEAST_SHARE)
    group_N, number_N, wrong_N = pairs.group_N[kept], pairs.number_N[kept], wrong_N[kept]
    share_N = pairs.share_N[kept] * (1 - 1 / pairs.firings_N[kept])
    order_N = np.lexsort((wrong_N / share_N, group_N))
    group_N = group_N[order_N]
    rank_N = np.arange(len(group_N)) - np.searchsorted(group_N, np.arange(groups))[group_N]
    listed = rank_N < MOST_VALUES
    places = group_N[listed], rank_N[listed]
    numbers_GK = np.full((groups, MOST_VALUES), none, dtype=np.int64)
    share_GK, wrong_GK = np.zeros((groups, MOST_VALUES)), np.zeros((groups, MOST_VALUES))
    numbers_GK[places] = number_N[order_N[listed]]
    share_GK[places], wrong_GK[places] = share_N[order_N[listed]], wrong_N[order_N[listed]]
    best_G = _counts(share_GK, wrong_GK, 0.0)
    outside_GK = np.arange(MOST_VALUES) >= best_G[:, None]
    share_GK[outside_GK] = wrong_GK[outside_GK] = 0
    order_GK = np.argsort(-share_GK, axis=1, kind="stable")
    numbers_GK = np.take_along_axis(numbers_GK, order_GK, 1)
    share_GK, wrong_GK = np.take_along_axis(share_GK, order_GK, 1), np.take_along_axis(wrong_GK, order_GK, 1)
    count_G = _counts(share_GK, wrong_GK, NEARLY)
    inside_GK = np.arange(MOST_VALUES) < count_G[:, None]
    return Chosen((share_GK * inside_GK).sum(1), (wrong_GK * inside_GK).sum(1), count_G, numbers_GK)


def _counts(share_GK: np.ndarray, wrong_GK: np.ndarray, tolerance: float) -> np.ndarray:
    """How many of the first values of each group it takes for f1 to be within `tolerance` of its best; 0 for a group without values [G]."""
    f_GK = f1(np.cumsum(share_GK, 1), np.cumsum(wrong_GK, 1))
    best_G = f_GK.max(1)
    return np.where(best_G > 0, (f_GK >= (best_G - tolerance)[:, None]).argmax(1) + 1, 0)
