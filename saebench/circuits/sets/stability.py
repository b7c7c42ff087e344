"""How alike the graphs of several prompts are: weighted Jaccard of all pairs, against what chance would give.

For two prompts with figures a and b (influence of nodes, or what edges carry)

    J = sum min(a, b) / sum max(a, b)

which is 1 for equal graphs and 0 for graphs with nothing in common; the score is the mean over pairs. Its interval is a bootstrap over
prompts in which a prompt drawn twice makes no pair with itself; fewer than five prompts have none. Two things it can be held against:

    chance      each prompt's latents replaced by others drawn from their dictionary: what is shared when figures stay as they are and
                which latent has them means nothing. Tokens, errors and targets stay. It is a low bar, since some latents are everywhere.
    control     pairs of one prompt of this set with one of another: what is shared with unrelated prompts. The p-value is of a test that
                deals the prompts out to two sets of these sizes.

Shape suffixes: `P` prompts, `R` draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from saebench.circuits.intervals import DRAWS, LEAST, SEED, Estimate, draw, tails
from saebench.circuits.sets.graph_sets import SHIFT, Entries, GraphSet, Of
from saebench.errors import UserError

DEALS = 100  # of latents


@dataclass(frozen=True)
class Stability:
    """Of the graphs of a set of prompts."""

    of: str
    prompts: int
    weighted: Estimate
    """Mean weighted Jaccard of pairs."""
    plain: Estimate
    """The same with presence in place of figures: what two prompts share of what either has."""
    chance: Estimate
    """Mean of `weighted` over deals of the latents, and the range that holds 95 % of them."""
    chance_p: float
    """Of so much by such a deal."""
    between: Estimate
    """Mean weighted Jaccard with prompts of the control; NaN where there is none."""
    excess: Estimate
    """`weighted` less `between`."""
    between_p: float
    """One-sided, of such an excess where the two sets are dealt out at random."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data: estimates as [value, low, high], NaN as None."""
        out: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            if isinstance(value, Estimate):
                out[name] = value.as_list()
            else:
                out[name] = None if isinstance(value, float) and math.isnan(value) else value
        return out


def stability(graphs: GraphSet, of: Of = "features", *, control: GraphSet | None = None, seed: int = SEED) -> Stability:
    """The stability of features, of all nodes, or of edges. Raises UserError for fewer than two prompts, and for a control of other
    dictionaries."""
    count = len(graphs)
    if count < 2:
        raise UserError("one graph has nothing to be compared with: give at least two prompts")
    entries = graphs.entries(of)
    weighted_PP, plain_PP = jaccard(entries, count), jaccard(_ones(entries), count)
    dealt_R = _dealt(graphs, of, seed)
    mean = _mean(weighted_PP)
    chance = Estimate(float(dealt_R.mean()), *np.quantile(dealt_R, (0.025, 0.975)).tolist())
    chance_p = float((1 + (dealt_R >= mean - 1e-12).sum()) / (1 + len(dealt_R)))
    between, excess, p = Estimate(math.nan), Estimate(math.nan), math.nan
    if control is not None:
        both = GraphSet([*graphs.graphs, *control.graphs], positions=graphs.positions)
        between, excess, p = _against(jaccard(both.entries(of), len(both)), count, seed)
    return Stability(
        of, count, Estimate(mean, *_interval(weighted_PP, seed)), Estimate(_mean(plain_PP), *_interval(plain_PP, seed)),
        chance, chance_p, between, excess, p,
    )  # fmt: skip


def jaccard(entries: Entries, prompts: int) -> np.ndarray:
    """The weighted Jaccard of all pairs of prompts: [P, P]; that of two without anything is 0."""
    least_PP = np.zeros((prompts, prompts))
    for step in range(1, prompts):  # entries are sorted by item, and an item is in a prompt once
        same = np.flatnonzero(entries.items[:-step] == entries.items[step:])
        if not len(same):
            break
        smaller = np.minimum(entries.figures[same], entries.figures[same + step])
        np.add.at(least_PP, (entries.prompts[same], entries.prompts[same + step]), smaller)
    least_PP += least_PP.T
    sum_P = np.bincount(entries.prompts, weights=entries.figures, minlength=prompts)
    np.fill_diagonal(least_PP, sum_P)
    most_PP = sum_P[:, None] + sum_P - least_PP
    return np.divide(least_PP, most_PP, out=np.zeros_like(least_PP), where=most_PP > 0)


def _ones(entries: Entries) -> Entries:
    return Entries(entries.prompts, entries.items, np.ones(len(entries.items)), entries.weights)


def _mean(J_PP: np.ndarray) -> float:
    """Over pairs of different prompts."""
    return float(J_PP[np.triu_indices(len(J_PP), 1)].mean())


