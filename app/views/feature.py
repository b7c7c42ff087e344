"""Feature: one latent with its evidence. What it fires on, what it does to the output, what it is near to."""

from __future__ import annotations

import shlex
from typing import Literal

import address
import circuit_files
import filtering
import layout
import numpy as np
import opening
import streamlit as st
from naming import link_chip, names
from opening import Entry
from views import feature_examples, feature_live

from saebench.features.labelling.labels import NEVER, NO_PATTERN, SELDOM
from saebench.features.store import Details, FeatureStore
from saebench.figures.feature_page import key_figures, label_line
from saebench.figures.features import activation_histogram, firing_by_position

CHIPS = 10  # of a kind that are shown at first
OF_ONE = ("on", "with", "count", "other", "look")  # what is chosen for one feature and means nothing for the next


def show() -> None:
    entry, store = layout.choose_store()
    listed = filtering.rows(entry, store, filtering.chosen())
    latent = _chosen(store, listed)
    address.belonging(f"{entry.key} {latent}", *OF_ONE)
    details = store.details(latent)
    _head(entry, store, latent, listed)
    layout.figures(key_figures(store, latent))
    if not details.histogram.sum():
        layout.empty("This latent never fires on the indexed text.")
    left, right = st.columns([1.75, 1], gap="large")
    with left:
        if details.histogram.sum():
            feature_examples.show(entry, store, latent, details)
        feature_live.test(entry, store, latent, details)
        feature_live.sources(entry, store, latent)
        _steering(entry, latent)
        circuit_files.show_containing(entry, latent)
    with right:
        _aside(entry, store, latent, details)


def _chosen(store: FeatureStore, listed: np.ndarray) -> int:
    """The latent to show, chosen by number in the sidebar or by a link."""
    first = int(listed[0]) if len(listed) else 0
    with st.sidebar:
        asked = address.get_number("feature", first)
        if not 0 <= asked < store.d_sae:
            layout.problem(f"There is no latent {asked}: they are 0 to {store.d_sae - 1:,}.")
            address.put("feature", first)
        return int(
            address.widget(
                st.number_input, "feature", "Latent", first, always=True, min_value=0, max_value=store.d_sae - 1, step=1
            )
        )


# --- the head ---


def _head(entry: Entry, store: FeatureStore, latent: int, listed: np.ndarray) -> None:
    label = opening.labels(entry).of(latent)
    said = label is not None and label.text not in (NO_PATTERN, SELDOM, NEVER)
    aside = label_line(label) if label is None or said else label.text
    title = label.text if label is not None and said else f"Feature {latent}"
    layout.title(title, f"{latent} in {entry.run.name} / {entry.name}; {aside}")
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        _step("Previous", "P", ":material/chevron_left:", listed[listed < latent][-1:])
        _step("Next", "N", ":material/chevron_right:", listed[listed > latent][:1])
        _bookmark(entry, latent)
        _own(entry, latent)
        _export(entry, store, latent)
        if len(listed) < store.d_sae:
            link = layout.a("listed", "features", run=entry.run.name, dictionary=entry.name)
            layout.show(f'<span class="sb-dim">among {len(listed):,} {link}</span>')


def _step(name: str, key: str, icon: str, to: np.ndarray) -> None:
    position: Literal["left", "right"] = "right" if name == "Next" else "left"
    if st.button(name, key=f"step-{name}", icon=icon, icon_position=position, shortcut=key, disabled=not len(to)):
        address.drop(*OF_ONE)
        address.put("feature", int(to[0]))
        address.rerun()


def _bookmark(entry: Entry, latent: int) -> None:
    notes = opening.notes(entry)
    starred = notes.of(latent).bookmark
    if st.button(
        "Bookmarked" if starred else "Bookmark", key="bookmark", icon=":material/star:" if starred else ":material/star_outline:"
    ):
        notes.change(latent, bookmark=not starred)
        address.rerun()


def _own(entry: Entry, latent: int) -> None:
    notes = opening.notes(entry)
    kept = notes.of(latent)
    with st.popover("Label and note", icon=":material/edit:"), st.form(f"own-{entry.name}-{latent}", border=False):
        label = st.text_input("Your label", kept.label, placeholder="what it stands for")
        note = st.text_area("Note", kept.note, height=120)
        if st.form_submit_button("Save", type="primary"):
            notes.change(latent, label=label, note=note)
            address.rerun()


