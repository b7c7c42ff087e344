"""How alike the latents of two dictionaries are: for each the figure of its nearest in the other."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from saebench.figures.plots import PALETTE, styled

BINS = 50


def nearest_histogram(
    similarities: Sequence[np.ndarray], names: Sequence[str], measure: str, least: float, height: int = 300
) -> go.Figure:
    """Latents by how alike their nearest is, one outline for each dictionary, as shares of its latents; a line marks the least that counts
    as alike. `measure` names the figure."""
    figure = go.Figure()
    edges = np.linspace(0, 1, BINS + 1)
    for number, (similarity_M, name) in enumerate(zip(similarities, names, strict=True)):
        counts, _ = np.histogram(np.clip(similarity_M, 0, 1), bins=edges)
        colour = PALETTE[number]
        figure.add_trace(
            go.Scatter(
                x=edges,
                y=np.append(counts, counts[-1]) / max(1, len(similarity_M)),
                name=html.escape(name),
                line={"shape": "hv", "color": colour, "width": 2},
                fill="tozeroy",
                fillcolor=f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:], 16)},0.18)",
                customdata=np.stack([np.append(edges[1:], 1), np.append(counts, counts[-1])], 1),
                hovertemplate="%{x:.2f} to %{customdata[0]:.2f}<br>%{customdata[1]:,} features (%{y:.1%})",
            )
        )
    figure.add_vline(x=least, line={"color": "rgba(128,128,128,0.8)", "width": 1.5, "dash": "dot"})
    figure.update_xaxes(title_text=f"{html.escape(measure)} of the nearest feature in the other", range=[0, 1])
    figure.update_yaxes(title_text="share of features", tickformat=".0%", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hovermode="closest")
    styled(figure, height)
    return figure.update_layout(margin={"t": 30, "b": 45})
