"""Scores of labels by closed forms, and the two halves of the corpus."""

import math

import numpy as np
import pytest

from saebench.features.labelling.scoring import CHANCE, halves, score


def flags(yes: int, no: int) -> np.ndarray:
    return np.array([True] * yes + [False] * no)


def test_balanced_accuracy_precision_and_recall():
    found = score(flags(30, 10), np.ones(40), flags(20, 180), 0.6)
    assert found.recall == found.recall_by_value == pytest.approx(0.75)
    assert found.balanced_accuracy == pytest.approx((0.75 + 0.9) / 2)
    assert found.precision == 0.6
    assert (found.positives, found.negatives) == (40, 200)
    assert found.fit == pytest.approx(2 * 0.6 * 0.75 / 1.35)


def test_recall_by_value_weighs_firings():
    found = score(np.array([True, False]), np.array([3.0, 1.0]), flags(0, 10), 1.0)
    assert (found.recall, found.recall_by_value) == (0.5, 0.75)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_a_label_that_says_nothing_is_at_chance(share):
    """Whatever share of all tokens it names."""
    found = score(
        flags(round(100 * share), round(100 * (1 - share))),
        np.ones(100),
        flags(round(1000 * share), round(1000 * (1 - share))),
        0.1,
    )
    assert found.balanced_accuracy == pytest.approx(CHANCE)
    assert not found.above_chance


def test_few_examples_do_not_make_a_label_sure():
    assert not score(flags(1, 2), np.ones(3), flags(0, 5), 1.0).above_chance
    assert score(flags(100, 200), np.ones(300), flags(0, 500), 1.0).above_chance


def test_the_error_is_the_spread_of_repeated_samples():
    """Drawn again and again from latents of known recall and false share."""
    generator = np.random.default_rng(0)
    drawn = [score(generator.random(50) < 0.7, np.ones(50), generator.random(200) < 0.1, 0.5) for _ in range(3000)]
    spread = np.std([one.balanced_accuracy for one in drawn])
    assert spread == pytest.approx(math.sqrt(0.7 * 0.3 / 50 + 0.1 * 0.9 / 200) / 2, rel=0.05)
    assert np.mean([one.error for one in drawn]) == pytest.approx(spread, rel=0.1)


def test_accidents_rarely_pass():
    """Of labels that say nothing, about as many pass as two standard errors let through."""
    generator = np.random.default_rng(1)
    passed = [score(generator.random(80) < 0.3, np.ones(80), generator.random(400) < 0.3, 0.5).above_chance for _ in range(4000)]
    assert np.mean(passed) < 0.035


def test_nothing_named():
    found = score(flags(0, 10), np.ones(10), flags(0, 50), float("nan"))
    assert (found.balanced_accuracy, found.fit, found.above_chance) == (0.5, 0.0, False)
    assert score(flags(10, 0), np.ones(10), flags(0, 0), 1.0).balanced_accuracy == 1.0


def test_every_context_is_in_one_half():
    for count in (0, 1, 2, 1000):
        for seed in (0, 1, 12345):
            labelling_C, scoring_C = halves(count, seed)
            assert len(labelling_C) == len(scoring_C) == count
            assert (labelling_C != scoring_C).all()


def test_halves_are_even_along_the_corpus():
    """Neighbours, which are often of one document, are divided too."""
    labelling_C, _ = halves(40_000, 7)
    assert abs(labelling_C.mean() - 0.5) < 0.01
    assert np.abs(labelling_C.reshape(-1, 400).mean(1) - 0.5).max() < 0.12
    assert abs((labelling_C[1:] == labelling_C[:-1]).mean() - 0.5) < 0.01
