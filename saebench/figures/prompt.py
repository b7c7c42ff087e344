"""A text of which every token is coloured, says its figures when pointed at, and leads somewhere when clicked. Token text is data: it is
always escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from saebench.figures.tokens import visible


@dataclass(frozen=True)
class Shown:
    """One token of a text."""

    text: str
    shade: float = 0.0
    """From -1 (cold) to 1 (warm); 0 is not coloured."""
    facts: Sequence[tuple[str, str]] = ()
    """What pointing at it says: name and value of each figure, escaped here."""
    href: str = ""
    """Where a click leads."""
    chosen: bool = False
    dim: bool = False


def html_tokens(tokens: Iterable[Shown]) -> str:
    """Tokens as they follow each other, as HTML; lines end where the text's lines do."""
    return f'<div class="sb-tokens">{"".join(map(_token, tokens))}</div>'


def _token(token: Shown) -> str:
    text = html.escape(visible(token.text)).replace("↵", "↵<br>")
    conditions = (("cold", token.shade < 0), ("shaded", token.shade != 0), ("chosen", token.chosen), ("dim", token.dim))
    classes = " ".join(name for name, holds in conditions if holds)
    attributes = f' class="{classes}"' if classes else ""
    if token.shade:
        attributes += f' style="--a:{min(1.0, abs(token.shade)):.2f}"'
    if token.facts:
        (name, value), *rest = token.facts
        lines = html.escape("\n".join(f"{name} {value}" for name, value in rest))
        attributes += f' data-n="{html.escape(name)}" data-v="{html.escape(value)}" data-d="{lines}"'
    if token.href:
        return f'<a data-go href="{html.escape(token.href)}"{attributes}>{text}</a>'
    return f"<span{attributes}>{text}</span>"


def shaded(values: Sequence[float], *, diverging: bool = False, strongest: float | None = None) -> tuple[list[float], float]:
    """Shades of some values, nan for none, and the value of the darkest: the largest in size, or the one given. Values below zero have a
    shade only where `diverging`."""
    if strongest is None:
        strongest = max((abs(value) for value in values if value == value), default=0.0)
    if not strongest:
        return [0.0] * len(values), 0.0
    low = -1.0 if diverging else 0.0
    return [min(1.0, max(low, value / strongest)) if value == value else 0.0 for value in values], strongest


def html_key(strongest: float, name: str, *, diverging: bool = False) -> str:
    """What the shades mean, as HTML."""
    low = f"{-strongest:.3g}" if diverging else "0"
    kind = ' class="both"' if diverging else ""
    return f'<span class="sb-key">{html.escape(name)} {low} <i{kind}></i> {strongest:.3g}</span>'
