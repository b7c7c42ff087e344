"""What pages share: the sidebar's choice of run and dictionary, headings, boxes, chips, highlighted contexts.

Everything that is data (names, tokens, labels) goes through `html.escape` here or in `saebench.figures.tokens`, and never into Markdown.
"""

from __future__ import annotations

import html
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import address
import opening
import streamlit as st
from streamlit.runtime.scriptrunner import StopException

from saebench.errors import UserError
from saebench.features.store import FeatureStore
from saebench.figures.tokens import alone, html_context, html_example

HERE = Path(__file__).parent


@cache
def _page_script() -> Any:
    from streamlit.components.v2 import component

    return component("saebench_page", js=(HERE / "page.js").read_text(encoding="utf-8"), isolate_styles=False)


def begin(pages: Mapping[str, Any], page: str) -> None:
    """At the start of every page: the style, what the query string says, and the script that follows links and shows tooltips."""
    st.html(HERE / "style.css")
    address.begin(pages, page)
    with st.container(key="hook"):
        _page_script()(key="page")
    opening.check_given()


@contextmanager
def guarded() -> Iterator[None]:
    """Around a page, and around the body of every fragment: what goes wrong is told in a sentence, and the query string is brought up to
    date, unless the page was left before it was whole."""
    try:
        yield
    except UserError as error:
        problem(str(error))
    except StopException:
        address.flush()
        raise
    except Exception as error:  # the terminal has the rest
        traceback.print_exc()
        problem(f"This page stopped at an error ({type(error).__name__}: {error}).", "The terminal of the browser shows where.")
    address.flush()


# --- text ---


def show(body: str, where: Any = st) -> None:
    """HTML in the page's own style. Whatever is data in it must be escaped."""
    where.html(f'<div class="sb">{body}</div>')


def title(text: str, aside: str = "") -> None:
    """The heading of a page, and what stands small beside it; both plain text."""
    show(f'<div class="sb-title"><h1>{html.escape(text)}</h1><span>{html.escape(aside)}</span></div>')


def heading(text: str, aside: str = "", where: Any = st) -> None:
    """A heading within a page; plain text."""
    small = f"<small>{html.escape(aside)}</small>" if aside else ""
    show(f'<div class="sb-head">{html.escape(text)}{small}</div>', where)


def problem(text: str, todo: str = "") -> None:
    """A box that says what is wrong and what to do; plain text, with commands in backticks."""
    show(f'<div class="sb-problem" role="alert">{_with_commands(text)} {_with_commands(todo)}</div>')


def note(text: str) -> None:
    """A box with something to know."""
    show(f'<div class="sb-note">{_with_commands(text)}</div>')


def empty(text: str) -> None:
    """Says that there is nothing, and why, where something would stand."""
    show(f'<div class="sb-empty sb-dim">{_with_commands(text)}</div>')


