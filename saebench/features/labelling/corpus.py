"""The corpus of a feature store as labels see it: tokens, words, lines, repetition, and where each token and word stands.

Computed once for a store, in a few arrays as long as the corpus. Everything that a rule (`rules.py`) can say about a token is looked up
here, for any tokens at once, through a `View`.

Shape suffixes: `T` tokens of the corpus, `V` vocabulary, `P` places (token numbers), `C` contexts, `W` window.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from saebench.features.labelling.scoring import halves
from saebench.features.labelling.sorting import order_by
from saebench.features.labelling.traits import Traits, affixes
from saebench.features.labelling.words import NO_WORD, Words

POOL = 4096  # random tokens of each half
SPACED = 0.05  # share of the vocabulary's words that begin with a space, where spaces separate words

PLACE_TRAITS = ("rest of a word", "repeated text")
"""Traits of a place in the text: the token continues a word; it and the one before stood like that earlier in the context."""
COLUMNS = ("token", "word", "before", "line", "begin", "end")
"""What is known of every token as one number: its id; its word; the word before its word; the token its line begins with; and the first
and the last letters of a longer word."""


class Corpus:
    """What labels can refer to in the corpus of a store, and its two halves, for labelling and for scoring."""

    def __init__(self, store: Any, seed: int = 0):
        self.store, self.seed = store, seed
        self.size: int = store.context_size
        self.ids_T: np.ndarray = store.ids_T
        self.strings: list[str] = store.token_strings
        self.nothing = len(self.strings)
        """The number that stands for what is outside of the context; below it are the ids of tokens."""
        self.traits = Traits.of(self.strings)
        self.labelling, self.scoring = (
            Half(self, part_C, seed + number) for number, part_C in enumerate(halves(store.num_contexts, seed))
        )

    def view(self, places_P: np.ndarray) -> View:
        return View(self, places_P)

    # --- numbers of every token: one array a column ---

    @cached_property
    def columns_T(self) -> dict[str, np.ndarray]:
        words = self._words
        affixed = {column: words.of_run(of_text) for column, (_, of_text) in self._affixes.items()}
        return {"token": self.ids_T, "word": self.words_T, "before": self._before_T, "line": self._line_T, **affixed}

    @cached_property
    def _affixes(self) -> dict[str, tuple[list[str], np.ndarray]]:
        """Beginnings and ends of all words, the rare ones too, and the number of each word's."""
        return {"begin": affixes(self._words.texts, from_end=False), "end": affixes(self._words.texts, from_end=True)}

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """What the numbers of a column that are not token ids stand for."""
        return {"word": self.words, "before": self.words} | {column: names for column, (names, _) in self._affixes.items()}

    @cached_property
    def numbers(self) -> dict[str, dict[str, int]]:
        """The numbers by what they stand for."""
        return {column: {name: number for number, name in enumerate(names)} for column, names in self.names.items()}

    @cached_property
    def joins_V(self) -> np.ndarray:
        """The share of each token's occurrences that continue a word, and that are continued [V, 2]."""
        counts_V = np.maximum(1, np.bincount(self.ids_T, minlength=self.nothing))
        continued_T = np.append(self.joined_T[1:], False)
        return np.column_stack(
            [np.bincount(self.ids_T, joined_T, minlength=self.nothing) / counts_V for joined_T in (self.joined_T, continued_T)]
        )

    @cached_property
    def separators(self) -> set[int]:
        """Ids of the tokens that stand between documents."""
        return set(np.unique(self.ids_T[self.positions_T == -1]).tolist())

    # --- words ---

    @cached_property
    def joined_T(self) -> np.ndarray:
        """Whether a token continues the word of the one before it."""
        begins = np.array([text[:1].isalpha() for text in self.strings])
        ends = np.array([text[-1:].isalpha() for text in self.strings])
        letters = [text for text in self.strings if text.strip().isalpha()]
        if sum(text[0] == " " for text in letters) < SPACED * len(letters):
            begins[:] = False  # a tokenizer that does not show spaces: every token is its own word
        joined_T = np.zeros(len(self.ids_T), dtype=bool)
        joined_T[1:] = begins[self.ids_T[1:]] & ends[self.ids_T[:-1]]
        return joined_T & ~self._first_T

    @cached_property
    def _first_T(self) -> np.ndarray:
        """Where a context or a document begins."""
        first_T = self.positions_T == 0
        first_T[:: self.size] = True
        return first_T

    @cached_property
    def positions_T(self) -> np.ndarray:
        """Place of every token in its document, -1 for a separator."""
        return self.store.contexts.positions_NS.flatten().numpy()

    @cached_property
    def _begin_T(self) -> np.ndarray:
        """Where the word of each token begins."""
        return np.maximum.accumulate(np.where(self.joined_T, 0, np.arange(len(self.ids_T), dtype=np.int32)))

    @cached_property
    def _words(self) -> Words:
        return Words.of(self.ids_T, self.joined_T, self._begin_T, self.strings)

    @cached_property
    def words_T(self) -> np.ndarray:
        """The number of each token's word."""
        return self._words.of_run(self._words.numbers)

    @property
    def words(self) -> list[str]:
        """The words by number; the first is no word."""
        return self._words.names

    def form(self, word: str) -> str:
        """A word as it is mostly written."""
        return self._words.forms.get(word, word)

    @property
    def _before_T(self) -> np.ndarray:
        """The word before the word of each token, spaces between them apart."""
        place_T = self._begin_T - 1
        inside_T = self._begin_T % self.size > 0
        spaces_T = inside_T & (self._begin_T % self.size > 1) & self.traits["spaces"][self.ids_T[place_T]]
        return np.where(inside_T, self.words_T[place_T - spaces_T], NO_WORD)

    # --- lines and repetition ---

    @property
    def _line_T(self) -> np.ndarray:
        """The token that the line of each token begins with, white space apart; `nothing` where it begins before the context."""
        breaks_V, blank_V = self.traits["line end"], self.traits["white space"]
        begins_T = self._first_T.copy()
        begins_T[1:] |= breaks_V[self.ids_T[:-1]] & ~breaks_V[self.ids_T[1:]]
        places_T = np.arange(len(self.ids_T), dtype=np.int32)
        start_T = np.maximum.accumulate(np.where(begins_T, places_T, 0))
        known_T = (start_T % self.size > 0) | (self.positions_T[start_T] == 0)
        for _ in range(2):
            start_T = np.where(blank_V[self.ids_T[start_T]] & (start_T < places_T), start_T + 1, start_T)
        return np.where(known_T, self.ids_T[start_T], self.nothing).astype(np.int32)

    @cached_property
    def repeats_T(self) -> np.ndarray:
        """Whether a token and the one before it stood like that earlier in the context."""
        pairs_T = np.empty(len(self.ids_T), dtype=np.int64)
        pairs_T[0] = -1
        pairs_T[1:] = self.ids_T[:-1].astype(np.int64) * self.nothing + self.ids_T[1:]
        pairs_T[:: self.size] = -1
        repeats_T = np.zeros(len(self.ids_T), dtype=bool)
        rows_CS = pairs_T.reshape(-1, self.size)
        order_CS = np.argsort(rows_CS, 1, kind="stable")
        sorted_CS = np.take_along_axis(rows_CS, order_CS, 1)
        same_CS = np.zeros_like(sorted_CS, dtype=bool)
        same_CS[:, 1:] = sorted_CS[:, 1:] == sorted_CS[:, :-1]
        np.put_along_axis(repeats_T.reshape(-1, self.size), order_CS, same_CS, 1)
        return repeats_T


