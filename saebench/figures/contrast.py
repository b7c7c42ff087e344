"""Two sets of documents: how much more often each latent fires in one of them, and how surely."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from saebench.features.contrast import Difference
from saebench.figures.plots import PALETTE, styled

LEVEL = 0.05  # false discovery rate up to which a difference counts
POINTS = 2000


def volcano(found: Sequence[Difference], names: tuple[str, str], name_of: Callable[[int], str], height: int = 320) -> go.Figure:
    """z against the ratio of the rates, of the latents that differ most; `names` are those of the sets. Latents that differ at the level of
    false discovery have the colour of the set they fire in more, the others are grey. `customdata` of a point is its latent."""
    figure = go.Figure()
    shown = sorted(found, key=lambda one: -abs(one.z))[:POINTS]
    groups = (
        (f"more in {names[0]}", PALETTE[1], lambda one: one.q <= LEVEL and one.z > 0),
        (f"more in {names[1]}", PALETTE[0], lambda one: one.q <= LEVEL and one.z < 0),
        ("may be chance", "rgba(128,128,128,0.45)", lambda one: one.q > LEVEL or not one.z),
    )
    for name, colour, belongs in groups:
        mine = [one for one in shown if belongs(one)]
        if not mine:
            continue
        figure.add_trace(
            go.Scatter(
                x=[one.log_ratio for one in mine],
                y=[one.z for one in mine],
                mode="markers",
                name=html.escape(name),
                marker={"color": colour, "size": 7, "opacity": 0.75},
                customdata=[one.latent for one in mine],
                text=[html.escape(name_of(one.latent)) for one in mine],
                hovertemplate="<b>%{customdata}</b> %{text}<br>rate ratio 2^%{x:.2f}, z %{y:.1f}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="log2 of the ratio of the rates")
    figure.update_yaxes(title_text="z: difference over its error")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    styled(figure, height)
    return figure.update_layout(margin={"t": 30, "b": 45})
