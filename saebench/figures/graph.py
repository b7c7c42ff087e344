"""An attribution graph as a picture: tokens below, layers above each other, what is explained on top; shared by the browser, notebooks and
reports.

Edges are blue where the source adds to the target and orange where it takes away, as wide as their weight; only those that carry most are
drawn. Errors are there, and quiet. Names and tokens are data and are escaped here.
Shape suffixes: `U` units (nodes and supernodes), `E` edges.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from saebench.circuits.graphs.graph import Graph
from saebench.circuits.sets.groups import Supernodes
from saebench.figures.graph_layout import GROUP, OUTPUT, Layout, Units, lay_out, level, level_name, units_of
from saebench.figures.plots import PALETTE, styled
from saebench.figures.tokens import alone

MOST_EDGES, MOST_OF_CHOSEN = 300, 60
WHOLE = (0.0, 1.0, 0.0, 1.0)
STEPS, WIDTHS = 9, (0.7, 1.3, 2.2, 3.6)  # points along an edge, pixels
UP, DOWN, GREY = "47,143,208", "222,106,29", "128,128,128"
LETTERS, MARGIN = 14, 2.5e-2
HOVER = {"align": "left", "bgcolor": "#1d2027", "bordercolor": "#1d2027", "font": {"color": "#f4f4f4", "size": 12}}
ABOVE, BELOW, ROW = 100, 84, 17  # pixels, of a line of nodes too
LOOKS = {
    "feature": ("features", "circle", PALETTE[2]),
    GROUP: ("supernodes", "square", PALETTE[3]),
    "token": ("tokens", "square", "#8a8a8a"),
    "target": ("explained", "hexagon2", PALETTE[4]),
    "error": ("errors", "diamond-open", f"rgba({GREY},0.55)"),
}


@dataclass(frozen=True)
class Drawing:
    """A figure, and what it leaves out in a sentence."""

    figure: go.Figure
    said: str


def draw_graph(
    graph: Graph,
    *,
    names: Mapping[int, str] | None = None,
    facts: Mapping[int, Sequence[str]] | None = None,
    supernodes: Supernodes | None = None,
    chosen: str = "",
    view: Sequence[float] = WHOLE,
    most: int = MOST_EDGES,
    height: int | None = None,
) -> Drawing:
    """A graph, pruned already, with zoom and hover.

    `names` are labels of nodes by number and `facts` further lines of what hovering says, both plain text; `supernodes` are drawn as one
    node each; `chosen` is the id of a node, or `group/NAME`, whose edges stand out; `view` is the part of the picture that is shown first,
    left, right, lower and upper end as shares of the whole. `most` edges are drawn at most. `customdata` of a point is its id, or
    `group/NAME`. Raises UserError for supernodes of another graph.
    """
    units = units_of(graph, supernodes)
    if not len(units):
        return Drawing(styled(go.Figure(), 240), "The graph has no node.")
    layout = lay_out(units)
    ids = [
        f"{GROUP}/{units.names[u]}" if units.kinds[u] == GROUP else graph.id(int(units.members[u][0])) for u in range(len(units))
    ]
    focus = ids.index(chosen) if chosen in ids else None
    figure = go.Figure()
    drawn_E = np.argsort(-units.carried_E, kind="stable")[:most]
    _edges(figure, units, layout, drawn_E, faint=focus is not None)
    mine_E = np.flatnonzero((units.sources_E == focus) | (units.targets_E == focus)) if focus is not None else drawn_E[:0]
    mine_E = mine_E[np.argsort(-units.carried_E[mine_E], kind="stable")][:MOST_OF_CHOSEN]
    _edges(figure, units, layout, mine_E, faint=False)
    _legend_of_edges(figure)
    said_of = [_hover(graph, units, u, names or {}, facts or {}) for u in range(len(units))]
    _points(figure, graph, units, layout, ids, said_of)
    _ring(figure, layout, focus)
    _axes(figure, graph, units, layout, view, height or _height(layout))
    return Drawing(figure, _said(graph, units, len(drawn_E)))


# --- edges ---


def _edges(figure: go.Figure, units: Units, layout: Layout, chosen_E: np.ndarray, *, faint: bool) -> None:
    """Edges as curves, a trace for each sign and width, be it empty, so that traces keep their numbers; the widest are last, on top."""
    weights_E = units.weights_E[chosen_E]
    largest = float(np.abs(weights_E).max(initial=0.0)) or 1.0
    bins_E = np.minimum(len(WIDTHS) - 1, (np.sqrt(np.abs(weights_E) / largest) * len(WIDTHS)).astype(int))
    t = np.linspace(0.0, 1.0, STEPS)
    ease = t * t * (3 - 2 * t)
    for number, width in enumerate(WIDTHS):
        for colour, sign in ((DOWN, weights_E < 0), (UP, weights_E >= 0)):
            mine_E = chosen_E[(bins_E == number) & sign]
            (x0, y0), (x1, y1) = (
                (layout.x_U[ends], layout.y_U[ends]) for ends in (units.sources_E[mine_E], units.targets_E[mine_E])
            )
            x = np.column_stack([x0[:, None] + (x1 - x0)[:, None] * ease, np.full(len(mine_E), np.nan)])
            y = np.column_stack([y0[:, None] + (y1 - y0)[:, None] * t, np.full(len(mine_E), np.nan)])
            alpha = 0.09 if faint else 0.32 + 0.14 * number
            figure.add_trace(
                go.Scatter(
                    x=np.round(x.ravel(), 3),
                    y=np.round(y.ravel(), 3),
                    mode="lines",
                    hoverinfo="skip",
                    showlegend=False,
                    line={"color": f"rgba({colour},{alpha:.2f})", "width": width},
                )
            )


def _legend_of_edges(figure: go.Figure) -> None:
    for name, colour in (("adds", UP), ("takes away", DOWN)):
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=name, line={"color": f"rgb({colour})", "width": 2}))


# --- nodes ---


def _look(kind: str) -> str:
    return kind if kind in LOOKS else "target"


def _points(figure: go.Figure, graph: Graph, units: Units, layout: Layout, ids: Sequence[str], said_of: Sequence[str]) -> None:
    most = (
        float(max((units.influence_U[u] for u in range(len(units)) if units.kinds[u] in ("feature", GROUP)), default=0.0)) or 1.0
    )
    targets_N = graph.nodes.weight_N > 0
    kinds = [
        "target" if targets_N[members].any() else _look(kind) for kind, members in zip(units.kinds, units.members, strict=True)
    ]
    for look, (name, symbol, colour) in sorted(LOOKS.items(), key=lambda item: item[0] != "error"):
        mine = [u for u, kind in enumerate(kinds) if kind == look]
        sizes = [5.0 + 6.0 * min(1.0, units.influence_U[u] / most) ** 0.5 for u in mine]
        fixed = {"error": 6.0, "token": 8.0, "target": 12.0}.get(look)
        figure.add_trace(
            go.Scatter(
                x=layout.x_U[mine],
                y=layout.y_U[mine],
                mode="markers",
                name=name,
                showlegend=bool(mine),
                customdata=[ids[u] for u in mine],
                text=[said_of[u] for u in mine],
                hovertemplate="%{text}<extra></extra>",
                marker={
                    "symbol": symbol,
                    "color": colour,
                    "size": fixed or sizes,
                    "opacity": 1.0,
                    "line": {"width": 1, "color": colour if look == "error" else "rgba(255,255,255,0.55)"},
                },
            )
        )


def _ring(figure: go.Figure, layout: Layout, focus: int | None) -> None:
    """Around the chosen node; points themselves stay what is hovered and clicked."""
    at = [] if focus is None else [focus]
    figure.add_trace(
        go.Scatter(
            x=layout.x_U[at],
            y=layout.y_U[at],
            mode="markers",
            hoverinfo="skip",
            showlegend=False,
            marker={"symbol": "circle-open", "size": 24, "color": "#E69F00", "line": {"width": 3}},
        )
    )


def node_name(graph: Graph, number: int, names: Mapping[int, str] | None = None) -> str:
    """What a node is called where a few words fit, as plain text: its label, else its number, else the token it stands on."""
    node = graph.node(number)
    token = alone(graph.tokens[node.position]) if node.position < len(graph.tokens) else ""
    if names and names.get(number):
        return names[number]
    if node.kind == "feature":
        return f"{graph.dictionaries[node.dictionary]['name']} {node.latent}"
    if node.kind == "error":
        return f"error of {level_name(level(graph, number))}"
    return token if node.kind == "token" else f"{node.kind} {alone(node.label)}"


def _hover(graph: Graph, units: Units, u: int, names: Mapping[int, str], facts: Mapping[int, Sequence[str]]) -> str:
    """What pointing at a unit says, as the markup that plotly reads, everything in it escaped."""
    if units.kinds[u] == GROUP:
        members = units.members[u]
        lines = [
            f"<b>{html.escape(short(units.names[u], 60))}</b>",
            f"{len(members)} nodes",
            f"influence {units.influence_U[u]:.3f}",
        ]
        lines += [html.escape(short(node_name(graph, int(n), names), 60)) for n in members[:6]]
        return "<br>".join(lines + (["…"] if len(members) > 6 else []))
    number = int(units.members[u][0])
    node = graph.node(number)
    lines = [f"<b>{html.escape(short(node_name(graph, number, names), 60))}</b>"]
    if node.kind == "feature":
        lines.append(html.escape(f"{graph.dictionaries[node.dictionary]['name']} {node.latent}"))
    lines.append(f"on {html.escape(short(alone(graph.tokens[node.position]), 30))} (position {node.position})")
    if node.kind == "feature":
        lines.append(f"activation {node.activation:.3g}")
    if node.kind == "logit":
        lines.append(f"probability {node.probability:.1%}")
    lines.append(f"influence {units.influence_U[u]:.3f}")
    lines += [html.escape(short(line, 80)) for line in facts.get(number, ())]
    return "<br>".join(lines)


def short(text: str, letters: int) -> str:
    """A text cut where it is longer than some letters."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


