"""Find the rules that best say where latents fire, from examples of the labelling half alone, many latents at once.

First the best single condition of each kind, then conditions that hold together with it. Candidates are compared by f1 (`grouping.py`) with
firings weighted by the square of their value, which is what a person does who reads the strongest examples first. What a condition names
wrongly is counted exactly where the corpus has an index, and estimated from places where the conditions so far hold elsewhere.

Shape suffixes: `P` places, `G` groups, `N` pairs of a group and a number, `X` yes-or-no conditions, `O` kinds of conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from saebench.features.labelling.corpus import COLUMNS, PLACE_TRAITS, Corpus
from saebench.features.labelling.firings import Firings, evenly
from saebench.features.labelling.grouping import Chosen, Pairs, Rows, choose, f1
from saebench.features.labelling.rules import Among, Condition, Early, Rule, Trait, find_places
from saebench.features.labelling.sorting import changes, sums
from saebench.features.labelling.topics import Topics
from saebench.features.labelling.words import NO_WORD

OTHERS = 250  # places that a condition names, to tell firings from
LEAST = 5  # firings without which nothing can be said
GAIN = 0.03  # of the fit, for which a rule may become longer
NAMED, COST_OF_NAMING = 2, 0.02
"""A rule about what stands around names the token too where it is one of so few, or is `TELLING`, and that costs no more fit."""
TELLING = {"number", "capitalised word", "capitals", "opening bracket", "closing bracket", "quotation mark", "line end"}
LONGEST = 3
KEPT = 2  # conditions that are tried as the first of a rule
CLEAR = 0.7  # fit from which on words further away are not looked at
TOPIC_FIRINGS = 100
EARLY = (1, 2, 4, 8, 16, 32)
UNSEEN = 0.3  # of a place: what a value is thought to name wrongly besides what was seen
KINDS = (("token", 0), ("token", -1), ("token", -2), ("token", 1), *((column, 0) for column in COLUMNS[1:]))
TOKEN, TRAIT = 0, 1  # of the kinds of `Options`: the token itself, and what it is by its characters
TRAITS_AT = (0, -1, 1)
PREFERENCE = {("token", 1): 0.95, ("token", -2): 0.97, ("line", 0): 0.97, ("begin", 0): 0.95, ("end", 0): 0.95}
"""Of two conditions that are about as good, the one that a reader understands sooner."""
READABLE, UNREADABLE = 5, 0.96
"""Values of a list that a reader takes in at once, and what a longer one is worth."""


@dataclass(frozen=True)
class Options:
    """One condition for each group, all of a kind."""

    covered_G: np.ndarray
    """Share of the summed weights of firings."""
    wrong_G: np.ndarray
    """Places named wrongly, in firings."""
    worth_G: np.ndarray
    """What it is worth beside others that fit as well."""
    condition: Callable[[int], Condition]
    values_G: np.ndarray
    """Values that it lists."""

    @property
    def fit_G(self) -> np.ndarray:
        return self.worth_G * f1(self.covered_G, self.wrong_G)

    def found(self, group: int) -> Found:
        covered, wrong, worth = (float(values_G[group]) for values_G in (self.covered_G, self.wrong_G, self.worth_G))
        return Found((self.condition(group),), covered, wrong, worth * f1(covered, wrong), worth)


@dataclass(frozen=True)
class Found:
    """A rule for a latent, and how well it fits the labelling half."""

    conditions: tuple[Condition, ...]
    covered: float
    wrong: float
    """As in `Options`."""
    fit: float
    worth: float

    @property
    def rule(self) -> Rule:
        return Rule(self.conditions)


class Labeller:
    """Finds rules for the latents of a store."""

    def __init__(self, corpus: Corpus):
        self.corpus, self.half = corpus, corpus.labelling
        self.topics = Topics(self.half)
        self.counts_X = np.array([condition.holds(self.half.everything).sum() for condition in PLACE_CONDITIONS])

    def find(self, firings: Firings) -> list[Found | None]:
        """The best rule for each latent, from its firings in the labelling half; None for one with too few."""
        options = self.first(firings)
        fit_OG = np.stack([one.fit_G for one in options])
        order_OG = np.argsort(-fit_OG, axis=0, kind="stable")[:KEPT]
        tried = [
            (latent, options[kind].found(latent))
            for latent in np.flatnonzero(firings.count_G >= LEAST).tolist()
            for kind in order_OG[:, latent].tolist()
            if fit_OG[kind, latent] > 0
        ]
        best: list[Found | None] = [None] * firings.rows.groups
        for (latent, _), found in zip(tried, Narrowing(firings, tried).run(), strict=True):
            known = best[latent]
            if known is None or found.fit > known.fit:
                best[latent] = found
        return best

    def first(self, firings: Firings) -> list[Options]:
        """Single conditions, the best of each kind for each latent."""
        rows, count_G = firings.rows, np.maximum(1, firings.count_G)
        options = []
        for column, at in KINDS:
            pairs = Pairs.of(rows, rows.view.numbers(column, at))
            right_N = pairs.firings_N * firings.scale_G[pairs.group_N]
            wrong_N = np.maximum(self.half.counts(column, pairs.number_N) - right_N, 0) + UNSEEN
            options.append(among(self.corpus, column, at, pairs, wrong_N / count_G[pairs.group_N], rows.groups))
            if column == "token" and at in TRAITS_AT:
                right_GX = trait_sums(self.corpus, pairs, right_N, rows.groups)
                wrong_GX = np.maximum(self.half.trait_counts - right_GX, 0) / count_G[:, None]
                conditions: list[Condition] = [Trait(name, at) for name in self.corpus.traits.names]
                options.append(best_of(trait_sums(self.corpus, pairs, pairs.share_N, rows.groups), wrong_GX, conditions))
        covered_GX, right_GX = (place_sums(rows, amounts) for amounts in (rows.share_P, firings.scale_G[rows.group_P]))
        wrong_GX = np.maximum(self.counts_X - right_GX, 0) / count_G[:, None]
        options.append(best_of(covered_GX, wrong_GX, PLACE_CONDITIONS))
        unclear = np.max([one.fit_G for one in options], axis=0) < CLEAR
        return [*options, *self.around(firings, np.flatnonzero(unclear & (firings.count_G >= LEAST)))]

    def around(self, firings: Firings, latents: np.ndarray) -> Iterator[Options]:
        """Words around the firings of some latents."""
        if not len(latents):
            return
        rows = firings.rows
        group_G = np.full(rows.groups, -1)
        group_G[latents] = np.arange(len(latents))
        places = np.flatnonzero(group_G[rows.group_P] >= 0)
        group_P = group_G[rows.group_P[places]]
        few = evenly(np.bincount(group_P, minlength=len(latents)), TOPIC_FIRINGS)
        places, group_P = places[few], group_P[few]
        share_P = rows.share_P[places] / np.bincount(group_P, rows.share_P[places])[group_P]
        some = Rows(self.corpus.view(rows.view.places_P[places]), group_P, share_P, np.zeros(len(places)), len(latents))
        for found in self.topics.best(some, firings.count_G[latents], firings.in_pool_GP[latents]):
            covered_G, wrong_G = np.zeros(rows.groups), np.zeros(rows.groups)
            conditions = {}
            for group, (condition, covered, wrong) in found.items():
                latent = int(latents[group])
                conditions[latent], covered_G[latent], wrong_G[latent] = condition, covered, wrong
            yield Options(covered_G, wrong_G, np.ones(rows.groups), conditions.__getitem__, np.ones(rows.groups))


class Narrowing:
    """Adds conditions to rules, many at once: those that keep most firings and leave most other places out, while that is worth it."""

    def __init__(self, firings: Firings, tried: list[tuple[int, Found]]):
        self.firings, self.corpus = firings, firings.corpus
        self.found = [found for _, found in tried]
        places, groups, shares, wrongs = [], [], [], []
        for group, (latent, found) in enumerate(tried):
            part = firings.part(latent)
            hits = part.start + np.flatnonzero(found.conditions[0].holds(firings.view(latent)))
            others, _ = find_places(found.conditions[0], firings.half, OTHERS)
            others = others[~firings.at(latent, others)]
            places += [firings.rows.view.places_P[hits], others]
            groups.append(np.full(len(hits) + len(others), group))
            shares += [scaled(firings.rows.share_P[hits], found.covered), np.zeros(len(others))]
            wrongs += [np.zeros(len(hits)), scaled(np.ones(len(others)), found.wrong)]
        nothing = [np.empty(0, dtype=np.int64)]
        self.rows = Rows(
            self.corpus.view(np.concatenate(places or nothing)),
            np.concatenate(groups or nothing),
            np.concatenate(shares or nothing),
            np.concatenate(wrongs or nothing),
            len(tried),
        )

    def run(self) -> list[Found]:
        """The rules as they are best."""
        while len(self.rows.group_P) and (longer := self.further()):
            self.keep(longer)
        return self.found

    def further(self) -> list[int]:
        """Make the rules longer for which that is worth it; returns which."""
        options = self.options()
        worth_OG = np.stack([one.worth_G for one in options]) * np.array([found.worth for found in self.found])
        fit_OG = worth_OG * np.stack([f1(one.covered_G, one.wrong_G) for one in options])
        before_G = np.array([found.fit for found in self.found])
        best_G, longer_G = fit_OG.argmax(0), fit_OG.max(0) >= before_G + GAIN
        for kind in (TOKEN, TRAIT):
            cheap_G = (fit_OG[kind] > 0) & (fit_OG[kind] >= before_G - COST_OF_NAMING)
            for group in np.flatnonzero(~longer_G & cheap_G).tolist():
                if names_token(options[kind], group) and not any(is_about_token(c) for c in self.found[group].conditions):
                    best_G[group], longer_G[group] = kind, True
        longer = []
        for group in np.flatnonzero(longer_G).tolist():
            kind, before = int(best_G[group]), self.found[group]
            condition = options[kind].condition(group)
            if condition not in before.conditions:
                longer.append(group)
                covered, wrong = float(options[kind].covered_G[group]), float(options[kind].wrong_G[group])
                fit, worth = float(fit_OG[kind, group]), float(worth_OG[kind, group])
                self.found[group] = Found((*before.conditions, condition), covered, wrong, fit, worth)
        return longer

    def options(self) -> list[Options]:
        """The best further condition of each kind for each rule."""
        rows = self.rows
        each_G = np.zeros(rows.groups)
        np.maximum.at(each_G, rows.group_P, rows.wrong_P)
        options = []
        for column, at in KINDS:
            pairs = Pairs.of(rows, rows.view.numbers(column, at))
            wrong_N = pairs.wrong_N + UNSEEN * each_G[pairs.group_N]
            options.append(among(self.corpus, column, at, pairs, wrong_N, rows.groups))
            if column == "token" and at in TRAITS_AT:
                covered_GX, wrong_GX = (
                    trait_sums(self.corpus, pairs, amounts, rows.groups) for amounts in (pairs.share_N, pairs.wrong_N)
                )
                options.append(best_of(covered_GX, wrong_GX, [Trait(name, at) for name in self.corpus.traits.names]))
        return [*options, best_of(place_sums(rows, rows.share_P), place_sums(rows, rows.wrong_P), PLACE_CONDITIONS)]

    def keep(self, longer: list[int]) -> None:
        """Go on with the rules that became longer, and with their rows at which they still hold; the longest are done."""
        rows = self.rows
        starts = np.searchsorted(rows.group_P, np.arange(rows.groups + 1))
        kept, shares = [np.empty(0, dtype=np.int64)], [np.empty(0)]
        for group in longer:
            found = self.found[group]
            if len(found.conditions) < LONGEST:
                part = slice(starts[group], starts[group + 1])
                view = self.corpus.view(rows.view.places_P[part])
                kept.append(part.start + np.flatnonzero(found.conditions[-1].holds(view)))
                shares.append(scaled(rows.share_P[kept[-1]], found.covered))
        chosen = np.concatenate(kept)
        view = self.corpus.view(rows.view.places_P[chosen])
        self.rows = Rows(view, rows.group_P[chosen], np.concatenate(shares), rows.wrong_P[chosen], rows.groups)


PLACE_CONDITIONS: list[Condition] = [
    *(Trait(name) for name in PLACE_TRAITS),
    *(Early(of, last) for of in ("context", "document") for last in EARLY),
]


def among(corpus: Corpus, column: str, at: int, pairs: Pairs, wrong_N: np.ndarray, groups: int) -> Options:
    """The best values of a column."""
    chosen = choose(pairs, wrong_N, NO_WORD if column in corpus.numbers else corpus.nothing, groups)
    worth_G = np.where(chosen.count_G > READABLE, UNREADABLE, 1.0) * PREFERENCE.get((column, at), 1.0)
    return Options(
        chosen.covered_G, chosen.wrong_G, worth_G, lambda group: _among(corpus, column, at, chosen, group), chosen.count_G
    )


def _among(corpus: Corpus, column: str, at: int, chosen: Chosen, group: int) -> Among:
    numbers, names = chosen.of(group).tolist(), corpus.names.get(column)
    return Among(column, tuple(numbers) if names is None else tuple(names[number] for number in numbers), at)


def best_of(covered_GX: np.ndarray, wrong_GX: np.ndarray, conditions: list[Condition]) -> Options:
    """The best of some yes-or-no conditions for each group."""
    best_G = f1(covered_GX, wrong_GX).argmax(1)
    groups = np.arange(len(best_G))
    covered_G, wrong_G = covered_GX[groups, best_G], wrong_GX[groups, best_G]
    return Options(covered_G, wrong_G, np.ones(len(groups)), lambda group: conditions[int(best_G[group])], np.ones(len(groups)))


def trait_sums(corpus: Corpus, pairs: Pairs, amounts_N: np.ndarray, groups: int) -> np.ndarray:
    """Amounts of the pairs of each group whose token has each trait [G, X]."""
    amounts_NX = corpus.traits.matrix[pairs.number_N] * amounts_N[:, None]
    sums_GX = np.zeros((groups, amounts_NX.shape[1]))
    starts = np.flatnonzero(changes(pairs.group_N))
    sums_GX[pairs.group_N[starts]] = sums(amounts_NX, starts)
    return sums_GX


def names_token(options: Options, group: int) -> bool:
    """Whether a condition of the kinds `TOKEN` or `TRAIT` tells a reader which token it is."""
    condition = options.condition(group)
    return condition.name in TELLING if isinstance(condition, Trait) else 0 < options.values_G[group] <= NAMED


def is_about_token(condition: Condition) -> bool:
    """Whether a condition says something of the token itself."""
    if isinstance(condition, Among):
        return condition.at == 0 and condition.column not in ("before", "line")
    return isinstance(condition, Trait) and condition.at == 0


def scaled(shares: np.ndarray, total: float) -> np.ndarray:
    """Shares in the same proportions that sum up to `total`."""
    return shares * (total / shares.sum()) if shares.any() else shares


def place_sums(rows: Rows, amounts_P: np.ndarray) -> np.ndarray:
    """Amounts of the rows of each group at which each of `PLACE_CONDITIONS` holds [G, X]."""
    return np.column_stack([rows.total(amounts_P * condition.holds(rows.view)) for condition in PLACE_CONDITIONS])
