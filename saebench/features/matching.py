"""Which latents of one dictionary are latents of another too.

Two latents are alike by what they write, where both dictionaries write the same sites of the same model: the cosine of their decoder rows.
Or by when they fire, where both have a feature store over the same tokens: phi, the correlation of firing, with T tokens on which a and b
fire n_a and n_b times and both at once n_ab times

    phi = (n_ab T - n_a n_b) / sqrt(n_a (T - n_a) n_b (T - n_b))

The nearest of a latent is the one of the other dictionary with the largest figure above zero (of equals the one with more tokens in common,
then the lowest number). A pair matches
where each is the nearest of the other, so no latent is in two pairs. Only latents that are alive take part. Dictionaries too large to be
compared whole are compared for latents drawn evenly: each drawn one is held against all of the other side, and the nearest of those found
against all of its own, so what is said of a drawn latent is exact.
Shape suffixes: `F` d_sae, `D` width, `M` latents of one dictionary that were looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.effects import Neighbours, largest
from saebench.features.examples import common
from saebench.features.scanning import blocks
from saebench.features.search import Together
from saebench.features.store import FeatureStore
from saebench.kernels.posting_statistics import coactivation

NONE = -1
ROWS = 1024  # latents whose cosines are taken at once
PRODUCTS = 2e11  # multiplications of one direction of a comparison by cosine: some seconds on a small machine
MEETINGS = 1e9  # pairs of firings on the same token that one direction of a comparison by phi goes through

Nearest = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Takes latents of one dictionary, ascending [M]; gives their nearest of the other [M] int64, -1 for none, and how alike [M]."""


@dataclass(frozen=True)
class Side:
    """What was found for latents of one of the two dictionaries."""

    latents_M: np.ndarray
    """Those looked at, ascending: all that are alive, or drawn from them."""
    alive: int
    nearest_M: np.ndarray
    """The nearest of each in the other dictionary, -1 where none is above zero."""
    similarity_M: np.ndarray
    """How alike they are: cosine or phi, 0 where there is none."""
    mutual_M: np.ndarray
    """Whether the nearest has this one as its nearest."""

    def matched(self, least: float) -> np.ndarray:
        """Which of them are in a pair at least so much alike: [M] bool."""
        return self.mutual_M & (self.similarity_M >= least)

    def shared(self, least: float) -> np.ndarray:
        """Which have a nearest at least so much alike, which itself is nearer to another: [M] bool."""
        return ~self.mutual_M & (self.similarity_M >= least)

    def unmatched(self, least: float) -> np.ndarray:
        """Which have nothing so much alike in the other dictionary: [M] bool."""
        return self.similarity_M < least


