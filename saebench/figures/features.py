"""Figures of one feature, and the map of all: how strongly and where it fires, where its firings come from, where it lies.

Shape suffixes: `F` latents shown, `H` heads, `S` source positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from saebench.features.store import Details
from saebench.figures.plots import PALETTE, styled
from saebench.figures.tokens import STRONG

GREY = "rgba(128,128,128,0.45)"


def shade(share: float) -> str:
    """The colour of an activation that is a share of the largest, as in highlighted contexts."""
    return f"rgba({STRONG[0]},{STRONG[1]},{STRONG[2]},{0.14 + 0.72 * min(1.0, max(0.0, share)):.2f})"


def activation_histogram(details: Details, height: int = 230) -> go.Figure:
    """Firings of a latent by value, on a logarithmic axis; bars have the colour that such values have in contexts."""
    edges = details.edges
    low, high = edges[:-1], edges[1:]
    largest = float(np.abs(edges).max()) or 1.0
    bars = go.Bar(
        x=(low + high) / 2,
        y=details.histogram,
        width=high - low,
        marker={"color": [shade(abs(float(value)) / largest) for value in (low + high) / 2], "line": {"width": 0}},
        customdata=np.stack([low, high], 1),
        hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}<br>%{y:,} firings<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_layout(bargap=0)
    figure.update_xaxes(title_text="activation")
    most = max(1, int(details.histogram.max()))
    figure.update_yaxes(title_text="firings", type="log", dtick=1, range=[np.log10(0.7), np.log10(1.3 * most)])
    return compact(figure, height)


def position_rates(details: Details, edges: np.ndarray, num_contexts: int) -> np.ndarray:
    """Share of the tokens of each bin of places in a context on which the latent fires; the first token of a context is not encoded."""
    first = np.maximum(np.ceil(edges), 1)
    return details.positions / np.maximum(1, np.diff(first) * num_contexts)


def firing_by_position(details: Details, edges: np.ndarray, num_contexts: int, height: int = 230) -> go.Figure:
    """How often a latent fires by place in the context."""
    bars = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=position_rates(details, edges, num_contexts),
        width=np.diff(edges) * 0.92,
        marker={"color": PALETTE[0]},
        customdata=np.stack([np.ceil(edges[:-1]), np.ceil(edges[1:]) - 1, details.positions], 1),
        hovertemplate="positions %{customdata[0]:.0f} to %{customdata[1]:.0f}<br>fires on %{y:.3%} of tokens<br>"
        "%{customdata[2]:,} firings<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_xaxes(title_text="position in the context")
    figure.update_yaxes(title_text="share of tokens", tickformat=".2~%", rangemode="tozero")
    return compact(figure, height)


def head_bars(shares_H: np.ndarray, height: int = 200) -> go.Figure:
    """Each head's part of what a latent writes."""
    bars = go.Bar(
        x=[f"{head}" for head in range(len(shares_H))],
        y=shares_H,
        marker={"color": PALETTE[2]},
        hovertemplate="head %{x}: %{y:.1%}<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_xaxes(title_text="head", type="category")
    figure.update_yaxes(title_text="share", tickformat=".0%", rangemode="tozero")
    return compact(figure, height)


def latent_map(
    x_F: np.ndarray,
    y_F: np.ndarray,
    latents_F: np.ndarray,
    names_F: Sequence[str],
    colours_F: np.ndarray,
    *,
    by_cluster: bool,
    others: tuple[np.ndarray, np.ndarray] | None = None,
    height: int = 640,
) -> go.Figure:
    """Latents in the plane, coloured by log10 density or by cluster (-1 in grey); `customdata` is the latent. `names_F` are escaped
    already; `others` lie behind, in grey."""
    marker: dict[str, Any]
    figure = go.Figure()
    size = float(np.clip(600 / max(1.0, len(latents_F) ** 0.5), 3, 8))
    if others is not None and len(others[0]):
        figure.add_trace(
            go.Scattergl(
                x=others[0],
                y=others[1],
                mode="markers",
                hoverinfo="skip",
                marker={"size": size * 0.7, "color": GREY, "opacity": 0.35},
            )
        )
    if by_cluster:
        colours = [*PALETTE, GREY]
        steps = [[(i + end) / len(colours), colour] for i, colour in enumerate(colours) for end in (0, 1)]
        number_F = np.where(colours_F < 0, len(PALETTE), colours_F % len(PALETTE))
        marker = {"color": number_F, "colorscale": steps, "cmin": -0.5, "cmax": len(colours) - 0.5}
    else:
        powers = list(range(-7, 1))
        bar = {"title": {"text": "fires on"}, "thickness": 10, "len": 0.6, "outlinewidth": 0}
        bar |= {"tickvals": powers, "ticktext": [_share(power) for power in powers]}
        low, high = np.percentile(colours_F, (1, 99)) if len(colours_F) else (0, 1)
        marker = {"color": colours_F, "colorscale": "Viridis", "cmin": low, "cmax": high, "colorbar": bar}
    points = go.Scattergl(
        x=x_F, y=y_F, mode="markers", text=list(names_F), customdata=latents_F, marker={"size": size, "opacity": 0.85, **marker},
        hovertemplate="<b>%{customdata}</b> %{text}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(points)
    figure.update_layout(showlegend=False, hovermode="closest", dragmode="pan")
    styled(figure, height)
    figure.update_layout(margin={"l": 10, "r": 10, "t": 10, "b": 10})
    figure.update_xaxes(visible=False)
    return figure.update_yaxes(visible=False, scaleanchor="x")


def _share(power: int) -> str:
    return "100%" if power == 0 else f"{10.0 ** (power + 2):.6g}%"


def compact(figure: go.Figure, height: int) -> go.Figure:
    """The common look with little room around it."""
    return styled(figure, height).update_layout(margin={"l": 62, "r": 10, "t": 10, "b": 42}, showlegend=False)
