"""Edits kept under a name in their run, as a file to download, and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import address
import layout
import opening
import steering_state
import steering_text
import streamlit as st
from opening import Entry
from steering_state import State
from steering_text import Asked, telling

from saebench.errors import UserError
from saebench.features.store import FeatureStore
from saebench.steering.presets import Preset, preset_path, presets

SAID = "preset-said"


def menu(entry: Entry, store: FeatureStore, state: State) -> None:
    """Save, open, remove and download."""
    with st.popover("Presets", icon=":material/bookmarks:"):
        if problem := st.session_state.pop(SAID, ""):
            layout.problem(problem)
        known = presets(entry.run.path)
        if state.rows:
            _save(entry, store, state, known)
        if known:
            _open(entry, known)
        elif not state.rows:
            layout.empty("No preset is kept in this run yet.")


def _save(entry: Entry, store: FeatureStore, state: State, known: dict[str, Path]) -> None:
    name = st.text_input("Save these edits as", key="preset-name", placeholder="a name", max_chars=80)
    if st.button("Save", key="preset-save", type="primary"):
        with telling():
            if not name:
                raise UserError("the preset has no name: type one")
            if preset_path(entry.run.path, name).exists():
                raise UserError(f"there is a preset {name!r} already: choose another name, or delete it first")
            preset = _preset(entry, store, state, name)
            preset.save(entry.run.path)
            steering_state.put_all(entry, State.of(preset))
            address.rerun()
    st.download_button(
        "Download as JSON", lambda: _json(entry, store, state, name), f"{name or 'preset'}.json", "application/json",
        icon=":material/download:", on_click="ignore",
    )  # fmt: skip


def _open(entry: Entry, known: dict[str, Path]) -> None:
    chosen = st.selectbox("Kept in this run", list(known), key="preset-chosen")
    with st.container(horizontal=True):
        st.button("Open", key="preset-open", on_click=_load, args=(entry, chosen))
        with st.popover("Delete", icon=":material/delete:"):
            st.button("Delete it for good", key="preset-delete", on_click=_delete, args=(entry, chosen))


def _preset(entry: Entry, store: FeatureStore, state: State, name: str) -> Preset:
    lm = opening.lm(entry.run)
    edits = state.settings(steering_text.unit(entry, store))
    return Preset(name=name, edits=edits, model=lm.fingerprint, prompt=address.peek("prompt"))


def _json(entry: Entry, store: FeatureStore, state: State, name: str) -> str:
    return json.dumps(_preset(entry, store, state, name or "preset").model_dump(mode="json"), indent=2) + "\n"


def _load(entry: Entry, name: str) -> None:
    try:
        preset = Preset.open(presets(entry.run.path)[name])
        state = State.of(preset)
        if state.dictionary not in entry.run.entries:
            raise UserError(f"preset {name!r} is of dictionary {state.dictionary!r}, which this run does not have")
    except (UserError, OSError, KeyError) as error:
        st.session_state[SAID] = str(error)
        return
    steering_state.put_all(entry, state)
    if preset.prompt:
        address.put("prompt", preset.prompt, "")


def _delete(entry: Entry, name: str) -> None:
    try:
        presets(entry.run.path)[name].unlink()
    except (OSError, KeyError) as error:
        st.session_state[SAID] = f"{name} cannot be deleted: {error}"


def terminal(entry: Entry, state: State, asked: Asked) -> None:
    """The same in the terminal, to be copied."""
    with st.expander("The same in the terminal", icon=":material/terminal:"):
        command = steering_state.command(entry, state, asked.prompt, *asked.options())
        if command is None:
            layout.empty("The terminal takes several edits as a preset: save them above, and the command stands here.")
            return
        st.code(command, language="bash", wrap_lines=True)
        if "--preset" not in command and any(row.how == "add" for row in state.rows):
            layout.show(
                '<span class="sb-dim">Its unit of strength is measured on held-out text, so it may differ by a little; '
                "a preset keeps the unit.</span>"
            )
