"""The words of a corpus, for any tokenizer: runs of tokens that join letter to letter.

A word is taken in lower case and without the space before it; a token without letters is a word of its own, white space is none.
Shape suffixes: `T` tokens of the corpus, `R` runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_COUNT = 3  # of rarer words nothing can be learned, and they are not told apart
NO_WORD = 0
MIX = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Words:
    """The words of a corpus by number; the first is no word, and stands for those that are rare."""

    names: list[str]
    forms: dict[str, str]
    """Each word as it is mostly written."""
    texts: list[str]
    """Every different run of tokens as a word, the rare ones too."""
    numbers: np.ndarray
    """The number of each of these."""
    text_R: np.ndarray
    """Which of them each run is."""
    length_R: np.ndarray
    """Tokens of each run."""

    @classmethod
    def of(cls, ids_T: np.ndarray, joined_T: np.ndarray, begin_T: np.ndarray, strings: list[str]) -> Words:
        """Find the words: `joined_T` says which tokens continue a run, `begin_T` where each token's run begins."""
        starts_R = np.flatnonzero(~joined_T)
        ends_R = np.append(starts_R[1:], len(ids_T))
        with np.errstate(over="ignore"):  # a 64-bit hash of the ids of a run
            place_T = np.arange(len(ids_T)) - begin_T
            powers = np.cumprod(np.full(int(place_T.max()) + 1, MIX, dtype=np.uint64))
            keys_R = np.add.reduceat((ids_T.astype(np.uint64) + np.uint64(1)) * powers[place_T], starts_R)
        _, first, text_R, counts = np.unique(keys_R, return_index=True, return_inverse=True, return_counts=True)
        written = [
            "".join([strings[i] for i in ids_T[begin:end].tolist()]).strip()
            for begin, end in zip(starts_R[first].tolist(), ends_R[first].tolist(), strict=True)
        ]
        texts = [text.lower() for text in written]
        totals: dict[str, int] = {}
        most: dict[str, tuple[int, str]] = {}
        for text, form, count in zip(texts, written, counts.tolist(), strict=True):
            totals[text] = totals.get(text, 0) + count
            most[text] = max(most.get(text, (0, "")), (count, form))
        known = {"": NO_WORD}
        numbers = [known.setdefault(text if totals[text] >= MIN_COUNT else "", len(known)) for text in texts]
        forms = {text: form for text, (_, form) in most.items() if text in known}
        return cls(list(known), forms, texts, np.array(numbers, dtype=np.int32), text_R, ends_R - starts_R)

    def of_run(self, of_text: np.ndarray) -> np.ndarray:
        """What is known of each different run, for every token of the corpus [T]."""
        return np.repeat(of_text[self.text_R], self.length_R)
