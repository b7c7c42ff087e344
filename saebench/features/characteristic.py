"""Which features to show first: those that say most about the token they fire on, and differ from each other.

A latent's evidence is how far the tokens it fires on (weighted by value) are from the corpus as a whole, in nats. The score is evidence
times the fourth root of its firings: a latent seen often enough to be believed, but specific. One is taken after the other, strongest
first, skipping latents whose decoder is near that of one taken before, or whose leading token is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.features.postings import Postings

MIN_FIRINGS = 50
MAX_DENSITY = 0.02
MAX_COSINE = 0.5


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
    scores = []
    for latent in ((counts_F >= MIN_FIRINGS) & (density_F <= MAX_DENSITY)).nonzero()[:, 0].tolist():
        shares_V = token_shares(postings, latent, ids_T, vocabulary)
        evidence = float(torch.special.xlogy(shares_V, shares_V / corpus_V).sum())
        scores.append((evidence * float(counts_F[latent]) ** 0.25, latent))

    W_dec = torch.nn.functional.normalize(dictionary.get_parameter("W_dec").detach(), dim=1)
    chosen: list[int] = []
    leading: set[int] = set()
    for _, latent in sorted(scores, reverse=True):
        lead = int(token_shares(postings, latent, ids_T, vocabulary).argmax())
        if lead in leading or any(float(W_dec[latent] @ W_dec[other]) > MAX_COSINE for other in chosen):
            continue
        chosen.append(latent)
        leading.add(lead)
        if len(chosen) == count:
            break
    return [describe_feature(postings, latent, examples, around, ids_T, vocabulary) for latent in chosen]


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
    for token, _ in postings.top(latent, examples):
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
