"""What separates two sets of documents: the figures by brute force, planted differences, and no more false ones than stated."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import saebench as sb
from saebench.activations.encoding import Encoded
from saebench.errors import UserError
from saebench.features import index
from saebench.features.contrast import (
    _Counts,
    contrast,
    contrast_texts,
    document_sets,
    false_discovery_rates,
    themes,
)
from saebench.features.prompts import read_prompt
from saebench.lm import Contexts

SIZE = 16


def statistics(x_aU, n_aU, x_bU, n_bU):
    """rate, rate, z and p of one latent by going through the units, from the definition."""
    rates = [x.sum() / n.sum() for x, n in ((x_aU, n_aU), (x_bU, n_bU))]
    own = 0.0
    for x_U, n_U, rate in ((x_aU, n_aU, rates[0]), (x_bU, n_bU, rates[1])):
        own += len(n_U) / (len(n_U) - 1) * sum((x - rate * n) ** 2 for x, n in zip(x_U, n_U, strict=True)) / n_U.sum() ** 2
    x_U, n_U, a, b = np.concatenate([x_aU, x_bU]), np.concatenate([n_aU, n_bU]), len(n_aU), len(n_bU)
    rest_U = x_U - x_U.sum() / n_U.sum() * n_U
    dealt = a * b / (a + b) * rest_U.var(ddof=1) * (n_U.sum() / (n_aU.sum() * n_bU.sum())) ** 2
    z = (rates[0] - rates[1]) / math.sqrt(max(own, dealt)) if rates[0] != rates[1] else 0.0
    return *rates, z, 2 * stats.t.sf(abs(z), min(a, b) - 1)


def check(difference, x_aU, n_aU, x_bU, n_bU):
    rate_a, rate_b, z, p = statistics(x_aU, n_aU, x_bU, n_bU)
    assert (difference.firings_a, difference.firings_b) == (x_aU.sum(), x_bU.sum())
    assert (difference.units_a, difference.units_b) == ((x_aU > 0).sum(), (x_bU > 0).sum())
    assert (difference.rate_a, difference.rate_b) == pytest.approx((rate_a, rate_b))
    assert difference.z == pytest.approx(z, rel=1e-6, abs=1e-9)
    assert difference.p == pytest.approx(p, rel=1e-5)
    ratio = ((x_aU.sum() + 0.5) / (n_aU.sum() + 1)) / ((x_bU.sum() + 0.5) / (n_bU.sum() + 1))
    assert difference.log_ratio == pytest.approx(math.log2(ratio))


def by_unit(small, mask, unit):
    """Firings [units, F] and tokens [units] of the documents of a set, by going through the tokens."""
    documents = small.store.contexts.documents_NS.flatten().tolist()
    firings, tokens = {}, {}
    for token, document in enumerate(documents):
        if token % SIZE == 0 or document < 0 or not mask[document]:
            continue
        key = document if unit == "document" else (token // SIZE, document)
        firings[key] = firings.get(key, 0) + (small.dense_TF[token] != 0)
        tokens[key] = tokens.get(key, 0) + 1
    return np.array(list(firings.values())), np.array(list(tokens.values()))


@pytest.mark.parametrize("unit", ["document", "context"])
def test_all_figures_by_brute_force(small, unit, monkeypatch):
    monkeypatch.setattr("saebench.features.scanning.BLOCK_ENTRIES", 3000)
    names = len(small.store.contexts.names)
    rng = np.random.default_rng(4)
    for kind in range(3):
        draw = rng.random(names)
        a, b = (draw < 0.3, draw > 0.5) if kind < 2 else (np.arange(names) < 12, np.arange(names) >= 30)
        (x_aUF, n_aU), (x_bUF, n_bU) = by_unit(small, a, unit), by_unit(small, b, unit)
        found = contrast(small.store, a, b, 100, min_firings=5, unit=unit)
        total_F = x_aUF.sum(0) + x_bUF.sum(0)
        assert sorted(d.latent for d in found) == np.flatnonzero(total_F >= 5).tolist()
        for difference in found:
            check(difference, x_aUF[:, difference.latent], n_aU, x_bUF[:, difference.latent], n_bU)
        expected = stats.false_discovery_control([d.p for d in found])
        assert [d.q for d in found] == pytest.approx(expected.tolist())
        assert [abs(d.z) for d in found] == sorted((abs(d.z) for d in found), reverse=True)
        assert contrast(small.store, a, b, 3, min_firings=5, unit=unit) == found[:3]
        mirrored = contrast(small.store, b, a, 100, min_firings=5, unit=unit)
        assert {d.latent: -d.z for d in mirrored} == pytest.approx({d.latent: d.z for d in found})


def test_themes_are_what_fires_more_than_elsewhere(small):
    mask = np.arange(len(small.store.contexts.names)) % 4 == 1
    expected = [d for d in contrast(small.store, mask, ~mask, 100) if d.z > 0]
    found = themes(small.store, mask, 100)
    assert found == sorted(expected, key=lambda d: -d.z)
    assert themes(small.store, mask, 2) == found[:2]


class Held:
    """A source that holds the wanted codes: with an identity encoder the activations are the codes."""

    identity = "held"

    def __init__(self, x_NSD, contexts):
        self.x_NSD, self.contexts, self.widths = x_NSD, contexts, {"a": x_NSD.shape[2]}
        self.num_contexts, self.context_size = x_NSD.shape[:2]

    def check_sites(self, sites):
        pass

    def fetch(self, contexts_N, sites, out=None):
        return {site: Encoded(self.x_NSD[contexts_N]) for site in sites}


def store_of(firing_TF, documents_T, path):
    """A store of codes that are 1 where a latent fires."""
    latents = firing_TF.shape[1]
    dictionary = sb.TopK(d_sae=latents, k=latents, d_in=latents, site="a", decoder="unit").build().requires_grad_(False)
    dictionary.W_enc_FD.copy_(torch.eye(latents))
    dictionary.W_dec.copy_(torch.eye(latents))
    documents_NS = torch.from_numpy(documents_T).view(-1, SIZE).int()
    names = [f"{'red' if d % 2 else 'blue'}/{d}.txt" for d in range(int(documents_T.max()) + 1)]
    contexts = Contexts(torch.zeros_like(documents_NS), documents_NS, torch.zeros_like(documents_NS), names)
    x_NSD = torch.from_numpy(firing_TF).float().view(-1, SIZE, latents)
    return index(dictionary, Held(x_NSD, contexts), path)


def bursty(rng, documents_T, latents, share=0.3):
    """Firings that cluster in documents: each latent is at home in some documents, and fires there often."""
    documents = int(documents_T.max()) + 1
    rate_UF = (rng.random((documents, latents)) < share) * rng.beta(0.5, 2, (documents, latents))
    return rng.random((len(documents_T), latents)) < rate_UF[documents_T]


def documents_of_many_lengths(rng, documents):
    lengths = rng.integers(20, 200, documents)
    documents_T = np.repeat(np.arange(documents), lengths)
    return documents_T[: len(documents_T) // SIZE * SIZE]


def test_planted_differences_are_found_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    documents_T = documents_of_many_lengths(rng, 120)
    firing_TF = bursty(rng, documents_T, 60)
    red_T = documents_T % 2 == 1
    for latent, (in_red, in_blue) in {3: (0.2, 0.05), 11: (0.02, 0.08), 40: (0.1, 0.0)}.items():
        firing_TF[:, latent] = rng.random(len(documents_T)) < np.where(red_T, in_red, in_blue)
    store = store_of(firing_TF, documents_T, tmp_path / "store")
    red = document_sets(store, "red/*")
    found = contrast(store, red, ~red)
    surely = [d for d in found if d.q < 0.05]
    assert {d.latent for d in surely} == {3, 11, 40}
    by_latent = {d.latent: d for d in surely}
    assert by_latent[3].log_ratio == pytest.approx(2, abs=0.3)
    assert by_latent[11].log_ratio == pytest.approx(-2, abs=0.4)
    assert by_latent[40].log_ratio > 8 and by_latent[40].firings_b == 0
    assert (by_latent[3].z > 0, by_latent[11].z < 0) == (True, True)
    assert {d.latent for d in themes(store, red, 2)} == {3, 40}


@pytest.mark.parametrize(("size", "share"), [(60, 0.3), (60, 0.03), (6, 0.3), (6, 0.03), (3, 0.3), (3, 0.03)])
def test_random_splits_differ_no_more_often_than_stated(size, share):
    """Firings cluster in documents, documents are dealt out by chance: p is below 5 % in 5 % of cases at most, and few sets have a
    discovery; counting tokens as independent would see differences everywhere."""
    rng = np.random.default_rng(size)
    splits, below, naive, tests, discoveries = 30, 0, 0, 0, 0
    for _ in range(splits):
        documents_T = documents_of_many_lengths(rng, 120)
        firing_TF = bursty(rng, documents_T, 150, share)
        in_a_U = np.zeros(120, dtype=bool)
        in_a_U[rng.choice(documents_T.max() + 1, size, replace=False)] = True
        counts = _Counts(150, np.bincount(documents_T, minlength=120), in_a_U, "document")
        tokens_N, latents_N = (
            x[order] for order in [np.argsort(np.nonzero(firing_TF)[1], kind="stable")] for x in np.nonzero(firing_TF)
        )
        counts.add(0, np.searchsorted(latents_N, np.arange(151)), tokens_N.astype(np.int32), documents_T.astype(np.int32))
        found = counts.differences(150, 10)
        p = np.array([d.p for d in found])
        tests, below = tests + len(p), below + (p < 0.05).sum()
        discoveries += any(d.q < 0.05 for d in found)
        n_a, n_b = counts.n
        for d in found:
            rate = (d.firings_a + d.firings_b) / (n_a + n_b)
            naive += abs(d.rate_a - d.rate_b) / math.sqrt(rate * (1 - rate) * (1 / n_a + 1 / n_b)) > 1.96
    assert below / tests < 0.06
    assert discoveries <= 1  # 5 % of the splits
    assert naive / tests > 0.2
    if size == 60 and share == 0.3:
        assert below / tests > 0.03  # it is not blind either


def test_documents_that_come_in_pieces_count_once(tmp_path):
    """The same contexts in another order: the same figures."""
    rng = np.random.default_rng(2)
    documents_T = np.repeat(np.arange(30), 3 * SIZE)
    firing_TF = bursty(rng, documents_T, 20)
    firing_TF[::SIZE] = False
    order_N = rng.permutation(len(documents_T) // SIZE)
    shuffled = lambda x: x.reshape(-1, SIZE, *x.shape[1:])[order_N].reshape(x.shape)  # noqa: E731
    whole = store_of(firing_TF, documents_T, tmp_path / "whole")
    pieces = store_of(shuffled(firing_TF), shuffled(documents_T), tmp_path / "pieces")
    mask = rng.random(30) < 0.4
    assert contrast(pieces, mask, ~mask) == contrast(whole, mask, ~mask)
    by_context = contrast(whole, mask, ~mask, unit="context")
    assert contrast(pieces, mask, ~mask, unit="context") == by_context
    assert {d.units_a + d.units_b for d in by_context} != {d.units_a + d.units_b for d in contrast(whole, mask, ~mask)}


def test_documents_by_name(tmp_path):
    documents_T = np.repeat(np.arange(6), 2 * SIZE)
    store = store_of(np.ones((len(documents_T), 2), dtype=bool), documents_T, tmp_path / "store")
    chosen = lambda pattern: np.flatnonzero(document_sets(store, pattern)).tolist()  # noqa: E731
    assert chosen("red/*") == [1, 3, 5]
    assert chosen("RED") == [1, 3, 5]
    assert chosen("?ed/3.txt | 4") == [3, 4]
    assert chosen("*/[02].txt") == [0, 2]
    assert chosen("(.*") == chosen("") == chosen("|") == []
    assert chosen("*") == list(range(6))


def test_sets_that_cannot_be_compared_are_named(small):
    names = len(small.store.contexts.names)
    one, two = np.arange(names) == 3, np.arange(names) < 5
    with pytest.raises(UserError, match="1 documents are in both sets \\('doc3' is one\\)"):
        contrast(small.store, one, two)
    with pytest.raises(UserError, match="a set with 1 documents cannot be told from chance: give at least two documents"):
        contrast(small.store, one, ~two)
    with pytest.raises(UserError, match="a set with 0 documents"):
        themes(small.store, one & two & ~one)
    assert contrast(small.store, one, ~two, unit="context")


def test_texts_that_are_in_no_store(small, tiny_lm, monkeypatch):
    monkeypatch.setattr("saebench.features.prompts.PIECES_AT_ONCE", 3)
    texts_a = [f"def value_{i}(x):\n    return x * {i}" for i in range(7)]
    texts_b = [f"the number {i} and the name {i * i}, " * (1 + i % 2) for i in range(5)]
    found = contrast_texts(tiny_lm, small.dictionary, texts_a, texts_b, 100, min_firings=3, context_size=64)
    x_UF, n_U = [], []
    for text in texts_a + texts_b:
        codes = read_prompt(tiny_lm, small.dictionary, text)
        x_UF.append(np.bincount(codes.latents, minlength=48))
        n_U.append(len(codes) - 1)
    x_UF, n_U = np.array(x_UF), np.array(n_U)
    assert sorted(d.latent for d in found) == np.flatnonzero(x_UF.sum(0) >= 3).tolist()
    for d in found:
        check(d, x_UF[:7, d.latent], n_U[:7], x_UF[7:, d.latent], n_U[7:])
    with pytest.raises(UserError, match="a set with 1 texts cannot be told from chance: give at least two texts on each side$"):
        contrast_texts(tiny_lm, small.dictionary, ["one", ""], texts_b)


def test_long_texts_are_read_in_contexts(small, tiny_lm):
    bos, text = tiny_lm.tokenizer.bos_token_id, "value_3 and the number 17 " * 10
    ids = tiny_lm.tokenizer(text)["input_ids"]
    texts_b = ["return x", "x * 3"]
    found = contrast_texts(tiny_lm, small.dictionary, [text, text[:40]], texts_b, 100, min_firings=1, context_size=20)
    expected = np.zeros(48, dtype=int)
    for start in range(0, len(ids), 19):
        x_CSD = tiny_lm.read(torch.tensor([[bos, *ids[start : start + 19]]]), small.dictionary.config.reads)
        codes = small.dictionary.encode_contexts(next(iter(x_CSD.values())))
        expected += codes.firings().numpy()
    short = read_prompt(tiny_lm, small.dictionary, text[:40])
    assert len(short) <= 20
    expected += np.bincount(short.latents, minlength=48)
    assert {d.latent: d.firings_a for d in found} == {d.latent: expected[d.latent] for d in found}
    assert sum(expected) == sum(d.firings_a for d in found)


def test_false_discovery_rates_are_those_of_benjamini_and_hochberg():
    rng = np.random.default_rng(0)
    for size in (1, 7, 400):
        p = rng.random(size) ** 3
        assert false_discovery_rates(p) == pytest.approx(stats.false_discovery_control(p))
    assert len(false_discovery_rates(np.empty(0))) == 0
