"""Which latents tell two sets of documents apart: the themes of a collection, and what separates it from another.

A latent's rate in a set is its firings over the tokens of the set. Firings within a document are not independent, so chance is judged by
documents, never by tokens. With x_d the firings and n_d the tokens of document d, and r the rate, the squared standard error of
r_a - r_b is the larger of two:

    sum over both sets of D/(D - 1) * sum_d (x_d - r n_d)^2 / (sum_d n_d)^2             documents about the rate of their own set
    (N / (N_a N_b))^2 * D_a D_b / (D (D - 1)) * sum_d (x_d - r n_d)^2                   all documents about the common rate

The first holds for sets of unequal spread; the second is the variance over all ways to deal the documents out to sets of these sizes, and
guards where a set is small and the first sees too little: a latent that none of three documents has. z = (r_a - r_b) / standard error is
compared with Student's t of min(D_a, D_b) - 1 degrees of freedom; q is the false discovery rate of Benjamini and Hochberg at that p.
Where a text is one long document, contexts can take the place of documents; then figures hold for these texts, not for others like them.
Shape suffixes: `T` tokens, `U` units (documents or contexts), `F` d_sae, `N` entries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Literal

import numpy as np

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.prompts import PIECE, encode_pieces, text_pieces
from saebench.features.scanning import blocks
from saebench.features.store import FeatureStore
from saebench.kernels.unit_sums import unit_sums
from saebench.lm import LanguageModel

MIN_FIRINGS = 10
NEITHER = -1
Unit = Literal["document", "context"]


@dataclass(frozen=True)
class Difference:
    """How often a latent fires in two sets of documents, a and b."""

    latent: int
    firings_a: int
    firings_b: int
    units_a: int
    """Documents (or contexts) of a in which it fires."""
    units_b: int
    rate_a: float
    """Firings per token."""
    rate_b: float
    log_ratio: float
    """log2 of the rates' ratio, half a firing added to each count: 1 means twice as often in a."""
    z: float
    """Difference of the rates over its standard error, by documents; above zero where it fires more in a."""
    p: float
    """Two-sided, of such a difference by chance."""
    q: float
    """Share of false ones among the latents that are at least as different, at most."""


def document_sets(store: FeatureStore, pattern: str) -> np.ndarray:
    """Which documents have a name like a pattern, [documents] bool: `*.py`, `docs/*`; or a part of the name, where the pattern has no
    `*` or `?`; several, separated by `|`. Whatever the case."""
    parts = [part.strip() for part in pattern.split("|") if part.strip()]
    wild = [part if set(part) & set("*?[") else f"*{part}*" for part in parts]
    found = re.compile("|".join(translate(part) for part in wild) or r"(?!)", re.IGNORECASE)
    return np.array([found.match(name) is not None for name in store.contexts.names], dtype=bool)


def contrast(
    store: FeatureStore,
    a: np.ndarray,
    b: np.ndarray,
    count: int = 50,
    min_firings: int = MIN_FIRINGS,
    *,
    unit: Unit = "document",
) -> list[Difference]:
    """The latents whose rates differ most surely between two sets of documents [documents, bool], by |z|; those with fewer than
    `min_firings` in both together are left out. Reads all postings once, in blocks.

    Raises UserError for sets that overlap, or have fewer than two documents (or contexts) with tokens.
    """
    return _counted(store, a, b, unit).differences(count, min_firings)


def themes(
    store: FeatureStore,
    mask: np.ndarray,
    count: int = 50,
    min_firings: int = MIN_FIRINGS,
    *,
    unit: Unit = "document",
) -> list[Difference]:
    """The latents that fire more in some documents [documents, bool] than in all others, by z. Raises UserError as `contrast` does."""
    return _counted(store, mask, ~mask, unit).differences(count, min_firings, more_in_a=True)


def contrast_texts(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    count: int = 50,
    min_firings: int = MIN_FIRINGS,
    *,
    sites: Sequence[str] | None = None,
    context_size: int = PIECE,
) -> list[Difference]:
    """The same for texts that are in no store: each is a document. Runs the model on all of them, in contexts of `context_size` tokens.
    Raises UserError for fewer than two texts with tokens on a side."""
    pieces = text_pieces(lm, [*texts_a, *texts_b], context_size)
    numbers = [number for number, ids in pieces for _ in ids[1:]]  # nothing fires on the first token of a piece
    sizes_U = np.bincount(numbers, minlength=len(texts_a) + len(texts_b))
    counts = _Counts(dictionary.config.d_sae, sizes_U, np.arange(len(sizes_U)) < len(texts_a), "text")
    latents, tokens = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
    first_tokens = np.cumsum([0, *(len(ids) for _, ids in pieces)])
    for places_N, positions_N, latents_N, _ in encode_pieces(lm, dictionary, pieces, sites):
        latents.append(latents_N)
        tokens.append(first_tokens[places_N] + positions_N)
    latents_N, tokens_N = np.concatenate(latents), np.concatenate(tokens)
    order_N = np.lexsort((tokens_N, latents_N))
    starts = np.searchsorted(latents_N[order_N], np.arange(dictionary.config.d_sae + 1))
    units_T = np.repeat([number for number, _ in pieces], [len(ids) for _, ids in pieces]).astype(np.int32)
    counts.add(0, starts, tokens_N[order_N].astype(np.int32), units_T)
    return counts.differences(count, min_firings)