def _with_commands(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def figures(items: Iterable[tuple[str, str]]) -> None:
    """Key figures in a row: (name, value)."""
    boxes = (
        f'<div class="sb-figure"><small>{html.escape(name)}</small><b>{html.escape(value)}</b></div>' for name, value in items
    )
    show(f'<div class="sb-figures">{"".join(boxes)}</div>')


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> None:
    """A small table; the heads are plain text, the cells HTML. `numbers` are the columns that are set flush right."""
    right = set(numbers)
    style = [' class="num"' if i in right else "" for i in range(len(head))]
    top = "".join(f"<th{s}>{html.escape(name)}</th>" for s, name in zip(style, head, strict=True))
    body = "".join("<tr>" + "".join(f"<td{s}>{cell}</td>" for s, cell in zip(style, row, strict=True)) + "</tr>" for row in rows)
    show(f'<div class="sb-scroll"><table class="sb-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def a(text: str, page: str, **params: Any) -> str:
    """A link to a page as HTML; the text is plain."""
    return f'<a data-go href="{html.escape(address.link(page, **params))}">{html.escape(text)}</a>'


def plot(figure: Any, key: str, *, select: bool = False) -> list[dict[str, Any]]:
    """A figure of `saebench.figures`; with `select` the points that were clicked."""
    bar = {"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.6)", "activecolor": "rgba(128,128,128,1)"}
    figure.update_layout(font_family='"Source Sans", system-ui, sans-serif', modebar=bar)
    image = {"filename": key, "format": "png", "scale": 2}
    config = {
        "displaylogo": False,
        "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"],
        "toImageButtonOptions": image,
    }
    if not select:
        st.plotly_chart(figure, theme=None, key=key, config=config)
        return []
    event = st.plotly_chart(figure, theme=None, key=key, config=config, on_select="rerun", selection_mode="points")
    return event["selection"]["points"]


# --- chips ---


def latent_chip(entry: opening.Entry, latent: int, aside: str = "", text: str = "") -> str:
    """A latent that links to its page, as HTML: number, text (such as its label), aside (such as a figure)."""
    href = html.escape(address.link("feature", run=entry.run.name, dictionary=entry.name, feature=latent))
    label = f"<span>{html.escape(text)}</span>" if text else ""
    small = f"<small>{html.escape(aside)}</small>" if aside else ""
    return f'<a class="sb-chip" data-go href="{href}" title="{html.escape(text)}"><b>{latent}</b>{label}{small}</a>'


def token_chip(text: str, aside: str = "", *, href: str = "", shade: float = 0.0, kind: str = "") -> str:
    """A token, its white space visible, as HTML; `kind` is "up" or "down" with a shade from 0 to 1, `href` where it links to."""
    small = f"<small>{html.escape(aside)}</small>" if aside else ""
    style = f' style="--a:{shade:.2f}"' if kind else ""
    classes = f"sb-chip sb-{kind}" if kind else "sb-chip"
    inside = f'<span class="sb-token">{html.escape(alone(text))}</span>{small}'
    return (
        f'<a class="{classes}" data-go href="{html.escape(href)}"{style}>{inside}</a>'
        if href
        else f'<span class="{classes}"{style}>{inside}</span>'
    )


# --- contexts ---


def contexts(
    examples: Iterable[Any], strongest: float, store: FeatureStore, where: Any = st, whole: Callable[[Any], str] | None = None
) -> None:
    """Highlighted contexts, one below the other: the value at the firing, the text, the document. `examples` are
    `saebench.features.examples.Example`; shades are relative to `strongest`; `whole` gives where the whole context of one is shown."""
    rows = []
    for example in examples:
        line = html_example(example, strongest, store)
        value, document = f"{example.values[example.focus]:.2f}", html.escape(example.document)
        link = "" if whole is None else f' <a data-go href="{html.escape(whole(example))}">context {example.context}</a>'
        rows.append(
            f'<div class="sb-row" data-d="{document}"><b>{value}</b><div>{line}<br><small>{document}{link}</small></div></div>'
        )
    show(f'<div class="sb-rows">{"".join(rows)}</div>', where)


def text_block(
    ids: Sequence[int],
    values: Sequence[float],
    strongest: float,
    text_of: Any,
    *,
    first: int = 0,
    focus: int | None = None,
    name: str = "activation",
    where: Any = st,
) -> None:
    """One stretch of text with a figure for each token, such as a prompt; `name` says what the figures are."""
    line = html_context(ids, values, strongest, text_of, first=first, focus=focus)
    show(f'<div data-n="{html.escape(name)}">{line}</div>', where)


def shade_key(strongest: float) -> None:
    """What the shades mean."""
    show(f'<span class="sb-key">0 <i></i> {strongest:.3g}</span>')


# --- what is looked at ---


def problems() -> None:
    """Name every run that cannot be opened."""
    for run in opening.runs().values():
        if run.problem:
            problem(f"{run.name} cannot be opened: {run.problem}")


def choose(*, where: Any = None, suffix: str = "", label: str = "") -> opening.Entry:
    """The run and the dictionary to look at, chosen in the sidebar; `suffix` for a second choice (`run2`, `dictionary2`) beside the first.

    Ends the page with a sentence where there is nothing to choose."""
    where = where or st.sidebar
    runs = {name: run for name, run in opening.runs().items() if run.entries}
    if not runs:
        problems()
        stop("None of the runs has a dictionary yet: `saebench train` makes one.")
    asked = address.peek(f"run{suffix}")
    if asked and asked not in runs:
        problem(f"There is no run {asked} here that could be shown: the browser was started with {', '.join(opening.runs())}.")
    with where:
        name = address.widget(st.selectbox, f"run{suffix}", f"{label}Run", next(iter(runs)), always=True, options=list(runs))
        entries = runs[name].entries
        first = next((entry for entry in entries.values() if entry.indexed), next(iter(entries.values())))
        chosen = address.widget(
            st.selectbox, f"dictionary{suffix}", f"{label}Dictionary", first.name, always=True, options=list(entries)
        )
    return entries[chosen]


def choose_store(**options: Any) -> tuple[opening.Entry, FeatureStore]:
    """As `choose`, with the feature store opened; ends the page with what to do where there is none, or a damaged one."""
    entry = choose(**options)
    try:
        store = opening.store(entry)
    except UserError as error:
        problem(str(error))
        st.stop()
    opening.read_ahead(entry)
    return entry, store


def stop(text: str) -> NoReturn:
    """End the page with a sentence."""
    empty(text)
    st.stop()
    raise AssertionError
