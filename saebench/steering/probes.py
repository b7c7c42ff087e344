"""Sparse probes: which few neurons, or latents, tell two kinds of texts apart, and how many of them suffice (methods.md A13).

Features are means over the tokens of a text. In each of five splits of the texts, 80 to 20, all that is fitted or ranked comes from the
80: a logistic probe on all units ranks them by |weight| per standard deviation, and for k = 1, 2, 4, ... a probe on the first k is
fitted anew. Noise of `sigma` standard deviations on those k at test time says how much hangs on them: a probe of weights w that gives a
text the score z is then right with probability Phi(|z| / (sigma ||w||)), or wrong. Where accuracy falls most is where k should be: with
more units the signal gets through the noise, with fewer there is less to lose. Noise on units of no use makes accuracy fall a little more,
so the least k is taken whose fall is within 0.02 of the largest. Accuracy is the mean of both classes' own, so that chance is 0.5. Beside
it stand as many other units drawn at random, and the length of the text alone. Units, signs and means are those of all texts.
Splits overlap, so intervals are Student's t with the correction of Nadeau and Bengio (2003). k is chosen by accuracies on held-out texts,
of which the one at the chosen k is, by a little, too good.
Shape suffixes: `U` texts, `D` width of a site, `F` units, `S` positions, `P` pieces of a batch, `R` splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr, stdtrit

from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.features.prompts import batches, text_pieces
from saebench.lm import LanguageModel
from saebench.steering.activity import activity
from saebench.steering.chosen import Chosen
from saebench.steering.edits import Edit, add, latent_rows
from saebench.steering.effect import Estimate
from saebench.steering.logistic import Features, Penalty, Standard, fit_logistic
from saebench.steering.positions import Positions

MOST_UNITS = 512
TEST_SHARE = 0.2
LEAST_TEXTS = 5  # on a side, so that one is held out
FALLS_ALIKE = 0.02
LENGTHS_ALIKE = 4  # classes of length between a length and its double


@dataclass(frozen=True)
class Step:
    """Probes on k units, over the splits. All accuracies are on held-out texts."""

    k: int
    accuracy: Estimate
    noisy: float
    """Expected accuracy with noise on the units."""
    random: Estimate
    """Accuracy of probes on k other units, drawn at random; on any k where fewer others vary."""

    @property
    def drop(self) -> float:
        """What noise takes away."""
        return self.accuracy.mean - self.noisy


@dataclass(frozen=True)
class SparseProbe:
    """The few units that tell positives from negatives, strongest first, and what supports them."""

    units: tuple[int, ...]
    weights: tuple[float, ...]
    """Of the probe on these units, per standard deviation."""
    mean_differences: tuple[float, ...]
    """Mean over the positives less that over the negatives, in the units' own measure."""
    stability: tuple[float, ...]
    """Share of the splits in which a unit is among the first k."""
    steps: tuple[Step, ...]
    """By k."""
    all_units: Estimate
    """Accuracy of the probe on all units."""
    length_only: Estimate
    """Accuracy of a probe on the number of tokens and its logarithm."""
    among: int
    """Units there are."""
    of: str | Dictionary | None = None
    """The site that the units are neurons of, or the dictionary that they are latents of."""

    @property
    def k(self) -> int:
        return len(self.units)

    @property
    def signs(self) -> tuple[int, ...]:
        """1 where more of a unit speaks for the positives, -1 where it speaks against them."""
        return tuple(int(np.sign(weight)) for weight in self.weights)

    def chosen(self) -> Chosen:
        """The latents, with |weight| as score; an `add` of them adds the mean difference. Raises UserError for a probe of neurons."""
        if not isinstance(self.of, Dictionary):
            raise UserError("the probe is of neurons, not of latents: steer with neuron_edit")
        return Chosen("sparse probe", self.units, tuple(abs(weight) for weight in self.weights), self.mean_differences)


