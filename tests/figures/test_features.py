"""Figures of features: every number in them against the one it stands for."""

from __future__ import annotations

import itertools

import numpy as np

from saebench.features.store import Details
from saebench.figures.features import activation_histogram, firing_by_position, head_bars, latent_map, position_rates
from saebench.figures.pareto import Placed, frontier, pareto

EDGES = np.linspace(-1.0, 4.0, 6)
DETAILS = Details(3, np.array([2, 0, 10, 1000, 1]), EDGES, np.array([7, 0, 5, 20]), [], [], [], [], [], [])


def test_the_histogram_has_the_bins_of_the_latent():
    figure = activation_histogram(DETAILS)
    (bars,) = figure.data
    assert bars.y.tolist() == [2, 0, 10, 1000, 1]
    np.testing.assert_allclose(bars.x, [-0.5, 0.5, 1.5, 2.5, 3.5])
    assert bars.width.tolist() == [1.0] * 5
    low, high = figure.layout.yaxis.range
    assert 10**low < 1 and 10**high > 1000


def test_rates_by_position_leave_the_first_token_out():
    rates = position_rates(DETAILS, np.array([0, 2.5, 5, 7.5, 10]), num_contexts=100)
    np.testing.assert_allclose(rates, [7 / 200, 0, 5 / 300, 20 / 200])  # positions 1-2, 3-4, 5-7, 8-9
    figure = firing_by_position(DETAILS, np.array([0, 2.5, 5, 7.5, 10]), num_contexts=100)
    np.testing.assert_allclose(figure.data[0].y, rates)


def test_shares_of_heads():
    assert head_bars(np.array([0.25, 0.75])).data[0].y.tolist() == [0.25, 0.75]


def test_the_map_holds_what_it_is_given():
    x, y, latents = np.array([0.0, 1, 2]), np.array([3.0, 4, 5]), np.array([7, 8, 9])
    for by_cluster, colours in ((False, np.array([-3.0, -2, -1])), (True, np.array([0, -1, 8]))):
        figure = latent_map(x, y, latents, ["a", "b", "c"], colours, by_cluster=by_cluster, others=(x[:2], y[:2]))
        behind, points = figure.data
        assert points.customdata.tolist() == [7, 8, 9] and points.x.tolist() == [0, 1, 2] and len(behind.x) == 2
    assert len(set(points.marker.color)) == 3  # two groups, and none


def test_the_frontier_is_what_nothing_beats():
    generator = np.random.default_rng(0)
    points = [
        Placed("r", f"{i}", "topk", *pair) for i, pair in enumerate(generator.integers(1, 8, (40, 2)).astype(float).tolist())
    ]
    for lower, sign in ((True, 1), (False, -1)):
        best = frontier(points, lower)
        for a, b in itertools.product(points, best):
            assert not (a.l0 <= b.l0 and sign * a.figure < sign * b.figure)
        for point in points:
            assert any(b.l0 <= point.l0 and sign * b.figure <= sign * point.figure for b in best)
        figure = pareto(points, "FVU", lower_is_better=lower)
        assert [list(pair) for pair in zip(figure.data[0].x, figure.data[0].y, strict=True)] == [[b.l0, b.figure] for b in best]
        assert {tuple(pair) for pair in figure.data[1].customdata} == {("r", f"{i}") for i in range(40)}


def test_names_of_runs_are_no_markup():
    figure = pareto([Placed("<b>x</b>", "d", "topk", 1.0, 2.0)], "FVU", lower_is_better=True)
    assert figure.data[1].name == "&lt;b&gt;x&lt;/b&gt;" and "<b>x" not in figure.data[1].text[0]
