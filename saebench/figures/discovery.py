"""Circuits that methods find, judged: what the model does with the best components alone and without them, and a table of agreement.

Results are a mapping from a task and its patch to `task`, `patch`, `date`, `rows` (level, method, truth, auc, precision, recall, inside,
components, seconds of processor time) and `curves` (level, method and the fields of `circuits.discovery.ranking.Curve`), as
evals/discovery.py keeps them.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saebench.figures.plots import PALETTE, styled
from saebench.files import replacing

METHODS = {
    "exact": "exact ablation",
    "eap": "EAP",
    "eap_ig": "EAP-IG",
    "first_order": "attribution patching",
    "latents_only": "attribution patching, errors held",
    "integrated": "integrated gradients",
    "discrete codes": "discrete codes",
}
HEADS = ("task", "patch", "level", "method", "truth", "in circuit", "AUC", "precision", "recall", "seconds")


def faithfulness_figure(curves: Sequence[Mapping[str, Any]], height: int = 380) -> go.Figure:
    """Faithfulness of the k largest components (solid) and what everything else still does (dashed) against k, one panel a level and one
    colour a method; the level lines are 0 and 1."""
    levels = list(dict.fromkeys(str(curve["level"]) for curve in curves))
    figure = make_subplots(rows=1, cols=max(1, len(levels)), subplot_titles=levels, horizontal_spacing=0.06)
    named: set[str] = set()
    for curve in curves:
        method, column = METHODS.get(curve["method"], str(curve["method"])), levels.index(curve["level"]) + 1
        colour = PALETTE[list(METHODS).index(curve["method"]) % len(PALETTE) if curve["method"] in METHODS else 0]
        for shares, dash, part in (
            (curve["faithfulness_K"], "solid", "alone"),
            (curve["completeness_K"], "dash", "everything else"),
        ):
            figure.add_trace(
                go.Scatter(
                    x=[size + 1 for size in curve["sizes_K"]],  # so that none has a place on the logarithmic axis
                    y=shares,
                    customdata=curve["sizes_K"],
                    mode="lines+markers",
                    name=html.escape(method),
                    legendgroup=method,
                    showlegend=part == "alone" and method not in named,
                    line={"color": colour, "dash": dash, "width": 2 if part == "alone" else 1.4},
                    marker={"size": 5},
                    hovertemplate=f"<b>{html.escape(method)}</b>, {part}<br>the %{{customdata}} largest<br>%{{y:.3f}}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        named.add(method)
    for level in (0, 1):
        figure.add_hline(y=level, line={"color": "rgba(128,128,128,0.6)", "width": 1, "dash": "dot"})
    figure.update_xaxes(type="log", title_text="size + 1")
    figure.update_yaxes(title_text="share of the metric", col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1.14, "yanchor": "bottom", "x": 0})
    return styled(figure, height).update_layout(margin={"t": 90})


def discovery_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a task, patch, level, method and truth, as text; figures are empty where nothing, or everything, is in the circuit."""
    rows = []
    for found in results.values():
        for row in found["rows"]:
            figures = {name: "" if row.get(key) is None else f"{row[key]:.2f}" for name, key in FIGURES.items()}
            rows.append(
                {
                    "task": str(found["task"]),
                    "patch": str(found["patch"]),
                    "level": str(row["level"]),
                    "method": METHODS.get(row["method"], str(row["method"])),
                    "truth": str(row["truth"]),
                    "in circuit": f"{row['inside']} of {row['components']:,}",
                    **figures,
                    "seconds": f"{row['seconds']:.1f}",
                }
            )
    return rows


FIGURES = {"AUC": "auc", "precision": "precision", "recall": "recall"}


def agreement_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table, one row a task, patch, level and truth: AUC of every method, and in brackets the share of its k best that
    are in the circuit, k as many as that has (precision and recall at once)."""
    heads = ["task", "ablation", "level", "truth", "in circuit", *METHODS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|---|--:|" + "--:|" * len(METHODS)]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in discovery_rows(results):
        if row["AUC"]:
            key = tuple(row[name] for name in ("task", "patch", "level", "truth", "in circuit"))
            cells.setdefault(key, {})[row["method"]] = f"{row['AUC']} ({row['precision']})"
    return [
        *lines,
        *(f"| {' | '.join([*key, *(row.get(name, '') for name in METHODS.values())])} |" for key, row in cells.items()),
    ]


def write_page(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One self-contained HTML page: curves of every task and patch, then the table."""
    from plotly.offline import get_plotlyjs

    parts = []
    for found in results.values():
        plot = faithfulness_figure(found["curves"]).to_html(
            full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
        )
        parts.append(f"<h2>{html.escape(str(found['task']))}, {html.escape(str(found['patch']))} ablation</h2>{plot}")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in HEADS)
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row[head])}</td>" for head in HEADS) + "</tr>" for row in discovery_rows(results)
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Circuit discovery</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>Circuit discovery</h1><p>{html.escape(READ)}</p>{''.join(parts)}<table><tr>{heads}</tr>{cells}</table></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


READ = (
    "Solid: the share of the metric that the largest components do alone. Dashed: the share that everything else still does without them. "
    "A circuit that is faithful and complete reaches 1 and 0 early."
)
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: 0.15rem 0.7rem; text-align: left; }
"""