def probe_neurons(
    lm: LanguageModel, site: str, positives: Sequence[str], negatives: Sequence[str], **options: Any
) -> SparseProbe:
    """Probe what stands at a site, coordinate by coordinate. Options as in `sparse_probe`; raises UserError as `layerwise` does."""
    return layerwise(lm, [site], positives, negatives, **options)[site]


def layerwise(
    lm: LanguageModel, sites: Sequence[str], positives: Sequence[str], negatives: Sequence[str], **options: Any
) -> dict[str, SparseProbe]:
    """The same for several sites, whose activations are read in one pass; from them a curve over layers.

    A text that comes twice counts once. Raises UserError for fewer than five texts on a side, a text on both, one without tokens, and for
    a site that does not hold one vector per token.
    """
    texts, positive_U = _labelled(positives, negatives)
    pooled, lengths_U = _pooled(lm, sites, texts)
    return {site: replace(sparse_probe(x_UD, positive_U, lengths_U, **options), of=site) for site, x_UD in pooled.items()}


def probe_latents(
    lm: LanguageModel, dictionary: Dictionary, positives: Sequence[str], negatives: Sequence[str], **options: Any
) -> SparseProbe:
    """Probe the latents of a dictionary. Options as in `sparse_probe`; raises UserError as `layerwise` does, and for a dictionary of
    another model."""
    check_model(dictionary, lm)
    texts, positive_U = _labelled(positives, negatives)
    fired = activity(lm, dictionary, texts)
    _check_tokens(texts, fired.tokens_U)
    return replace(sparse_probe(fired.means_UF, positive_U, fired.tokens_U, **options), of=dictionary)


def sparse_probe(
    x_UF: Features,
    positive_U: np.ndarray,
    lengths_U: np.ndarray,
    *,
    penalty: Penalty = "l2",
    C: float = 1.0,
    sigma: float = 10.0,
    splits: int = 5,
) -> SparseProbe:
    """Probe features [U, F], dense or sparse, for classes [U, bool], given the number of tokens of each text [U].

    `C` is the weight of the data against the penalty, `sigma` the noise in standard deviations. Raises UserError where no unit varies.
    """
    if penalty not in ("l1", "l2"):
        raise UserError(f"penalty {penalty!r} is unknown: use l1 or l2")
    if splits < 2 or not (C > 0 and sigma > 0):
        raise UserError(f"splits={splits}, C={C}, sigma={sigma}: use two splits or more, and C and sigma above 0")
    varying = int((Standard.of(x_UF).inverse_F > 0).sum())
    if not varying:
        raise UserError("no unit differs between the texts: give other texts, or another site or dictionary")
    sizes = [1 << power for power in range(MOST_UNITS.bit_length()) if 1 << power <= min(varying, MOST_UNITS)]
    n_UL = np.stack([lengths_U, np.log(np.maximum(1, lengths_U))], 1).astype(np.float64)
    every, by_length, ranks = [], [], []
    best, noisy, drawn = np.empty((3, len(sizes), splits))
    for split in range(splits):
        rng = np.random.default_rng(split)
        test_U = held_out(positive_U, rng)
        fold = _Fold(x_UF[~test_U], positive_U[~test_U], x_UF[test_U], positive_U[test_U], penalty, C)
        by_length.append(replace(fold, train=n_UL[~test_U], test=n_UL[test_U]).accuracy(np.arange(2)))
        accuracy, ranked = fold.ranked()
        every.append(accuracy)
        ranks.append(ranked)
        varies = np.flatnonzero(Standard.of(fold.train).inverse_F)
        for place, k in enumerate(sizes):
            best[place, split], noisy[place, split] = fold.with_noise(ranked[:k], sigma)
            others = np.setdiff1d(varies, ranked[:k])
            drawn[place, split] = fold.accuracy(rng.permutation(others if len(others) >= k else varies)[:k])
    steps = [
        Step(k, _over_splits(best[place]), float(noisy[place].mean()), _over_splits(drawn[place]))
        for place, k in enumerate(sizes)
    ]
    most = max(step.drop for step in steps)
    k = next(step.k for step in steps if step.drop >= most - FALLS_ALIKE)
    whole = _Fold(x_UF, positive_U, x_UF, positive_U, penalty, C)
    units = whole.ranked()[1][:k]
    chosen_UK = _columns(x_UF, units)
    differences = chosen_UK[positive_U].mean(0) - chosen_UK[~positive_U].mean(0)
    return SparseProbe(
        units=tuple(units.tolist()),
        weights=tuple(fit_logistic(chosen_UK, positive_U, penalty=penalty, C=C).weights_F.tolist()),
        mean_differences=tuple(differences.tolist()),
        stability=tuple(float(np.mean([unit in ranked[:k] for ranked in ranks])) for unit in units),
        steps=tuple(steps),
        all_units=_over_splits(np.array(every)),
        length_only=_over_splits(np.array(by_length)),
        among=x_UF.shape[1],
    )


