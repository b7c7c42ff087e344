"""What is known of each latent from all its codes: moments and places of its values, the tokens it fires on, the latents it fires with.

All of it is computed from *postings*, the codes of a range of latents sorted by latent: those of latent f of the range are `tokens_N`
(int32, numbers of tokens, ascending within a latent) and `values_N` (float16, finite) at starts_F1[f] .. starts_F1[f + 1] (int64, not
necessarily from 0). Arrays are numpy's and may be mapped from files, which are trusted to hold what they should.

The compiled kernels (cpu/postings.cpp) do the work, with the same results for any number of threads; the `reference_` twins, in numpy and
scipy, take their place, with the same bits, where there is no compiler and where `reference` or `stock` is ordered.

Shape suffixes: `F` latents of the range, `G` all latents, `N` postings, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from saebench.kernels.arrays import compiled, ready

Postings = tuple[np.ndarray, np.ndarray, np.ndarray]
"""starts_F1, tokens_N, values_N"""


@dataclass(frozen=True)
class Moments:
    """Of each latent, 0 where it has no postings."""

    sum: np.ndarray
    """Of the values: [F] float64."""
    square: np.ndarray
    """Sum of the squares: [F] float64."""
    cube: np.ndarray
    fourth: np.ndarray
    low: np.ndarray
    """Least value: [F] float32."""
    high: np.ndarray
    contexts: np.ndarray
    """In how many contexts it fires: [F] int64."""
    histogram: np.ndarray
    """Values by size: [F, bins] int64. Bins have equal width from min(0, low) to high; each begins with its lower edge, the last one holds
    both. Where there is no width, all are in the last."""
    positions: np.ndarray
    """Firings by place in the context: [F, position_bins] int64."""


@dataclass(frozen=True)
class TopTokens:
    """The ids of the vocabulary on which each latent's values have the largest sums, largest first, ties to the lowest id."""

    ids: np.ndarray
    """[F, count] int32, -1 where a latent fires on fewer ids."""
    counts: np.ndarray
    """Firings on the id: [F, count] int64."""
    sums: np.ndarray
    """Sum of the values on the id: [F, count] float64."""
    distinct: np.ndarray
    """On how many ids a latent fires: [F] int64."""


@dataclass(frozen=True)
class Coactivation:
    """The latents that fire on the same tokens as each latent, the largest phi coefficient first."""

    latents: np.ndarray
    """[F, count] int32, -1 where a latent fires with fewer."""
    together: np.ndarray
    """Tokens on which both fire: [F, count] int64."""
    either: np.ndarray
    """Tokens on which at least one of them fires: [F, count] int64."""
    phi: np.ndarray
    """[F, count] float64."""

    @property
    def jaccard(self) -> np.ndarray:
        """Share of `together` in `either`: [F, count] float64."""
        return self.together / np.maximum(self.either, 1)


class Rows(Protocol):
    """Codes of consecutive tokens: on token first_token + t fire latents[starts[t]] .. latents[starts[t + 1]] (int32, none twice). `starts`
    are int64, one more than tokens."""

    @property
    def first_token(self) -> int: ...
    @property
    def starts(self) -> np.ndarray: ...
    @property
    def latents(self) -> np.ndarray: ...


class Run(Protocol):
    """Postings of all latents on some of the tokens."""

    @property
    def starts_F1(self) -> np.ndarray: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def values(self) -> np.ndarray: ...


def moments(
    starts_F1: np.ndarray,
    tokens_N: np.ndarray,
    values_N: np.ndarray,
    context_size: int,
    bins: int = 50,
    position_bins: int = 16,
) -> Moments:
    """Sums of powers, range, histogram and places of each latent's values. Token t is at position t % context_size of its context."""
    postings = _postings(starts_F1, tokens_N, values_N)
    library = compiled()
    return Moments(*(library.moments if library else reference_moments)(*postings, context_size, bins, position_bins))


def top_tokens(
    starts_F1: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray, ids_T: np.ndarray, vocabulary: int, count: int = 10
) -> TopTokens:
    """The `count` ids on which each latent's values have the largest sums. `ids_T`: the id of every token, int32 from 0 to vocabulary - 1.
    Raises ValueError where a latent fires on another id, or on a token that has none."""
    postings = _postings(starts_F1, tokens_N, values_N)
    _at_least_one(count)
    last = postings[1][postings[0][1:][np.diff(postings[0]) > 0] - 1].max(initial=-1)
    if last >= len(ids_T):
        raise ValueError(f"ids_T holds the ids of {len(ids_T)} tokens, and a latent fires on token {last}")
    library = compiled()
    compute = library.top_tokens if library else reference_top_tokens
    return TopTokens(*compute(*postings, ready("ids_T", ids_T, np.int32), vocabulary, count))


