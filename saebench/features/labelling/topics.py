"""Words that stand around the firings of latents more often than around random tokens: right before them, or as a topic.

Presence is counted, not occurrences, and a context counts once however often a latent fires in it, so that one long document on a subject
does not make a topic. Shape suffixes: `P` places, `W` window, `U` words, `G` groups, `N` pairs of a group and a word.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from saebench.features.labelling.corpus import Half, View
from saebench.features.labelling.grouping import Rows, f1
from saebench.features.labelling.rules import Around
from saebench.features.labelling.sorting import changes, order_by, sums
from saebench.features.labelling.words import NO_WORD

WINDOWS = (((16, 0), 3, (1,)), ((40, 10), 12, (1, 2, 3)))
"""Tokens before and after, words that are named at most, and how many of them are asked for."""
SURE = 3.0  # standard errors of the log odds ratio
PRIOR = 10.0  # places of the random kind that smooth it
LEAST_CONTEXTS = 3


class Presence:
    """Which words stand around the places of each group, each once."""

    def __init__(self, view: View, group_P: np.ndarray, window: tuple[int, int]):
        words_PW = np.sort(view.window(*window), axis=1)
        first_PW = np.ones(words_PW.shape, dtype=bool)
        first_PW[:, 1:] = words_PW[:, 1:] != words_PW[:, :-1]
        row, column = np.nonzero(first_PW & (words_PW != NO_WORD))
        self.words = len(view.corpus.words)
        group, word = group_P[row], words_PW[row, column]
        order = order_by(group, word)
        self.keys, self.rows = (group.astype(np.int64) * self.words + word)[order], row[order]
        """Group times words plus word, ascending, and the rows where that is."""
        self.starts_N = np.flatnonzero(changes(self.keys))
        self.group_N, self.word_N = np.divmod(self.keys[self.starts_N], self.words)

    def count(self, group: int, words: np.ndarray, first: int, last: int) -> np.ndarray:
        """How many of some words stand around each of the rows first to last, which are those of the group."""
        keys = group * self.words + words
        starts, ends = np.searchsorted(self.keys, keys), np.searchsorted(self.keys, keys, side="right")
        rows = np.concatenate([self.rows[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
        return np.bincount(rows - first, minlength=last - first)


class Topics:
    """Finds words around firings, against the random tokens of a half."""

    def __init__(self, half: Half):
        self.half, self.corpus = half, half.corpus
        self.told_U = np.array([len(word) >= 3 and word.isalpha() for word in self.corpus.words])
        """Words that say something of a topic."""
        nobody = np.zeros(len(half.pool), dtype=np.int64)
        self.pools = {window: Presence(half.pool, nobody, window) for window, _, _ in WINDOWS}

    def best(self, rows: Rows, firings_G: np.ndarray, fires_GP: np.ndarray) -> Iterator[dict[int, tuple[Around, float, float]]]:
        """For each window the best condition of each group, with the share of firings it covers and the places it names wrongly, in
        firings. `fires_GP` says where in the pool there is a firing."""
        ranges = np.searchsorted(rows.group_P, np.arange(rows.groups + 1)).tolist()
        size = len(self.half.pool)
        for window, most, least in WINDOWS:
            found, pool = Presence(rows.view, rows.group_P, window), self.pools[window]
            group_M, word_M = self.telling(rows, found, pool, most, topic=window[1] > 0)
            starts = np.searchsorted(group_M, np.arange(rows.groups + 1))
            best = {}
            for group in np.flatnonzero(np.diff(starts)).tolist():
                words = word_M[starts[group] : starts[group + 1]]
                first, last = ranges[group], ranges[group + 1]
                here_P, there_P = found.count(group, words, first, last), pool.count(0, words, 0, size)
                each = self.half.num_tokens / size / firings_G[group]
                options = []
                for at_least in least:
                    covered = float(rows.share_P[first:last] @ (here_P >= at_least))
                    wrong = (float(((there_P >= at_least) & ~fires_GP[group]).sum()) + 0.5) * each
                    options.append((f1(covered, wrong), at_least, covered, wrong))
                _, at_least, covered, wrong = max(options)
                condition = Around(tuple(self.corpus.words[word] for word in words.tolist()), at_least, *window)
                best[group] = condition, covered, wrong
            yield best

    def telling(self, rows: Rows, found: Presence, pool: Presence, most: int, topic: bool) -> tuple[np.ndarray, np.ndarray]:
        """Up to `most` words for each group, those first that are most surely more often around its firings than around random tokens:
        groups, ascending, and words."""
        contexts_P = rows.view.places_P // self.corpus.size
        keys_P = rows.group_P.astype(np.int64) * (int(contexts_P.max(initial=0)) + 1) + contexts_P
        _, same_P, firings = np.unique(keys_P, return_inverse=True, return_counts=True)
        once_P = 1 / firings[same_P]
        seen_N = sums(once_P[found.rows], found.starts_N)
        contexts_G = rows.total(once_P)
        share_U = np.zeros(len(self.told_U))
        share_U[pool.word_N] = np.diff(np.append(pool.starts_N, len(pool.keys))) / len(self.half.pool)
        sure_N = log_odds(seen_N, contexts_G[found.group_N], share_U[found.word_N], len(self.half.pool))
        kept = (sure_N > SURE) & (seen_N >= LEAST_CONTEXTS - 0.5)
        if topic:
            kept &= self.told_U[found.word_N]
        group_N, word_N, sure_N = found.group_N[kept], found.word_N[kept], sure_N[kept]
        order = np.lexsort((-sure_N, group_N))
        group_N, word_N = group_N[order], word_N[order]
        rank_N = np.arange(len(group_N)) - np.searchsorted(group_N, np.arange(rows.groups))[group_N]
        return group_N[rank_N < most], word_N[rank_N < most]


def log_odds(seen_N: np.ndarray, places_N: np.ndarray, share_N: np.ndarray, pool: int) -> np.ndarray:
    """How surely a word stands around some places more often than around random ones: the log of the odds ratio in standard errors,
    smoothed by `PRIOR` places of the random kind (after Monroe, Colaresi and Quinn 2008, with presence for counts)."""
    share_N = (share_N * pool + 0.5) / (pool + 1)
    with_N, without_N = seen_N + PRIOR * share_N, places_N - seen_N + PRIOR * (1 - share_N)
    ratio_N = np.log(with_N / without_N) - np.log(share_N / (1 - share_N))
    return ratio_N / np.sqrt(1 / with_N + 1 / (share_N * pool))
