"""Contexts in which a latent fires: the strongest, a fair sample of every strength, those shared with another latent.

All of it follows from a latent's postings, so it is exact, and costs what the latent's firings cost, not what the corpus does.
Shape suffixes: `N` firings of a latent, `K` firings that were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saebench.errors import UserError
from saebench.features.store import FeatureStore

BEFORE, AFTER = 24, 12  # tokens shown around a firing
SAMPLE = 4096  # of the values of a latent, from which it is guessed where its strongest begin
DRAWN = 8  # firings that are drawn at first for each that is wanted
HALVES = 1 << 16
NOWHERE = -1


@dataclass(frozen=True, kw_only=True)
class Example:
    """A stretch of text around a firing."""

    ids: list[int]
    values: list[float]
    """The latent's value on each token, 0 where it is silent."""
    focus: int
    """Which of the tokens is the firing."""
    document: str
    token: int = NOWHERE
    """Number of the firing's token in the store, or -1 for text that is not from one."""
    first: int = NOWHERE
    """Number of the first token shown."""
    context: int = NOWHERE


@dataclass(frozen=True)
class ExampleGroup:
    """Firings of about the same strength: values from `low` to `high`, how many there are, and some of them."""

    low: float
    high: float
    firings: int
    examples: list[Example]


def window(store: FeatureStore, latent: int, token: int, before: int = BEFORE, after: int = AFTER) -> Example:
    """What stands around a token, within its context, with the values of a latent. Raises UserError for an unknown latent or token."""
    size = store.num_contexts * store.context_size
    if not 0 <= token < size:
        raise UserError(f"token {token} is not one of the {size:,}, counted from 0")
    return _show(store, *store.postings(latent), [token], before, after)[0]


def top_examples(
    store: FeatureStore,
    latent: int,
    count: int = 20,
    *,
    before: int = BEFORE,
    after: int = AFTER,
    token_id: int | None = None,
    skip: int = 0,
    offset: int = 0,
) -> list[Example]:
    """The contexts where a latent fires most strongly, each with its strongest firing; of equal ones the earlier comes first.

    `token_id` restricts firings to one token of the vocabulary, `skip` leaves out the first positions of every context, and the first
    `offset` examples are passed over. Raises UserError for an unknown latent.
    """
    tokens_N, values_N = store.postings(latent)
    places_K = _kept(store, tokens_N, token_id, skip)
    chosen_N, strengths_N = (tokens_N, values_N) if places_K is None else (tokens_N[places_K], values_N[places_K])
    places = strongest(chosen_N, strengths_N, store.context_size, offset + count)[offset:]
    return _show(store, tokens_N, values_N, chosen_N[places].tolist(), before, after)


def quantile_groups(
    store: FeatureStore,
    latent: int,
    groups: int = 5,
    per: int = 5,
    *,
    seed: int = 0,
    before: int = BEFORE,
    after: int = AFTER,
) -> list[ExampleGroup]:
    """All firings of a latent in groups of equal size by value, strongest group first, with up to `per` examples of each.

    Examples are drawn from all firings of the group alike, at most one from a context, and shown strongest first; a seed gives the same
    ones again. Sizes differ by 1 at most; of equal values the earlier counts as the lower. Raises UserError for an unknown latent.
    """
    tokens_N, values_N = store.postings(latent)
    ranks = _Ranks(values_N, store.value_scale, min(groups, len(values_N)))
    rng = np.random.default_rng([seed, latent])
    wanted = min(len(values_N), DRAWN * per * ranks.groups)
    chosen: list[dict[int, int]] = [{} for _ in range(ranks.groups)]  # context -> firing, by group

    def take(drawn_K: np.ndarray) -> None:
        contexts_K = tokens_N[drawn_K] // store.context_size
        for place, context, group in zip(drawn_K.tolist(), contexts_K.tolist(), ranks.of(drawn_K).tolist(), strict=True):
            if len(chosen[group]) < per:
                chosen[group].setdefault(context, place)

    drawn_K = rng.choice(len(values_N), wanted, replace=False)
    take(drawn_K)
    if any(len(found) < per for found in chosen):
        take(rng.permutation(np.delete(np.arange(len(values_N)), drawn_K)))
    shown = []
    for group in reversed(range(ranks.groups)):
        places = sorted(chosen[group].values(), key=lambda place: (-values_N[place], place))
        examples = _show(store, tokens_N, values_N, tokens_N[places].tolist(), before, after)
        shown.append(ExampleGroup(*ranks.extent(group), examples))
    return shown


def cofiring_examples(
    store: FeatureStore, latent: int, other: int, count: int = 10, *, before: int = BEFORE, after: int = AFTER
) -> list[Example]:
    """The contexts where two latents fire on one token most strongly, at most one from each; values are those of `latent`.

    Strength is the product of the two values, each as a share of its latent's largest. Raises UserError for an unknown latent.
    """
    (tokens_N, values_N), (other_tokens_N, other_values_N) = store.postings(latent), store.postings(other)
    places_K, other_places_K = common(tokens_N, other_tokens_N, store.num_contexts * store.context_size)
    both_K = tokens_N[places_K]
    strengths_K = _relative(values_N)[places_K] * _relative(other_values_N)[other_places_K]
    chosen = both_K[strongest(both_K, strengths_K, store.context_size, count)]
    return _show(store, tokens_N, values_N, chosen.tolist(), before, after)


