"""What is shown, as the query string says it: every link can be shared and opened again.

A key that stands in the query string counts; else what this visitor chose last on any page; else the default. Keys of the default value
are left out of the query string.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

import streamlit as st

KEPT, PENDING, PAGES, PAGE = "kept", "pending", "pages", "page"


def begin(pages: Mapping[str, Any], page: str) -> None:
    """At the start of every run of the script: take over what the query string says, unless a widget has just said otherwise."""
    if st.session_state.get(PAGE) != page:
        _pending().clear()  # of a page that was left before it was whole
    st.session_state.update({PAGES: pages, PAGE: page})
    _kept().update({key: value for key, value in st.query_params.to_dict().items() if key not in _pending()})


def flush() -> None:
    """At the end of every run: bring the query string up to date, at once, so that the browser's Back leads to what was seen before."""
    wanted = {key: value for key, value in {**st.query_params.to_dict(), **_pending()}.items() if value is not None}
    _pending().clear()
    st.query_params.from_dict(wanted)


def _kept() -> dict[str, str]:
    return st.session_state.setdefault(KEPT, {})


def _pending() -> dict[str, str | None]:
    return st.session_state.setdefault(PENDING, {})


def get(key: str, default: str = "") -> str:
    """What is chosen for a key. Puts it into the query string of this page, unless it is the default."""
    value = _kept().get(key, default)
    _write(key, value, default)
    return value


def peek(key: str, default: str = "") -> str:
    """As `get`, leaving the query string of this page as it is."""
    return _kept().get(key, default)


def get_number(key: str, default: int | float | None = None) -> Any:
    """As `get` for a number of the type of the default (int for None); the default where what stands there is none."""
    kind = float if isinstance(default, float) else int
    try:
        value = kind(_kept()[key])
    except (KeyError, ValueError):
        return default
    _write(key, f"{value}", f"{default}")
    return value


def drop(*keys: str) -> None:
    """Forget what was chosen for some keys."""
    for key in keys:
        _kept().pop(key, None)
        _pending()[key] = None


def belonging(to: str, *keys: str) -> None:
    """Say what some keys belong to: once that is another thing, what was chosen for them is forgotten, unless the query string names it."""
    if st.session_state.get("belonging") != to:
        for key in keys:
            if key not in st.query_params:
                _kept().pop(key, None)
        st.session_state["belonging"] = to


def put(key: str, value: Any, default: Any = None) -> None:
    """Choose a value for a key: it stands in the query string unless it is the default."""
    _kept()[key] = str(value)
    _write(key, str(value), None if default is None else str(int(default) if isinstance(default, bool) else default))


def _write(key: str, value: str, default: str | None) -> None:
    _pending()[key] = None if value == default else value


def widget(make: Callable[..., Any], key: str, label: str, default: Any, *, always: bool = False, **more: Any) -> Any:
    """A Streamlit widget whose value lives in the query string under `key`: `widget(st.text_input, "find", "Search", "")`.

    The value is read as the type of the default: str, bool, int, float. For a widget with `options` the value is one of them; another one
    that a link names counts as the default. With `always` the query string names the default too.
    """
    name = f"w-{key}"
    silent = None if always else default
    if "options" in more:
        known = {str(option): option for option in more["options"]}
        value = known.get(_kept().get(key, str(default)), default)
        put(key, value, silent)
    elif isinstance(default, bool):
        value = get(key, "1" if default else "0") == "1"
    elif isinstance(default, int | float):
        value = get_number(key, default)
        value = max(value, more.get("min_value", value))
        value = min(value, more.get("max_value", value))
    else:
        value = get(key, default)
    if always:
        put(key, value)
    st.session_state[name] = value

    def changed() -> None:
        chosen = st.session_state[name]
        if chosen is None:
            chosen = default
        if isinstance(default, bool):
            chosen = int(chosen)
        put(key, chosen, silent)

    return make(label, key=name, on_change=changed, **more)


def link(page: str, **params: Any) -> str:
    """The address of a page, to be used in `<a data-go href="...">` (escaped by `html.escape`); None leaves a key out."""
    given = {key: value for key, value in params.items() if value is not None}
    return f"{page}?{urlencode(given)}" if given else page


def go(page: str, **params: Any) -> None:
    """Show another page at once."""
    given = {key: str(value) for key, value in params.items() if value is not None}
    _kept().update(given)
    _pending().clear()
    st.switch_page(st.session_state[PAGES][page], query_params=given)


def rerun() -> None:
    """Run the page again with what was `put` just now, which a plain `st.rerun` would not see."""
    flush()
    st.rerun()
