"""Dose-response of the edits on the page beside random directions: measured in a process of its own, shown as a figure and a table."""

from __future__ import annotations

import html
import tempfile
from pathlib import Path

import address
import background
import layout
import opening
import steering_text
import streamlit as st
from opening import Entry
from steering_state import State

from saebench.features.store import FeatureStore
from saebench.figures.steering import CHOSEN, OPEN, dose_figure, dose_table, reading, write_page
from saebench.steering import trial
from saebench.steering.effect import Effects
from saebench.steering.hooks import check_edit
from saebench.steering.trial import Trial

TARGETS = {"firing": "The features fire", "pattern": "A pattern", "examples": "Like examples"}
MEANT = (
    "What the edits are to reach. The features fire: share of written tokens on which any of them fires when the untouched model reads "
    "the text again. A pattern: share of lines in which a regular expression is found. Like examples: how much more the tokens are "
    "those of your examples than those of the indexed text, in nats per token."
)
MAX_CHARACTERS = 6000


def show(entry: Entry, store: FeatureStore, state: State) -> None:
    """What is to be reached, the button, and what was found."""
    layout.heading("Dose-response", "strength by strength, beside random directions of the same length")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        target = address.widget(
            st.segmented_control, "target", "Target", "firing", options=list(TARGETS), format_func=TARGETS.__getitem__, help=MEANT
        )  # fmt: skip
        pattern = ""
        if target == "pattern":
            pattern = address.widget(st.text_input, "pattern", "Regular expression", "", placeholder=r"^\s*def ", max_chars=500)
    examples = ""
    if target == "examples":
        if len(address.peek("like")) > MAX_CHARACTERS:
            address.put("like", address.peek("like")[:MAX_CHARACTERS])
        examples = address.widget(
            st.text_area, "like", "Examples, set apart by empty lines", "", height=120, max_chars=MAX_CHARACTERS
        )  # fmt: skip
    wanted = Trial(
        edits=state.settings(1.0), target=target, pattern=pattern, examples=examples, unit_of_store=state.unit is None
    )  # fmt: skip
    path = wanted.path(store)
    at = opening.stamp(path)
    if at is not None:
        _effects(_kept(str(path), at), state)
        return
    with steering_text.telling():
        background.offer(
            f"doses {entry.key}", "Measure", "Measuring", lambda: _arguments(entry, store, wanted), icon=":material/show_chart:"
        )  # fmt: skip
    layout.show(
        f'<span class="sb-dim">{trial.PROMPTS} prompts from the indexed text, {trial.SEEDS} seeds, {trial.WRITTEN} tokens each: half a '
        "minute or a few, beside whatever else you do here.</span>"
    )


def _arguments(entry: Entry, store: FeatureStore, wanted: Trial) -> list[str]:
    """What measures, in a process of its own. Raises UserError for what would only fail there."""
    lm, dictionary = opening.lm(entry.run), opening.dictionary(entry)
    wanted.aim(lm, dictionary, store)
    for edit in wanted.made(lm, dictionary, store):
        check_edit(lm, edit)
    whole, _, part = entry.name.partition("@")
    model = entry.run.record["recipe"]["model"]
    paths = [str(entry.store_path), str(entry.run.path / "dictionaries" / whole)]
    return ["-m", "saebench.steering.trial", *paths, part, str(model["name"]), str(model["dtype"]), wanted.model_dump_json()]


@st.cache_resource(show_spinner=False, max_entries=32)
def _kept(path: str, at: opening.Stamp) -> Effects:
    return trial.kept(Path(path))


def _effects(effects: Effects, state: State) -> None:
    layout.plot(dose_figure(effects), key="doses")
    said = (
        "Strength counts as on the sliders, that of the strongest edit; the others keep their proportion to it."
        if len(state.rows) > 1
        else ""
    )
    layout.show(f'<p>{html.escape(reading(effects))}</p><span class="sb-dim">{OPEN} {said} {CHOSEN}</span>')
    rows = dose_table(effects)
    heads = list(rows[0])
    layout.table(heads, [[html.escape(value) for value in row.values()] for row in rows], numbers=range(1, len(heads)))
    st.download_button(
        "Figure, table and texts as one HTML file", lambda: _page(effects), "dose-response.html", "text/html",
        icon=":material/download:", on_click="ignore",
    )  # fmt: skip


def _page(effects: Effects) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        write_page(effects, path, "Dose-response")
        return path.read_text(encoding="utf-8")
