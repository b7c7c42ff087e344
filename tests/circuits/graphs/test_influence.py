import numpy as np
import pytest
from hand_graphs import graph_of

from saebench.circuits.graphs.influence import edge_influence, influence, prune, scores, series, shares, smallest_set
from saebench.errors import UserError

# 0 and 1 features, 2 error, 3 and 4 tokens, 5 and 6 logits
KINDS = ["feature", "feature", "error", "token", "token", "logit", "logit"]
EDGES = {(5, 0): 3.0, (5, 2): -1.0, (6, 1): 1.0, (6, 0): 1.0, (1, 0): -2.0, (1, 3): 2.0, (0, 3): 1.0, (0, 4): -3.0}
WEIGHTS = {5: 0.75, 6: 0.25}


def random_graph(seed, nodes=60):
    """Features read earlier nodes alone; errors and tokens first, logits last."""
    draw = np.random.default_rng(seed)
    kinds = ["token"] * 5 + ["error"] * 10 + ["feature"] * (nodes - 18) + ["logit"] * 3
    edges = {}
    for target in range(15, nodes):
        for source in range(min(target, nodes - 3)):
            if draw.random() < 0.4 or source == target - 1 < nodes - 3:
                edges[target, source] = float(draw.normal())
    return graph_of(kinds, edges, {nodes - 1: 0.5, nodes - 2: 0.3, nodes - 3: 0.2})


def test_influence_by_hand():
    """Into 5: 0 has 3/4, 2 has 1/4. Into 6: halves. Into 1: halves. Into 0: 3 has 1/4, 4 has 3/4."""
    feature1 = 0.25 / 2
    feature0 = 0.75 * 3 / 4 + 0.25 / 2 + feature1 / 2
    expected = [feature0, feature1, 0.75 / 4, feature1 / 2 + feature0 / 4, feature0 * 3 / 4, 0, 0]
    assert influence(graph_of(KINDS, EDGES, WEIGHTS)) == pytest.approx(expected)


def test_series_equals_the_closed_form():
    graph = random_graph(0)
    B, p = shares(graph).toarray(), graph.nodes.weight_N
    assert influence(graph) == pytest.approx(p @ np.linalg.inv(np.eye(len(graph)) - B) - p, abs=1e-12)


def test_a_cycle_is_refused():
    with pytest.raises(ValueError, match="cycle"):
        series(shares(graph_of(["feature", "feature"], {(0, 1): 1.0, (1, 0): 1.0}, {0: 1.0})), np.array([1.0, 0.0]))


def test_scores_by_hand():
    found = scores(graph_of(KINDS, EDGES, WEIGHTS))
    assert found.replacement == pytest.approx(1 - 0.75 / 4)
    assert found.replacement_low == found.replacement_high == pytest.approx(found.replacement)
    into = {0: 0.75, 1: 0.125, 5: 0.75, 6: 0.25}
    assert found.completeness == pytest.approx(1 - into[5] / 4 / sum(into.values()))
    assert found.completeness_low == pytest.approx(found.completeness)
    assert found.completeness_high == pytest.approx(found.completeness)


def test_dropped_edges_widen_the_bounds_by_what_they_carry():
    """Half of what goes into 6 is left out: an eighth of all."""
    found = scores(graph_of(KINDS, EDGES, WEIGHTS, {6: 2.0}))
    low = 1 - 0.75 / 4 - 0.125
    assert (found.replacement_low, found.replacement_high) == (pytest.approx(low), pytest.approx(low + 0.125))
    assert found.completeness_low < found.completeness < found.completeness_high


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("node_share, edge_share", [(1.0, 0.9), (1.0, 0.5), (0.7, 0.95), (0.4, 0.6)])
def test_bounds_of_what_is_left_hold_the_score_of_the_whole(seed, node_share, edge_share):
    graph = random_graph(seed)
    whole, part = scores(graph), scores(prune(graph, node_share, edge_share, keep_errors=seed % 2 == 0))
    assert part.replacement_low - 1e-9 <= whole.replacement <= part.replacement_high + 1e-9
    assert part.completeness_low - 1e-9 <= whole.completeness <= part.completeness_high + 1e-9
    assert part.replacement_low <= part.replacement <= part.replacement_high
    assert part.completeness_low - 1e-9 <= part.completeness <= part.completeness_high + 1e-9


def test_smallest_set():
    values = np.array([0.1, 0.4, 0.2, 0.3, 0.0])
    assert smallest_set(values, 0.7).tolist() == [False, True, False, True, False]
    assert smallest_set(values, 0.71).tolist() == [False, True, True, True, False]
    assert smallest_set(values, 1.0).tolist() == [True, True, True, True, False]
    assert not smallest_set(np.zeros(3), 0.5).any()


def test_edge_influence_by_hand():
    found = dict(zip(sorted(EDGES), edge_influence(graph_of(KINDS, EDGES, WEIGHTS)), strict=True))
    assert found[5, 0] == pytest.approx(0.75 * 3 / 4)
    assert found[1, 0] == pytest.approx(0.125 / 2)
    assert found[0, 4] == pytest.approx(0.75 * 3 / 4)


def test_pruning_by_hand():
    """Influence: 0 has .75, 4 has .5625, 3 .25, 2 .1875, 1 .125. Of 1.875 in all, .8 is reached with 0, 4 and 3: 1 and the error go, but
    that the error stays. Edges into 6 from 1 and into 1 are gone with it."""
    graph = graph_of(KINDS, EDGES, WEIGHTS)
    pruned = prune(graph, 0.8, 1.0)
    ids = [pruned.id(n) for n in range(len(pruned))]
    assert ids == ["feature/d/0/0", "error/error/2", "token/3", "token/4", "logit/5/3", "logit/6/3"]
    assert pruned.nodes.dropped_size_N.tolist() == [0, 0, 0, 0, 0, 1.0]
    assert pruned.edges_into(4) == [(0, 3.0), (1, -1.0)]
    assert pruned.labels == {4: "yes", 5: "yes"}
    without = prune(graph, 0.8, 1.0, keep_errors=False)
    assert not without.is_kind("error").any() and without.nodes.dropped_size_N[3] == 1.0
    assert without.nodes.dropped_N[3] == -1.0


def test_edges_are_pruned_to_their_share_and_idle_features_go():
    """Edge influences of the whole: (5,0) .5625, (0,4) .5625, (5,2) .1875, (0,3) .1875, (6,*) .125, (1,*) .0625. With 75 % of 1.875, the
    first four stay; feature 1 has no edge left, and 6 none into it."""
    pruned = prune(graph_of(KINDS, EDGES, WEIGHTS), 1.0, 0.75)
    assert [pruned.id(n) for n in range(len(pruned)) if pruned.node(n).kind == "feature"] == ["feature/d/0/0"]
    assert pruned.num_edges == 4
    assert pruned.nodes.dropped_size_N[pruned.find("logit/6/3")] == 2.0
    assert pruned.nodes.dropped_size_N[pruned.find("feature/d/0/0")] == 0.0


def test_shares_are_checked():
    for shares_ in ((0.0, 0.9), (0.8, 1.5), (float("nan"), 0.5)):
        with pytest.raises(UserError, match="is no share"):
            prune(graph_of(KINDS, EDGES, WEIGHTS), *shares_)