def _counted(store: FeatureStore, a: np.ndarray, b: np.ndarray, unit: str) -> _Counts:
    """The sums over a store for two sets of documents."""
    if (a & b).any():
        name = store.contexts.names[int(np.flatnonzero(a & b)[0])]
        raise UserError(f"{int((a & b).sum())} documents are in both sets ({name!r} is one): make the sets exclude each other")
    units_T, documents_U = _units(store, a | b, unit)
    sizes_U = np.bincount(units_T[units_T >= 0], minlength=len(documents_U))
    counts = _Counts(store.d_sae, sizes_U, a[documents_U], unit)
    for block in blocks(store, values=False):
        counts.add(block.first, block.starts, block.tokens_N, units_T)
    return counts


def _units(store: FeatureStore, wanted: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """The unit of every token, -1 for tokens of documents that are not wanted and for those on which nothing can fire: [T] int32; and the
    document of every unit [U]."""
    documents_T = store.contexts.documents_NS.flatten().numpy()
    numbers = np.full(len(wanted) + 1, NEITHER, dtype=np.int32)  # the last is for tokens of no document
    numbers[np.flatnonzero(wanted)] = np.arange(wanted.sum())
    units_T = numbers[documents_T]
    units_T[:: store.context_size] = NEITHER
    documents_U = np.flatnonzero(wanted)
    if unit == "context":
        inside = np.flatnonzero(units_T >= 0)
        begins = np.diff(units_T[inside], prepend=NEITHER) != 0
        begins |= np.diff(inside // store.context_size, prepend=-1) != 0
        documents_U = documents_U[units_T[inside[begins]]]
        units_T[inside] = np.cumsum(begins, dtype=np.int32) - 1
    return units_T, documents_U


class _Counts:
    """The sums of `unit_sums` for each latent and set, and what follows from them. `sizes_U` are tokens n, `in_a_U` says
    which set a unit is of."""

    def __init__(self, d_sae: int, sizes_U: np.ndarray, in_a_U: np.ndarray, unit: str):
        self.in_a_U, self.sizes_U = in_a_U, sizes_U
        some_U = sizes_U > 0
        self.units = np.array([(some_U & in_a_U).sum(), (some_U & ~in_a_U).sum()])
        if self.units.min() < 2:
            raise UserError(
                f"a set with {self.units.min()} {unit}s cannot be told from chance: give at least two {unit}s on each side"
                + (', or compare contexts (unit="context")' if unit == "document" else "")
            )
        self.n, self.nn = (
            np.array([total[in_a_U].sum(), total[~in_a_U].sum()], dtype=np.float64)
            for total in (sizes_U, sizes_U.astype(float) ** 2)
        )
        self.sums_42F = np.zeros((4, 2, d_sae))

    def add(self, first: int, starts: np.ndarray, tokens_N: np.ndarray, units_T: np.ndarray) -> None:
        """Take in all postings of neighbouring latents, given the unit of every token (-1 for none)."""
        self.sums_42F[..., first : first + len(starts) - 1] = unit_sums(starts, tokens_N, units_T, self.in_a_U, self.sizes_U)

    def differences(self, count: int, min_firings: int, more_in_a: bool = False) -> list[Difference]:
        """The latents that differ most surely, or of those only the ones that fire more in a."""
        from scipy.special import stdtr

        tested = np.flatnonzero(self.sums_42F[0].sum(0) >= max(1, min_firings))
        x, xx, xn, fires = self.sums_42F[..., tested]
        n, nn = self.n[:, None], self.nn[:, None]
        rates = x / n
        z = (rates[0] - rates[1]) / np.maximum(self._error(x, xx, xn, n, nn), 1e-300)
        p = 2 * stdtr(self.units.min() - 1, -np.abs(z))
        q = false_discovery_rates(p)
        log_ratio = np.log2((x[0] + 0.5) / (n[0] + 1)) - np.log2((x[1] + 0.5) / (n[1] + 1))
        order = np.lexsort((tested, -np.abs(log_ratio), -z if more_in_a else -np.abs(z)))
        order = order[z[order] > 0][:count] if more_in_a else order[:count]
        return [
            Difference(
                latent=int(tested[i]),
                firings_a=int(x[0, i]),
                firings_b=int(x[1, i]),
                units_a=int(fires[0, i]),
                units_b=int(fires[1, i]),
                rate_a=float(rates[0, i]),
                rate_b=float(rates[1, i]),
                log_ratio=float(log_ratio[i]),
                z=float(z[i]),
                p=float(p[i]),
                q=float(q[i]),
            )
            for i in order.tolist()
        ]

    def _error(self, x: np.ndarray, xx: np.ndarray, xn: np.ndarray, n: np.ndarray, nn: np.ndarray) -> np.ndarray:
        """The standard error of the difference of the rates; see the head of this file. All [2, latents] and [2, 1]."""
        units = self.units[:, None]
        rates, common = x / n, x.sum(0) / n.sum()
        own = units / (units - 1) * np.maximum(xx - 2 * rates * xn + rates**2 * nn, 0) / n**2
        spread = np.maximum(xx.sum(0) - 2 * common * xn.sum(0) + common**2 * nn.sum(), 0)
        dealt = units.prod() / (units.sum() * (units.sum() - 1)) * (n.sum() / n.prod()) ** 2 * spread
        return np.sqrt(np.maximum(own.sum(0), dealt))


def false_discovery_rates(p: np.ndarray) -> np.ndarray:
    """For each of some p-values the least level at which Benjamini and Hochberg's procedure counts it as a discovery."""
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q
