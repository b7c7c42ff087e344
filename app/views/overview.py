"""Overview: the runs and their dictionaries, how good each is, how it was trained, how often its latents fire."""

from __future__ import annotations

import html
from contextlib import suppress
from typing import Any

import address
import layout
import opening
import streamlit as st
from opening import Entry

from saebench.errors import UserError
from saebench.figures.pareto import Placed, pareto
from saebench.figures.plots import density_histogram, training_curves

COMPARED = {"FVU": ("fvu", True), "CE recovered": ("ce_recovered_zero", False)}
HEADS = ("Run", "Dictionary", "Kind", "Site", "Latents", "L0", "FVU", "CE recovered", "Dead", "Features")


def show() -> None:
    runs = opening.runs()
    entries = [entry for run in runs.values() for entry in run.entries.values()]
    layout.title("Overview", f"{_count(len(runs), 'run')}, {_count(len(entries), 'dictionary', 'dictionaries')}")
    layout.problems()
    chosen = layout.choose()
    _dictionaries(entries)
    left, right = st.columns(2, gap="medium")
    with left:
        _pareto(entries, chosen)
    with right:
        _density(chosen)
    _training(chosen)
    _provenance(chosen)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _figures(entry: Entry) -> dict[str, Any]:
    """Its figures; nothing where they are not measured, or damaged, which the table says."""
    with suppress(UserError):
        return opening.evaluation(entry.run).get(entry.name, {})
    return {}


def _dictionaries(entries: list[Entry]) -> None:
    rows: list[list[str]] = []
    last = None
    for entry in entries:
        try:
            figures, config = opening.evaluation(entry.run).get(entry.name, {}), opening.config(entry)
        except UserError as error:
            layout.problem(f"{entry.run.name} / {entry.name}: {error}")
            continue
        cell = lambda key, form, figures=figures: f"{figures[key]:{form}}" if key in figures else "-"  # noqa: E731
        sites = ", ".join(config.reads) + (f" → {', '.join(config.writes)}" if not config.rewrites else "")
        rows.append([
            "" if entry.run.name == last else html.escape(entry.run.name),
            layout.a(entry.name, "features", run=entry.run.name, dictionary=entry.name),
            html.escape(config.architecture),
            f'<span class="sb-wrap">{html.escape(sites)}</span>',
            f"{config.d_sae:,}",
            cell("l0", ".1f"),
            cell("fvu", ".4f"),
            cell("ce_recovered_zero", ".4f"),
            cell("dead", ".1%"),
            _indexed(entry),
        ])  # fmt: skip
        last = entry.run.name
    layout.table(HEADS, rows, numbers=range(4, 9))
    missing = dict.fromkeys(entry.run.path for entry in entries if not entry.indexed and entry.run.finished)
    if missing:
        layout.note(
            "Features can be looked at once they are indexed: " + ", ".join(f"`saebench index {path}`" for path in missing)
        )


def _indexed(entry: Entry) -> str:
    if not entry.indexed:
        return '<span class="sb-dim">not indexed</span>'
    try:
        return f"{opening.store(entry).num_tokens:,} tokens"
    except UserError as error:
        return f'<span class="sb-bad" title="{html.escape(str(error))}">damaged: index it again</span>'


def _pareto(entries: list[Entry], chosen: Entry) -> None:
    layout.heading("Quality against sparsity", "a click on a point opens its features")
    name = address.widget(
        st.segmented_control, "compared", "Compared figure", "FVU", options=list(COMPARED), label_visibility="collapsed"
    )
    key, lower_is_better = COMPARED[name]
    points = [
        Placed(entry.run.name, entry.name, opening.config(entry).architecture, figures["l0"], figures[key])
        for entry in entries
        if key in (figures := _figures(entry))
    ]
    if not points:
        layout.empty("Nothing is measured yet: `saebench evaluate RUN` does it.")
        return
    figure = pareto(points, name, lower_is_better=lower_is_better, chosen=(chosen.run.name, chosen.name))
    event = layout.plot(figure, key="pareto", select=True)
    for point in event:
        if point.get("customdata"):
            run, dictionary = point["customdata"]
            address.go("features", run=run, dictionary=dictionary)


def _density(entry: Entry) -> None:
    layout.heading(f"How often the latents of {entry.name} fire")
    figures = _figures(entry)
    if "density" in figures:
        figure = density_histogram(figures["density"], figures["tokens"])
    elif entry.indexed:
        store = opening.store(entry)
        figure = density_histogram(store.density_F.tolist(), store.num_tokens)
    else:
        layout.empty(f"Not known yet: `saebench evaluate {entry.run.path}` or `saebench index {entry.run.path}` measures it.")
        return
    aside = figure.layout.title.text
    figure.update_layout(title=None, margin={"t": 20})
    layout.show(f'<span class="sb-dim">{html.escape(aside)}</span>')
    layout.plot(figure, key="density")


def _training(entry: Entry) -> None:
    rows = opening.metrics(entry.run)
    layout.heading(f"Training of {entry.run.name}", "" if entry.run.finished else "not finished yet")
    if not rows:
        layout.empty("The run has no training log.")
        return
    legend = {"orientation": "h", "x": 0, "y": 1.06, "yanchor": "bottom"}
    layout.plot(training_curves(rows).update_layout(legend=legend, margin={"t": 70}), key="training")


def _provenance(entry: Entry) -> None:
    record = entry.run.record
    recipe = record["recipe"]
    with st.expander("How it was made"):
        facts = {
            "model": f"{recipe['model']['name']} ({record['model'].get('fingerprint', 'not known yet')})",
            "text": recipe["text"]["source"],
            "started": record["started"],
            "training tokens": f"{recipe['training']['num_tokens']:,}",
            "seconds": ", ".join(f"{what} {seconds:,.0f}" for what, seconds in record["seconds"].items()),
            "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
            "directory": str(entry.run.path),
        }
        layout.table(("", ""), [(html.escape(name), html.escape(value)) for name, value in facts.items()])