def _interval(J_PP: np.ndarray, seed: int) -> tuple[float, float]:
    count = len(J_PP)
    if count < LEAST:
        return math.nan, math.nan
    drawn_R = _drawn(J_PP, draw(count, DRAWS, seed))
    low, high = np.quantile(drawn_R[np.isfinite(drawn_R)], tails(count))
    return float(low), float(high)


def _drawn(J_PP: np.ndarray, counts_RP: np.ndarray) -> np.ndarray:
    """Mean over pairs of different prompts in each draw: [R]; NaN where one prompt alone was drawn."""
    apart_PP = 1.0 - np.eye(len(J_PP))
    pairs_R = ((counts_RP @ apart_PP) * counts_RP).sum(1)
    sums_R = ((counts_RP @ (J_PP * apart_PP)) * counts_RP).sum(1)
    return np.divide(sums_R, pairs_R, out=np.full(len(pairs_R), np.nan), where=pairs_R > 0)


def _dealt(graphs: GraphSet, of: Of, seed: int) -> np.ndarray:
    """The score with each prompt's latents replaced by others: [deals]."""
    rng = np.random.default_rng(seed)
    entries, count = graphs.entries(of), len(graphs)
    if of == "edges":
        codes = graphs.edge_codes[entries.items]
        ends = [codes >> SHIFT, codes & ((1 << SHIFT) - 1)]
    else:
        ends = [entries.items]
    latents = [_Latents(graphs, prompt) for prompt in range(count)]
    mean_R = np.zeros(DEALS)
    for number in range(DEALS):
        new_PK = np.stack([each.replaced(rng) for each in latents])
        items = np.zeros(len(entries.items), dtype=np.int64)
        for end in ends:
            items = (items << SHIFT) | new_PK[entries.prompts, end]
        order = np.argsort(items, kind="stable")
        columns = (column[order] for column in (entries.prompts, items, entries.figures, entries.weights))
        mean_R[number] = _mean(jaccard(Entries(*columns), count))
    return mean_R


class _Latents:
    """The latents of one prompt, by dictionary; at several places of a prompt a latent is the same."""

    def __init__(self, graphs: GraphSet, prompt: int):
        sizes = {each["name"]: each["d_sae"] for each in graphs.graphs[prompt].dictionaries}
        space_K = np.unique(graphs.spaces, return_inverse=True)[1]
        step = max(sizes.values(), default=0)
        own_K = np.arange(len(graphs.keys))
        self.base_K = np.where(graphs.latent_K < 0, own_K, len(own_K) + space_K * step)
        there_K = np.isin(own_K, graphs.node_entries.items[graphs.node_entries.prompts == prompt])
        names_K = np.array(graphs.dictionaries)
        self.groups = []
        for name, size in sizes.items():
            mine = np.flatnonzero((names_K == name) & there_K)
            kept, place = np.unique(graphs.latent_K[mine], return_inverse=True)
            self.groups.append((mine, len(kept), place, size))

    def replaced(self, rng: np.random.Generator) -> np.ndarray:
        """A number for each node of the set, of features drawn anew: [K]."""
        new_K = self.base_K.copy()
        for mine, count, place, size in self.groups:
            new_K[mine] += rng.choice(size, count, replace=False)[place]
        return new_K


def _against(J_PP: np.ndarray, first: int, seed: int) -> tuple[Estimate, Estimate, float]:
    """Pairs of one prompt of the first `first` with one of the others; what pairs within the first have above these; and p."""
    count = len(J_PP)
    across = J_PP[:first, first:]
    between, excess = float(across.mean()), _mean(J_PP[:first, :first]) - float(across.mean())
    a_RP, b_RP = draw(first, DRAWS, seed), draw(count - first, DRAWS, seed + 1)
    across_R = ((a_RP @ across) * b_RP).sum(1) / (first * (count - first))
    excess_R = _drawn(J_PP[:first, :first], a_RP) - across_R
    rng = np.random.default_rng(seed)
    dealt_R = np.zeros(DRAWS)
    for number in range(DRAWS):
        order = rng.permutation(count)
        J = J_PP[np.ix_(order, order)]
        dealt_R[number] = _mean(J[:first, :first]) - J[:first, first:].mean()
    p = float((1 + (dealt_R >= excess - 1e-12).sum()) / (1 + DRAWS))
    fewest = min(first, count - first)
    if fewest < LEAST:
        return Estimate(between), Estimate(excess), p
    ends = [np.quantile(some[np.isfinite(some)], tails(fewest)).tolist() for some in (across_R, excess_R)]
    return Estimate(between, *ends[0]), Estimate(excess, *ends[1]), p
