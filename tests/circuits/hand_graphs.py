"""Graphs written by hand."""

import numpy as np

from saebench.circuits.graphs.graph import KINDS, Graph, Nodes


def graph_of(kinds, edges, weights=None, dropped=None):
    """Nodes of some kinds, each at a position of its own and sites by kind; edges as {(target, source): weight}."""
    count = len(kinds)
    weight_N = np.zeros(count)
    for node, weight in (weights or {}).items():
        weight_N[node] = weight
    dropped_N = np.zeros(count)
    for node, size in (dropped or {}).items():
        dropped_N[node] = size
    order = sorted(edges)
    nodes = Nodes(
        kind_N=np.array([KINDS.index(kind) for kind in kinds], dtype=np.int8),
        site_N=np.array([KINDS.index(kind) for kind in kinds], dtype=np.int16),
        dictionary_N=np.array([0 if kind == "feature" else -1 for kind in kinds], dtype=np.int16),
        position_N=np.arange(count, dtype=np.int32),
        latent_N=np.array([i if kind == "feature" else -1 for i, kind in enumerate(kinds)], dtype=np.int32),
        token_N=np.full(count, 3, dtype=np.int32),
        activation_N=np.array([1.5 if kind == "feature" else 0.0 for kind in kinds], dtype=np.float32),
        value_N=np.zeros(count),
        weight_N=weight_N,
        probability_N=np.zeros(count),
        constant_N=np.zeros(count),
        dropped_N=dropped_N.copy(),
        dropped_size_N=dropped_N,
    )
    return Graph(
        prompt="a b",
        ids=[3] * count,
        tokens=["a"] * count,
        model={"name": "hand", "fingerprint": "hand"},
        dictionaries=[
            {
                "name": "d",
                "architecture": "topk",
                "d_sae": 99,
                "reads": [f"x{i}" for i in range(count)],
                "writes": ["x"],
                "fingerprint": "none",
            }
        ],
        sites=list(KINDS),
        nodes=nodes,
        offsets_N=np.array([sum(target < n for target, _ in order) for n in range(count + 1)], dtype=np.int64),
        sources_E=np.array([source for _, source in order], dtype=np.int32),
        weights_E=np.array([edges[key] for key in order], dtype=np.float32),
        labels={n: "yes" for n in np.flatnonzero(weight_N)},
    )
