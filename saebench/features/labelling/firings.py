"""The firings of some latents in one half of the corpus, as labels are made from them and scored on them.

Shape suffixes: `P` places, `G` latents, `N` postings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from saebench.features.labelling.corpus import Corpus, Half, View
from saebench.features.labelling.grouping import Rows

FIRINGS = 300  # of a latent that are looked at


@dataclass(frozen=True)
class Firings:
    """Some latents, counted from 0 here: where they fire, and a sample of the firings in the half."""

    corpus: Corpus
    half: Half
    keys: np.ndarray
    """Latent times tokens of the corpus plus place, ascending, of all firings in both halves."""
    count_G: np.ndarray
    """Firings of each latent in the half."""
    rows: Rows
    """The sample, each weighted by the square of its value."""
    values_P: np.ndarray
    """Its absolute values."""

    @classmethod
    def of(cls, half: Half, starts: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray) -> Firings:
        """From postings: those of latent i are starts[i] to starts[i + 1]."""
        corpus, latents = half.corpus, len(starts) - 1
        latent_N = np.repeat(np.arange(latents), np.diff(starts))
        keys = latent_N * len(corpus.ids_T) + tokens_N
        inside = np.flatnonzero(half.contexts_C[tokens_N // corpus.size])
        count_G = np.bincount(latent_N[inside], minlength=latents)
        sample = inside[evenly(count_G, FIRINGS)]
        group_P, values_P = latent_N[sample], np.abs(values_N[sample]).astype(np.float64)
        squares_P = values_P**2
        share_P = squares_P / np.bincount(group_P, squares_P, minlength=latents)[group_P]
        rows = Rows(corpus.view(tokens_N[sample]), group_P, share_P, np.zeros(len(sample)), latents)
        return cls(corpus, half, keys, count_G, rows, values_P)

    @cached_property
    def scale_G(self) -> np.ndarray:
        """Firings that each of a latent's sample stands for."""
        return self.count_G / np.maximum(1, np.bincount(self.rows.group_P, minlength=self.rows.groups))

    def part(self, latent: int) -> slice:
        """The rows of one latent."""
        return slice(self._starts[latent], self._starts[latent + 1])

    @cached_property
    def _starts(self) -> list[int]:
        return np.searchsorted(self.rows.group_P, np.arange(self.rows.groups + 1)).tolist()

    def view(self, latent: int) -> View:
        """The sample of one latent."""
        return self.corpus.view(self.rows.view.places_P[self.part(latent)])

    def at(self, latent: int, places: np.ndarray) -> np.ndarray:
        """Whether a latent fires at places."""
        keys = latent * len(self.corpus.ids_T) + places.astype(np.int64)
        return self.keys[np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)] == keys

    @cached_property
    def in_pool_GP(self) -> np.ndarray:
        """Where in the half's random tokens each latent fires."""
        latent_N, token_N = np.divmod(self.keys, len(self.corpus.ids_T))
        row_N = self.half.pool_rows_T[token_N]
        fires_GP = np.zeros((self.rows.groups, len(self.half.pool)), dtype=bool)
        fires_GP[latent_N[row_N >= 0], row_N[row_N >= 0]] = True
        return fires_GP


def evenly(counts_G: np.ndarray, most: int) -> np.ndarray:
    """Of the entries of some lists, one behind the other, the places of up to `most` of each, evenly spread."""
    starts = np.cumsum(counts_G) - counts_G
    rank = np.arange(int(counts_G.sum())) - np.repeat(starts, counts_G)
    count = np.repeat(counts_G, counts_G)
    return np.flatnonzero((count <= most) | ((rank + 1) * most // np.maximum(1, count) > rank * most // np.maximum(1, count)))
