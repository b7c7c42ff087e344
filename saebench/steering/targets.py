"""What a text is steered towards, as a number of each text: without a judge, from examples or from a pattern.

Shape suffixes: `V` vocabulary, `U` texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from saebench.errors import UserError


class Target(Protocol):
    """A number of every text, larger where it is more of what is wanted."""

    @property
    def name(self) -> str:
        """What it is called in tables and figures."""
        ...

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """[U] float64."""
        ...


@dataclass(frozen=True)
class Pattern:
    """Share of the lines (those with any sign) in which a regular expression is found. A text without lines scores 0."""

    name: str
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, pattern: str, name: str = "") -> Pattern:
        """Raises UserError for what is no regular expression."""
        try:
            return cls(name or f"lines with {pattern}", re.compile(pattern))
        except re.error as error:
            raise UserError(f"{pattern!r} is no regular expression: {error}") from None

    def score(self, texts: Sequence[str]) -> np.ndarray:
        lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
        return np.array([sum(bool(self.pattern.search(line)) for line in some) / len(some) if some else 0.0 for some in lines])


@dataclass(frozen=True)
class Likeness:
    """How much more a text's tokens are those of one set of examples than of another, in nats per token: the mean over the tokens of
    log p(token | positives) - log p(token | negatives), both counts smoothed by one (naive Bayes). A text without tokens scores 0."""

    name: str
    tokenizer: Any
    log_odds_V: np.ndarray
    accuracy: float
    """Share of the examples that were held out which it puts on the right side of 0, each side counting as much."""

    @classmethod
    def between(cls, tokenizer: Any, positives: Sequence[str], negatives: Sequence[str], name: str = "likeness") -> Likeness:
        """From two sets of texts, one in four of each held out for the accuracy. Raises UserError for fewer than four on a side."""
        for side, texts in (("positives", positives), ("negatives", negatives)):
            if len(texts) < 4:
                raise UserError(f"{len(texts)} {side} are too few to tell what they have in common: give at least 4")
        kept = [[text for i, text in enumerate(texts) if i % 4] for texts in (positives, negatives)]
        held = [texts[::4] for texts in (positives, negatives)]
        counts = [_counts(tokenizer, texts) + 1.0 for texts in kept]
        log_odds_V = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
        found = cls(name, tokenizer, log_odds_V, 0.0)
        right = (np.mean(found.score(held[0]) > 0) + np.mean(found.score(held[1]) < 0)) / 2
        return cls(name, tokenizer, log_odds_V, float(right))

    def score(self, texts: Sequence[str]) -> np.ndarray:
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if len(texts) else []
        return np.array([self.log_odds_V[some].mean() if len(some) else 0.0 for some in ids])


def _counts(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.bincount([i for some in ids for i in some], minlength=len(tokenizer)).astype(np.float64)
