"""Searching latents and contexts, against brute force on dense codes."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from saebench.errors import UserError
from saebench.features.effects import LogitEffects
from saebench.features.search import (
    filter_latents,
    like,
    on_token,
    promoting,
    similar_contexts,
    together,
    tokens_named,
)

SIZE = 16


def phi_of(a_T, b_T):
    """The correlation of two columns of zeros and ones over the tokens that were encoded."""
    encoded_T = np.arange(len(a_T)) % SIZE > 0
    a_T, b_T = a_T[encoded_T], b_T[encoded_T]
    return float(np.corrcoef(a_T, b_T)[0, 1]) if a_T.std() and b_T.std() else 0.0


@pytest.mark.parametrize("gathered", [1, 1 << 22])
def test_latents_that_fire_on_a_token(small, monkeypatch, gathered):
    monkeypatch.setattr("saebench.features.search.GATHERED", gathered)
    encoded_T = np.arange(len(small.ids_T)) % SIZE > 0
    firing_TF = small.dense_TF != 0
    for token_id in np.unique(small.ids_T)[::9].tolist():
        here_T = (small.ids_T == token_id) & encoded_T
        expected = {}
        for latent in range(small.store.d_sae):
            on = firing_TF[here_T, latent]
            if on.any():
                shares = on.mean(), on.sum() / firing_TF[:, latent].sum()
                expected[latent] = (on.sum(), shares[0], small.dense_TF[here_T, latent][on].mean(), shares[1])
        found = on_token(small.store, token_id, 48)
        assert {hit.latent for hit in found} == set(expected)
        for hit in found:
            got = (hit.firings, hit.share_of_token, hit.mean, hit.share_of_latent)
            assert got == pytest.approx(expected[hit.latent], rel=1e-5)
        products = [hit.share_of_token * hit.share_of_latent for hit in found]
        assert products == sorted(products, reverse=True)
        assert on_token(small.store, token_id, 3) == found[:3]
    assert on_token(small.store, int(small.ids_T.max()) + 1) == []


def test_tokens_by_their_text(small):
    strings, counts = small.store.token_strings, small.store.token_counts
    found = tokens_named(small.store, "value", 1000)
    exact = [i for i, s in enumerate(strings) if s == "value"]
    folded = [i for i, s in enumerate(strings) if s.strip().casefold() == "value" and s != "value"]
    begin = [i for i, s in enumerate(strings) if s.strip().casefold().startswith("value") and i not in exact + folded]
    by_count = lambda ids: sorted(ids, key=lambda i: (-counts[i], i))  # noqa: E731
    assert found == by_count(exact) + by_count(folded) + by_count(begin)
    assert len(found) > 0
    assert tokens_named(small.store, " ", 5) == [strings.index(" ")]
    assert tokens_named(small.store, "no such token") == []


def test_the_like_are_merged_from_what_is_listed(small):
    firing_TF = small.dense_TF != 0
    rows = small.dictionary.directions
    unit_FD = torch.nn.functional.normalize(rows, dim=1)
    for latent in small.alive[::7]:
        found = like(small.store, latent, 100)
        assert len({alike.latent for alike in found}) == len(found) > 0
        for alike in found:
            if alike.cosine is not None:
                assert alike.cosine == pytest.approx(float(unit_FD[latent] @ unit_FD[alike.latent]), abs=1e-5)
            if alike.phi is not None:
                a_T, b_T = firing_TF[:, latent], firing_TF[:, alike.latent]
                assert alike.phi == pytest.approx(phi_of(a_T, b_T), abs=1e-5)
                assert alike.jaccard == pytest.approx((a_T & b_T).sum() / (a_T | b_T).sum())
        nearest = [max(x for x in (a.cosine, a.read_cosine, a.phi) if x is not None) for a in found]
        assert nearest == sorted(nearest, reverse=True)
        assert like(small.store, latent, 2) == found[:2]
        assert any(alike.phi is not None for alike in found) and any(alike.cosine is not None for alike in found)


def test_any_two_latents_together(small):
    firing_TF = small.dense_TF != 0
    for a in range(0, 48, 5):
        for b in range(48):
            found = together(small.store, a, b)
            a_T, b_T = firing_TF[:, a], firing_TF[:, b]
            assert found.tokens == (a_T & b_T).sum()
            assert found.phi == pytest.approx(phi_of(a_T, b_T), abs=1e-9)
            assert found.jaccard == pytest.approx((a_T & b_T).sum() / max(1, (a_T | b_T).sum()))
    with pytest.raises(UserError, match="latent 48 is not"):
        together(small.store, 0, 48)


def test_latents_that_promote_a_token(small, tiny_lm):
    effects = LogitEffects(small.dictionary, tiny_lm)
    U_VD = tiny_lm.direct_unembedding_VD
    effect_FV = small.dictionary.directions @ (U_VD - U_VD.mean(0)).T
    for token in (3, 300):
        order = effect_FV[:, token].argsort(descending=True).tolist()
        found = promoting(effects, token, 5)
        assert [latent for latent, _ in found] == order[:5]
        assert [logit for _, logit in found] == pytest.approx(effect_FV[order[:5], token].tolist(), rel=1e-4)
        assert [latent for latent, _ in promoting(effects, token, 5, suppressed=True)] == order[::-1][:5]
        assert all(logit > 0 for _, logit in promoting(effects, token, 48))
        assert all(logit < 0 for _, logit in promoting(effects, token, 48, suppressed=True))
    assert promoting(LogitEffects(small.dictionary, None), 3) == []


def brute_similarity(small, strengths_F, informative=10**9):
    """Scores of all contexts by the formula, from dense codes."""
    sizes_TF = np.abs(small.dense_TF)
    best_CF = sizes_TF.reshape(-1, SIZE, 48).max(1) / sizes_TF.max(0).clip(1e-30)
    contexts_F = (best_CF > 0).sum(0)
    weights_F = np.array([math.log(len(best_CF) / c) if c > 1 else 0.0 for c in contexts_F])
    kept = np.argsort(-weights_F * strengths_F, kind="stable")[:informative]
    total = (weights_F * strengths_F)[kept].sum()
    adds_CF = weights_F * np.minimum(best_CF, strengths_F) / total
    return adds_CF[:, kept].sum(1), adds_CF


@pytest.mark.parametrize("informative", [5, 48])
def test_similar_contexts_by_the_formula(small, monkeypatch, informative):
    monkeypatch.setattr("saebench.features.search.INFORMATIVE", informative)
    sizes_TF = np.abs(small.dense_TF)
    for context in (0, 17, 200):
        rows = slice(context * SIZE, (context + 1) * SIZE)
        strengths_F = sizes_TF[rows].max(0) / sizes_TF.max(0).clip(1e-30)
        score_C, adds_CF = brute_similarity(small, strengths_F, informative)
        found = similar_contexts(small.store, context, count=8, exclude=[context + 1])
        assert score_C[context] == pytest.approx(1)
        score_C[[context, context + 1]] = -1
        assert [hit.score for hit in found] == pytest.approx(np.sort(score_C)[::-1][:8].tolist(), rel=1e-5)
        for hit in found:
            assert hit.context not in (context, context + 1)
            assert hit.score == pytest.approx(score_C[hit.context], rel=1e-5)
            assert sum(weight for _, weight in hit.shared) == pytest.approx(hit.score, rel=1e-5)
            for latent, weight in hit.shared:
                assert weight == pytest.approx(adds_CF[hit.context, latent], rel=1e-5)
            assert [w for _, w in hit.shared] == sorted((w for _, w in hit.shared), reverse=True)


def test_similar_contexts_of_given_codes(small):
    context = 42
    _, latents, values = small.store.codes(context * SIZE, (context + 1) * SIZE)
    by_number = similar_contexts(small.store, context, count=5)
    shuffled = np.random.default_rng(0).permutation(len(latents))
    by_codes = similar_contexts(small.store, codes=(latents[shuffled], values[shuffled]), count=6)
    assert (by_codes[0].context, by_codes[0].score) == (context, pytest.approx(1))
    assert [hit.score for hit in by_codes[1:]] == pytest.approx([hit.score for hit in by_number])
    assert similar_contexts(small.store, codes=(latents[:0], values[:0])) == []
    with pytest.raises(UserError, match="context 423 is not one of the 423"):
        similar_contexts(small.store, 423)


def test_filters_of_the_table_of_latents(small):
    table = small.store.latents
    count = np.count_nonzero(small.dense_TF, axis=0)
    high = small.dense_TF.max(0)
    assert filter_latents(table).tolist() == np.flatnonzero(count).tolist()
    assert filter_latents(table, alive=False).tolist() == list(range(48))
    low, up = float(np.quantile(count[count > 0], 0.2)) / 6345, float(np.quantile(count[count > 0], 0.7)) / 6345
    found = filter_latents(table, density=(low, up), max=(None, float(np.median(high))))
    density = count / small.store.num_tokens
    assert found.tolist() == np.flatnonzero((density >= low) & (density <= up) & (high <= np.median(high)) & (count > 0)).tolist()
    assert 0 < len(found) < 40
    sums = [np.bincount(small.ids_T, small.dense_TF[:, f], minlength=400) for f in range(48)]
    tops = np.array([s.argmax() if count[f] else -1 for f, s in enumerate(sums)])
    if small.kind != "lorsa":
        top = int(tops[small.alive[0]])
        assert filter_latents(table, token=top).tolist() == np.flatnonzero(tops == top).tolist()
        pair = [top, int(tops[small.alive[-1]])]
        assert filter_latents(table, token=pair).tolist() == np.flatnonzero(np.isin(tops, pair)).tolist()
    labels = [None if f % 3 else f"Numbers after {f}" for f in range(48)]
    labelled = table.append_column("label", pa.array(labels))
    assert filter_latents(labelled, label="AFTER 1", alive=False).tolist() == [12, 15, 18]
    assert filter_latents(labelled, label="(.*", alive=False).tolist() == []
    with pytest.raises(UserError, match="no figure 'beauty' to filter by: use one of latent, count, density"):
        filter_latents(table, beauty=(0, 1))
