"""Correlation matching against dense correlations, SVCCA and RSA on spaces of which the answer is known."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import saebench as sb
from saebench.activations import ActivationStream
from saebench.circuits.matching import universality
from saebench.circuits.matching.universality import SameTokens, correlate, rsa, share_tokens, similarity, svcca, top_tokens
from saebench.codes import SparseCodes
from saebench.errors import UserError
from saebench.features import index


def dense(count: int, latents: int, seed: int, rate: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, latents, generator=generator)
    return values * (torch.rand(count, latents, generator=generator) < rate)


@pytest.fixture(scope="module")
def pair():
    """Latents 0 to 9 of A are 5 to 14 of B, with noise; A's last never fires, B's last always by the same amount."""
    a, b = dense(400, 20, 0), dense(400, 30, 1)
    b[:, 5:15] = 0.7 * a[:, :10] + 0.3 * b[:, 5:15]
    a[:, 19], b[:, 29] = 0, 1
    return a, b


def test_correlations_are_those_of_dense_codes(pair, monkeypatch):
    monkeypatch.setattr(universality, "LATENTS", 7)
    a, b = pair
    parts = [(SparseCodes.from_dense(a[i : i + 150]), SparseCodes.from_dense(b[i : i + 150])) for i in range(0, 400, 150)]
    found = correlate(SameTokens.of_codes(parts), floor=0.1)
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(a.double().T, b.double().T)[:20, 20:]
    r = np.nan_to_num(r)
    assert (found.num_a, found.num_b) == (19, 29)
    assert {(i, j) for i, j in zip(*np.nonzero(r > 0.1), strict=True)} == set(zip(found.a_N, found.b_N, strict=True))
    np.testing.assert_allclose(found.r_N, r[found.a_N, found.b_N], atol=1e-6)
    best_a, best_b, best_r = found.best()
    for i, j, value in zip(best_a, best_b, best_r, strict=True):
        assert i == r[:, j].argmax() and value == pytest.approx(r[:, j].max(), abs=1e-6)
    assert set(best_b) == set(np.flatnonzero(r.max(0) > 0.1))
    # greedy by brute force
    table, expected = r.copy(), set()
    while table.max() > 0.1:
        i, j = np.unravel_index(table.argmax(), table.shape)
        expected.add((i, j))
        table[i], table[:, j] = -1, -1
    assert set(zip(*found.one_to_one()[:2], strict=True)) == expected >= {(i, i + 5) for i in range(10)}


def test_top_tokens_and_what_they_have_in_common():
    a = torch.tensor([[1.0, 0, 0], [2.0, 0, 1.0], [1.5, 0, 0], [0.0, 0, 1.0]])
    b = a[:, [0, 2]]
    same = SameTokens.of_codes([(SparseCodes.from_dense(a), SparseCodes.from_dense(b))], np.array([3, 1, 3, 0]))
    top_a, top_b = top_tokens(same, 2)
    assert top_a.tolist() == [[3, 1], [-1, -1], [0, 1]] and top_b.tolist() == [[3, 1], [0, 1]]
    assert share_tokens(top_a, top_b[[0, 0, 0]]).tolist() == [True, False, True]
    strings = ["x", "\n", "(", "a"]
    assert share_tokens(top_a, top_b[[0, 0, 0]], strings).tolist() == [True, False, False]
    with pytest.raises(UserError, match="ids are not known"):
        top_tokens(SameTokens.of_codes([(SparseCodes.from_dense(a), SparseCodes.from_dense(b))]))
    with pytest.raises(UserError, match="3 token ids are not those of 4 tokens"):
        SameTokens.of_codes([(SparseCodes.from_dense(a), SparseCodes.from_dense(b))], np.arange(3))
    with pytest.raises(UserError, match="same tokens"):
        SameTokens.of_codes([(SparseCodes.from_dense(a), SparseCodes.from_dense(b[:2]))])


def test_stores_give_what_codes_give(tiny_lm, contexts, tmp_path, monkeypatch):
    monkeypatch.setattr(universality, "CHUNK", 100)
    made, source = [], []
    for seed, layer in enumerate((0, 1)):
        site = f"blocks.{layer}.hook_resid_post"
        sae = sb.TopK(d_sae=40, k=4, d_in=32, site=site).build().requires_grad_(False)
        rows = torch.nn.functional.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)), dim=1)
        sae.W_enc_FD.copy_(rows)
        sae.W_dec.copy_(rows)
        sae.folded = True
        stream = ActivationStream(tiny_lm, contexts[:20], [site])
        made.append(index(sae, stream, tmp_path / str(layer)))
        source.append(sae.encode_contexts(tiny_lm.read(contexts.ids_NS[:20], [site])[site].float()))
    same = SameTokens.of_stores(*made)
    found, expected = correlate(same), correlate(SameTokens.of_codes([tuple(source)]))
    table, other = (dict(zip(zip(f.a_N, f.b_N, strict=True), f.r_N, strict=True)) for f in (found, expected))
    near = {pair for pair in table.keys() ^ other.keys()}
    assert len(table) > 20 and all(table.get(p, other.get(p)) < 0.101 for p in near)
    assert all(table[p] == pytest.approx(other[p], abs=2e-3) for p in table.keys() & other.keys())
    latent = int(found.a_N[0])
    listed = [token for token, _, _ in made[0].details(latent).tokens[:5]]
    assert [i for i in top_tokens(same)[0][latent].tolist() if i >= 0] == listed


def test_a_rotated_space_is_the_same_space():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 30))
    rotation = np.linalg.qr(generator.normal(size=(30, 30)))[0]
    assert svcca(x, x @ rotation) == pytest.approx(1, abs=1e-9)
    # rows are centred over coordinates, which a rotation moves: with rows that sum to 0 in both it does not
    flat = x - x.mean(1, keepdims=True)
    turned = np.eye(30) - np.ones((30, 30)) / 30
    within = np.linalg.qr(np.concatenate([np.ones((30, 1)), turned @ generator.normal(size=(30, 29))], 1))[0][:, 1:]
    other = flat @ within @ np.linalg.qr(generator.normal(size=(29, 29)))[0] @ within.T
    assert rsa(flat, other) == pytest.approx(1, abs=1e-9)
    found = similarity(flat, other, draws=20)
    assert found.svcca == pytest.approx(1) and found.rsa == pytest.approx(1) and found.svcca_p == found.rsa_p == 0


def test_the_null_is_not_zero():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(2000, 50))
    assert svcca(x, x[generator.permutation(2000)], share=1.0) == pytest.approx(0.135, abs=0.01)
    found = similarity(x, x[generator.permutation(2000)], share=1.0, rows=200)
    assert found.svcca_null.mean() == pytest.approx(0.135, abs=0.005) and len(found.svcca_null) == 100
    assert abs(found.svcca - found.svcca_null.mean()) < 4 * found.svcca_null.std() and found.svcca_p > 0
    assert abs(found.rsa) < 0.03 and abs(found.rsa_null.mean()) < 0.005


def test_rsa_is_spearman_on_the_upper_triangle():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(40, 6)), generator.normal(size=(40, 9))
    y[:, :6] += x
    upper = np.triu_indices(40, 1)
    expected = spearmanr(np.corrcoef(x)[upper], np.corrcoef(y)[upper])[0]
    assert rsa(x, y) == pytest.approx(expected, abs=1e-9)
    order = np.random.default_rng(3).permutation(40)
    found = similarity(x, y[order], draws=5)
    assert found.rsa == pytest.approx(rsa(x, y[order]), abs=1e-9) and found.svcca == pytest.approx(svcca(x, y[order]), abs=1e-9)


def test_too_few_pairs_are_refused():
    generator = np.random.default_rng(4)
    with pytest.raises(UserError, match="20 pairs are too few"):
        svcca(generator.normal(size=(20, 12)), generator.normal(size=(20, 12)))
