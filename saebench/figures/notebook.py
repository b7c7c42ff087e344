"""What notebooks show: contexts with their firings, and tables, as objects that Jupyter draws as HTML and everything else prints as text.

Pages that keep tables but drop colours still show on which token each line was picked, in a column of its own.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from saebench.features.examples import Example
from saebench.figures.tokens import alone, html_line, visible

CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"
NOTHING = "none"


@dataclass(frozen=True)
class Table:
    """Rows of text under heads."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def _repr_html_(self) -> str:
        return _html_table(self.heads, [[html.escape(visible(cell)) for cell in row] for row in self.rows])

    def __repr__(self) -> str:
        if not self.rows:
            return NOTHING
        lines = [list(self.heads), *([visible(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def table(rows: Sequence[Mapping[str, object]]) -> Table:
    """Rows with the same keys, which become the heads; numbers that are to be rounded are given as text."""
    heads = list(rows[0]) if rows else []
    return Table(heads, [[str(row[head]) for head in heads] for row in rows])


@dataclass(frozen=True)
class Highlighted:
    """Examples as a table: value, token, the text around it with every firing shaded, document."""

    examples: Sequence[Example]
    text_of: Callable[[int], str]
    strongest: float
    """The value of the darkest shade."""

    def _repr_html_(self) -> str:
        documents = any(example.document for example in self.examples)
        heads = ["value", "token", "context", *(["document"] if documents else [])]
        rows = [
            [
                f"{example.values[example.focus]:.2f}",
                f"<code>{html.escape(alone(self.text_of(example.ids[example.focus])))}</code>",
                html_line(example, self.strongest, self.text_of),
                *([html.escape(example.document)] if documents else []),
            ]
            for example in self.examples
        ]
        return _html_table(heads, rows)

    def __repr__(self) -> str:
        lines = []
        for example in self.examples:
            parts = [visible(self.text_of(token)) for token in example.ids]
            parts[example.focus] = f"[{parts[example.focus]}]"
            lines.append(f"{example.values[example.focus]:8.2f}  {''.join(parts)}")
        return "\n".join(lines) or NOTHING


def highlighted(
    examples: Example | Sequence[Example], text_of: Callable[[int], str], strongest: float | None = None
) -> Highlighted:
    """One example or several, to be the last value of a cell or given to `display`. `text_of` is the text of a token id; `strongest` is the
    value of the darkest shade, by default the largest shown."""
    shown = [examples] if isinstance(examples, Example) else list(examples)
    if strongest is None:
        strongest = max((value for example in shown for value in example.values), default=0.0)
    return Highlighted(shown, text_of, strongest)


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    if not rows:
        return f"<p>{NOTHING}</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = ("".join(f'<td style="{CELL}">{cell}</td>' for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"
