"""Tokens as text and as HTML: white space is seen, markup is text, values are where they belong."""

from __future__ import annotations

import re
from html import unescape

import pytest

from saebench.figures.tokens import alone, html_context, visible

TOKENS = ["<b>", " a", "\n", "  ", "&amp;", "\"'", "\x00\u202e", "$x$"]


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" the", "·the"), ("the ", "the·"), ("  ", "··"), ("\n  x", "↵  x"), ("\t", "→"), ("a b", "a b"), ("", ""), ("\r\n", "␍↵")],
)
def test_a_token_that_stands_alone(token, shown):
    assert alone(token) == shown


def test_contexts_are_escaped_and_marked():
    values = [1.0, 0.0, -2.0, 4.0, 0.0, 0.5, 0.0, 8.0]
    body = html_context(range(8), values, 4.0, TOKENS.__getitem__, focus=3, first=10)
    assert unescape(re.sub(r"<[^>]*>", "", body)) == "".join(map(visible, TOKENS))
    marks = re.findall(r'<i( class="[^"]*")? style="--a:([\d.]+)" data-v="([^"]*)" data-p="(\d+)">', body)
    assert marks == [
        ("", "0.25", "1", "10"),
        (' class="cold"', "0.50", "-2", "12"),
        (' class="focus"', "1.00", "4", "13"),
        ("", "0.12", "0.5", "15"),
        ("", "1.00", "8", "17"),
    ]
    assert "\u202e" not in body and "\x00" not in body


def test_no_values_and_no_place():
    assert html_context([1, 2], [0, 0], 0.0, TOKENS.__getitem__) == '<span class="sb-context"> a↵</span>'
    assert "data-p" not in html_context([1], [1.0], 0.0, TOKENS.__getitem__)
