"""Find latents and contexts: by token, by likeness, by what they do to the logits, by their figures; contexts by what fires in them.

Shape suffixes: `N` entries, `T` tokens, `C` contexts, `F` d_sae, `K` found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from saebench.errors import UserError
from saebench.features.effects import LogitEffects
from saebench.features.examples import common
from saebench.features.store import FeatureStore

GATHERED = 1 << 22  # entries that are counted at once
INFORMATIVE = 32  # latents of a query whose postings are read


@dataclass(frozen=True)
class TokenHit:
    """A latent that fires on a token of the vocabulary."""

    latent: int
    firings: int
    share_of_token: float
    """Of the token's occurrences, those on which the latent fires."""
    mean: float
    """Of its values there."""
    share_of_latent: float
    """Of the latent's firings, those on this token."""


def on_token(store: FeatureStore, token_id: int, count: int = 20) -> list[TokenHit]:
    """The latents that belong most to a token: largest product of the two shares, which is 1 where a latent fires on this token always
    and on no other. Reads the codes of all occurrences."""
    places_T = np.flatnonzero(store.ids_T == token_id)
    places_T = places_T[places_T % store.context_size > 0]
    firings_F, sums_F = np.zeros(store.d_sae, dtype=np.int64), np.zeros(store.d_sae)
    for latents_N, values_N in _codes_at(store, places_T):
        firings_F += np.bincount(latents_N, minlength=store.d_sae)
        sums_F += np.bincount(latents_N, weights=values_N, minlength=store.d_sae)
    found_K = np.flatnonzero(firings_F)
    product_K = firings_F[found_K] ** 2 / (len(places_T) * store.counts_F[found_K])
    return [
        TokenHit(
            latent=latent,
            firings=int(firings_F[latent]),
            share_of_token=float(firings_F[latent] / len(places_T)),
            mean=float(sums_F[latent] / firings_F[latent]),
            share_of_latent=float(firings_F[latent] / store.counts_F[latent]),
        )
        for latent in found_K[np.argsort(-product_K, kind="stable")[:count]].tolist()
    ]


