import numpy as np
from mixes import TEXT

from saebench.circuits.graphs import tracing
from saebench.circuits.graphs.tracing import trace


def test_the_first_features_are_those_that_targets_take_most_from(models, mixed):
    """Before any feature has a row, influence is the edges into the targets, as shares of their sums, weighted as the targets are."""
    lm, dictionaries = models["gpt2"], mixed["gpt2", "lorsa"]
    whole = trace(lm, dictionaries, TEXT, keep=1.0, max_features=10_000)
    A = np.abs(whole.matrix().toarray())
    targets = whole.targets
    influence_N = (whole.nodes.weight_N[targets, None] * A[targets] / A[targets].sum(1, keepdims=True)).sum(0)
    features = np.flatnonzero(whole.is_kind("feature"))
    expected = features[np.argsort(-influence_N[features])[:6]]
    few = trace(lm, dictionaries, TEXT, keep=1.0, max_features=6)
    assert {few.id(n) for n in np.flatnonzero(few.is_kind("feature"))} == {whole.id(n) for n in expected}


def test_blocks_of_edges_change_nothing(models, mixed, monkeypatch):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "lorsa"]
    monkeypatch.setattr(tracing, "CHUNK", 4)  # so that influence is estimated again and again
    graphs = []
    for block in (1, 50, 1 << 20):
        monkeypatch.setattr(tracing, "BLOCK", block)
        graphs.append(trace(lm, dictionaries, TEXT, keep=9, max_features=40))
    for graph in graphs[1:]:
        assert [graph.id(n) for n in range(len(graph))] == [graphs[0].id(n) for n in range(len(graph))]
        np.testing.assert_array_equal(graph.weights_E, graphs[0].weights_E)
    held = graphs[0].settings["edges_held"]
    assert graphs[0].num_edges <= held <= 9 * (40 + len(graphs[0].targets))