class Half:
    """The contexts for labelling, or those for scoring: how often everything stands there, and where."""

    def __init__(self, corpus: Corpus, contexts_C: np.ndarray, seed: int):
        self.corpus, self.contexts_C = corpus, contexts_C
        self.num_tokens = int(contexts_C.sum()) * (corpus.size - 1)
        """All but the first of each context, on which nothing fires."""
        contexts = np.flatnonzero(contexts_C)
        random = np.random.default_rng(seed)
        count = min(POOL, self.num_tokens)
        drawn = np.sort(random.choice(self.num_tokens, count, replace=False)) if count else np.empty(0, dtype=np.int64)
        self.pool = corpus.view(contexts[drawn // (corpus.size - 1)] * corpus.size + drawn % (corpus.size - 1) + 1)
        """Random tokens."""
        self.pool_rows_T = np.full(len(corpus.ids_T), -1, dtype=np.int16)
        """Which of them each token of the corpus is, -1 for those that are none."""
        self.pool_rows_T[self.pool.places_P] = np.arange(count)
        self._indices: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def index(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The half's places by the number they have in a column, and where those of each number begin."""
        if column not in self._indices:
            corpus = self.corpus
            places = (np.flatnonzero(self.contexts_C)[:, None] * corpus.size + np.arange(corpus.size)).ravel().astype(np.int32)
            numbers = corpus.columns_T[column][places]
            counts = np.bincount(numbers, minlength=int(corpus.columns_T[column].max()) + 1)
            starts = np.concatenate([[0], np.cumsum(counts)])
            self._indices[column] = places[order_by(np.zeros_like(numbers), numbers)], starts
        return self._indices[column]

    def counts(self, column: str, numbers: np.ndarray) -> np.ndarray:
        """How many tokens of the half have each of some numbers in a column."""
        starts = self.index(column)[1]
        known = numbers < len(starts) - 1
        numbers = np.where(known, numbers, 0)
        return np.where(known, starts[numbers + 1] - starts[numbers], 0)

    @cached_property
    def trait_counts(self) -> np.ndarray:
        """How many tokens of the half have each trait of `Corpus.traits`."""
        starts = self.index("token")[1]
        return np.diff(starts) @ self.corpus.traits.matrix[: len(starts) - 1]

    @cached_property
    def everything(self) -> View:
        """All tokens of the half."""
        corpus = self.corpus
        return corpus.view((np.flatnonzero(self.contexts_C)[:, None] * corpus.size + np.arange(1, corpus.size)).ravel())

    def find(self, column: str, at: int, numbers: np.ndarray, limit: int) -> tuple[np.ndarray, float]:
        """Up to `limit` places, evenly spread, at `at` tokens from which a column has one of some numbers, and how many each stands for."""
        places, starts = self.index(column)
        numbers = numbers[numbers < len(starts) - 1]
        first, lengths = starts[numbers], starts[numbers + 1] - starts[numbers]
        total = int(lengths.sum())
        drawn = np.arange(total) if total <= limit else np.arange(limit) * total // limit
        ends = np.cumsum(lengths)
        group = np.searchsorted(ends, drawn, side="right")
        found = places[first[group] + drawn - (ends - lengths)[group]]
        position = found % self.corpus.size - at
        return (found - at)[(position > 0) & (position < self.corpus.size)], total / len(drawn) if total else 1.0


class View:
    """Some places of the corpus, and what stands there; computed when first asked for."""

    def __init__(self, corpus: Corpus, places_P: np.ndarray):
        self.corpus, self.places_P = corpus, places_P
        self.position_P = places_P % corpus.size
        self._found: dict[Any, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.places_P)

    def numbers(self, column: str, at: int = 0) -> np.ndarray:
        """The numbers in a column at `at` tokens from each place [P]; those outside of the context are `nothing`."""
        if (column, at) not in self._found:
            corpus = self.corpus
            found_P = corpus.columns_T[column][self._shifted(at)]
            self._found[column, at] = np.where(self._inside(at), found_P, corpus.nothing) if at else found_P
        return self._found[column, at]

    def trait(self, name: str, at: int = 0) -> np.ndarray:
        """Whether the token at `at` from each place has a trait; those of `PLACE_TRAITS` only at the place itself [P]."""
        if name in PLACE_TRAITS:
            return (self.corpus.joined_T if name == PLACE_TRAITS[0] else self.corpus.repeats_T)[self.places_P]
        return self.corpus.traits[name][self.numbers("token", at)]

    def window(self, before: int, after: int) -> np.ndarray:
        """The words of the tokens around each place, `NO_WORD` outside of the context and at the place itself [P, W]."""
        key = ("window", before, after)
        if key not in self._found:
            corpus = self.corpus
            offsets_W = np.concatenate([np.arange(-before, 0), np.arange(1, after + 1)])
            position_PW = self.position_P[:, None] + offsets_W
            inside_PW = (position_PW >= 0) & (position_PW < corpus.size)
            words_PW = corpus.words_T[np.where(inside_PW, self.places_P[:, None] + offsets_W, self.places_P[:, None])]
            self._found[key] = words_PW * inside_PW
        return self._found[key]

    def _shifted(self, at: int) -> np.ndarray:
        return self.places_P + np.where(self._inside(at), at, 0) if at else self.places_P

    def _inside(self, at: int) -> np.ndarray:
        return (self.position_P + at >= 0) & (self.position_P + at < self.corpus.size)
