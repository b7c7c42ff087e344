"""A graph with every supernode as one node.

Edges between groups are the sums of their members' edges; those within a group are kept beside it. Nothing is lost:

    sum of edges + within groups                           is that of the graph, of weights, of sizes and of what edges carry
    edges into a node + inside + dropped + constant        is its value, the sum of its members'
    influence                                              is the sum of the members'

Groups may lie on each other's way, so that edges go both ways between two and sizes of edges no longer tell influence, which is therefore
never computed anew from a collapsed graph.
Shape suffixes: `N` nodes, `M` nodes of the collapsed graph, `E` edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from saebench.circuits.graphs.graph import Graph, Nodes
from saebench.circuits.graphs.influence import edge_influence
from saebench.circuits.sets.groups import Supernodes
from saebench.errors import UserError

SUMS = ("value_N", "weight_N", "probability_N", "constant_N", "dropped_N", "dropped_size_N")


def _nothing() -> np.ndarray:
    return np.zeros(0)


@dataclass
class CollapsedGraph(Graph):
    """A view of a graph. A group is listed as its member of most influence, with its name as label; sums are over all members."""

    whole: Graph | None = field(default=None, repr=False)
    members: list[tuple[int, ...]] = field(default_factory=list)
    """By node, the numbers of the nodes of `whole` that it stands for."""
    names: dict[int, str] = field(default_factory=dict)
    """Of the nodes that are groups."""
    influence_M: np.ndarray = field(default_factory=_nothing)
    sizes_E: np.ndarray = field(default_factory=_nothing)
    """Sum of the sizes of the edges that an edge stands for."""
    carried_E: np.ndarray = field(default_factory=_nothing)
    """Sum of what they carry (influence.py)."""
    inside_M: np.ndarray = field(default_factory=_nothing)
    """Sums of weights, sizes and what is carried within groups."""
    inside_size_M: np.ndarray = field(default_factory=_nothing)
    inside_carried_M: np.ndarray = field(default_factory=_nothing)

    def influence(self) -> np.ndarray:
        """The sum of the members': [M]."""
        return self.influence_M

    def scores(self) -> Any:
        """Those of the graph that it is a view of."""
        assert self.whole is not None
        return self.whole.scores()

    def prune(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("pruned")

    def verify(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("verified")

    def intervene(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("intervened on")

    def save(self, *_: Any) -> NoReturn:
        self._refuse("saved")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"a view with supernodes as nodes cannot be {what}: use the graph itself")


def collapse(graph: Graph, supernodes: Supernodes) -> CollapsedGraph:
    """The view of a graph with each group as one node. Raises UserError for nodes that the graph lacks."""
    supernodes.check(graph)
    influence_N = graph.influence()
    rank_N = influence_N + graph.nodes.weight_N
    main_N = np.arange(len(graph))
    for group in supernodes.groups:
        listed = np.array(group.members)
        main_N[listed] = listed[np.argmax(rank_N[listed])]
    mains, new_N = np.unique(main_N, return_inverse=True)
    count = len(mains)

    def summed(column: np.ndarray, by: np.ndarray, size: int = count) -> np.ndarray:
        return np.bincount(by, weights=column.astype(np.float64), minlength=size)

    rows_E = new_N[np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))]
    columns_E = new_N[graph.sources_E]
    edges = (graph.weights_E, np.abs(graph.weights_E), edge_influence(graph))
    within_E = rows_E == columns_E
    inside = [summed(column[within_E], rows_E[within_E]) for column in edges]
    codes, place_E = np.unique(rows_E[~within_E] * count + columns_E[~within_E], return_inverse=True)
    between = [summed(column[~within_E], place_E, len(codes)) for column in edges]
    table = Nodes(**{**graph.nodes.take(mains).__dict__, **{name: summed(getattr(graph.nodes, name), new_N) for name in SUMS}})
    names = {int(new_N[group.members[0]]): group.name for group in supernodes.groups}
    labels = {m: graph.labels[n] for m, n in enumerate(mains.tolist()) if n in graph.labels}
    order_N = np.argsort(new_N, kind="stable")
    return CollapsedGraph(
        graph.prompt, graph.ids, graph.tokens, graph.model, graph.dictionaries, graph.sites, table,
        np.searchsorted(codes, np.arange(count + 1) * count).astype(np.int64), (codes % count).astype(np.int32), between[0],
        labels | names, {m: graph.vectors[n] for m, n in enumerate(mains.tolist()) if n in graph.vectors}, dict(graph.settings),
        whole=graph, members=[tuple(part.tolist()) for part in np.split(order_N, np.searchsorted(new_N[order_N], np.arange(1, count)))],
        names=names, influence_M=summed(influence_N, new_N), sizes_E=between[1], carried_E=between[2],
        inside_M=inside[0], inside_size_M=inside[1], inside_carried_M=inside[2],
    )  # fmt: skip
