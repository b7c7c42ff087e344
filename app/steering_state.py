"""What is set on the Steering page, as data, in the query string, as a preset and as a command.

`edits` is LATENTS_HOW_STRENGTH_VALUE for every row, the rows joined by `~`: `12_add_4~3.7_clamp_1_2.5`; what is missing has its default.
`where` are positions in their form as text; `length`, where it stands, is what a strength of 1 adds, as a preset brings it (`unit` is
the Corpus page's).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import address
import opening
import streamlit as st
from opening import Entry

from saebench.errors import UserError
from saebench.features.store import FeatureStore
from saebench.steering.edits import NEED_VALUE, Edit, How
from saebench.steering.positions import Positions
from saebench.steering.presets import Preset, Setting, presets

EDITS, WHERE, UNIT, OF = "edits", "where", "length", "steered"
STRENGTH, FACTOR = 4.0, 2.0
MOST = 24  # rows
ROW = re.compile(r"(\d{1,9}(?:\.\d{1,9})*)(?:_([a-z]+))?(?:_([^_]+))?(?:_([^_]+))?")


@dataclass(frozen=True)
class Row:
    """What is done to one feature, or to several at once."""

    latents: tuple[int, ...]
    how: str = "add"
    strength: float = STRENGTH
    value: float | None = None

    @classmethod
    def new(cls, latents: tuple[int, ...], how: str, store: FeatureStore) -> Row:
        """With the defaults of a primitive: a latent is clamped to its largest activation."""
        value = {"scale": FACTOR, "clamp": largest(store, latents)}.get(how, 0.0) if how in NEED_VALUE else None
        return cls(latents, how, STRENGTH if how == "add" else 1.0, value)

    @classmethod
    def parse(cls, text: str, store: FeatureStore) -> Row:
        """Raises UserError for what is no row."""
        found = ROW.fullmatch(text)
        if found is None:
            raise UserError(f"{text!r} is no edit: in an address they are such as 12, or 12_clamp_1_2.5")
        latents, how = tuple(map(int, found[1].split("."))), found[2] or "add"
        if how not in get_args(How):
            raise UserError(f"{text!r}: unknown primitive {how!r}: use one of {', '.join(get_args(How))}")
        if wrong := next((latent for latent in latents if latent >= store.d_sae), None):
            raise UserError(f"there is no feature {wrong}: they are 0 to {store.d_sae - 1:,}")
        row = cls.new(latents, how, store)
        if found[3]:
            row = replace(row, strength=_number(found[3], text))
        return replace(row, value=_number(found[4], text)) if found[4] else row

    def __str__(self) -> str:
        value = "" if self.value is None else f"_{plain(self.value)}"
        return f"{'.'.join(map(str, self.latents))}_{self.how}_{plain(self.strength)}{value}"


def plain(value: float) -> str:
    """A number in the shortest form that is read as the same."""
    short = f"{value:.6g}"
    return short if float(short) == value else repr(value)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where!r}: {text!r} is no number") from None
    if not math.isfinite(value):
        raise UserError(f"{where!r}: {text!r} is not finite")
    return value


def largest(store: FeatureStore, latents: Iterable[int]) -> float:
    """The largest activation of some latents in the indexed text."""
    return max(float(store.latents["max"][latent].as_py() or 0.0) for latent in latents)


@dataclass(frozen=True)
class State:
    """Which edits are set, and where they act."""

    dictionary: str
    rows: tuple[Row, ...] = ()
    where: str = "all"
    unit: float | None = None
    """What a strength of 1 adds; None for what the page measures itself."""

    def settings(self, unit: float) -> tuple[Setting, ...]:
        """As a preset keeps them; `unit` counts where the state has none of its own."""
        own = unit if self.unit is None else self.unit
        return tuple(
            Setting(
                dictionary=self.dictionary, latents=row.latents, how=row.how, strength=row.strength,
                value=row.value, unit=own if row.how == "add" else 1.0, positions=self.where,
            )
            for row in self.rows
        )  # fmt: skip

    @classmethod
    def of(cls, preset: Preset) -> State:
        """Raises UserError for what a preset may hold and the page has no place for."""
        dictionaries, where = ({getattr(edit, field) for edit in preset.edits} for field in ("dictionary", "positions"))
        units = {edit.unit for edit in preset.edits if edit.how == "add"}
        plain = all(edit.keep_error and not edit.weights for edit in preset.edits)
        if not plain or len(dictionaries) > 1 or len(where) > 1 or len(units) > 1:
            raise UserError(
                f"preset {preset.name!r} has weights, several dictionaries or positions, or takes out the error, which this page does not "
                f"show: `saebench steer RUN --preset {shlex.quote(preset.name)} --prompt ...` writes with it"
            )
        rows = tuple(Row(edit.latents, edit.how, edit.strength, edit.value) for edit in preset.edits)
        return cls(dictionaries.pop(), rows, where.pop(), units.pop() if units else None)


# --- the query string ---


def read(entry: Entry, store: FeatureStore) -> tuple[State, list[str]]:
    """What the query string says, and what of it is wrong, which is left out."""
    _forget_other(entry)
    rows, wrong = [], []
    asked = [part for part in address.get(EDITS).split("~") if part]
    for part in asked[:MOST]:
        try:
            row = Row.parse(part, store)
            State(entry.name, (row,)).settings(1.0)[0].edit({entry.name: opening.dictionary(entry)})
            rows.append(row)
        except UserError as error:
            wrong.append(str(error))
    if len(asked) > MOST:
        wrong.append(f"{len(asked)} edits are too many for a page: the first {MOST} are shown")
    where = address.get(WHERE, "all")
    try:
        Positions.parse(where)
    except UserError as error:
        wrong.append(str(error))
        where = "all"
    unit = None
    if address.get(UNIT):
        try:
            unit = _number(address.peek(UNIT), f"{UNIT}={address.peek(UNIT)}")
        except UserError as error:
            wrong.append(str(error))
    return State(entry.name, tuple(rows), where, unit), wrong


def _forget_other(entry: Entry) -> None:
    """Features of another dictionary mean nothing here: they are forgotten, unless the address names them together with this one."""
    query, of = st.query_params, _of(entry.run.path, entry.name)
    stand = query.get("run", entry.run.name) == entry.run.name and query.get("dictionary", entry.name) == entry.name
    if st.session_state.get(OF, of) != of and not (EDITS in query and stand):
        address.drop(EDITS, UNIT)
    st.session_state[OF] = of


def _of(run: Path, dictionary: str) -> str:
    return f"{run}/{dictionary}"


def text_of(rows: Iterable[Row]) -> str:
    """Rows as `edits` says them."""
    return "~".join(map(str, rows))


def put(rows: Iterable[Row]) -> None:
    address.put(EDITS, text_of(rows), "")


def put_all(entry: Entry, state: State) -> None:
    """Show edits that were kept in the run of a dictionary."""
    st.session_state[OF] = _of(entry.run.path, state.dictionary)
    put(state.rows)
    address.put(WHERE, state.where, "all")
    if state.unit is None:
        address.drop(UNIT)
    else:
        address.put(UNIT, plain(state.unit))
    address.put("dictionary", state.dictionary)


# --- the model, presets, the terminal ---


def made(entry: Entry, settings: Iterable[Setting]) -> list[Edit]:
    dictionary = opening.dictionary(entry)
    return [setting.edit({entry.name: dictionary}) for setting in settings]


def preset_like(entry: Entry, state: State) -> str | None:
    """The name of a preset that says the same, if there is one."""
    for name, path in presets(entry.run.path).items():
        try:
            found = State.of(Preset.open(path))
        except UserError:
            continue
        if found == replace(state, unit=state.unit if found.unit is not None else None):
            return name
    return None


def command(entry: Entry, state: State, prompt: str, *options: str) -> str | None:
    """The same in the terminal; None where only a preset could say it."""
    words = ["saebench", "steer", str(entry.run.path)]
    if (name := preset_like(entry, state)) is not None:
        words += ["--preset", name]
    elif len(state.rows) == 1:
        (row,) = state.rows
        words += ["--dictionary", entry.name]
        words += [word for latent in row.latents for word in ("--feature", str(latent))]
        words += ["--how", row.how] if row.how != "add" else []
        words += [f"--strength={plain(row.strength)}"]
        words += [f"--value={plain(row.value)}"] if row.value is not None else []
        words += [f"--positions={state.where}"] if state.where != "all" else []
    else:
        return None
    return shlex.join([*words, f"--prompt={prompt or 'Once upon a time'}", *options])