def _export(entry: Entry, store: FeatureStore, latent: int) -> None:
    stem = f"{entry.run.name.replace('/', '-')}-{entry.name}-{latent}"
    with st.popover("Export", icon=":material/download:"):
        st.download_button(
            "This feature as one HTML file", lambda: feature_examples.page(entry, store, latent), f"{stem}.html", "text/html",
            on_click="ignore", width="stretch",
        )  # fmt: skip
        st.download_button(
            "Its examples as CSV", lambda: feature_examples.table(store, latent), f"{stem}.csv", "text/csv",
            on_click="ignore", width="stretch",
        )  # fmt: skip
        layout.show('<span class="sb-dim">Figures have a camera in their corner, which saves them as PNG.</span>')


# --- beside the contexts ---


def _aside(entry: Entry, store: FeatureStore, latent: int, details: Details) -> None:
    if details.histogram.sum():
        layout.heading("Activations", "firings by value")
        layout.plot(activation_histogram(details), key="activations")
    _logits(entry, store, details)
    if details.tokens:
        layout.heading("Tokens it fires on", "firings; a click shows them")
        total = sum(abs(value) for *_, value in details.tokens)
        _chips([
            layout.token_chip(
                store.token_strings[token], f"{count:,}", kind="down", shade=abs(value) / max(total, 1e-9),
                href=address.link("feature", run=entry.run.name, dictionary=entry.name, feature=latent, on=token),
            )
            for token, count, value in details.tokens
        ])  # fmt: skip
    _others(entry, "Writes nearly the same", [(other, f"cos {cosine:.2f}") for other, cosine in details.neighbours])
    _others(entry, "Fires together with", [(other, f"φ {phi:.2f}") for other, _, phi, _ in details.coactive])
    if not np.array_equal([other for other, _ in details.neighbours], [other for other, _ in details.read_neighbours]):
        _others(entry, "Reads nearly the same", [(other, f"cos {cosine:.2f}") for other, cosine in details.read_neighbours])
    if details.histogram.sum():
        layout.heading("Where in the context it fires")
        layout.plot(firing_by_position(details, store.position_edges(), store.num_contexts), key="positions")


def _logits(entry: Entry, store: FeatureStore, details: Details) -> None:
    for name, kind, pairs in (("Promoted tokens", "up", details.promoted), ("Suppressed tokens", "down", details.suppressed)):
        if pairs:
            largest = max(abs(figure) for _, figure in (*details.promoted, *details.suppressed))
            layout.heading(name, "logits per unit")
            _chips([
                layout.token_chip(store.token_strings[token], f"{figure:+.2f}", kind=kind, shade=abs(figure) / largest)
                for token, figure in pairs
            ])  # fmt: skip
    if not details.promoted and not details.suppressed:
        layout.heading("Promoted tokens")
        layout.show('<span class="sb-dim">What this dictionary writes does not go straight to the logits.</span>')


def _others(entry: Entry, name: str, pairs: list[tuple[int, str]]) -> None:
    if not pairs:
        return
    called = names(entry)
    layout.heading(name)
    _chips([layout.latent_chip(entry, other, aside, called(other)) for other, aside in pairs])


def _chips(chips: list[str]) -> None:
    more = (
        f"<details><summary>{len(chips) - CHIPS} more</summary>{''.join(chips[CHIPS:])}</details>" if len(chips) > CHIPS else ""
    )
    layout.show("".join(chips[:CHIPS]) + more)


def _steering(entry: Entry, latent: int) -> None:
    layout.heading("Steer with it", "add it while the model writes, and see the text with and without it")
    link = link_chip("Steer with it", "steering", run=entry.run.name, dictionary=entry.name, edits=latent)
    words = ["saebench", "steer", str(entry.run.path), "--dictionary", entry.name, "--feature", str(latent)]
    layout.show(f'{link} <span class="sb-dim">or in a terminal:</span>')
    st.code(shlex.join([*words, "--prompt", "Once upon a time"]), language="bash", wrap_lines=True)
