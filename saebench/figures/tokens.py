"""Highlighted contexts: the same feature shown in a terminal and as HTML. Token text is data and always escaped."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator

from rich.text import Text

from saebench.features import Example, Feature

STRONG = (213, 94, 0)  # vermilion of Okabe and Ito's palette


def visible(token: str) -> str:
    """A token with its white space made visible where it would get lost: line ends, tabs, and control characters."""
    if not token.strip(" "):
        return "·" * len(token)
    return "".join(_SHOWN.get(c, c if c.isprintable() or c == " " else "�") for c in token)


_SHOWN = {"\n": "↵", "\t": "→", "\r": "␍"}


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
