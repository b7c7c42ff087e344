"""Which latents are listed: what was typed and chosen on the Features page, which the Feature page goes along.

The choice stands in the query string: `find`, `token`, `rare` and `frequent` (powers of ten of the density), `strongest`, `dead`,
`starred`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import address
import numpy as np
import opening
import streamlit as st
from opening import Entry

from saebench.features.search import filter_latents, tokens_named
from saebench.features.store import FeatureStore

RAREST = -7.0
TOKENS = 500  # of the vocabulary that a text may stand for


@dataclass(frozen=True)
class Filters:
    find: str = ""
    """In the label; a number is a latent."""
    token: str = ""
    """The latent's strongest token is this one, or begins with it."""
    rare: float = RAREST
    frequent: float = 0.0
    strongest: float = 0.0
    """Its largest value is this at least."""
    dead: bool = False
    """Those that never fire too."""
    starred: bool = False
    """Bookmarked ones only."""


def chosen() -> Filters:
    """As the query string says, or as they were chosen last."""
    none = Filters()
    return Filters(
        address.peek("find"),
        address.peek("token"),
        _number("rare", none.rare),
        _number("frequent", none.frequent),
        _number("strongest", none.strongest),
        address.peek("dead") == "1",
        address.peek("starred") == "1",
    )


def _number(key: str, default: float) -> float:
    try:
        return float(address.peek(key, str(default)))
    except ValueError:
        return default


def widgets() -> Filters:
    """The widgets to choose by."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        address.widget(
            st.text_input, "find", "Search labels", "", placeholder="text, or a number", icon=":material/search:", width=240
        )
        address.widget(st.text_input, "token", "Strongest token", "", placeholder="such as def", width=150)
        _density()
        address.widget(st.number_input, "strongest", "Largest value from", 0.0, min_value=0.0, step=0.5, format="%.1f", width=150)
    return chosen()


def toggles() -> None:
    """The rest of them."""
    address.widget(st.toggle, "starred", "Bookmarked", False)
    address.widget(st.toggle, "dead", "Dead ones too", False)


def _density() -> None:
    low, high = _number("rare", RAREST), _number("frequent", 0.0)
    steps = [round(RAREST + i / 4, 2) for i in range(int(-RAREST * 4) + 1)]
    value = tuple(min(steps, key=lambda step: abs(step - end)) for end in sorted((low, high)))
    if st.session_state.get("w-density", value) != value:
        st.session_state["w-density"] = value

    def changed() -> None:
        first, last = st.session_state["w-density"]
        address.put("rare", first, RAREST)
        address.put("frequent", last, 0.0)

    st.select_slider("Fires on", steps, value, key="w-density", format_func=share, on_change=changed, width=260)


def share(power: float) -> str:
    """A power of ten as a share of tokens."""
    return "0%" if power <= RAREST else f"{float(f'{10.0 ** (power + 2):.2g}'):.6g}%"


def rows(entry: Entry, store: FeatureStore, filters: Filters) -> np.ndarray:
    """The latents that pass, ascending."""
    return _rows(entry.key, opening.beside(entry), filters, entry, store)


@st.cache_resource(show_spinner=False, max_entries=200)
def _rows(key: str, beside: object, filters: Filters, _entry: Entry, _store: FeatureStore) -> np.ndarray:
    ranges: dict[str, Any] = {}
    if filters.rare > RAREST or filters.frequent < 0:
        ranges["density"] = (10.0**filters.rare if filters.rare > RAREST else None, 10.0**filters.frequent * (1 + 1e-9))
    if filters.strongest > 0:
        ranges["max"] = (filters.strongest, None)
    token = tokens_named(_store, filters.token, TOKENS) if filters.token else None
    found = filter_latents(_store.latents, alive=not filters.dead, token=token, **ranges)
    if filters.find:
        found = found[_named(_entry, found, filters.find)]
    if filters.starred:
        found = found[np.isin(found, opening.notes(_entry).bookmarks())]
    return found


def _named(entry: Entry, latents: np.ndarray, text: str) -> np.ndarray:
    """Which of them have a label with these words, or this number."""
    number = [int(text)] if text.strip().isdecimal() else []
    return np.isin(latents, [*opening.labels(entry).search(text), *number])
