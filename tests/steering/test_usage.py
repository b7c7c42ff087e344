"""Relative usage: the score by hand, planted latents, what is refused."""

import math

import numpy as np
import pytest
import scipy.sparse as sp

from saebench.errors import UserError
from saebench.steering.activity import Activity
from saebench.steering.usage import relative_usage, usage_scores


def made(firings_UF, tokens_U, value=2.0):
    """The activity of texts in which latents fire so many times, each time with one value."""
    firings_UF = np.array(firings_UF)
    return Activity(np.array(tokens_U), firings_UF.sum(0), value * firings_UF.sum(0), sp.csr_array(value * firings_UF))


def test_scores_are_those_computed_by_hand():
    target = made([[3, 4, 0, 1], [1, 6, 0, 1]], [10, 10])  # 4, 10, 0 and 2 of 16 firings
    background = made([[0, 5, 1, 0], [0, 1, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0]], [9, 9, 9, 0])  # the last text has no token
    expected = [4 / 16 * math.log(4 / 1), 10 / 16 * math.log(4 / 4), 0.0, 2 / 16 * math.log(4 / 2)]
    assert np.allclose(usage_scores(target, background), expected, atol=1e-15)
    chosen = relative_usage(target, background, count=10)
    assert chosen.latents == (0, 3), "a latent of every background text and one that never fires are no choice"
    assert chosen.scores == pytest.approx((expected[0], expected[3]))
    assert relative_usage(target, background, count=1).latents == (0,)


def test_planted_latents_are_found():
    rng = np.random.default_rng(0)
    common_F = rng.random(60) < 0.5
    target, background = (rng.poisson(common_F * 3, size=(40, 60)) for _ in range(2))
    planted = [5, 17, 44]
    background[:, planted] = 0
    target[:, planted] = rng.poisson(1.0, size=(40, 3))
    chosen = relative_usage(made(target, [50] * 40), made(background, [50] * 40), count=3)
    assert sorted(chosen.latents) == planted


def test_refuses_two_dictionaries_and_subjects_that_nothing_marks():
    with pytest.raises(UserError, match="of 2 and 3 latents: use one dictionary"):
        relative_usage(made([[1, 1]], [5]), made([[1, 1, 1]], [5]))
    with pytest.raises(UserError, match="relative usage found no latent"):
        relative_usage(made([[1, 1]], [5]), made([[1, 1]], [5]))
