"""Targets against counts by hand."""

import math

import numpy as np
import pytest

from saebench.errors import UserError
from saebench.steering.targets import Likeness, Pattern


def test_share_of_lines():
    imports = Pattern.of(r"^\s*(import|from)\s")
    assert imports.score(["import os\nx = 1\n\n  from a import b", "", "\n\n", "x"]).tolist() == [2 / 3, 0.0, 0.0, 0.0]
    with pytest.raises(UserError, match="no regular expression"):
        Pattern.of("(")


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) - 97 for c in text] for text in texts]}

    def __len__(self):
        return 4


def test_likeness_is_naive_bayes():
    """Each fourth text is held out: the second to fourth of four remain. Positives aab aab aab, negatives bbc bbc bbc; plus one each."""
    found = Likeness.between(Letters(), ["aaa", "aab", "aab", "aab"], ["ccc", "bbc", "bbc", "bbc"])
    p = np.array([7, 4, 1, 1]) / 13
    q = np.array([1, 7, 4, 1]) / 13
    np.testing.assert_allclose(found.log_odds_V, np.log(p / q))
    assert found.score(["ab", "", "d"]).tolist() == pytest.approx([(math.log(7) + math.log(4 / 7)) / 2, 0.0, 0.0])
    assert found.accuracy == 1.0
    with pytest.raises(UserError, match="3 positives are too few"):
        Likeness.between(Letters(), ["a"] * 3, ["b"] * 4)
