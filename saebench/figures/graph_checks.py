"""Predicted against measured effects of an attribution graph, as `verify` leaves them in the graph: a figure, and a table by kind of node.

Names are data and are escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from saebench.errors import UserError
from saebench.figures.graph import HOVER
from saebench.figures.plots import PALETTE, styled

GREY = "rgba(128,128,128,0.7)"
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")
HEADS = ("what", "pairs", "Spearman", "calibration", "same sign")
NONE = "-"
OTHERS = {"frozen": "edges, norms held too", "free": "edges, nothing held"}


def effects_figure(found: Mapping[str, Any], name: Callable[[int], str], height: int = 420) -> go.Figure:
    """What the graph foretells along all its paths against what the model did, a point an edge, by kinds of its ends; the dotted line is
    where both are the same. `name` is the plain text for a node's number. Raises UserError for what `verify` did not write."""
    figure = go.Figure()
    groups: dict[str, list[Mapping[str, Any]]] = {}
    try:
        for edge in found["edges"]:
            groups.setdefault(kinds_text(f"{edge['source_kind']}>{edge['target_kind']}"), []).append(edge)
        values = [float(edge[key]) for edge in found["edges"] for key in ("predicted_total", "measured")]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the verification that the graph holds is damaged ({type(error).__name__}): verify it again") from None
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * ((high - low) or 1.0)
    ends = [low - room, high + room]
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1, "dash": "dot"}, hoverinfo="skip", showlegend=False
        )
    )
    for number, (kinds, edges) in enumerate(sorted(groups.items())):
        said = [
            f"{html.escape(name(edge['source'])[:60])}<br>→ {html.escape(name(edge['target'])[:60])}<br>along the edge alone "
            f"{edge['predicted_edge']:.3g}"
            for edge in edges
        ]
        figure.add_trace(
            go.Scatter(
                x=[edge["predicted_total"] for edge in edges],
                y=[edge["measured"] for edge in edges],
                mode="markers",
                name=html.escape(kinds),
                text=said,
                marker={"size": 8, "opacity": 0.8, "color": PALETTE[number % 6], "symbol": SYMBOLS[number % 6]},
                hovertemplate="%{text}<br>predicted %{x:.3g}<br>measured %{y:.3g}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="predicted, along all paths of the graph")
    figure.update_yaxes(title_text="measured in the model")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hoverlabel=HOVER)
    return styled(figure, height)


def checks_table(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Spearman, calibration (measured per predicted; 1 where sizes are right too) and agreement in sign: of all edges, along all paths and
    alone, by kinds, and of nodes on what is explained. Raises UserError for what `verify` did not write."""
    try:
        rows = [_row("edges, along all paths", found["total"])]
        rows += [_row(f"   {kinds_text(kinds)}", figures) for kinds, figures in sorted(found["by_kind"].items())]
        rows += [_row(what, found[key]) for key, what in OTHERS.items() if key in found]
        rows += [_row("edges, each alone", found["edge"]), _row("nodes, on what is explained", found["node"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the verification that the graph holds is damaged ({type(error).__name__}): verify it again") from None
    return rows


def kinds_text(kinds: str) -> str:
    """`token>feature` in words."""
    return " to ".join(kinds.split(">"))


def _row(what: str, figures: Mapping[str, Any]) -> dict[str, str]:
    cells = [figures["count"], *(figures[key] for key in ("spearman", "slope", "same_sign"))]
    shown = [NONE if value is None or not np.isfinite(value) else value for value in cells]
    forms = ("d", ".2f", ".2f", ".0%")
    texts = [value if value == NONE else f"{value:{form}}" for value, form in zip(shown, forms, strict=True)]
    return dict(zip(HEADS, [what, *texts], strict=True))
