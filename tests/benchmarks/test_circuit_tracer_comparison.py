"""The comparison with circuit-tracer's graphs: a graph by hand in both forms, with one edge changed."""

import numpy as np
import pytest
from circuits.hand_graphs import graph_of

from benchmarks.circuit_tracer import agreement, influence, numbers


@pytest.fixture
def both():
    """Feature 1 of layer 0 and its error, the token, and a logit, all at position 0; theirs has a feature more, with no edge out."""
    graph = graph_of(["feature", "error", "token", "logit"], {(3, 0): 2.0, (3, 1): -1.0, (3, 2): 0.5, (0, 2): 4.0}, {3: 1.0})
    graph.dictionaries[0]["name"] = "mlp-0"
    graph.sites[1] = "blocks.0.hook_mlp_out"
    graph.ids, graph.tokens = [3], ["a"]
    graph.nodes.position_N[:] = 0
    graph.nodes.latent_N[0] = 1
    adjacency = np.zeros((5, 5), dtype=np.float32)
    adjacency[4, [0, 2, 3]], adjacency[0, 3], adjacency[1, 3] = [2.0, -1.0, 0.5], 4.0, 7.0
    theirs = {
        "features": np.array([[0, 0, 1], [0, 0, 9]]),
        "adjacency": adjacency,
        "adjacency_with_positions": adjacency,
        "logit_tokens": np.array([3]),
        "logit_probabilities": np.array([0.25], dtype=np.float32),
    }
    return graph, theirs


def test_equal_graphs_agree(both):
    found = agreement(*both)
    assert found["features"] == {"both": 1, "ours_only": 0, "theirs_only": 1, "influence_of_theirs_only": 0.0}
    assert {kind: (cells["edges"], cells["difference"]) for kind, cells in found["sources"].items()} == {
        "feature": (1, 0.0), "error": (1, 0.0), "token": (2, 0.0), "token with its position": (2, 0.0),
    }  # fmt: skip


def test_a_changed_edge_is_a_share_of_the_strongest_into_its_target(both):
    graph, theirs = both
    theirs["adjacency"] = theirs["adjacency"].copy()
    theirs["adjacency"][4, 2] = -1.5
    found = agreement(graph, theirs)["sources"]
    assert found["error"]["difference"] == 0.25 and found["error"]["relative"] == pytest.approx(1 / 3)
    assert found["feature"]["difference"] == found["token"]["difference"] == 0.0


def test_influence_is_what_comes_through(both):
    """Of the logit's quarter 2 in 3.5 through the feature, all of which, and 0.5 in 3.5, comes from the token."""
    expected = np.array([2.0, 0.0, 1.0, 2.5, 0.0]) / 3.5 * 0.25
    np.testing.assert_allclose(influence(both[1]["adjacency"], both[1]["logit_probabilities"]), expected, rtol=1e-6)


def test_lengths_are_numbers():
    assert numbers("32,128") == [32, 128]
    with pytest.raises(Exception, match="no list such as"):
        numbers("32,")