def coactivation(
    starts_F1: np.ndarray,
    tokens_N: np.ndarray,
    codes: Sequence[Rows],
    counts_G: np.ndarray,
    num_tokens: int,
    first_latent: int,
    count: int = 16,
) -> Coactivation:
    """For each of the latents first_latent .. first_latent + F the `count` others with the largest phi coefficient, of those that fire on
    a token with it. `codes` are in the order of their tokens. Memory is 4 G bytes for each thread.

    phi = (n11 T - n_f n_g) / (sqrt(n_f (T - n_f)) sqrt(n_g (T - n_g))), or 0 where that is undefined, with T = num_tokens, n = counts_G
    (int64: on how many tokens each latent fires) and n11 on how many both do. Ties go to the larger n11, then to the lowest latent.
    """
    starts_F1, tokens_N = ready("starts_F1", starts_F1, np.int64), ready("tokens_N", tokens_N, np.int32)
    _at_least_one(count)
    counts_G = ready("counts_G", counts_G, np.int64)
    rows = [
        (each.first_token, ready("starts of codes", each.starts, np.int64), ready("latents of codes", each.latents, np.int32))
        for each in codes
    ]
    spreads_G = np.sqrt((counts_G * (num_tokens - counts_G)).astype(np.float64))
    spreads_G[spreads_G == 0] = np.inf  # phi becomes 0
    library = compiled()
    latents, together, phi = (library.coactivation if library else reference_coactivation)(
        starts_F1, tokens_N, rows, counts_G, spreads_G, num_tokens, first_latent, count
    )
    firings_F1 = counts_G[first_latent : first_latent + len(starts_F1) - 1, None]
    either = np.where(latents >= 0, firings_F1 + counts_G[latents] - together, 0)
    return Coactivation(latents, together, either, phi)


def merge_runs(runs: Sequence[Run], first_latent: int, last_latent: int) -> Postings:
    """Postings of the latents first_latent .. last_latent (exclusive) of all runs, in the order of the runs within a latent: new arrays."""
    parts = [
        (
            ready("starts_F1", run.starts_F1, np.int64),
            ready("tokens", run.tokens, np.int32),
            ready("values", run.values, np.float16),
        )
        for run in runs
    ]
    starts_F1 = np.zeros(last_latent - first_latent + 1, np.int64)
    for starts, _, _ in parts:
        starts_F1 += starts[first_latent : last_latent + 1] - starts[first_latent]
    library = compiled()
    return starts_F1, *(library.merge_runs if library else reference_merge_runs)(parts, first_latent, starts_F1)


def reference_moments(
    starts_F1: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray, context_size: int, bins: int, position_bins: int
) -> tuple[np.ndarray, ...]:
    num = len(starts_F1) - 1
    latents_N = np.repeat(np.arange(num), np.diff(starts_F1))
    tokens_N = tokens_N[starts_F1[0] : starts_F1[-1]].astype(np.int64)
    values_N = values_N[starts_F1[0] : starts_F1[-1]].astype(np.float64)
    powers = [values_N, values_N**2, values_N * values_N**2, values_N**2 * values_N**2]  # exact
    contexts_N = tokens_N // context_size
    new_N = np.diff(contexts_N, prepend=-1) != 0
    new_N |= np.diff(latents_N, prepend=-1) != 0
    places_N = latents_N * position_bins + tokens_N % context_size * position_bins // context_size
    low, high, histogram = np.zeros(num, np.float32), np.zeros(num, np.float32), np.zeros((num, bins), np.int64)
    for f in np.flatnonzero(np.diff(starts_F1)):
        values = values_N[starts_F1[f] - starts_F1[0] : starts_F1[f + 1] - starts_F1[0]]
        low[f], high[f] = values.min(), values.max()
        least = min(0.0, values.min())
        edges = least + np.arange(bins + 1) * ((values.max() - least) / bins)
        histogram[f] = np.bincount(np.minimum(np.searchsorted(edges, values, "right") - 1, bins - 1), minlength=bins)
    return (
        *(np.bincount(latents_N, power, num).astype(np.float64) for power in powers),
        low,
        high,
        np.bincount(latents_N[new_N], minlength=num),
        histogram,
        np.bincount(places_N, minlength=num * position_bins).reshape(num, position_bins),
    )


