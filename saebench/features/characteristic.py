"""Which features to show first: those that say most about the text around their firings, and differ from each other.

A latent's evidence is how far the tokens at its strong firings, the three before them and the one after are from the corpus as a whole,
each weighted by value, in nats; the surroundings count in full, the token itself, which is the easy part, by half. Few firings
look specific by chance, so evidence shrinks with the square root below 200 of them. One latent is taken after the other, strongest
first, skipping those whose decoder, or whose leading token, is near that of one taken before.
Shape suffixes: `T` tokens, `N` firings, `V` vocabulary, `F` d_sae, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from saebench.dictionaries import Dictionary
from saebench.features.examples import Example, top_examples
from saebench.features.scanning import blocks
from saebench.features.store import FeatureStore

MIN_FIRINGS = 50
ENOUGH_FIRINGS = 200
MAX_DENSITY = 0.02
MAX_COSINE = 0.5
STRONG = 0.3  # of the largest value
LEAD = 8  # positions at the start of a context, where there is little before a firing to see
TOKENS_SHOWN = 5


@dataclass(frozen=True)
class Feature:
    """A latent with its evidence."""

    latent: int
    density: float
    mean_value: float
    max_value: float
    examples: list[Example]
    top_tokens: list[tuple[int, float]]
    """The tokens it fires on, with their share of its summed values, largest first."""


def characteristic_features(
    dictionary: Dictionary, store: FeatureStore, count: int, examples: int = 4, around: int = 12
) -> list[Feature]:
    """The `count` most characteristic features of a dictionary, or fewer where it has no more that qualify."""
    corpus_V = np.bincount(store.ids_T) + 1.0
    corpus_V /= corpus_V.sum()
    candidates_F = (store.counts_F >= MIN_FIRINGS) & (store.density_F <= MAX_DENSITY)
    scores = [
        (evidence(store, tokens_N, values_N, corpus_V), latent)
        for block in blocks(store, latents_F=candidates_F)
        for latent, tokens_N, values_N in block
        if candidates_F[latent]
    ]
    rows_FD = dictionary.directions
    unit_FD = None if rows_FD is None else torch.nn.functional.normalize(rows_FD, dim=1)
    top_tokens_F = store.latents["top_token"].fill_null(-1).to_numpy()
    chosen: list[int] = []
    leading: set[int] = set()
    for _, latent in sorted(scores, reverse=True):
        lead = int(top_tokens_F[latent])
        if lead in leading or (unit_FD is not None and bool((unit_FD[chosen] @ unit_FD[latent] > MAX_COSINE).any())):
            continue
        chosen.append(latent)
        leading.add(lead)
        if len(chosen) == count:
            break
    return [describe_feature(store, latent, examples, around) for latent in chosen]


def evidence(store: FeatureStore, tokens_N: np.ndarray, values_N: np.ndarray, corpus_V: np.ndarray) -> float:
    """How much the text around a latent's strong firings differs from the corpus; see the head of this file."""
    strong_N = (values_N >= STRONG * values_N.max()) & (tokens_N % store.context_size >= LEAD)
    places, weights = tokens_N[strong_N], values_N[strong_N].astype(np.float64)
    if len(places) == 0:
        return 0.0

    def divergence(*offsets: int) -> float:
        around = np.minimum(places[:, None] + np.array(offsets), len(store.ids_T) - 1)
        ids, number = np.unique(store.ids_T[around], return_inverse=True)
        sums = np.bincount(number.ravel(), weights=np.repeat(weights, len(offsets)))
        shares = sums / sums.sum()
        return float(shares @ np.log(shares / corpus_V[ids]))

    total = 0.5 * divergence(0) + divergence(-3, -2, -1) + divergence(1)
    return total * min(1.0, len(places) / ENOUGH_FIRINGS) ** 0.5


def describe_feature(store: FeatureStore, latent: int, examples: int, around: int) -> Feature:
    """Gather what is shown of one latent that fires."""
    row = store.latents.slice(latent, 1).to_pylist()[0]
    tokens = store.details(latent).tokens[:TOKENS_SHOWN]
    return Feature(
        latent=latent,
        density=row["density"],
        mean_value=row["mean"],
        max_value=row["max"],
        examples=top_examples(store, latent, examples, before=around, after=around // 2, skip=LEAD),
        top_tokens=[(token, total / (row["mean"] * row["count"])) for token, _, total in tokens if total > 0],
    )
