"""The corpus of a feature store as a person reads it: its documents, their contexts, what fires in a stretch of text, and what a contrast
of two sets of documents rests on.

Shape suffixes: `T` tokens, `F` d_sae, `N` entries, `S` positions of a context, `U` units (documents or contexts).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saebench.errors import UserError
from saebench.features.contrast import Difference
from saebench.features.examples import AFTER, BEFORE, Example, strongest, window
from saebench.features.store import FeatureStore

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Strong:
    """A latent that stands out in a stretch of text."""

    latent: int
    value: float
    """The largest in size there."""
    token: int
    """Number of the token on which it is largest."""
    firings: int
    share_of_largest: float
    """The value over the latent's largest of all, in size."""
    weight: float
    """The value's size times the log of contexts over those in which the latent fires, by which latents are ranked."""


def largest_values(store: FeatureStore) -> np.ndarray:
    """The largest value of every latent in the corpus, in size: [F]."""
    return np.maximum(np.abs(store.latents["min"].to_numpy()), np.abs(store.latents["max"].to_numpy()))


def strongest_in(store: FeatureStore, first: int, last: int, count: int = 20) -> list[Strong]:
    """The latents that stand out in tokens first to last (exclusive): strong there, and in few contexts; by weight."""
    starts, latents_N, values_N = store.codes(first, last)
    if not len(latents_N):
        return []
    tokens_N = first + np.repeat(np.arange(last - first), np.diff(starts))
    order_N = np.lexsort((tokens_N, -np.abs(values_N), latents_N))  # by latent, largest first
    found, begins, firings = np.unique(latents_N[order_N], return_index=True, return_counts=True)
    values, tokens = values_N[order_N][begins], tokens_N[order_N][begins]
    shares = np.abs(values) / np.maximum(largest_values(store)[found], np.finfo(np.float32).tiny)
    weights = np.abs(values) * np.log(store.num_contexts / store.latents["contexts"].to_numpy()[found])
    return [
        Strong(int(found[i]), float(values[i]), int(tokens[i]), int(firings[i]), float(shares[i]), float(weights[i]))
        for i in np.lexsort((found, -weights))[:count].tolist()
    ]


def values_in(store: FeatureStore, first: int, last: int, weights: Sequence[tuple[int, float]]) -> np.ndarray:
    """How much of some latents fires on each token first to last (exclusive): the sum of their values over their largest of all, times
    the weights given with them: [S]."""
    latents, given = (list(column) for column in zip(*weights, strict=True)) if weights else ([], [])
    weight_F = np.zeros(store.d_sae)
    weight_F[latents] = np.array(given) / np.maximum(largest_values(store)[latents], np.finfo(np.float32).tiny)
    starts, latents_N, values_N = store.codes(first, last)
    sums_N = np.concatenate([[0.0], np.cumsum(weight_F[latents_N] * np.abs(values_N))])
    return np.diff(sums_N[starts])


# --- documents ---


def tokens_by_document(store: FeatureStore) -> np.ndarray:
    """Tokens of each document in the corpus: [documents]."""
    documents_T = store.contexts.documents_NS.flatten().numpy()
    return np.bincount(documents_T[documents_T >= 0], minlength=len(store.contexts.names))


def contexts_of(store: FeatureStore, document: int) -> np.ndarray:
    """The contexts that hold tokens of a document, ascending. Raises UserError for an unknown document."""
    names = store.contexts.names
    if not 0 <= document < len(names):
        raise UserError(f"document {document} is not one of the {len(names):,}, counted from 0")
    return np.flatnonzero((store.contexts.documents_NS == document).any(1).numpy())


def names_in(store: FeatureStore, context: int) -> list[str]:
    """The documents of a context in their order. Raises UserError for an unknown context."""
    check_context(store, context)
    numbers = dict.fromkeys(store.contexts.documents_NS[context].tolist())
    return [store.contexts.names[number] for number in numbers if number >= 0]


def check_context(store: FeatureStore, context: int) -> None:
    if not 0 <= context < store.num_contexts:
        raise UserError(f"context {context} is not one of the {store.num_contexts:,}, counted from 0")


def common_parts(names: Sequence[str], count: int = 8) -> list[tuple[str, int]]:
    """Parts of names that some documents have and some have not, with how many have them; those of most documents first, and of several
    that the same documents have the first in their names. They are what a set of documents can be chosen by."""
    having: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        for part in dict.fromkeys(re.findall(r"[^\W\d_]{3,}", name.lower())):
            having.setdefault(part, []).append(number)
    by_documents: dict[tuple[int, ...], str] = {}
    for part, numbers in having.items():
        if 2 <= len(numbers) <= len(names) - 2:
            by_documents.setdefault(tuple(numbers), part)
    found = [(part, len(numbers)) for numbers, part in by_documents.items()]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:count]


# --- contrasts ---


def count_units(store: FeatureStore, mask: np.ndarray, unit: str) -> int:
    """How many of the documents [documents, bool] have tokens on which something can fire; or how many stretches within one context
    they have, where `unit` is context."""
    inner_NS = store.contexts.documents_NS[:, 1:].numpy()
    wanted_NS = (inner_NS >= 0) & mask[inner_NS]
    if unit == "document":
        return len(np.unique(inner_NS[wanted_NS]))
    changes_NS = np.ones_like(wanted_NS)
    changes_NS[:, 1:] = (inner_NS[:, 1:] != inner_NS[:, :-1]) | ~wanted_NS[:, :-1]
    return int((wanted_NS & changes_NS).sum())


def interval(difference: Difference, units: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of the difference of two rates, rate_a - rate_b, by Student's t; `units` is the number of documents (or
    contexts) of the smaller set. nan where the rates are equal."""
    from scipy.special import stdtrit

    gap = difference.rate_a - difference.rate_b
    if not difference.z:
        return float("nan"), float("nan")
    reach = float(stdtrit(units - 1, 0.5 + confidence / 2)) * abs(gap / difference.z)
    return gap - reach, gap + reach


def examples_in(
    store: FeatureStore, latent: int, mask: np.ndarray, count: int = 6, *, before: int = BEFORE, after: int = AFTER
) -> list[Example]:
    """The strongest firings of a latent in some documents [documents, bool], at most one from each context. Raises UserError for an unknown
    latent."""
    tokens_N, values_N = store.postings(latent)
    documents_N = store.documents_of(tokens_N)
    inside_N = np.flatnonzero((documents_N >= 0) & mask[documents_N])
    places = strongest(tokens_N[inside_N], np.abs(values_N[inside_N]), store.context_size, count)
    return [window(store, latent, token, before, after) for token in tokens_N[inside_N][places].tolist()]


# --- texts that are in no store ---


def paragraphs(text: str) -> list[str]:
    """The parts of a text between empty lines."""
    return [part.strip("\n") for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]
