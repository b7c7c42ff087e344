"""Highlighted contexts: the same feature shown in a terminal and as HTML. Token text is data and always escaped."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence

from rich.text import Text

from saebench.features import Example, Feature, FeatureStore

STRONG = (213, 94, 0)  # vermilion of Okabe and Ito's palette


def visible(token: str) -> str:
    """A token with its white space made visible where it would get lost: line ends, tabs, and control characters."""
    if not token.strip(" "):
        return "·" * len(token)
    return "".join(_SHOWN.get(c, c if c.isprintable() or c == " " else "�") for c in token)


_SHOWN = {"\n": "↵", "\t": "→", "\r": "␍"}


def alone(token: str) -> str:
    """A token that stands by itself: as `visible`, with the spaces at its ends as dots."""
    text = visible(token)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    return "·" * before + inner + "·" * (len(text) - before - len(inner))


def shades(example: Example, strongest: float) -> Iterator[tuple[int, float, float]]:
    """(token id, value, shade from 0 to 1) of every token of an example."""
    for token, value in zip(example.ids, example.values, strict=True):
        yield token, value, min(1.0, value / strongest) if strongest > 0 else 0.0


def terminal_line(example: Example, strongest: float, text_of: Callable[[int], str]) -> Text:
    """One line of coloured tokens for a terminal."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for number, (token, value, shade) in enumerate(shades(example, strongest)):
        style = ""
        if value > 0:
            red, green, blue = (round(255 + (c - 255) * (0.25 + 0.75 * shade)) for c in STRONG)
            style = f"black on rgb({red},{green},{blue})" + (" bold underline" if number == example.focus else "")
        line.append(visible(text_of(token)), style=style)
    return line


def html_line(example: Example, strongest: float, text_of: Callable[[int], str]) -> str:
    """One line of coloured tokens as HTML; hovering shows token and value."""
    parts = []
    for number, (token, value, shade) in enumerate(shades(example, strongest)):
        text = html.escape(visible(text_of(token)))
        if value > 0:
            focus = " class=focus" if number == example.focus else ""
            colour = f"rgba({STRONG[0]},{STRONG[1]},{STRONG[2]},{0.15 + 0.75 * shade:.2f})"
            text = f'<span{focus} style="background:{colour}" title="{value:.3f}">{text}</span>'
        parts.append(text)
    return "".join(parts)


def headline(feature: Feature, text_of: Callable[[int], str]) -> str:
    """The tokens a feature fires on, in one line."""
    return "   ".join(f"{visible(text_of(token))!r} {share:.0%}" for token, share in feature.top_tokens[:4])


def html_context(
    ids: Sequence[int],
    values: Sequence[float],
    strongest: float,
    text_of: Callable[[int], str],
    *,
    focus: int | None = None,
    first: int | None = None,
) -> str:
    """Tokens as they follow each other, as HTML. Each firing is an `<i>` with its shade `--a` from 0 to 1, its value `data-v` and, where
    the position of the first token is given, its own as `data-p`. Values below zero have the class `cold`."""
    parts = []
    for number, (token, value) in enumerate(zip(ids, values, strict=True)):
        text = html.escape(visible(text_of(token)))
        if value:
            shade = min(1.0, abs(value) / strongest) if strongest > 0 else 0.0
            classes = " ".join(name for name, holds in (("focus", number == focus), ("cold", value < 0)) if holds)
            named = f' class="{classes}"' if classes else ""
            place = "" if first is None else f' data-p="{first + number}"'
            text = f'<i{named} style="--a:{shade:.2f}" data-v="{value:.4g}"{place}>{text}</i>'
        parts.append(text)
    return f'<span class="sb-context">{"".join(parts)}</span>'


def html_example(example: Example, strongest: float, store: FeatureStore) -> str:
    """An example of a store as `html_context` gives it: its firing in focus, positions counted in its context."""
    return html_context(
        example.ids,
        example.values,
        strongest,
        store.token_strings.__getitem__,
        focus=example.focus,
        first=example.first % store.context_size,
    )