def neuron_edit(
    probe: SparseProbe, strength: float = 1.0, *, unit: float | None = None, positions: str | Positions = "all"
) -> Edit:
    """Add the mean difference between the classes on the units alone, `strength` times; or, with `unit`, a vector of that direction and
    `strength` times that length. Neurons are moved at their site, latents by what they write."""
    if probe.of is None:
        raise UserError("the probe is of no model's units: make it by probe_neurons or probe_latents")
    difference_K = torch.tensor(probe.mean_differences)
    if isinstance(probe.of, Dictionary):
        rows_KD = latent_rows(probe.of, probe.units)
        length = float((difference_K.to(rows_KD) @ rows_KD).norm())
        unit = length if unit is None else unit
        return add(probe.of, probe.units, strength, weights=probe.mean_differences, unit=unit, positions=positions)
    direction_D = torch.zeros(probe.among)
    direction_D[list(probe.units)] = difference_K
    length = float(difference_K.norm())
    return add(direction_D, strength=strength, site=probe.of, unit=length if unit is None else unit, positions=positions)


def length_matched(
    lm: LanguageModel, positives: Sequence[str], negatives: Sequence[str], seed: int = 0
) -> tuple[list[str], list[str]]:
    """As many texts of every length on both sides, drawn at random: lengths in tokens count as one where they differ by less than about a
    fifth. A probe of these texts cannot profit from their length."""
    rng = np.random.default_rng(seed)
    sides: list[dict[int, list[int]]] = []
    for texts in (positives, negatives):
        lengths_U = _lengths(lm, texts)
        by_class: dict[int, list[int]] = {}
        for place in rng.permutation(len(texts)).tolist():
            by_class.setdefault(round(LENGTHS_ALIKE * math.log2(max(1, lengths_U[place]))), []).append(place)
        sides.append(by_class)
    kept = [[place for c in own for place in own[c][: len(other.get(c, ()))]] for own, other in (sides, sides[::-1])]
    return [positives[place] for place in sorted(kept[0])], [negatives[place] for place in sorted(kept[1])]