# --- around them ---


def _named_on_top(graph: Graph, units: Units, layout: Layout) -> list[dict[str, Any]]:
    """The names of what is explained, slanted above it, as annotations."""
    return [
        {
            "x": layout.x_U[u], "y": layout.y_U[u], "textangle": -40, "showarrow": False, "xanchor": "left", "yanchor": "bottom",
            "yshift": 6,
            "xshift": -3, "font": {"size": 12}, "text": html.escape(short(alone(graph.labels.get(int(units.members[u][0]), "")), LETTERS)),
        }
        for u in range(len(units))
        if units.level_U[u] == OUTPUT and units.kinds[u] != GROUP
    ]  # fmt: skip


def _bands(layout: Layout) -> list[dict[str, Any]]:
    """Every other row a little darker, as shapes."""
    return [
        {
            "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": layout.ends_R[r - 1], "y1": layout.ends_R[r], "layer": "below",
            "fillcolor": f"rgba({GREY},0.08)", "line": {"width": 0},
        }
        for r in range(1, len(layout.rows), 2)
    ]  # fmt: skip


def _height(layout: Layout) -> int:
    return int(min(860, max(400, ROW * layout.height + ABOVE + BELOW)))


def _axes(figure: go.Figure, graph: Graph, units: Units, layout: Layout, view: Sequence[float], height: int) -> None:
    styled(figure, height)
    whole = (-MARGIN * layout.width, layout.width * (1 + MARGIN), -0.2, layout.height + 0.3)
    left, right, low, high = view
    every = max(1, round(len(layout.columns) / 70))
    shown = range(0, len(layout.columns), every)
    texts = [html.escape(short(alone(graph.tokens[layout.columns[c]]), LETTERS)) for c in shown]
    slanted = len(texts) > 8
    figure.update_xaxes(
        tickvals=[layout.x_C[c] for c in shown], ticktext=texts, tickangle=-50 if slanted else 0, showgrid=False, zeroline=False,
        range=[whole[0] + end * (whole[1] - whole[0]) for end in (left, right)], tickfont={"size": 12},
    )  # fmt: skip
    apart = max(1, round(len(layout.rows) * 15 / max(1, height - ABOVE - BELOW)))
    rows = range(0, len(layout.rows), apart)
    figure.update_yaxes(
        tickvals=[layout.y_R[r] for r in rows], ticktext=[layout.rows[r] for r in rows], showgrid=False, zeroline=False,
        range=[whole[2] + end * (whole[3] - whole[2]) for end in (low, high)], tickfont={"size": 12},
    )  # fmt: skip
    figure.update_layout(
        margin={"l": 84, "r": 16, "t": ABOVE, "b": BELOW}, hovermode="closest", dragmode="pan", uirevision="graph", meta={"whole": whole},
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 1 - 26 / height, "yanchor": "top", "font": {"size": 12}},
        hoverlabel=HOVER, annotations=_named_on_top(graph, units, layout), shapes=_bands(layout),
    )  # fmt: skip


def _said(graph: Graph, units: Units, edges: int) -> str:
    """What is drawn, and what is not."""
    left, total = len(graph) - sum(map(len, units.members)), len(units.weights_E)
    said = f"All {total:,} edges are drawn" if edges == total else f"The {edges:,} edges that carry most are drawn, of {total:,}"
    return f"{said}; {left:,} nodes that carry nothing or least are not." if left else f"{said}."
