"""Rules: small statements about a token and what stands around it that are true or false at any place of a corpus.

A rule is what a label says, exactly: conditions that hold together. It is kept as JSON beside the label's text, and anyone
can test it on any text. Shape suffix: `P` places.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from saebench.features.labelling.corpus import Corpus, Half, View

MOST_WORDS = 16
SET_BITS = np.array([number.bit_count() for number in range(1 << MOST_WORDS)], dtype=np.uint8)


@dataclass(frozen=True)
class Among:
    """A column of the corpus (`corpus.COLUMNS`) has one of these values, at `at` tokens from the place; ids of tokens, or texts."""

    column: str
    values: tuple[int | str, ...]
    at: int = 0

    def numbers(self, corpus: Corpus) -> np.ndarray:
        """The values as sorted numbers; those that this corpus does not have are left out."""
        if self.column in ("token", "line"):
            return np.array(sorted(self.values), dtype=np.int64)
        known = corpus.numbers[self.column]
        return np.array(sorted(known[str(value)] for value in self.values if value in known), dtype=np.int64)

    def holds(self, view: View) -> np.ndarray:
        numbers, found_P = self.numbers(view.corpus), view.numbers(self.column, self.at)
        if not len(numbers):
            return np.zeros(len(found_P), dtype=bool)
        return numbers[np.searchsorted(numbers, found_P).clip(max=len(numbers) - 1)] == found_P


@dataclass(frozen=True)
class Trait:
    """The token at `at` from the place has a trait (`traits.TRAITS`, `corpus.PLACE_TRAITS`)."""

    name: str
    at: int = 0

    def holds(self, view: View) -> np.ndarray:
        return view.trait(self.name, self.at)


@dataclass(frozen=True)
class Around:
    """Of the words, up to `MOST_WORDS`, `at_least` different ones stand among the `before` tokens before the place and the `after` tokens
    behind it."""

    words: tuple[str, ...]
    at_least: int
    before: int
    after: int

    def holds(self, view: View) -> np.ndarray:
        known = view.corpus.numbers["word"]
        numbers = [known[word] for word in self.words if word in known]
        bits_U = np.zeros(len(view.corpus.words), dtype=np.uint16)
        bits_U[numbers] = 1 << np.arange(len(numbers))
        return SET_BITS[np.bitwise_or.reduce(bits_U[view.window(self.before, self.after)], axis=1)] >= self.at_least


@dataclass(frozen=True)
class Early:
    """The place is among the first `last` tokens of its `context` or `document`; a separator is the first of a document."""

    of: str
    last: int

    def holds(self, view: View) -> np.ndarray:
        return self.position(view) <= self.last

    def position(self, view: View) -> np.ndarray:
        return view.position_P if self.of == "context" else view.corpus.positions_T[view.places_P] + 1


Condition = Among | Trait | Around | Early
KINDS: dict[str, type] = {"among": Among, "trait": Trait, "around": Around, "early": Early}


@dataclass(frozen=True)
class Rule:
    """True where all of its conditions are."""

    conditions: tuple[Condition, ...]

    def holds(self, view: View) -> np.ndarray:
        """At which places it is true [P]."""
        return np.logical_and.reduce([condition.holds(view) for condition in self.conditions])

    def json(self) -> str:
        kinds = {kind: name for name, kind in KINDS.items()}
        return json.dumps([{"kind": kinds[type(condition)], **asdict(condition)} for condition in self.conditions])

    @classmethod
    def parse(cls, text: str) -> Rule:
        """The rule that `json` wrote."""
        return cls(tuple(_condition(fields) for fields in json.loads(text)))


def find_places(condition: Condition, half: Half, limit: int) -> tuple[np.ndarray, float]:
    """Up to `limit` places of a half at which a condition holds, evenly spread over all of them where the corpus has an index, else over
    its random tokens; and how many places each stands for."""
    if isinstance(condition, Among):
        return half.find(condition.column, condition.at, condition.numbers(half.corpus), limit)
    places = half.pool.places_P[condition.holds(half.pool)]
    each = half.num_tokens / max(1, len(half.pool))
    if len(places) <= limit:
        return places, each
    return places[np.arange(limit) * len(places) // limit], each * len(places) / limit


def _condition(fields: dict) -> Condition:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return KINDS[fields.pop("kind")](**fields)