@dataclass(frozen=True)
class Matching:
    """Two dictionaries, each latent looked at with its nearest in the other."""

    a: Side
    b: Side

    @property
    def complete(self) -> bool:
        """Whether all latents that are alive were looked at."""
        return all(len(side.latents_M) == side.alive for side in (self.a, self.b))

    def pairs(self, least: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The matched pairs at least so much alike, most alike first: latents of a [N], of b [N], cosine or phi [N]. Of dictionaries that
        were not compared whole, those that a latent drawn from a is in."""
        kept = np.flatnonzero(self.a.matched(least))
        kept = kept[np.argsort(-self.a.similarity_M[kept], kind="stable")]
        return self.a.latents_M[kept], self.a.nearest_M[kept], self.a.similarity_M[kept]


# --- by what they write ---


def check_directions(a: Dictionary, b: Dictionary) -> None:
    """Raises UserError where what two dictionaries write cannot be compared, with the reason."""
    for dictionary in (a, b):
        if dictionary.directions is None:
            raise UserError(f"{dictionary.config.architecture!r} does not write one vector for each latent")
    if a.config.writes != b.config.writes:
        raise UserError(f"they write different sites, {' + '.join(a.config.writes)} and {' + '.join(b.config.writes)}")
    if a.config.blocks_out != b.config.blocks_out:
        raise UserError(f"they write different widths, {sum(a.config.blocks_out)} and {sum(b.config.blocks_out)}")


def cosine(a: Dictionary, latent_a: int, b: Dictionary, latent_b: int) -> float:
    """Of what two latents write. Raises UserError as `check_directions` does."""
    check_directions(a, b)
    assert a.directions is not None and b.directions is not None
    return float(torch.nn.functional.cosine_similarity(a.directions[latent_a].double(), b.directions[latent_b].double(), dim=0))


def match_directions(
    a: Dictionary,
    b: Dictionary,
    alive_a_F: np.ndarray | None = None,
    alive_b_F: np.ndarray | None = None,
    *,
    budget: float = PRODUCTS,
    seed: int = 0,
) -> Matching:
    """Match two dictionaries by the cosine of what their latents write, over those that are alive [F, bool]; by default all are.

    Where all against all would take more than `budget` multiplications, latents are drawn with `seed`. Raises UserError as
    `check_directions` does.
    """
    check_directions(a, b)
    alive = [
        np.arange(d.config.d_sae) if mask_F is None else np.flatnonzero(mask_F) for d, mask_F in ((a, alive_a_F), (b, alive_b_F))
    ]
    rows = [Neighbours(d.directions).unit_FD for d in (a, b)]
    cost = [float(sum(a.config.blocks_out) * len(alive[1 - side])) for side in (0, 1)]
    drawn = [_draw(alive[side], budget / max(cost[side], 1), seed + side) for side in (0, 1)]
    return _matching(alive, drawn, (_by_cosine(rows[0], rows[1], alive[1]), _by_cosine(rows[1], rows[0], alive[0])))


def _by_cosine(rows_FD: Tensor, other_FD: Tensor, others: np.ndarray) -> Nearest:
    other_MD = other_FD if len(others) == len(other_FD) else other_FD[torch.from_numpy(others)]

    def nearest(latents_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found_M, cosine_M = np.full(len(latents_M), NONE, dtype=np.int64), np.zeros(len(latents_M))
        for start in range(0, len(latents_M) if len(others) else 0, ROWS):
            part = slice(start, start + ROWS)
            places_MK, cosines_MK = largest(rows_FD[torch.from_numpy(latents_M[part])], other_MD, 1)
            place_M = places_MK[:, 0].numpy()
            found_M[part] = np.where(place_M == NONE, NONE, others[place_M])
            cosine_M[part] = cosines_MK[:, 0].double().clamp(0, 1).numpy()
        return found_M, cosine_M

    return nearest


# --- by when they fire ---


def check_tokens(a: FeatureStore, b: FeatureStore) -> None:
    """Raises UserError where two stores are not over the same tokens, in which case firings cannot be compared."""
    if (a.num_contexts, a.context_size) != (b.num_contexts, b.context_size) or not np.array_equal(a.ids_T, b.ids_T):
        raise UserError(
            f"their feature stores are over different tokens ({a.num_contexts:,} contexts of {a.context_size}, {b.num_contexts:,} of "
            f"{b.context_size}): index both over the same"
        )


def match_firings(a: FeatureStore, b: FeatureStore, *, budget: float = MEETINGS, seed: int = 0) -> Matching:
    """Match the latents of two stores over the same tokens by the correlation of their firing.

    Where going through all firings that meet on a token would take more than `budget` of them, latents are drawn with `seed`. Beside the
    stores' own pages, memory holds about a million postings. Raises UserError for stores over different tokens.
    """
    check_tokens(a, b)
    stores = (a, b)
    alive = [np.flatnonzero(store.counts_F) for store in stores]
    drawn = []
    for side, (store, other) in enumerate(((a, b), (b, a))):
        cost = store.num_entries / max(1, len(alive[side])) * other.num_entries / max(1, other.num_tokens)
        drawn.append(_draw(alive[side], budget / max(cost, 1), seed + side))
    return _matching(alive, drawn, (_by_phi(a, b), _by_phi(b, a)))


def _by_phi(store: FeatureStore, other: FeatureStore) -> Nearest:
    def nearest(latents_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted_F = np.zeros(store.d_sae, dtype=bool)
        wanted_F[latents_M] = True
        found_F, phi_F = np.full(store.d_sae, NONE, dtype=np.int64), np.zeros(store.d_sae)
        for block in blocks(store, values=False, latents_F=wanted_F):
            inside = np.flatnonzero(wanted_F[block.first : block.first + len(block.starts) - 1])
            parts = [block.tokens_N[block.starts[i] : block.starts[i + 1]] for i in inside]
            starts, latents = np.concatenate([[0], np.cumsum([len(part) for part in parts])]), inside + block.first
            # to the kernel, these latents are more latents of the other dictionary, numbered behind its own
            counts = np.concatenate([other.counts_F, store.counts_F[latents]])
            best = coactivation(starts, np.concatenate(parts), other.chunks, counts, store.num_tokens, other.d_sae, 1)
            kept = (best.latents[:, 0] != NONE) & (best.phi[:, 0] > 0)
            found_F[latents[kept]], phi_F[latents[kept]] = best.latents[kept, 0], best.phi[kept, 0]
        return found_F[latents_M], phi_F[latents_M]

    return nearest


def fire_together(a: FeatureStore, latent_a: int, b: FeatureStore, latent_b: int) -> Together:
    """How a latent of one store and one of another fire together. Raises UserError for stores over different tokens and for an unknown
    latent."""
    check_tokens(a, b)
    (tokens_a, _), (tokens_b, _) = a.postings(latent_a), b.postings(latent_b)
    both = len(common(tokens_a, tokens_b, a.num_contexts * a.context_size)[0])
    n_a, n_b, n = len(tokens_a), len(tokens_b), a.num_tokens
    spread = float(n_a) * n_b * (n - n_a) * (n - n_b)
    return Together(both, (n * both - n_a * n_b) / spread**0.5 if spread else 0.0, both / max(1, n_a + n_b - both))


# --- both ---


def _draw(latents: np.ndarray, count: float, seed: int) -> np.ndarray:
    """So many of the latents, evenly, ascending; all where they are no more."""
    if len(latents) <= count:
        return latents
    return np.sort(np.random.default_rng(seed).choice(latents, max(1, round(count)), replace=False))


def _matching(alive: Sequence[np.ndarray], drawn: Sequence[np.ndarray], nearest: tuple[Nearest, Nearest]) -> Matching:
    found = [nearest[side](drawn[side]) for side in (0, 1)]
    sides = []
    for side in (0, 1):
        partners_M, similarity_M = found[side]
        asked, (back, _) = drawn[1 - side], found[1 - side]
        unknown = np.setdiff1d(partners_M[partners_M != NONE], asked)
        if len(unknown):
            more, _ = nearest[1 - side](unknown)
            asked, back = np.concatenate([asked, unknown]), np.concatenate([back, more])
        order = np.argsort(asked)
        place_M = np.searchsorted(asked, partners_M, sorter=order).clip(max=max(0, len(asked) - 1))
        mutual_M = np.zeros(len(partners_M), dtype=bool)
        if len(asked):
            mutual_M = (partners_M != NONE) & (back[order[place_M]] == drawn[side])
        sides.append(Side(drawn[side], len(alive[side]), partners_M, similarity_M, mutual_M))
    return Matching(*sides)