def held_out(positive_U: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A fifth of each class, one text at least: [U, bool]."""
    test_U = np.zeros(len(positive_U), dtype=bool)
    for members in (np.flatnonzero(positive_U), np.flatnonzero(~positive_U)):
        test_U[rng.permutation(members)[: max(1, round(TEST_SHARE * len(members)))]] = True
    return test_U


@dataclass(frozen=True)
class _Fold:
    """Texts to fit on and texts to test on."""

    train: Features
    of_train: np.ndarray
    test: Features
    of_test: np.ndarray
    penalty: Penalty
    C: float

    def ranked(self) -> tuple[float, np.ndarray]:
        """Accuracy of the probe on all units, and the units by |weight|; those that L1 leaves at 0 by the difference of the means."""
        probe = fit_logistic(self.train, self.of_train, penalty=self.penalty, C=self.C)
        means = (np.asarray(self.train[mask].mean(axis=0)).ravel() for mask in (self.of_train, ~self.of_train))
        apart_F = np.abs(np.subtract(*means)) * probe.standard.inverse_F
        order = np.lexsort((-apart_F, -np.abs(probe.weights_F)))
        return _balanced(probe.scores(self.test) > 0, self.of_test), order

    def accuracy(self, units: np.ndarray) -> float:
        """Of a probe on some units."""
        probe = fit_logistic(_columns(self.train, units), self.of_train, penalty=self.penalty, C=self.C)
        return _balanced(probe.scores(_columns(self.test, units)) > 0, self.of_test)

    def with_noise(self, units: np.ndarray, sigma: float) -> tuple[float, float]:
        """The same, and what is to be expected of it with noise on them at test time."""
        probe = fit_logistic(_columns(self.train, units), self.of_train, penalty=self.penalty, C=self.C)
        scores_U = probe.scores(_columns(self.test, units))
        spread = sigma * float(np.linalg.norm(probe.weights_F))  # weights and noise are both per standard deviation
        if not spread:
            return 0.5, 0.5
        return _balanced(scores_U > 0, self.of_test), _balanced(ndtr(scores_U / spread), self.of_test)


def _balanced(said_U: np.ndarray, true_U: np.ndarray) -> float:
    """Mean of the shares of both classes that are said right, given what is said to be positive, or how likely."""
    return float((said_U[true_U].mean() + 1 - said_U[~true_U].mean()) / 2)


def _columns(x_UF: Features, units: np.ndarray) -> np.ndarray:
    some = x_UF[:, units]
    return some if isinstance(some, np.ndarray) else some.toarray()


def _over_splits(values_R: np.ndarray) -> Estimate:
    """Mean and 95 % interval over splits that overlap, inside 0 to 1."""
    mean, count = float(np.mean(values_R)), len(values_R)
    error = float(np.std(values_R, ddof=1)) * math.sqrt(1 / count + TEST_SHARE / (1 - TEST_SHARE))
    reach = float(stdtrit(count - 1, 0.975)) * error
    return Estimate(mean, max(0.0, mean - reach), min(1.0, mean + reach))


def _labelled(positives: Sequence[str], negatives: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The texts of both sides, each once, and which are positives."""
    sides = [list(dict.fromkeys(texts)) for texts in (positives, negatives)]
    if both := set(sides[0]) & set(sides[1]):
        raise UserError(f"{len(both)} texts are on both sides ({min(both)[:40]!r} is one): leave them out")
    for side, texts in zip(("positives", "negatives"), sides, strict=True):
        if len(texts) < LEAST_TEXTS:
            raise UserError(f"{len(texts)} different {side} are too few to hold some out: give at least {LEAST_TEXTS}")
    return sides[0] + sides[1], np.arange(len(sides[0]) + len(sides[1])) < len(sides[0])


def _check_tokens(texts: Sequence[str], lengths_U: np.ndarray) -> None:
    if not lengths_U.all():
        raise UserError(f"text {texts[int(np.argmin(lengths_U))]!r} has no tokens: leave it out")


def _lengths(lm: LanguageModel, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, the first of each piece aside: [U]."""
    lengths_U = np.zeros(len(texts), dtype=np.int64)
    for number, ids in text_pieces(lm, texts):
        lengths_U[number] += len(ids) - 1
    return lengths_U


def _pooled(lm: LanguageModel, sites: Sequence[str], texts: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The mean over the tokens of each text of what stands at each site [U, D], and the tokens of each text [U]."""
    sums = {site: np.zeros((len(texts), lm.width(site))) for site in sites}
    lengths_U = _lengths(lm, texts)
    _check_tokens(texts, lengths_U)
    pieces = text_pieces(lm, texts)
    numbers_P = np.array([number for number, _ in pieces])
    for places, ids_CS in batches(pieces):
        for site, x_CSD in lm.read(ids_CS, list(sites)).items():
            np.add.at(sums[site], numbers_P[places], x_CSD[:, 1:].sum(1, dtype=torch.float64).cpu().numpy())
    return {site: sum_UD / lengths_U[:, None] for site, sum_UD in sums.items()}, lengths_U
