"""Which features to show first: those that say most about the text around their firings, and differ from each other.

A latent's evidence is how far the tokens at its strong firings, the three before them and the one after are from the corpus as a whole,
each weighted by value, in nats; the surroundings count in full, the token itself, which is the easy part, by half. Few firings
look specific by chance, so evidence shrinks with the square root below 200 of them. One latent is taken after the other, strongest
first, skipping those whose decoder, or whose leading token, is near that of one taken before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.features.postings import Postings

MIN_FIRINGS = 50
ENOUGH_FIRINGS = 200
MAX_DENSITY = 0.02
MAX_COSINE = 0.5
STRONG = 0.3  # of the largest value
LEAD = 8  # positions at the start of a context, where there is little before a firing to see


@dataclass(frozen=True)
class Example:
    """A stretch of text around a firing: token ids, the value at each (0 where silent), which one is the firing, and the document."""

    ids: list[int]
    values: list[float]
    focus: int
    document: str


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
    dictionary: Dictionary, postings: Postings, count: int, examples: int = 4, around: int = 12
) -> list[Feature]:
    """The `count` most characteristic features of a dictionary, or fewer where it has no more that qualify."""
    ids_T = postings.contexts.ids_NS.flatten().long()
    vocabulary = int(ids_T.max()) + 1
    corpus_V = torch.bincount(ids_T, minlength=vocabulary).double() + 1
    corpus_V /= corpus_V.sum()
    counts_F, density_F = postings.counts_F, postings.density_F()
    candidates = ((counts_F >= MIN_FIRINGS) & (density_F <= MAX_DENSITY)).nonzero()[:, 0].tolist()
    scores = [(evidence(postings, latent, ids_T, corpus_V), latent) for latent in candidates]

    rows_FD = dictionary.directions
    unit_FD = None if rows_FD is None else torch.nn.functional.normalize(rows_FD, dim=1)
    chosen: list[int] = []
    leading: set[int] = set()
    for _, latent in sorted(scores, reverse=True):
        lead = int(token_shares(postings, latent, ids_T, vocabulary).argmax())
        if lead in leading or (unit_FD is not None and bool((unit_FD[chosen] @ unit_FD[latent] > MAX_COSINE).any())):
            continue
        chosen.append(latent)
        leading.add(lead)
        if len(chosen) == count:
            break
    return [describe_feature(postings, latent, examples, around, ids_T, vocabulary) for latent in chosen]


def evidence(postings: Postings, latent: int, ids_T: Tensor, corpus_V: Tensor) -> float:
    """How much the text around a latent's strong firings differs from the corpus; see the head of this file."""
    tokens, values = postings.of(latent)
    strong = (values >= STRONG * values.max()) & (tokens % postings.contexts.context_size >= LEAD)
    places, weights = tokens[strong].long(), values[strong].double()
    if len(places) == 0:
        return 0.0

    def divergence(offsets: tuple[int, ...]) -> float:
        shares_V = torch.zeros_like(corpus_V)
        for offset in offsets:
            shares_V.index_add_(0, ids_T[(places + offset).clamp(max=len(ids_T) - 1)], weights)
        shares_V /= shares_V.sum()
        return float(torch.special.xlogy(shares_V, shares_V / corpus_V.clamp_min(1e-300)).sum())

    total = 0.5 * divergence((0,)) + divergence((-3, -2, -1)) + divergence((1,))
    return total * min(1.0, len(places) / ENOUGH_FIRINGS) ** 0.5


def token_shares(postings: Postings, latent: int, ids_T: Tensor, vocabulary: int) -> Tensor:
    """How the summed values of a latent are spread over the tokens of the vocabulary: [V], sums to 1."""
    tokens, values = postings.of(latent)
    shares_V = torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, ids_T[tokens.long()], values.double())
    return shares_V / shares_V.sum()


def describe_feature(postings: Postings, latent: int, examples: int, around: int, ids_T: Tensor, vocabulary: int) -> Feature:
    """Gather what is shown of one latent."""
    tokens, values = postings.of(latent)
    by_token = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    size = postings.contexts.context_size
    shown = []
    for token, _ in postings.top(latent, examples, skip=LEAD):
        first = max(token - around, token // size * size)
        last = min(token + around // 2 + 1, (token // size + 1) * size)
        document = int(postings.contexts.documents_NS.flatten()[token])
        shown.append(
            Example(
                ids=ids_T[first:last].tolist(),
                values=[by_token.get(t, 0.0) for t in range(first, last)],
                focus=token - first,
                document=postings.contexts.names[document] if document >= 0 else "",
            )
        )
    shares = token_shares(postings, latent, ids_T, vocabulary).topk(min(5, vocabulary))
    return Feature(
        latent=latent,
        density=float(postings.density_F()[latent]),
        mean_value=float(values.mean()),
        max_value=float(values.max()),
        examples=shown,
        top_tokens=[(int(i), float(v)) for v, i in zip(shares.values, shares.indices, strict=True) if v > 0],
    )
