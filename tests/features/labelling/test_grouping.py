"""Choosing what firings have in common, by trying every subset; sorting and sampling against numpy."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from saebench.features.labelling.firings import evenly
from saebench.features.labelling.grouping import LEAST_FIRINGS, LEAST_SHARE, MOST_VALUES, NEARLY, Pairs, Rows, choose, f1
from saebench.features.labelling.sorting import changes, order_by, sums
from saebench.features.labelling.topics import PRIOR, log_odds

NONE = 3


def drawn(seed: int, groups: int, values: int, places: int) -> Rows:
    generator = np.random.default_rng(seed)
    group_P = np.sort(generator.integers(0, groups, places))
    firing_P = generator.random(places) < 0.6
    share_P = firing_P * generator.random(places)
    share_P /= np.maximum(np.bincount(group_P, share_P, minlength=groups), 1e-9)[group_P]
    rows = Rows(SimpleNamespace(), group_P, share_P, ~firing_P * generator.random(places), groups)
    rows.view.numbers = generator.integers(0, values, places)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_pairs_by_brute_force(seed):
    rows = drawn(seed, 6, 9, 400)
    pairs = Pairs.of(rows, rows.view.numbers)
    seen = list(zip(pairs.group_N.tolist(), pairs.number_N.tolist(), strict=True))
    assert seen == sorted({(int(g), int(n)) for g, n in zip(rows.group_P, rows.view.numbers, strict=True)})
    for place, (group, number) in enumerate(seen):
        here = (rows.group_P == group) & (rows.view.numbers == number)
        assert pairs.share_N[place] == pytest.approx(rows.share_P[here].sum())
        assert pairs.wrong_N[place] == pytest.approx(rows.wrong_P[here].sum())
        assert pairs.firings_N[place] == (rows.share_P[here] > 0).sum()


@pytest.mark.parametrize("seed", range(8))
def test_no_other_list_of_values_is_better(seed):
    """Among all subsets of the values: none has a better f1 than the chosen one by more than it may cost to be short."""
    rows = drawn(seed, 4, 9, 250)
    pairs = Pairs.of(rows, rows.view.numbers)
    wrong_N = pairs.wrong_N / 20
    chosen = choose(pairs, wrong_N, NONE, rows.groups)
    for group in range(rows.groups):
        own = [
            place
            for place in np.flatnonzero(pairs.group_N == group)
            if pairs.number_N[place] != NONE and pairs.firings_N[place] >= LEAST_FIRINGS and pairs.share_N[place] >= LEAST_SHARE
        ]
        share = {int(pairs.number_N[p]): float(pairs.share_N[p] * (1 - 1 / pairs.firings_N[p])) for p in own}
        wrong = {int(pairs.number_N[p]): float(wrong_N[p]) for p in own}
        worth = {
            some: float(f1(sum(share[n] for n in some), sum(wrong[n] for n in some)))
            for size in range(1, len(share) + 1)
            for some in itertools.combinations(sorted(share), size)
        }
        numbers = chosen.of(group).tolist()
        assert worth[tuple(sorted(numbers))] >= max(worth.values()) - NEARLY - 1e-12
        assert chosen.covered_G[group] == pytest.approx(sum(share[n] for n in numbers))
        assert chosen.wrong_G[group] == pytest.approx(sum(wrong[n] for n in numbers))
        assert [share[n] for n in numbers] == sorted((share[n] for n in numbers), reverse=True)


def test_a_group_without_values_and_long_lists():
    empty = Rows(SimpleNamespace(), np.array([2, 2]), np.array([0.5, 0.5]), np.zeros(2), 4)
    chosen = choose(Pairs.of(empty, np.array([7, 7])), np.zeros(1), NONE, 4)
    assert chosen.count_G.tolist() == [0, 0, 1, 0] and chosen.of(2).tolist() == [7] and chosen.of(0).tolist() == []
    assert chosen.covered_G.tolist() == [0, 0, 0.5, 0]  # one firing of two was what it was chosen for
    many = Rows(SimpleNamespace(), np.zeros(160, dtype=np.int64), np.full(160, 1 / 160), np.zeros(160), 1)
    pairs = Pairs.of(many, np.arange(160) // 4)
    assert MOST_VALUES - 2 <= len(choose(pairs, np.zeros(40), -1, 1).of(0)) <= MOST_VALUES
    nothing = Pairs.of(Rows(SimpleNamespace(), *(np.empty(0, dtype=np.int64),) * 3, 2), np.empty(0, dtype=np.int64))
    assert choose(nothing, np.empty(0), NONE, 2).count_G.tolist() == [0, 0]


def test_what_is_chosen_for_a_group_does_not_depend_on_the_others():
    rows = drawn(11, 30, 40, 4000)
    pairs = Pairs.of(rows, rows.view.numbers)
    together = choose(pairs, pairs.wrong_N, NONE, 30)
    for group in range(30):
        own = pairs.group_N == group
        alone = Pairs(*(getattr(pairs, name)[own] for name in ("group_N", "number_N", "share_N", "wrong_N", "firings_N")))
        alone = choose(alone, pairs.wrong_N[own], NONE, group + 1)
        assert alone.of(group).tolist() == together.of(group).tolist()
        assert alone.covered_G[group] == together.covered_G[group]


@pytest.mark.parametrize(("groups", "numbers"), [(3, 10), (70_000, 5), (5, 200_000), (1, 1)])
def test_order_by(groups, numbers):
    generator = np.random.default_rng(0)
    group_P, number_P = generator.integers(0, groups, 5000), generator.integers(0, numbers, 5000)
    assert (order_by(group_P, number_P) == np.lexsort((number_P, group_P))).all()


def test_runs():
    values = np.array([4, 4, 2, 2, 2, 9])
    starts = np.flatnonzero(changes(values))
    assert starts.tolist() == [0, 2, 5] and sums(np.ones(6), starts).tolist() == [2, 3, 1]
    assert changes(values[:0]).tolist() == [] and sums(np.empty((0, 3)), starts[:0]).shape == (0, 3)


def test_evenly():
    counts = np.array([0, 3, 1000, 7, 0, 50])
    kept = evenly(counts, 10)
    ends = np.cumsum(counts)
    of = np.searchsorted(ends, kept, side="right")
    assert np.bincount(of, minlength=6).tolist() == [0, 3, 10, 7, 0, 10]
    assert np.diff(kept[of == 2]).tolist() == [100] * 9
    assert evenly(np.zeros(3, dtype=np.int64), 10).tolist() == []


def test_log_odds():
    """Nothing to tell where a word is as frequent as elsewhere; surer with more places; sign by direction."""
    share = (0.2 * 4096 + 0.5) / 4097
    assert log_odds(np.array([share * 50]), np.array([50.0]), np.array([0.2]), 4096)[0] == pytest.approx(0, abs=1e-9)
    more, less = (log_odds(np.array([n]), np.array([50.0]), np.array([0.2]), 4096)[0] for n in (25, 2))
    assert more > 2 and less < -1
    assert log_odds(np.array([250]), np.array([500.0]), np.array([0.2]), 4096)[0] > 2 * more
    with_, without = 25 + PRIOR * share, 25 + PRIOR * (1 - share)
    expected = np.log(with_ / without / (share / (1 - share))) / np.sqrt(1 / with_ + 1 / (share * 4096))
    assert more == pytest.approx(expected)
