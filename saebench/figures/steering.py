"""Dose-response of steering: what each method reaches, and what it costs, on shared axes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saebench.figures.plots import PALETTE, styled
from saebench.files import replacing
from saebench.steering.effect import BREAKS, REPORTED, UNTOUCHED, Dose, Effects

PANELS = {
    "target": "{target}",
    "perplexity": "perplexity of the text",
    "kl": "KL on neutral text (nats)",
    "repetition": "repetition",
}
CONTROL, DASHES = "#8a8a8a", ("solid", "dash", "dot", "dashdot")


def dose_figure(effects: Effects, height: int = 620) -> go.Figure:
    """Four panels over the strength: the target, perplexity, KL and repetition, each with 95 % intervals; the untouched model as a dotted
    line, a prompt as a level line of its own, controls in grey. Where the perplexity is over three times that of untouched text, the symbol
    is open."""
    titles = [name.format(target=html.escape(effects.target)) for name in PANELS.values()]
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.1, vertical_spacing=0.15)
    strengths = sorted(
        {dose.strength for dose in effects.doses if len(effects.of(dose.method)) > 1} or {d.strength for d in effects.doses}
    )
    looks = _looks(effects)
    for place, panel in enumerate(PANELS):
        row, column = place // 2 + 1, place % 2 + 1
        figure.add_hline(
            effects.untouched.estimate(panel).mean, line={"color": CONTROL, "width": 1, "dash": "dot"}, row=row, col=column
        )
        for method in effects.methods:
            trace = _line(effects, effects.of(method), panel, strengths, *looks[method])
            figure.add_trace(trace.update(showlegend=place == 0 and looks[method][2]), row=row, col=column)
    figure.update_xaxes(type="log", tickvals=strengths, ticktext=[f"{s:g}" for s in strengths])
    figure.update_xaxes(title_text="strength", row=2)
    figure.update_yaxes(type="log", row=1, col=2)
    figure.update_yaxes(rangemode="tozero", row=2)
    figure.update_layout(legend={"orientation": "h", "y": 1.07, "yanchor": "bottom", "x": 0})
    return styled(figure, height=height).update_layout(margin={"t": 110})


def _looks(effects: Effects) -> dict[str, tuple[str, str, bool]]:
    """Colour, dash and whether it is named in the legend, by method: controls of one group look the same and are named once."""
    looks: dict[str, tuple[str, str, bool]] = {}
    groups: list[str] = []
    numbers = {"control": 0, "other": 0}
    shown: dict[str, tuple[str, str]] = {}
    for method in effects.methods:
        first = effects.of(method)[0]
        if first.group not in shown:
            kind = "control" if first.kind == "control" else "other"
            number = numbers[kind]
            numbers[kind] += 1
            colour = CONTROL if kind == "control" else PALETTE[number % len(PALETTE)]
            shown[first.group] = (colour, DASHES[(number if kind == "control" else number // len(PALETTE)) % len(DASHES)])
        looks[method] = (*shown[first.group], first.group not in groups)
        groups.append(first.group)
    return looks


def _line(
    effects: Effects, doses: Sequence[Dose], panel: str, strengths: Sequence[float], colour: str, dash: str, named: bool
) -> go.Scatter:
    estimates = [dose.estimate(panel) for dose in doses]
    x = [dose.strength for dose in doses]
    level = len(doses) == 1 and len(strengths) > 1  # a prompt has no strength
    if level:
        x, estimates, doses = [strengths[0], strengths[-1]], estimates * 2, list(doses) * 2
    symbols = [("circle" if effects.fluent(dose) else "circle-open") for dose in doses]
    finite = [e.mean == e.mean for e in estimates]
    return go.Scatter(
        x=[value for value, kept in zip(x, finite, strict=True) if kept],
        y=[e.mean for e in estimates if e.mean == e.mean],
        error_y={
            "type": "data", "symmetric": False, "thickness": 1, "width": 3,
            "array": [e.high - e.mean for e in estimates if e.mean == e.mean],
            "arrayminus": [e.mean - e.low for e in estimates if e.mean == e.mean],
        },
        mode="lines+markers",
        name=html.escape(doses[0].group),
        legendgroup=doses[0].group,
        line={"color": colour, "dash": "longdash" if level else dash, "width": 1.2 if doses[0].kind == "control" else 2},
        marker={"symbol": symbols, "size": 6},
        hovertemplate=f"<b>{html.escape(doses[0].method)}</b><br>strength %{{x:g}}<br>%{{y:.4g}}<extra></extra>",
        showlegend=named,
    )  # fmt: skip


def dose_table(effects: Effects) -> list[dict[str, str]]:
    """One row a method: the strength chosen on every other prompt, what it reaches and costs on the others, and where fluency breaks."""
    rows = [_row("untouched", "", effects.untouched, effects, "")]
    for method in effects.methods:
        best, broken = effects.best(method), effects.breaks_at(method)
        dosed = len(effects.of(method)) > 1
        said = "" if not dosed else f"{broken:g}" if broken is not None else "not up to here"
        if best is None:
            rows.append({"method": method, "strength": "never fluent", "breaks at": said})
        else:
            rows.append(_row(method, f"{best.strength:g}" if dosed else "", best, effects, said))
    names = list(rows[0])
    return [{name: row.get(name, "") for name in names} for row in rows]


def _row(method: str, strength: str, dose: Dose, effects: Effects, broken: str) -> dict[str, str]:
    def said(figure: str, form: str) -> str:
        e = dose.estimate(figure, REPORTED)
        return "" if e.mean != e.mean else f"{e.mean:{form}} ({e.low:{form}} to {e.high:{form}})"

    return {
        "method": method,
        "strength": strength,
        effects.target: said("target", ".3f"),
        "perplexity": said("perplexity", ".1f"),
        "repetition": said("repetition", ".2f"),
        "KL neutral": said("kl", ".3f"),
        "edit size": said("size", ".2f"),
        "breaks at": broken,
    }


def write_page(effects: Effects, path: Path, title: str) -> None:
    """One self-contained HTML page: the figure, the table, and texts of every method at its best strength."""
    from plotly.offline import get_plotlyjs

    plot = dose_figure(effects).to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    rows = dose_table(effects)
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(reading(effects))}</p>{plot}<p class=dim>{OPEN}</p>"
        f"<h2>At the best strength that is still fluent</h2><p class=dim>{CHOSEN}</p><table><tr>{heads}</tr>{cells}</table>"
        f"<h2>Texts</h2>{''.join(_texts(effects, method) for method in effects.methods)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


OPEN = f"Open symbols: the perplexity of the text, under the untouched model, is over {BREAKS:g} times that of untouched text."
CHOSEN = "The strength is chosen on every other prompt and told on the others. Means and 95 % intervals over prompts."
STYLE = """
:root { color-scheme: light dark; } .dim { color: #7a7a7a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
tr + tr { border-top: 1px solid rgba(128,128,128,.25); } pre { font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; }
pre b { color: #7a7a7a; font-weight: normal; }
"""


def reading(effects: Effects) -> str:
    """In a few sentences: which selections of features go beyond every control, from which strength on, where fluency breaks, and which
    reach DiffMean at their best fluent strength."""
    breaks = {method: effects.breaks_at(method) for method in effects.methods}
    said = beyond_controls(effects.rows(), breaks)
    best = {method: dose for method in effects.methods if (dose := effects.best(method)) is not None}
    if "DiffMean" in best:
        told = {method: dose.estimate("target", REPORTED).mean for method, dose in best.items()}
        level = [method for method, dose in best.items() if dose.kind == "features" and told[method] >= told["DiffMean"]]
        said += f" At or above DiffMean, each at its best fluent strength: {'; '.join(level)}." if level else ""
        said += "" if level else " No selection of features reaches DiffMean, each at its best fluent strength."
    return said


def beyond_controls(rows: Sequence[Mapping[str, Any]], breaks: Mapping[str, float | None]) -> str:
    """Which selections have a target whose interval is above that of every control at the same strength and of untouched text, from which
    strength on, and where their fluency breaks; from the rows of `Effects`."""
    strengths = sorted({row["strength"] for row in rows if row["kind"] == "features"})
    untouched = next(row for row in rows if row["method"] == UNTOUCHED)
    bars = {
        strength: max(
            row["target_high"] for row in [untouched, *rows] if row["kind"] == "control" and row["strength"] in (strength, 0.0)
        )
        for strength in strengths
    }
    found = []
    for method in dict.fromkeys(row["method"] for row in rows if row["kind"] == "features"):
        beyond = [row["strength"] for row in rows if row["method"] == method and row["target_low"] > bars[row["strength"]]]
        if beyond:
            broken = breaks.get(method)
            found.append(f"{method} from {min(beyond):g} (fluency {f'breaks at {broken:g}' if broken else 'never breaks here'})")
    if not found:
        return "No selection of features goes beyond every control of the same strength with intervals apart."
    return f"Beyond every control of the same strength, intervals apart: {'; '.join(found)}."


def _texts(effects: Effects, method: str, count: int = 3) -> str:
    dose = effects.best(method)
    if dose is None or dose.kind == "control":
        return ""
    shown = "".join(
        f"<pre><b>{html.escape(prompt)}</b>{html.escape(texts[0])}</pre>"
        for prompt, texts in list(zip(effects.prompts, dose.texts, strict=True))[:count]
    )
    return f"<h3>{html.escape(method)}, strength {dose.strength:g}</h3>{shown}"
