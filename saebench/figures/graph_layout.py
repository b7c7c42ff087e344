"""Where the nodes of an attribution graph stand: a column a token position, a row a layer, tokens below and what is explained on top.

Several nodes of one position and layer fill a cell, slot by slot; columns are as wide and rows as high as their fullest cell. What is drawn
is a unit: a node, or a supernode, which stands where its member of most influence is.
Shape suffixes: `M` nodes of the collapsed graph, `U` units, `E` edges between them, `C` columns, `R` rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.graphs.parts import Place
from saebench.circuits.sets.collapsing import collapse
from saebench.circuits.sets.groups import Supernodes
from saebench.errors import UserError

MOST_NODES = 800
LAYERS = 1 << 20  # more than any model has: a row needs no model
WIDEST = 8  # slots of a column
EMBEDDING, OUTPUT = -1.0, math.inf
GROUP = "group"
TOKENS_FIRST = 1e9


@dataclass
class Units:
    """Nodes and supernodes, as they are drawn."""

    kinds: list[str]
    names: list[str]
    """Of supernodes; "" for single nodes."""
    members: list[np.ndarray]
    """Numbers of nodes of the graph."""
    position_U: np.ndarray
    level_U: np.ndarray
    influence_U: np.ndarray
    sources_E: np.ndarray
    targets_E: np.ndarray
    weights_E: np.ndarray
    carried_E: np.ndarray
    """Of the edges between units: the share of what is explained that comes through them."""

    def __len__(self) -> int:
        return len(self.kinds)


@dataclass
class Layout:
    """Places of units, and names of columns and rows."""

    x_U: np.ndarray
    y_U: np.ndarray
    columns: list[int]
    """Token positions."""
    x_C: np.ndarray
    rows: list[str]
    y_R: np.ndarray
    ends_R: np.ndarray
    """Upper ends of rows."""
    width: float
    height: float


def level(graph: Graph, number: int) -> float:
    """The height of a node: point of the stream where it reads or is written, in between for what stands in the stream."""
    kind, site = KINDS[graph.nodes.kind_N[number]], graph.sites[graph.nodes.site_N[number]]
    if kind == "token":
        return EMBEDDING
    if kind not in ("feature", "error"):
        return OUTPUT
    try:
        place = Place.of(site, LAYERS)
    except UserError:  # a graph of other makers
        return float(graph.nodes.site_N[number])
    return place.point - 0.5 if place.kind == "stream" else float(place.point)


def level_name(value: float) -> str:
    """What a row is called."""
    if value in (EMBEDDING, OUTPUT):
        return "embedding" if value == EMBEDDING else "output"
    if value % 1:
        point = round(value + 0.5)
        return f"stream {point // 2}" if point % 2 == 0 else f"stream {point // 2} mid"
    return f"{'MLP' if value % 2 else 'attention'} {int(value) // 2}"


def units_of(graph: Graph, supernodes: Supernodes | None = None, most: int = MOST_NODES) -> Units:
    """What is drawn: targets, tokens, and of the others with an edge the `most` of most influence; those of a supernode as one. Raises
    UserError for supernodes of another graph."""
    view = collapse(graph, supernodes or Supernodes())
    linked_M = np.diff(view.offsets_N) > 0
    linked_M[view.sources_E] = True
    targets_M, tokens_M = view.nodes.weight_N > 0, view.is_kind("token")
    rank_M = view.influence_M + np.where(targets_M, np.inf, 0.0) + np.where(tokens_M & linked_M, TOKENS_FIRST, 0.0)
    candidates = np.flatnonzero(linked_M | targets_M | tokens_M)
    drawn = np.sort(candidates[np.argsort(-rank_M[candidates], kind="stable")[:most]])
    unit_M = np.full(len(view), -1, dtype=np.int64)
    unit_M[drawn] = np.arange(len(drawn))
    into_E = unit_M[np.repeat(np.arange(len(view)), np.diff(view.offsets_N))]
    from_E = unit_M[view.sources_E]
    kept_E = (into_E >= 0) & (from_E >= 0)
    return Units(
        [GROUP if m in view.names else KINDS[view.nodes.kind_N[m]] for m in drawn.tolist()],
        [view.names.get(m, "") for m in drawn.tolist()],
        [np.array(view.members[m]) for m in drawn.tolist()],
        view.nodes.position_N[drawn].astype(np.int64),
        np.array([level(view, m) for m in drawn.tolist()]),
        view.influence_M[drawn],
        from_E[kept_E], into_E[kept_E], view.weights_E[kept_E], view.carried_E[kept_E],
    )  # fmt: skip


def lay_out(units: Units) -> Layout:
    """A place for every unit: in its cell by influence, errors last."""
    columns = sorted(set(units.position_U.tolist()))
    levels = sorted(set(units.level_U.tolist()))
    cells: dict[tuple[int, int], list[int]] = {}
    order = sorted(range(len(units)), key=lambda u: (units.kinds[u] == "error", -units.influence_U[u], u))
    for u in order:
        cells.setdefault((columns.index(int(units.position_U[u])), levels.index(float(units.level_U[u]))), []).append(u)
    width_C, height_R = np.ones(len(columns)), np.ones(len(levels))
    for (column, row), mine in cells.items():
        if levels[row] != OUTPUT:
            width_C[column] = max(width_C[column], min(WIDEST, math.ceil(math.sqrt(0.9 * len(mine)))))
    for (column, row), mine in cells.items():
        if levels[row] != OUTPUT:
            height_R[row] = max(height_R[row], math.ceil(len(mine) / width_C[column]))
    right_C, top_R = np.cumsum(width_C + 0.5), np.cumsum(height_R + 0.9)
    x_C, y_R = right_C - (width_C + 0.5) / 2, top_R - (height_R + 0.9) / 2
    x_U, y_U = np.zeros(len(units)), np.zeros(len(units))
    for (column, row), mine in cells.items():
        slots = int(width_C[column])
        lines = math.ceil(len(mine) / slots)
        for i, u in enumerate(mine):
            line = i // slots
            along = min(slots, len(mine) - line * slots)
            x_U[u] = x_C[column] + (i % slots) - (along - 1) / 2
            y_U[u] = y_R[row] + (lines - 1) / 2 - line
    ends = float(right_C[-1]) if len(columns) else 1.0, float(top_R[-1]) if len(levels) else 1.0
    on_top = [u for u in order if units.level_U[u] == OUTPUT]
    x_U[on_top] = _apart(x_C[[columns.index(int(units.position_U[u])) for u in on_top]], ends[0])
    y_U[on_top] = y_R[-1]
    return Layout(x_U, y_U, columns, x_C, [level_name(value) for value in levels], y_R, top_R, *ends)


def _apart(wanted: np.ndarray, width: float) -> np.ndarray:
    """Places on top, each as far right as it is wanted and far enough from the next for its name to be read."""
    x = np.zeros(len(wanted))
    between, right = min(width / 22, width / max(1, len(wanted))), width
    for u in sorted(range(len(wanted)), key=lambda u: (-wanted[u], -u)):
        x[u] = min(float(wanted[u]), right)
        right = x[u] - between
    return x
