"""What two graphs, or the graphs of two sets of prompts, differ in: nodes and edges that only one has, and changed figures.

Nodes and edges are those of a set (graph_sets.py), everything is a less b. For two sets each figure has a test over prompts, never over
positions: with figures x of the prompts (0 where a prompt lacks the item), the squared standard error of the difference of means is the
larger of

    s_a^2 / P_a + s_b^2 / P_b          prompts about the mean of their own set
    s^2 (1 / P_a + 1 / P_b)            all prompts about the common mean: the variance over all ways to deal them out

compared with Student's t of min(P_a, P_b) - 1 degrees of freedom, which gives the interval too; q is Benjamini and Hochberg's false
discovery rate over all items that at least `LEAST` prompts have. features/contrast.py tests latents over documents in the same way. Two
single graphs differ exactly in what they differ: there is no interval.
Shape suffixes: `P` prompts, `K` nodes or edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.intervals import Estimate
from saebench.circuits.sets.graph_sets import Entries, GraphSet, Positions
from saebench.features.contrast import false_discovery_rates

LEAST = 2  # prompts that have an item which is tested
TOP = 200


@dataclass(frozen=True)
class Change:
    """One node or edge."""

    a: float
    """Mean figure in a, and in b."""
    b: float
    change: Estimate
    """a less b."""
    present_a: int
    """Prompts of a that have it, and of b."""
    present_b: int
    p: float
    """Two-sided, of such a change by chance; NaN where it was not tested."""
    q: float

    @property
    def only(self) -> str:
        """ "a" or "b" where no prompt of the other has it, else ""."""
        return "" if self.present_a and self.present_b else "a" if self.present_a else "b"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, NaN as None."""
        out = {name: value.as_list() if isinstance(value, Estimate) else value for name, value in self.__dict__.items()}
        out = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in out.items()}
        return out | {"only": self.only}


@dataclass(frozen=True)
class NodeChange(Change):
    """Of influence."""

    key: str
    kind: str
    label: str


@dataclass(frozen=True)
class EdgeChange(Change):
    """Of weight."""

    source: str
    target: str


@dataclass(frozen=True)
class GraphDifference:
    """a less b; the changes that are surest first, or of two single graphs the largest."""

    prompts_a: int
    prompts_b: int
    nodes: list[NodeChange]
    edges: list[EdgeChange]
    num_nodes: dict[str, int]
    """How many of all are in `both`, only in `a`, only in `b`."""
    num_edges: dict[str, int]
    both: GraphSet = field(repr=False)
    """All graphs, those of a first."""

    def where(self, key: str) -> list[tuple[int, ...]]:
        """The numbers that a node has in each graph, those of a first. Raises UserError for an unknown key."""
        return self.both.where(key)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, NaN as None."""
        out = {name: value for name, value in self.__dict__.items() if name not in ("nodes", "edges", "both")}
        return out | {"nodes": [node.as_dict() for node in self.nodes], "edges": [edge.as_dict() for edge in self.edges]}


Graphs = Graph | Sequence[Graph] | GraphSet


def compare(a: Graphs, b: Graphs, *, positions: Positions | None = None, top: int = TOP) -> GraphDifference:
    """The `top` nodes and edges of two graphs or sets that differ most; `positions` as for `GraphSet`, whose own is taken where there is
    one. Raises UserError for graphs of different models or dictionaries, and for an empty set."""
    listed_a, listed_b = _listed(a), _listed(b)
    own: Positions = next((given.positions for given in (a, b) if isinstance(given, GraphSet)), "dropped")
    both = GraphSet([*GraphSet(listed_a).graphs, *GraphSet(listed_b).graphs], positions=positions or own)
    counts = len(listed_a), len(listed_b)
    nodes, links = both.node_entries, both.edge_entries
    changes, num_nodes = _changes(nodes, nodes.figures, len(both.keys), counts, top)
    edge_changes, num_edges = _changes(links, links.weights, len(both.edge_codes), counts, top)
    return GraphDifference(
        *counts,
        [NodeChange(key=both.keys[k], kind=KINDS[both.kind_K[k]], label=both.labels[k], **found) for k, found in changes],
        [EdgeChange(source=both.ends(edge)[0], target=both.ends(edge)[1], **found) for edge, found in edge_changes],
        num_nodes, num_edges, both,
    )  # fmt: skip


def _listed(graphs: Graphs) -> list[Graph]:
    if isinstance(graphs, Graph):
        return [graphs]
    return graphs.graphs if isinstance(graphs, GraphSet) else list(graphs)


def _changes(
    entries: Entries, column: np.ndarray, count: int, prompts: tuple[int, int], top: int
) -> tuple[list[tuple[int, dict[str, Any]]], dict[str, int]]:
    """The items that differ most, each with the fields of a `Change`, and how many are in both, or in one."""
    in_b = (entries.prompts >= prompts[0]).astype(np.int64)
    place = in_b * count + entries.items
    present = np.bincount(place, minlength=2 * count).reshape(2, count)
    x = np.bincount(place, weights=column, minlength=2 * count).reshape(2, count)
    P = np.array(prompts)[:, None]
    mean = x / P
    change = mean[0] - mean[1]
    half, z, p, q = (np.full(count, math.nan) for _ in range(4))
    if min(prompts) > 1:
        from scipy.special import stdtr, stdtrit

        # about the means, since prompts are alike and squares would cancel
        own_E = (column - mean[in_b, entries.items]) ** 2
        own = np.bincount(place, weights=own_E, minlength=2 * count).reshape(2, count) + (P - present) * mean**2
        common = x.sum(0) / P.sum()
        spread = np.bincount(entries.items, weights=(column - common[entries.items]) ** 2, minlength=count)
        spread += (P.sum() - present.sum(0)) * common**2
        dealt = spread / (P.sum() - 1) * (1 / P).sum()
        error = np.sqrt(np.maximum((own / (P - 1) / P).sum(0), dealt))
        free = min(prompts) - 1
        z = np.divide(change, error, out=np.zeros(count), where=error > 1e-12 * np.abs(mean).max(0))  # below it is rounding
        half = stdtrit(free, 0.975) * error
        tested = np.flatnonzero(present.sum(0) >= LEAST)
        p[tested] = 2 * stdtr(free, -np.abs(z[tested]))
        q[tested] = false_discovery_rates(p[tested])
        order = np.lexsort((-np.abs(change), -np.where(np.isnan(p), 0.0, np.abs(z))))[:top]
    else:
        order = np.argsort(-np.abs(change), kind="stable")[:top]
    found = []
    for k in order.tolist():
        ends = () if math.isnan(half[k]) else (float(change[k] - half[k]), float(change[k] + half[k]))
        figures = {"a": float(mean[0, k]), "b": float(mean[1, k]), "change": Estimate(float(change[k]), *ends)}
        tests = {"p": float(p[k]), "q": float(q[k])}
        found.append((k, {**figures, "present_a": int(present[0, k]), "present_b": int(present[1, k]), **tests}))
    there = present > 0
    numbers = {"both": int(there.all(0).sum()), "a": int((there[0] & ~there[1]).sum()), "b": int((there[1] & ~there[0]).sum())}
    return found, numbers
