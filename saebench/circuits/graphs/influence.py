"""How much of the targets comes through each node, how much of it is explained, and what can be left out (methods.md A3).

With B the sizes of the edges into each node as shares of their sum, and p the weights of the targets, the influence of nodes is
p (B + B^2 + ...) = p (I - B)^-1 - p; the graph has no cycles, so the sum ends.

    replacement   influence of tokens / (tokens + errors)
    completeness  1 - share of errors among a node's inputs, mean over nodes with inputs, weighted by influence and target weight

Both are of the edges that are kept. With shares of all edges, dropped ones included, what the dropped ones carry, u, may come from tokens
or from errors: replacement lies between tokens and tokens + u of that accounting. Each dropped unit could pass through at most one node of
every site that the dictionaries read, which bounds completeness too.
Shape suffixes: `N` nodes, `E` edges.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import scipy.sparse as sp

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Of a graph; `low` and `high` bound the score of the same graph with no edge left out."""

    replacement: float
    replacement_low: float
    replacement_high: float
    completeness: float
    completeness_low: float
    completeness_high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def shares(graph: Graph, *, of_all: bool = False) -> sp.csr_array:
    """Sizes of edges as shares of those into their target that are kept, or `of_all`, dropped ones too: [N, N], targets by rows."""
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    sizes_E = np.abs(graph.weights_E).astype(np.float64)
    total_N = np.bincount(rows_E, weights=sizes_E, minlength=len(graph))
    if of_all:
        total_N += graph.nodes.dropped_size_N
    total_N[total_N == 0] = 1.0
    return sp.csr_array((sizes_E / total_N[rows_E], graph.sources_E, graph.offsets_N), shape=(len(graph), len(graph)))


def series(B: sp.csr_array, start_N: np.ndarray) -> np.ndarray:
    """start (B + B^2 + ...): [N]. Raises ValueError where B has a cycle."""
    transposed = sp.csr_array(B.T)
    total_N = np.zeros(len(start_N))
    wave_N = start_N.astype(np.float64)
    for _ in range(len(start_N) + 1):
        wave_N = transposed @ wave_N
        if not wave_N.any():
            return total_N
        total_N += wave_N
    raise ValueError("the edges have a cycle")


def influence(graph: Graph) -> np.ndarray:
    """[N] float64, in units of the targets' weights."""
    return series(shares(graph), graph.nodes.weight_N)


def scores(graph: Graph) -> Scores:
    """Replacement and completeness, with bounds."""
    tokens_N, errors_N = graph.is_kind("token"), graph.is_kind("error")
    kept, all_ = _flow(graph, False), _flow(graph, True)
    explained = float(kept[0][tokens_N].sum())
    missed = float(kept[0][errors_N].sum())
    replacement = explained / (explained + missed) if explained + missed else 0.0
    low = float(all_[0][tokens_N].sum())
    unknown = max(0.0, 1.0 - low - float(all_[0][errors_N].sum()))
    completeness = _mean(*kept[1:])
    into_N, error_N, dropped_N = all_[1], all_[2], all_[3]
    extra = unknown * len({site for dictionary in graph.dictionaries for site in dictionary["reads"]})
    total = float(into_N.sum()) + extra
    return Scores(
        replacement, min(low, replacement), max(min(1.0, low + unknown), replacement),
        completeness,
        float((into_N * (1 - error_N - dropped_N)).sum()) / total if total else 0.0,
        min(1.0, (float((into_N * (1 - error_N)).sum()) + extra) / total) if total else 0.0,
    )  # fmt: skip


def _flow(graph: Graph, of_all: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Influence of every node; and of those with inputs their influence with target weight, and the shares of errors and of dropped
    edges among their inputs: [N] each."""
    B = shares(graph, of_all=of_all)
    flow_N = series(B, graph.nodes.weight_N)
    kept_N = np.asarray(B.sum(1)).ravel()
    error_N = B @ graph.is_kind("error").astype(np.float64)
    has_N = (kept_N > 0) | (graph.nodes.dropped_size_N > 0)
    dropped_N = np.where(has_N, 1 - kept_N, 0.0).clip(0.0) if of_all else np.zeros(len(graph))
    return flow_N, np.where(has_N, flow_N + graph.nodes.weight_N, 0.0), error_N, dropped_N


def _mean(into_N: np.ndarray, error_N: np.ndarray, _: np.ndarray) -> float:
    return float((into_N * (1 - error_N)).sum() / into_N.sum()) if into_N.sum() else 0.0


def smallest_set(values_N: np.ndarray, share: float) -> np.ndarray:
    """The fewest entries that hold a share of the sum, as a mask; of equal ones the first. Zeros are never among them."""
    order_N = np.argsort(-values_N, kind="stable")
    sums_N = np.cumsum(values_N[order_N])
    kept_N = np.zeros(len(values_N), dtype=bool)
    if len(sums_N) and sums_N[-1] > 0:
        count = int(np.searchsorted(sums_N, share * sums_N[-1] * (1 - 1e-12))) + 1
        kept_N[order_N[:count]] = True
    return kept_N & (values_N > 0)


def edge_influence(graph: Graph) -> np.ndarray:
    """What every edge carries: its share of its target times the target's influence and weight: [E]."""
    B = shares(graph)
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    return B.data * (series(B, graph.nodes.weight_N) + graph.nodes.weight_N)[rows_E]


def prune(graph: Graph, node_share: float = 0.8, edge_share: float = 0.98, *, keep_errors: bool = True) -> Graph:
    """The fewest nodes that hold `node_share` of all influence, of their edges the fewest that hold `edge_share`, and of these features
    those with an edge in and an edge out. Targets and tokens always stay, errors unless `keep_errors` is off. Raises UserError for shares
    that are not above 0 and at most 1."""
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0 < share <= 1:
            raise UserError(f"{name}={share} is no share: use a number above 0, at most 1")
    always_N = (graph.nodes.weight_N > 0) | graph.is_kind(*(("token", "error") if keep_errors else ("token",)))
    pruned = graph.only(smallest_set(influence(graph), node_share) | always_N, np.ones(graph.num_edges, dtype=bool))
    pruned = pruned.only(np.ones(len(pruned), dtype=bool), smallest_set(edge_influence(pruned), edge_share))
    while True:
        into_N = np.diff(pruned.offsets_N) > 0
        out_N = np.bincount(pruned.sources_E, minlength=len(pruned)) > 0
        idle_N = (pruned.nodes.kind_N == KINDS.index("feature")) & (pruned.nodes.weight_N == 0) & ~(into_N & out_N)
        if not keep_errors:
            idle_N |= pruned.is_kind("error") & ~out_N
        if not idle_N.any():
            break
        pruned = pruned.only(~idle_N, np.ones(pruned.num_edges, dtype=bool))
    pruned.settings = {**graph.settings, "node_share": node_share, "edge_share": edge_share}
    return pruned