def _codes_at(store: FeatureStore, places_T: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The entries of some ascending tokens, latents and values, a few million at a time."""
    latents, values, held = [], [], 0
    for chunk in store.chunks:
        first, last = np.searchsorted(places_T, [chunk.first_token, chunk.first_token + len(chunk.starts) - 1])
        if first == last:
            continue
        rows = places_T[first:last] - chunk.first_token
        lengths = chunk.starts[rows + 1] - chunk.starts[rows]
        entries_N = np.repeat(chunk.starts[rows] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        latents.append(chunk.latents[entries_N])
        values.append(chunk.values[entries_N].astype(np.float32) * np.float32(store.value_scale))
        held += len(entries_N)
        if held >= GATHERED:
            yield np.concatenate(latents), np.concatenate(values)
            latents, values, held = [], [], 0
    if latents:
        yield np.concatenate(latents), np.concatenate(values)


def tokens_named(store: FeatureStore, text: str, count: int = 20) -> list[int]:
    """Tokens of the vocabulary that are a text, then those that are it but for space around them or for case, then those that begin with
    it; of each kind those that stand in the corpus most often first."""
    plain = text.strip().casefold()

    def kind(token: str) -> int | None:
        if token == text:
            return 0
        folded = token.strip().casefold()
        return None if not plain else 1 if folded == plain else 2 if folded.startswith(plain) else None

    counts = store.token_counts
    found = [(k, -int(counts[i]), i) for i, token in enumerate(store.token_strings) if (k := kind(token)) is not None]
    return [i for _, _, i in sorted(found)[:count]]


@dataclass(frozen=True)
class Alike:
    """A latent like another: by what it writes, by what it reads, by when it fires. None where it is not among the nearest in that way."""

    latent: int
    cosine: float | None
    read_cosine: float | None
    phi: float | None
    jaccard: float | None


def like(store: FeatureStore, latent: int, count: int = 16) -> list[Alike]:
    """The latents listed as like one, by the largest of cosine, cosine of what is read, and phi. Raises UserError for an unknown latent."""
    details = store.details(latent)
    written, read = dict(details.neighbours), dict(details.read_neighbours)
    phi = {other: figure for other, _, figure, _ in details.coactive}
    jaccard = {other: figure for other, _, _, figure in details.coactive}
    found = [
        Alike(other, written.get(other), read.get(other), phi.get(other), jaccard.get(other))
        for other in dict.fromkeys([*written, *read, *phi])
    ]
    nearest = lambda a: max(figure for figure in (a.cosine, a.read_cosine, a.phi) if figure is not None)  # noqa: E731
    return sorted(found, key=lambda alike: (-nearest(alike), alike.latent))[:count]


@dataclass(frozen=True)
class Together:
    """How two latents fire together: tokens on which both do, the correlation of firing, and the share of both in either."""

    tokens: int
    phi: float
    jaccard: float


def together(store: FeatureStore, a: int, b: int) -> Together:
    """Exact figures of any two latents, 0 where one never fires or always. Raises UserError for an unknown latent."""
    (tokens_a, _), (tokens_b, _) = store.postings(a), store.postings(b)
    both = len(common(tokens_a, tokens_b, store.num_contexts * store.context_size)[0])
    n_a, n_b, n = len(tokens_a), len(tokens_b), store.num_tokens
    spread = float(n_a) * n_b * (n - n_a) * (n - n_b)
    return Together(both, (n * both - n_a * n_b) / spread**0.5 if spread else 0.0, both / max(1, n_a + n_b - both))


def promoting(effects: LogitEffects, token_id: int, count: int = 20, *, suppressed: bool = False) -> list[tuple[int, float]]:
    """The latents that raise (or lower) the logit of a token most, with the effect of one unit; none where there is no direct effect."""
    effect_F = effects.on(token_id)
    if effect_F is None:
        return []
    values, latents = effect_F.topk(min(count, len(effect_F)), largest=not suppressed)
    kept = (values < 0) if suppressed else (values > 0)
    return list(zip(latents[kept].tolist(), values[kept].tolist(), strict=True))


@dataclass(frozen=True)
class ContextHit:
    """A context in which much of what was asked for fires: its number, score, and what each shared latent adds to the score."""

    context: int
    score: float
    shared: list[tuple[int, float]]


def similar_contexts(
    store: FeatureStore,
    context: int | None = None,
    *,
    codes: tuple[np.ndarray, np.ndarray] | None = None,
    count: int = 10,
    exclude: Collection[int] = (),
) -> list[ContextHit]:
    """The contexts most like one of the store, or like any text given by its codes (latents [N], values [N], in any order).

    A latent's strength in a context is its largest value there as a share of its largest of all (in size). The score is
    sum_f w_f min(q_f, s_f) / sum_f w_f q_f, with q the strengths asked for, s those of the context, and w_f the log of contexts over
    those in which f fires: 1 for a context that has all of it. The sums run over the latents with the largest w q, without those that
    fire in one context only, and only their postings are read. The context itself and those to `exclude` are not listed. Raises
    UserError for an unknown context.
    """
    if codes is None:
        if context is None or not 0 <= context < store.num_contexts:
            raise UserError(f"context {context} is not one of the {store.num_contexts:,}, counted from 0")
        _, *codes_N = store.codes(context * store.context_size, (context + 1) * store.context_size)
        latents_N, values_N = codes_N
        exclude = {context, *exclude}
    else:
        latents_N, values_N = codes
    table = store.latents
    largest_F = np.maximum(np.abs(table["min"].to_numpy()), np.abs(table["max"].to_numpy()))
    contexts_F = table["contexts"].to_numpy()
    asked_K, place_N = np.unique(latents_N, return_inverse=True)
    strength_K = np.zeros(len(asked_K))
    np.maximum.at(strength_K, place_N, np.abs(values_N))
    known_K = contexts_F[asked_K] > 1
    asked_K, strength_K = asked_K[known_K], strength_K[known_K]
    strength_K = np.minimum(strength_K / largest_F[asked_K], 1)
    weight_K = np.log(store.num_contexts / contexts_F[asked_K])
    chosen = np.argsort(-weight_K * strength_K, kind="stable")[:INFORMATIVE]
    total = float((weight_K * strength_K)[chosen].sum())
    if not total:
        return []
    score_C = np.zeros(store.num_contexts)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for latent, strength, weight in zip(asked_K[chosen].tolist(), strength_K[chosen], weight_K[chosen], strict=True):
        tokens_N, values_N = store.postings(latent)
        contexts_N = tokens_N // store.context_size
        starts = np.flatnonzero(np.diff(contexts_N, prepend=-1))
        best = np.maximum.reduceat(np.abs(values_N), starts) / largest_F[latent]
        adds = weight / total * np.minimum(best, strength)
        score_C[contexts_N[starts]] += adds
        found[latent] = contexts_N[starts], adds
    score_C[list(exclude)] = 0
    order = np.argsort(-score_C, kind="stable")[:count]
    return [ContextHit(c, float(score_C[c]), _shared(found, c)) for c in order.tolist() if score_C[c] > 0]


def _shared(found: Mapping[int, tuple[np.ndarray, np.ndarray]], context: int) -> list[tuple[int, float]]:
    """What each latent adds to the score of a context, largest first."""
    shared = []
    for latent, (contexts, adds) in found.items():
        place = int(np.searchsorted(contexts, context))
        if place < len(contexts) and contexts[place] == context:
            shared.append((latent, float(adds[place])))
    return sorted(shared, key=lambda pair: -pair[1])


def filter_latents(
    table: pa.Table,
    *,
    alive: bool = True,
    token: int | Collection[int] | None = None,
    label: str | None = None,
    **ranges: tuple[float | None, float | None],
) -> np.ndarray:
    """The rows of a table of latents that pass: those that fire at all, whose top token is the one given (or one of those), whose `label`
    contains a text whatever its case, and whose figures lie in ranges, ends included: `density=(1e-5, None)`. Raises UserError for a
    column that is not in the table or has no numbers."""
    kept = np.ones(len(table), dtype=bool)
    if alive:
        kept &= table["count"].to_numpy() > 0
    if token is not None:
        tokens = [token] if isinstance(token, int) else list(token)
        kept &= np.isin(table["top_token"].fill_null(-1).to_numpy(), tokens)
    if label is not None:
        kept &= compute.match_substring(table["label"], label, ignore_case=True).fill_null(False).to_numpy()
    for name, (low, high) in ranges.items():
        if name not in table.column_names or not _is_number(table.schema.field(name).type):
            names = [field.name for field in table.schema if _is_number(field.type)]
            raise UserError(f"latents have no figure {name!r} to filter by: use one of {', '.join(names)}")
        column = table[name].cast(pa.float64()).to_numpy()
        kept &= (column >= (-np.inf if low is None else low)) & (column <= (np.inf if high is None else high))
    return np.flatnonzero(kept)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