def reference_top_tokens(
    starts_F1: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray, ids_T: np.ndarray, vocabulary: int, count: int
) -> tuple[np.ndarray, ...]:
    num = len(starts_F1) - 1
    ids, counts, sums = np.full((num, count), -1, np.int32), np.zeros((num, count), np.int64), np.zeros((num, count))
    distinct = np.zeros(num, np.int64)
    for f in range(num):
        own = slice(starts_F1[f], starts_F1[f + 1])
        found, which, firings = np.unique(ids_T[tokens_N[own]], return_inverse=True, return_counts=True)
        if len(found) and (found[0] < 0 or found[-1] >= vocabulary):
            raise ValueError(f"ids_T holds ids outside a vocabulary of {vocabulary}")
        totals = np.bincount(which, values_N[own].astype(np.float64))
        best = np.lexsort((found, -totals))[:count]
        for row, all_of_it in ((ids, found), (counts, firings), (sums, totals)):
            row[f, : len(best)] = all_of_it[best]
        distinct[f] = len(found)
    return ids, counts, sums, distinct


def reference_coactivation(
    starts_F1: np.ndarray,
    tokens_N: np.ndarray,
    codes: Sequence[tuple[int, np.ndarray, np.ndarray]],
    counts_G: np.ndarray,
    spreads_G: np.ndarray,
    num_tokens: int,
    first_latent: int,
    count: int,
) -> tuple[np.ndarray, ...]:
    from scipy.sparse import csr_array

    num = len(starts_F1) - 1
    tokens_N = tokens_N[starts_F1[0] : starts_F1[-1]]
    height = max([1 + int(tokens_N.max(initial=-1)), *(first + len(starts) - 1 for first, starts, _ in codes)])
    lengths_T = np.zeros(height, np.int64)
    for first, starts, _ in codes:
        lengths_T[first : first + len(starts) - 1] = np.diff(starts)
    indices = np.concatenate([np.zeros(0, np.int32), *(latents[starts[0] : starts[-1]] for _, starts, latents in codes)])
    by_token = csr_array(
        (np.ones(len(indices), np.int64), indices, np.concatenate([[0], np.cumsum(lengths_T)])), shape=(height, len(counts_G))
    )
    by_latent = csr_array((np.ones(len(tokens_N), np.int64), tokens_N, starts_F1 - starts_F1[0]), shape=(num, height))
    latents, together, phi = np.full((num, count), -1, np.int32), np.zeros((num, count), np.int64), np.zeros((num, count))
    for i in range(num):
        row, f = by_latent[i : i + 1] @ by_token, first_latent + i
        others = row.indices != f
        g, n11 = row.indices[others], row.data[others]
        found = (n11 * num_tokens - counts_G[f] * counts_G[g]) / (spreads_G[f] * spreads_G[g])
        best = np.lexsort((g, -n11, -found))[:count]
        for rows, all_of_it in ((latents, g), (together, n11), (phi, found)):
            rows[i, : len(best)] = all_of_it[best]
    return latents, together, phi


def reference_merge_runs(runs: Sequence[Postings], first_latent: int, starts_F1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens_N, values_N = np.empty(starts_F1[-1], np.int32), np.empty(starts_F1[-1], np.float16)
    next_F = starts_F1[:-1].copy()
    for starts, tokens, values in runs:
        own = starts[first_latent : first_latent + len(starts_F1)]
        counts_F = np.diff(own)
        places_N = np.arange(own[0], own[-1]) + np.repeat(next_F - own[:-1], counts_F)
        tokens_N[places_N], values_N[places_N] = tokens[own[0] : own[-1]], values[own[0] : own[-1]]
        next_F += counts_F
    return tokens_N, values_N


def _postings(starts_F1: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray) -> Postings:
    return (
        ready("starts_F1", starts_F1, np.int64),
        ready("tokens_N", tokens_N, np.int32),
        ready("values_N", values_N, np.float16),
    )


def _at_least_one(count: int) -> None:
    if count < 1:
        raise ValueError(f"count={count}: it must be at least 1")
