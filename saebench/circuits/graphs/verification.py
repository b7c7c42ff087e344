"""Whether what a graph says holds: its strongest edges and nodes, each taken out, predicted against measured.

For every edge checked: what the graph predicts for the target when the source is multiplied by 1 + delta, along the edge alone and along
all paths; what the linear model says with everything else held, which must equal the edge; and what the model itself does
(interventions.py): `measured` with its attention patterns held, which graphs take as given and published interventions hold too; `frozen`
with the scales of norms held as well; `free` with nothing held. Two figures compare prediction with `measured`: Spearman's rank
correlation, and the calibration, the slope of measured on predicted through the origin, which is 1 where sizes are right too. Where
`frozen` agrees much better than `measured`, norms are what the graph leaves out; where `measured` is much better than `free`, attention is.
Shape suffixes: `N` nodes, `E` edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from saebench.circuits.graphs.graph import Graph
from saebench.circuits.graphs.influence import edge_influence, influence
from saebench.circuits.graphs.interventions import Intervention, Interventions, at_hand
from saebench.circuits.graphs.replacement import Dictionaries, LocalModel
from saebench.errors import UserError
from saebench.lm import LanguageModel

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class EdgeCheck:
    """One edge, with the change of its target's value."""

    source: int
    target: int
    source_kind: str
    target_kind: str
    predicted_edge: float
    predicted_total: float
    held: float
    frozen: float
    measured: float
    free: float


@dataclass(frozen=True)
class NodeCheck:
    """One node, with the change of the targets, weighted as they are."""

    node: int
    kind: str
    predicted_total: float
    frozen: float
    measured: float
    free: float


@dataclass(frozen=True)
class Agreement:
    """Of predicted with measured."""

    count: int
    spearman: float
    slope: float
    """Calibration: measured per predicted, least squares through the origin."""
    same_sign: float
    """Share of pairs that agree in sign."""

    @classmethod
    def of(cls, predicted: list[float], measured: list[float]) -> Agreement:
        """NaN where there are too few pairs, or all are alike."""
        p, m = np.array(predicted, dtype=np.float64), np.array(measured, dtype=np.float64)
        squares = float((p * p).sum())
        slope = float((p * m).sum()) / squares if squares else math.nan
        return cls(len(p), spearman(p, m), slope, float((np.sign(p) == np.sign(m)).mean()) if len(p) else math.nan)


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    delta: float
    edges: list[EdgeCheck] = field(repr=False)
    nodes: list[NodeCheck] = field(repr=False)
    edge: Agreement
    """Direct edges against the model itself, attention patterns held."""
    total: Agreement
    """Effects along all paths of the graph against the model itself, attention patterns held."""
    node: Agreement
    by_kind: dict[str, Agreement]
    """`total` by source and target, such as `feature>logit`."""
    held_error: float
    """The largest difference between an edge and the linear model, as a share of the largest edge: what the arithmetic misses."""
    frozen: Agreement
    """`total` with the scales of norms held too."""
    free: Agreement
    """`total` with nothing held."""
    frozen_by_kind: dict[str, Agreement]
    free_by_kind: dict[str, Agreement]

    @property
    def spearman(self) -> float:
        """The figure that is shown by default: effects along all paths of the graph against the model itself, attention patterns held."""
        return self.total.spearman

    def as_dict(self, numbers_N: np.ndarray | None = None) -> dict[str, Any]:
        """Plain data, NaN as None; with the numbers that nodes have in another graph, where these are given (`Graph.numbers_in`)."""
        plain = _plain(asdict(self))
        if numbers_N is not None:
            for check in plain["edges"]:
                check.update(source=int(numbers_N[check["source"]]), target=int(numbers_N[check["target"]]))
            for check in plain["nodes"]:
                check["node"] = int(numbers_N[check["node"]])
        return plain


@torch.no_grad()
def verify(
    lm: LanguageModel,
    dictionaries: Dictionaries,
    graph: Graph,
    top: int = 50,
    *,
    delta: float = -1.0,
    model: LocalModel | None = None,
) -> Verification:
    """Check the `top` edges that carry most, and as many nodes, each source multiplied by 1 + delta (-1 takes it out). What was found is
    also kept in `graph.extra["verification"]`. Raises UserError for a graph without edges, and a model or dictionaries that are not its."""
    if top < 1 or not math.isfinite(delta) or delta == 0:
        raise UserError(f"top={top} and delta={delta} check nothing: use at least one edge, and a delta that is not 0")
    runs = Interventions(at_hand(lm, dictionaries, graph, model), graph)
    can_N = np.array([runs.can(number) for number in range(len(graph))])
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    order_E = np.argsort(-edge_influence(graph) * can_N[graph.sources_E], kind="stable")
    chosen_E = order_E[can_N[graph.sources_E[order_E]]][:top]
    if not len(chosen_E):
        raise UserError("the graph has no edge from a node that can be changed: trace with more features, or prune less")
    order_N = np.argsort(-influence(graph) * can_N, kind="stable")
    chosen_N = order_N[can_N[order_N]][:top]
    changed = list(dict.fromkeys([*graph.sources_E[chosen_E].tolist(), *chosen_N.tolist()]))
    done: dict[int, Intervention] = dict(zip(changed, runs.many(changed, 1.0 + delta), strict=True))
    kind = lambda number: graph.node(number).kind  # noqa: E731
    edges = []
    for e in chosen_E.tolist():
        source, target = int(graph.sources_E[e]), int(rows_E[e])
        run = done[source]
        columns = (run.edge_N, run.total_N, run.held_N, run.frozen_N, run.measured_N, run.free_N)
        edges.append(EdgeCheck(source, target, kind(source), kind(target), *(float(column[target]) for column in columns)))
    weight_N = graph.nodes.weight_N
    nodes = []
    for n in chosen_N.tolist():
        effects = (done[n].total_N, done[n].frozen_N, done[n].measured_N, done[n].free_N)
        nodes.append(NodeCheck(n, kind(n), *(float(effect_N @ weight_N) for effect_N in effects)))
    found = _summary(delta, edges, nodes)
    graph.extra["verification"] = found.as_dict()
    return found


def _summary(delta: float, edges: list[EdgeCheck], nodes: list[NodeCheck]) -> Verification:
    groups: dict[str, list[EdgeCheck]] = {}
    for edge in edges:
        groups.setdefault(f"{edge.source_kind}>{edge.target_kind}", []).append(edge)
    largest = max(abs(edge.predicted_edge) for edge in edges)

    def agreement(some: list[EdgeCheck], measure: str = "measured") -> Agreement:
        return Agreement.of([edge.predicted_total for edge in some], [getattr(edge, measure) for edge in some])

    def by_kind(measure: str) -> dict[str, Agreement]:
        return {name: agreement(group, measure) for name, group in sorted(groups.items())}

    return Verification(
        delta=delta,
        edges=edges,
        nodes=nodes,
        edge=Agreement.of([edge.predicted_edge for edge in edges], [edge.measured for edge in edges]),
        total=agreement(edges),
        node=Agreement.of([node.predicted_total for node in nodes], [node.measured for node in nodes]),
        by_kind=by_kind("measured"),
        held_error=max(abs(edge.held - edge.predicted_edge) for edge in edges) / largest if largest else 0.0,
        frozen=agreement(edges, "frozen"),
        free=agreement(edges, "free"),
        frozen_by_kind=by_kind("frozen"),
        free_by_kind=by_kind("free"),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN for fewer than three pairs or where all of one are alike."""
    from scipy.stats import rankdata

    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
