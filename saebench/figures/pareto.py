"""Dictionaries against each other: how well each reconstructs, and with how many active latents."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from saebench.figures.plots import PALETTE, styled

SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star", "x", "hexagon")
WIDE = 4  # times between the largest and the smallest L0, from which on the axis is logarithmic


@dataclass(frozen=True)
class Placed:
    """A dictionary in the plot: the run and the dictionary it is, its architecture, L0 and the figure that is compared."""

    run: str
    dictionary: str
    architecture: str
    l0: float
    figure: float


def frontier(points: Sequence[Placed], lower_is_better: bool) -> list[Placed]:
    """Those that no other beats in the figure with as few active latents, by L0."""
    best: list[Placed] = []
    for point in sorted(points, key=lambda p: (p.l0, p.figure if lower_is_better else -p.figure)):
        if not best or (point.figure < best[-1].figure if lower_is_better else point.figure > best[-1].figure):
            best.append(point)
    return best


def pareto(points: Sequence[Placed], name: str, *, lower_is_better: bool, chosen: tuple[str, str] | None = None) -> go.Figure:
    """The figure against L0, colours by run and symbols by architecture, with a line along those that nothing beats. `customdata` of a
    point is its run and dictionary; `chosen` is circled."""
    figure = go.Figure()
    best = frontier(points, lower_is_better)
    line = {"color": "rgba(128,128,128,0.6)", "width": 1.5, "dash": "dot"}
    figure.add_trace(
        go.Scatter(
            x=[p.l0 for p in best],
            y=[p.figure for p in best],
            mode="lines",
            line=line,
            name="best so far",
            hoverinfo="skip",
            showlegend=len(best) > 1,
        )
    )
    architectures = list(dict.fromkeys(point.architecture for point in points))
    for number, run in enumerate(dict.fromkeys(point.run for point in points)):
        mine = [point for point in points if point.run == run]
        symbols = [SYMBOLS[architectures.index(point.architecture) % len(SYMBOLS)] for point in mine]
        marker = {
            "color": PALETTE[number % len(PALETTE)],
            "symbol": symbols,
            "size": 12,
            "line": {"width": [2.5 if (point.run, point.dictionary) == chosen else 0 for point in mine], "color": "#E69F00"},
        }
        figure.add_trace(
            go.Scatter(
                x=[point.l0 for point in mine],
                y=[point.figure for point in mine],
                mode="markers",
                name=html.escape(run),
                marker=marker,
                customdata=[[point.run, point.dictionary] for point in mine],
                text=[html.escape(f"{point.run} / {point.dictionary} ({point.architecture})") for point in mine],
                hovertemplate="<b>%{text}</b><br>L0 %{x:.1f}<br>" + html.escape(name) + " %{y:.4f}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="L0: active latents per token")
    figure.update_yaxes(title_text=html.escape(name))
    least, most = (extreme(point.l0 for point in points) for extreme in (min, max))
    if most > WIDE * least > 0:
        figure.update_xaxes(type="log")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return styled(figure, height=380)
