"""Plotly figures shared by reports, notebooks and the browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

# Okabe and Ito's palette: told apart by people with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RANGE = (-6.5, 0.0)  # of log10 density; rarer latents are counted in the first bar
CURVES = {"fvu": "FVU on training batches", "l0": "L0", "dead": "dead latents (share)", "lr": "learning rate"}


def training_curves(rows: Sequence[dict[str, Any]]) -> go.Figure:
    """FVU, L0, dead share and learning rate against tokens, one line per dictionary, from the rows of metrics.jsonl."""
    figure = make_subplots(rows=2, cols=2, subplot_titles=list(CURVES.values()), horizontal_spacing=0.1, vertical_spacing=0.16)
    names = list(dict.fromkeys(row["dictionary"] for row in rows))
    for place, metric in enumerate(CURVES):
        for number, name in enumerate(names):
            mine = [row for row in rows if row["dictionary"] == name]
            trace = go.Scatter(
                x=[row["tokens"] for row in mine],
                y=[row[metric] for row in mine],
                name=name,
                legendgroup=name,
                showlegend=place == 0 and len(names) > 1,
                line={"color": PALETTE[number % len(PALETTE)], "width": 2},
                hovertemplate="%{x:,} tokens<br>%{y:.4g}",
            )
            figure.add_trace(trace, row=place // 2 + 1, col=place % 2 + 1)
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    figure.update_yaxes(rangemode="tozero", tickformat=".1%", row=2, col=1)
    figure.update_xaxes(title_text="tokens", row=2)
    return styled(figure, height=560)


def density_histogram(density: Sequence[float], tokens: int) -> go.Figure:
    """How often latents fire: a histogram of log10 density, with the dead ones counted in the title."""
    import numpy as np

    values = np.asarray(density)
    alive = values[values > 0]
    dead = int((values == 0).sum())
    counts, edges = np.histogram(np.clip(np.log10(alive), *RANGE), bins=60, range=RANGE)
    centres = (edges[:-1] + edges[1:]) / 2
    bars = go.Bar(
        x=centres, y=counts, width=np.diff(edges), marker={"color": PALETTE[0]}, customdata=10**centres,
        hovertemplate="fires on %{customdata:.2g} of tokens<br>%{y} latents<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(bars)
    figure.update_layout(
        title=f"Density of {len(values):,} latents over {tokens:,} held-out tokens; {dead:,} never fired", bargap=0
    )
    figure.update_xaxes(title_text="share of tokens on which the latent fires (log10)")
    figure.update_yaxes(title_text="latents")
    return styled(figure, height=360)


def styled(figure: go.Figure, height: int) -> go.Figure:
    """The common look: no chart junk, readable on light and dark pages."""
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)"}
    figure.update_layout(
        height=height, margin={"l": 60, "r": 20, "t": 50, "b": 50}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#7a7a7a"}, title={"font": {"size": 15}},
    )  # fmt: skip
    figure.update_annotations(font_size=14)
    figure.update_xaxes(**axis)
    return figure.update_yaxes(**axis)
