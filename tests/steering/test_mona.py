"""Texts chosen by the features that they fire: similarity by hand and by brute force, the ranking against means taken text by text."""

import numpy as np
import pytest
import scipy.sparse as sp

from saebench.errors import UserError
from saebench.features.prompts import read_prompt
from saebench.steering.activity import activity
from saebench.steering.mona import mona, prototype, similarities, similarity

CODE = [f"def value_{i}(x):\n    return x * {i}" for i in range(12)]
PROSE = [f"the number {i} and the name {i * i}" for i in range(12)]


def by_brute_force(a_F, b_F):
    return sum(map(min, a_F, b_F)) / (sum(map(max, a_F, b_F)) or 1.0)


def test_similarity_by_hand():
    a, b = np.array([1, 0, 2, 0.5]), np.array([0.5, 1, 2, 0])
    assert similarity(a, b) == pytest.approx(2.5 / 4.5)
    assert round(similarity(a, b), 6) == 0.555556
    assert similarity(a, b) == similarity(b, a)
    assert similarity(a, a) == 1 and similarity(a, a + 1e-3) < 1
    assert similarity(a, 2 * a) == pytest.approx(0.5)
    assert similarity(0 * a, 0 * a) == 0 and similarity(a, 0 * a) == 0
    assert similarity(np.array([1.0, 0]), np.array([0, 1.0])) == 0


def test_parts_above_and_below_zero_are_coordinates_of_their_own():
    a, b = np.array([1, -2, 3.0, -1]), np.array([-1, -1, 2.0, 0])
    doubled = [np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)]) for x in (a, b)]
    assert similarity(a, b) == pytest.approx(by_brute_force(*doubled)) == pytest.approx(3 / 8)
    assert similarity(a, -a) == 0 and similarity(a, a) == similarity(-a, -a) == 1


def test_similarities_of_sparse_rows_by_brute_force():
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3):
        rows_UF = rng.random((40, 50)) * (rng.random((40, 50)) < density)
        rows_UF[3] = 0
        to_F = rng.random(50) * (rng.random(50) < 0.4)
        expected = [by_brute_force(row_F, to_F) for row_F in rows_UF]
        assert similarities(sp.csr_array(rows_UF), to_F) == pytest.approx(expected)
        assert expected[3] == 0 < max(expected)
    assert similarities(sp.csr_array((2, 50)), np.zeros(50)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="not two of one length"):
        similarity(np.ones(3), np.ones(4))


def means(lm, dictionary, texts):
    """Mean codes, one text at a time."""
    rows = []
    for text in texts:
        codes = read_prompt(lm, dictionary, text)
        rows.append(np.bincount(codes.latents, weights=codes.values, minlength=dictionary.config.d_sae) / (len(codes) - 1))
    return np.array(rows)


@pytest.mark.parametrize("kind", ["topk", "transcoder"])
def test_the_ranking_is_that_of_means_taken_text_by_text(kind, tiny_lm, kinds, monkeypatch):
    monkeypatch.setattr("saebench.steering.mona.TEXTS_AT_ONCE", 7)
    dictionary, candidates = kinds[kind], [*PROSE[:8], "", *CODE[4:]]
    target_F = means(tiny_lm, dictionary, CODE[:4]).mean(0)
    assert prototype(activity(tiny_lm, dictionary, [*CODE[:4], ""])) == pytest.approx(target_F, rel=1e-5, abs=1e-8)
    expected = [by_brute_force(row_F, target_F) for row_F in means(tiny_lm, dictionary, [text for text in candidates if text])]
    expected.insert(8, 0.0)
    found = mona(tiny_lm, dictionary, CODE[:4], candidates, share=1)
    assert sorted(found.indices) == list(range(17))
    assert found.scores == pytest.approx([expected[place] for place in found.indices], rel=1e-4)
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert set(found.indices[:8]) == set(range(9, 17)) and found.indices[-1] == 8
    fifth = mona(tiny_lm, dictionary, CODE[:4], candidates, share=0.25)
    assert fifth.indices == found.indices[:5]  # 4.25, rounded up
    assert len(mona(tiny_lm, dictionary, CODE[:4], [*CODE, *CODE[:8]], share=0.05).indices) == 1


def test_one_target_is_most_like_itself(tiny_lm, kinds):
    found = mona(tiny_lm, kinds["topk"], [CODE[3]], CODE, share=0.1)
    assert found.indices[0] == 3 and found.scores[0] == pytest.approx(1)


def test_texts_that_come_again_are_left_out_where_wanted(tiny_lm, kinds):
    candidates = [CODE[5], PROSE[0], f" {CODE[5]}\n", CODE[5], PROSE[1]]
    with_them = mona(tiny_lm, kinds["topk"], [CODE[5]], candidates, share=0.6)
    without = mona(tiny_lm, kinds["topk"], [CODE[5]], candidates, share=0.6, deduplicate=True)
    assert set(with_them.indices) == {0, 2, 3} and with_them.scores[:2] == pytest.approx((1, 1))
    assert set(without.indices) < {0, 1, 4} and without.indices[0] == 0 and len(without.indices) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CODE, PROSE, 0.0), "share=0.0 of the candidates"),
        ((CODE, PROSE, 1.5), "share=1.5 of the candidates"),
        ((CODE, [], 0.5), "the candidates have no text"),
        ((CODE, ["", ""], 0.5), "the candidates have no text"),
        (([""], PROSE, 0.5), "the texts have no tokens"),
        (([], PROSE, 0.5), "the texts have no tokens"),
    ],
)
def test_what_cannot_be_ranked_is_named(arguments, message, tiny_lm, kinds):
    targets, candidates, share = arguments
    with pytest.raises(UserError, match=message):
        mona(tiny_lm, kinds["topk"], targets, candidates, share=share)
