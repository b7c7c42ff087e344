"""What a token is by its characters alone, in any language: a number, a capital, a bracket, white space, and how a word begins and ends.

Shape suffix: `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

AFFIX, AFFIXED = 3, 5  # letters of the beginning and end of a word that is itself longer

TRAITS: dict[str, Callable[[str], bool]] = {
    "number": lambda text: text.strip().isdigit(),
    "capitalised word": lambda text: text.strip().isalpha() and len(text.strip()) > 1 and text.strip().istitle(),
    "capitals": lambda text: text.strip().isalpha() and text.strip().isupper(),
    "letters": lambda text: text.strip().isalpha(),
    "punctuation": lambda text: bool(text.strip()) and not any(c.isalnum() for c in text),
    "opening bracket": lambda text: text.strip()[-1:] in ("(", "[", "{"),
    "closing bracket": lambda text: text.strip()[:1] in (")", "]", "}"),
    "quotation mark": lambda text: bool(text.strip()) and set(text.strip()) <= set("\"'`“”\u2018\u2019«»"),
    "line end": lambda text: "\n" in text,
    "spaces": lambda text: bool(text) and not text.strip(" \t"),
    "white space": lambda text: bool(text) and not text.strip(),
    "token that is not ASCII": lambda text: not text.isascii(),
    "token after a space": lambda text: text[:1] == " " and bool(text.strip()),
}


@dataclass(frozen=True)
class Traits:
    """Which traits each token of a vocabulary has [V + 1, traits]; a last row for no token."""

    names: list[str]
    matrix: np.ndarray

    @classmethod
    def of(cls, strings: Sequence[str]) -> Traits:
        rows = [[holds(text) for holds in TRAITS.values()] for text in strings]
        return cls(list(TRAITS), np.array([*rows, [False] * len(TRAITS)], dtype=bool))

    def __getitem__(self, name: str) -> np.ndarray:
        """Which tokens have a trait [V + 1]."""
        return self.matrix[:, self.names.index(name)]


def affixes(words: Sequence[str], from_end: bool) -> tuple[list[str], np.ndarray]:
    """The beginnings, or ends, of longer words, the first of them none; and the number of each word's."""
    numbers = {"": 0}
    of_word = []
    for word in words:
        affix = (word[-AFFIX:] if from_end else word[:AFFIX]) if word.isalpha() and len(word) >= AFFIXED else ""
        of_word.append(numbers.setdefault(affix, len(numbers)))
    return list(numbers), np.array(of_word, dtype=np.int32)
