"""Steering: features turned up or down while the model writes, beside what it writes untouched, and what that costs.

All that is set stands in the query string (`steering_state.py`), so an address shows the same to others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import address
import layout
import opening
import steering_doses
import steering_presets
import steering_state
import steering_text
import streamlit as st
from naming import link_chip, names
from opening import Entry
from steering_state import Row, State

from saebench.features.search import filter_latents, tokens_named
from saebench.features.store import FeatureStore
from saebench.steering.edits import NEED_VALUE
from saebench.steering.positions import Positions

HOWS = {"add": "Add", "scale": "Scale", "clamp": "Clamp", "ablate": "Ablate"}
MEANT = (
    "Add: its direction is added; a strength of 1 is a tenth of the mean length of the activations there. Scale: its activation is "
    "multiplied by the value. Clamp: its activation is set to the value. Ablate: it is set to zero. Of these three the strength is the "
    "share of the change that is made: 1 is all of it, 0 none."
)
PLACES = {
    "all": "everywhere", "prompt": "in the prompt", "generated": "in what is written", "last": "on the last token",
    "span": "from position to position", "after": "behind a token",
}  # fmt: skip
BEGINNING = {"span": "1-9", "after": "after:,"}  # what these are before anything is typed
FOUND, TOKENS, STARRED = 12, 40, 8
COLUMNS = (2.7, 1.4, 2.8, 2.2, 1.3)


def show() -> None:
    entry, store = layout.choose_store()
    layout.title("Steering", f"{entry.run.name} / {entry.name}")
    state, wrong = steering_state.read(entry, store)
    for text in wrong:
        layout.problem(text)
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute"):
        find = address.widget(
            st.text_input, "add", "Add a feature", "", placeholder="its number, or words of its label", icon=":material/search:",
            width=340,
        )  # fmt: skip
        steering_presets.menu(entry, store, state)
    _search(entry, store, state, find.strip())
    if not state.rows:
        layout.empty(
            "Choose a feature: type its number or a word of its label above, or follow “Steer with it” on a feature's own page."
        )
        _bookmarked(entry)
        return
    _rows(entry, store, state)
    steering_text.prompt(store)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        _where(state.where)
        asked = steering_text.settings()
    steering_text.show(entry, store, state, asked)
    steering_presets.terminal(entry, state, asked)
    steering_doses.show(entry, store, state)


# --- which features ---


def _search(entry: Entry, store: FeatureStore, state: State, text: str) -> None:
    """Features that a text stands for, as chips that add them; a number adds its feature at once."""
    if not text:
        return
    if text.isdecimal():
        latent = int(text[:9])
        if latent >= store.d_sae:
            layout.problem(f"There is no feature {latent}: they are 0 to {store.d_sae - 1:,}.")
            return
        if not _has(state, latent):
            steering_state.put((*state.rows, Row.new((latent,), "add", store)))
        address.drop("add")
        address.rerun()
    labelled = opening.labels(entry).search(text)[:FOUND]
    by_token = filter_latents(store.latents, token=tokens_named(store, text, TOKENS)).tolist()
    found = [latent for latent in dict.fromkeys([*labelled, *by_token]) if not _has(state, latent)][:FOUND]
    if not found:
        layout.empty("No other feature has that in its label, or fires on such a token most.")
        return
    name = names(entry)
    chips = [link_chip(str(latent), "steering", name(latent), title="add it", **_with(state, latent, store)) for latent in found]
    layout.show(f'<div class="sb-chips">{"".join(chips)}</div>')


def _bookmarked(entry: Entry) -> None:
    starred = opening.notes(entry).bookmarks()[:STARRED]
    if starred:
        name = names(entry)
        layout.heading("Or one that you bookmarked")
        layout.show(
            f'<div class="sb-chips">{"".join(link_chip(str(i), "steering", name(i), edits=i, add="") for i in starred)}</div>'
        )


def _has(state: State, latent: int) -> bool:
    return any(row.latents == (latent,) for row in state.rows)


def _with(state: State, latent: int, store: FeatureStore) -> dict[str, str]:
    return {"edits": steering_state.text_of((*state.rows, Row.new((latent,), "add", store))), "add": ""}


# --- what is done with them ---


def _rows(entry: Entry, store: FeatureStore, state: State) -> None:
    name = names(entry)
    for number, row in enumerate(state.rows):
        first, how, strength, value, remove = st.columns(COLUMNS, vertical_alignment="bottom", gap="medium")
        with first:
            chips = "".join(layout.latent_chip(entry, latent, text=name(latent)) for latent in row.latents)
            layout.show(f'<div class="sb-steered">{chips}</div>')
        with how:
            kinds = list(dict.fromkeys([*HOWS, row.how]))
            _how(store, state, number, kinds)
        with strength:
            least, most, step = (-10.0, 10.0, 0.25) if row.how == "add" else (0.0, 2.0, 0.05)
            ends = {"min_value": min(least, row.strength), "max_value": max(most, row.strength), "step": step}
            _part(st.slider, "Strength", state, number, "strength", **ends)
        with value:
            if row.how in NEED_VALUE:
                _value(store, state, number)
        with remove:
            rows = state.rows[:number] + state.rows[number + 1 :]
            st.button(
                "Remove",
                key=f"remove-{number}",
                icon=":material/close:",
                type="tertiary",
                on_click=steering_state.put,
                args=(rows,),
            )


def _part(make: Callable[..., Any], label: str, state: State, number: int, field: str, **more: Any) -> None:
    """A widget of one field of a row."""
    row, key = state.rows[number], f"row-{number}-{field}"
    st.session_state[key] = getattr(row, field)

    def changed() -> None:
        _replace(state, number, replace(row, **{field: st.session_state[key]}))

    make(label, key=key, on_change=changed, **more)


def _replace(state: State, number: int, row: Row) -> None:
    steering_state.put((*state.rows[:number], row, *state.rows[number + 1 :]))


def _how(store: FeatureStore, state: State, number: int, kinds: list[str]) -> None:
    row, key = state.rows[number], f"row-{number}-how"
    st.session_state[key] = row.how

    def changed() -> None:
        _replace(state, number, Row.new(row.latents, st.session_state[key], store))

    st.selectbox(
        "What is done",
        kinds,
        key=key,
        on_change=changed,
        format_func=lambda how: HOWS.get(how, how),
        help=MEANT if not number else None,
    )


def _value(store: FeatureStore, state: State, number: int) -> None:
    row = state.rows[number]
    assert row.value is not None
    if row.how == "clamp":
        label, high = "Activation", max(steering_state.largest(store, row.latents), row.value)
    else:
        label, high = {"scale": "Times"}.get(row.how, "Projection"), max(10.0, row.value)
    low = min(0.0, row.value)
    if high - low < 1e-6:  # of a feature that never fires
        _part(st.number_input, label, state, number, "value")
    else:
        _part(st.slider, label, state, number, "value", min_value=low, max_value=high, step=float(f"{(high - low) / 100:.1g}"))


# --- where they act ---


def _where(where: str) -> None:
    """What the positions are, in one, two or three widgets."""
    positions = Positions.parse(where)
    _choice("Where it acts", "kind", positions.kind, lambda kind: BEGINNING.get(kind, kind), st.selectbox, options=list(PLACES),
            format_func=PLACES.__getitem__, width=200)  # fmt: skip
    if positions.kind == "span":
        first, end = positions.first, positions.end
        _choice(
            "First position",
            "first",
            first,
            lambda new: f"{new}-{max(end, new + 1)}",
            st.number_input,
            min_value=0,
            step=1,
            width=130,
        )
        _choice(
            "First one behind",
            "end",
            end,
            lambda new: f"{min(first, new - 1)}-{new}",
            st.number_input,
            min_value=1,
            step=1,
            width=130,
        )
    elif positions.kind == "after":
        _choice("Token", "token", positions.token, lambda new: f"after:{new}" if new else "all", st.text_input, width=130)


def _choice(label: str, name: str, value: Any, said: Callable[[Any], str], make: Callable[..., Any], **more: Any) -> None:
    """A widget of a part of the positions; `said` makes them of what it is set to."""
    key = f"where-{name}"
    st.session_state[key] = value
    make(label, key=key, on_change=lambda: address.put("where", said(st.session_state[key]), "all"), **more)