def strongest(tokens_N: np.ndarray, strengths_N: np.ndarray, context_size: int, count: int) -> np.ndarray:
    """Where in ascending tokens the strongest of each context stands, for the `count` contexts whose strongest are largest: [K], strongest
    first, of equals the earlier."""
    size = len(tokens_N)
    if not size or count <= 0:
        return np.empty(0, dtype=np.int64)
    sample = np.sort(strengths_N[:: max(1, size // SAMPLE)])
    wanted = 4 * count
    while True:
        share = wanted / size * len(sample)
        floor = sample[-int(share) - 1] if share + 8 < len(sample) else -np.inf
        places_K = np.flatnonzero(strengths_N >= floor)
        places_K = places_K[np.argsort(-strengths_N[places_K], kind="stable")]
        _, first = np.unique(tokens_N[places_K] // context_size, return_index=True)
        if len(first) >= count or floor == -np.inf:
            return places_K[np.sort(first)[:count]]
        wanted *= 16


def common(tokens_N: np.ndarray, other_N: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in two lists of ascending tokens those stand that are in both: [K] in the first, [K] in the second."""
    if len(tokens_N) > len(other_N):
        return common(other_N, tokens_N, num_tokens)[::-1]
    if len(tokens_N) * 64 > num_tokens:  # looking all up one by one would take longer than marking them
        marked_T = np.zeros(num_tokens, dtype=bool)
        marked_T[tokens_N] = True
        places_K = np.flatnonzero(marked_T[other_N])
        marked_T[tokens_N] = False
        marked_T[other_N[places_K]] = True
        return np.flatnonzero(marked_T[tokens_N]), places_K
    places_N = np.searchsorted(other_N, tokens_N)
    found_N = places_N < len(other_N)
    found_N[found_N] = other_N[places_N[found_N]] == tokens_N[found_N]
    return np.flatnonzero(found_N), places_N[found_N]


class _Ranks:
    """Groups of equal size of values that are halves times a scale. There are few halves, so they are counted instead of sorted."""

    def __init__(self, values_N: np.ndarray, scale: float, groups: int):
        self.scale, self.groups = scale, groups
        bits_N = (values_N / np.float32(scale)).astype(np.float16).view(np.uint16)
        self.keys_N = np.where(bits_N >> 15, ~bits_N, bits_N | 0x8000)  # ascending with the values, as halves are not
        self.ends = np.cumsum(np.bincount(self.keys_N, minlength=HALVES))
        self.firsts = np.arange(groups + 1) * len(values_N) // max(1, groups)
        self._equal: dict[int, np.ndarray] = {}

    def of(self, places_K: np.ndarray) -> np.ndarray:
        """The groups of some values, 0 for the lowest."""
        keys_K = self.keys_N[places_K]
        low_K = np.where(keys_K > 0, self.ends[keys_K.astype(np.int64) - 1], 0)
        groups_K = self._group(low_K)
        for number in np.flatnonzero(groups_K != self._group(self.ends[keys_K] - 1)):  # equal values on both sides of a border
            key = int(keys_K[number])
            if key not in self._equal:
                self._equal[key] = np.flatnonzero(self.keys_N == key)
            groups_K[number] = self._group(low_K[number] + np.searchsorted(self._equal[key], places_K[number]))
        return groups_K

    def extent(self, group: int) -> tuple[float, float, int]:
        """Lowest and highest value of a group, and how many it has."""
        first, last = (int(i) for i in self.firsts[group : group + 2])
        return self._value(first), self._value(last - 1), last - first

    def _group(self, ranks: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.firsts, ranks, side="right") - 1

    def _value(self, rank: int) -> float:
        key = int(np.searchsorted(self.ends, rank, side="right"))
        bits = key ^ 0x8000 if key >> 15 else key ^ 0xFFFF
        return float(np.uint16(bits).view(np.float16)) * self.scale


def _kept(store: FeatureStore, tokens_N: np.ndarray, token_id: int | None, skip: int) -> np.ndarray | None:
    """Which firings are on a token and behind the first positions; None for all."""
    if token_id is None and not skip:
        return None
    kept_N = np.ones(len(tokens_N), dtype=bool)
    if token_id is not None:
        kept_N &= store.ids_T[tokens_N] == token_id
    if skip:
        kept_N &= tokens_N % store.context_size >= skip
    return np.flatnonzero(kept_N)


def _relative(values_N: np.ndarray) -> np.ndarray:
    """Values as shares of the largest in size."""
    return values_N / max(np.abs(values_N).max(initial=0), np.finfo(np.float32).tiny)


def _show(
    store: FeatureStore, tokens_N: np.ndarray, values_N: np.ndarray, chosen: list[int], before: int, after: int
) -> list[Example]:
    """Examples around some tokens, given the postings of the latent."""
    size, names = store.context_size, store.contexts.names
    documents = store.documents_of(np.array(chosen, dtype=np.int64)).tolist()
    examples = []
    for token, document in zip(chosen, documents, strict=True):
        context = token // size
        first, last = max(token - before, context * size), min(token + after + 1, (context + 1) * size)
        low, high = np.searchsorted(tokens_N, [first, last])
        values = np.zeros(last - first, dtype=np.float32)
        values[tokens_N[low:high] - first] = values_N[low:high]
        examples.append(
            Example(
                ids=store.ids_T[first:last].tolist(),
                values=values.tolist(),
                focus=token - first,
                document=names[document] if document >= 0 else "",
                token=token,
                first=first,
                context=context,
            )
        )
    return examples
