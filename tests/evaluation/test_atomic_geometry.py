"""Atomic geometry against brute force and closed forms, and what coherence guarantees against trials."""

import math

import pytest
import torch

import saebench as sb
from saebench.codes import SparseCodes
from saebench.dictionaries.atoms import whitening
from saebench.errors import UserError
from saebench.evaluation.atoms import (
    atom_figures,
    atomic_inner_products,
    coherence,
    coherences,
    q_star,
    r_squared,
    random_atoms,
    recovery_interval,
    rip_bound,
    second_moment,
    unique_support,
)


def correlated(rows=3000, width=12, seed=0, mean=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing + mean


def hadamard(order: int):
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < order:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows / order**0.5


def test_atomic_inner_products_equal_the_definition():
    x = correlated()
    S = torch.linalg.inv(second_moment(x))
    u, v = x[:5], x[5:9]
    found = atomic_inner_products(u, v, second_moment(x))
    for i in range(5):
        for j in range(4):
            expected = u[i] @ S @ v[j] / ((u[i] @ S @ u[i]) * (v[j] @ S @ v[j])).sqrt()
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-8)


def test_atoms_of_independent_causes_are_nearly_orthogonal_in_the_atomic_product_alone():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    causes = torch.randn(200_000, 12, generator=generator, dtype=torch.float64)
    moment = second_moment(causes @ atoms)
    apart = ~torch.eye(12, dtype=torch.bool)
    assert atomic_inner_products(atoms, atoms, moment)[apart].abs().max() < 0.02
    assert coherence(atoms) > 0.3


def test_coherence_over_blocks_equals_brute_force(monkeypatch):
    monkeypatch.setattr("saebench.evaluation.atoms.ROWS_AT_ONCE", 7)
    atoms = torch.randn(23, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(atoms[:, None], atoms[None], dim=2).abs()
    pairs = torch.cat(list(coherences(atoms)))
    expected = cosines[torch.ones(23, 23, dtype=torch.bool).triu(1)]
    torch.testing.assert_close(pairs.sort().values, expected.sort().values)
    assert coherence(atoms) == pytest.approx(float(expected.max()))
    assert coherence(atoms[:1]) == 0


def test_what_coherence_guarantees():
    mu = coherence(torch.cat([torch.eye(256, dtype=torch.float64), hadamard(256)]))
    assert mu == pytest.approx(1 / 16)
    assert unique_support(mu) == 8  # 1/15 is above 1/16, 1/17 is not
    assert unique_support(1 / 15) == 7  # strictly below
    assert unique_support(0.0) == math.inf
    assert rip_bound(mu, 4) == pytest.approx(3 / 16)
    assert recovery_interval(mu, 4, 1, 1.3) == pytest.approx((0.325, 0.75625))
    assert recovery_interval(mu, 8, 1, 1.3) is None


def test_q_star_of_orthonormal_atoms_is_one():
    l0 = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    assert q_star(torch.linalg.qr(correlated(16, 16))[0], l0) == 1
    assert q_star(torch.eye(1), l0) == 1


def test_q_star_equals_a_search_over_quantiles():
    generator = torch.Generator().manual_seed(3)
    for width in (8, 64, 512):
        atoms = torch.randn(60, width, generator=generator, dtype=torch.float64)
        l0 = 1 + torch.poisson(torch.full((301,), 1.5), generator=generator).long()
        pairs, sizes = torch.cat(list(coherences(atoms))).sort().values, l0.sort().values
        best = 0.0
        for q in torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:].tolist():
            mu_q = float(pairs[math.ceil(q * len(pairs) - 1e-9) - 1])
            k_q = int(sizes[math.ceil(q * len(sizes) - 1e-9) - 1])
            if mu_q < 1 / (2 * k_q - 1):
                best = q
        assert q_star(atoms, l0) == pytest.approx(best, abs=1e-4)
        assert 0 < best < 1 or width == 512


class Truth:
    """The identity, with an error of a stated size."""

    def __init__(self, error):
        self.error = error

    def encode(self, x):
        return SparseCodes.from_dense((x > 0).to(x.dtype))

    def reconstruct(self, x, codes):
        return x + self.error * (x - x.mean(0))


def test_r_squared():
    x = correlated(500)
    r2, l0 = r_squared(Truth(0.5), x)
    assert r2 == pytest.approx(0.75)
    assert torch.equal(l0, (x > 0).sum(1))
    assert r_squared(Truth(0.0), x)[0] == 1


def test_random_atoms_have_the_stated_l0_on_other_tokens_and_a_fitted_scale():
    x, held_out = correlated(seed=0).float(), correlated(seed=1).float()
    random = random_atoms(x, 60, 5)
    r2, l0 = r_squared(random, held_out)
    assert float(l0.double().mean()) == pytest.approx(5, rel=0.05)
    assert 0 < r2 < 0.9
    with torch.no_grad():
        for factor in (0.9, 1.1):
            other = ((random(x) - random.b_dec) * factor + random.b_dec - x).square().sum()
            assert other > (random(x) - x).square().sum()
    assert not torch.equal(random.W_dec, random_atoms(x, 60, 5, seed=1).W_dec)


def test_figures_of_trained_atoms_beside_random_ones():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(12, 12, generator=generator)
    causes = torch.rand(30_000, 12, generator=generator) * (torch.rand(30_000, 12, generator=generator) < 0.15)
    x = causes @ atoms
    source = sb.TensorSource({"a": x[:25_000]})
    trained = sb.train(sb.Threshold(d_sae=24, target_l0=1.5), source, sb.TrainConfig(num_tokens=60_000, batch_size=200))
    figures = atom_figures(trained, x[:25_000], x[25_000:])
    assert figures["r_squared"] > 0.9 > figures["random_r_squared"]
    assert figures["random_l0"] == pytest.approx(figures["l0"], rel=0.1)
    assert 0 < figures["q_star"] <= 1
    whiten, _ = whitening(second_moment(x[:25_000] - x[:25_000].mean(0)), trained.config.floor)
    assert figures["coherence"] == pytest.approx(coherence(trained.W_dec.double() @ whiten))
    assert figures["mean_coherence"] < figures["coherence"]
    assert figures["unique_support"] == unique_support(figures["coherence"])
    for options in ({"floor": 0.5}, {"centre": False}):
        other = atom_figures(trained, x[:25_000], x[25_000:], **options)
        assert other["mean_coherence"] != figures["mean_coherence"]
        assert other["random_r_squared"] != figures["random_r_squared"]


def test_a_dictionary_without_atoms_of_this_width_is_refused():
    x = correlated(50, 12).float()
    with pytest.raises(UserError, match="decoder rows as wide as the activations, 12"):
        atom_figures(Truth(0.0), x, x)
