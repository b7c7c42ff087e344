import itertools
import math

import pytest
import torch
from scipy.stats import multivariate_normal, norm

from saebench.errors import UserError
from saebench.synthetic.planted import BLOCK, PlantedDictionary

SMALL = {"num_features": 60, "width": 24, "l0": 5.0}
TREES = {"tree_share": 0.7, "branching": 3, "depth": 2}
KINDS = {
    "plain": {},
    "topics": {"correlation": 0.6, "topics": 4},
    "trees": {**TREES, "child_rate": 0.5},
    "exclusive": {**TREES, "child_rate": 0.3, "exclusive": True, "correlation": 0.9},
}


def planted(kind="plain", **fields):
    return PlantedDictionary(**{**SMALL, **KINDS[kind], **fields})


def test_rates_follow_the_power_law_and_add_up_to_l0():
    rates = PlantedDictionary(num_features=1000, width=8, l0=2.0, exponent=1.5, max_rate=0.99).rates_F
    assert rates.sum() == pytest.approx(2.0, rel=1e-12)
    assert rates[9] / rates[99] == pytest.approx(10**1.5, rel=1e-12)
    capped = PlantedDictionary(num_features=1000, width=8, l0=20.0, exponent=1.0, max_rate=0.5).rates_F
    assert capped.sum() == pytest.approx(20.0, rel=1e-12)
    at_most = int((capped == 0.5).sum())
    assert 1 < at_most < 20
    assert capped[at_most] < 0.5
    assert capped[199] / capped[399] == pytest.approx(2.0, rel=1e-12)
    assert PlantedDictionary(num_features=10, width=8, l0=5.0, exponent=2.0).rates_F.tolist() == pytest.approx([0.5] * 10)
    assert PlantedDictionary(num_features=10, width=8, l0=3.0, exponent=0.0).rates_F.tolist() == pytest.approx([0.3] * 10)


@pytest.mark.parametrize("kind", KINDS)
def test_empirical_rates_are_the_stated_ones(kind):
    p = planted(kind)
    tokens = 10 * BLOCK
    _, codes = p.sample(tokens, seed=3)
    assert p.rates_F.sum() == pytest.approx(5.0)
    deviation_F = (codes.firings() / tokens - p.rates_F) / (p.rates_F * (1 - p.rates_F) / tokens).sqrt()
    assert deviation_F.abs().max() < 4.5
    assert 0.4 < deviation_F.square().mean() < 2.2  # 1 on average; wide, since topics and trees make the deviations dependent
    l0 = codes.l0().double()
    assert (l0.mean() - 5).abs() < 4.5 * l0.std() / math.sqrt(tokens)


def test_without_correlation_features_are_independent():
    p = planted()
    _, codes = p.sample(10 * BLOCK, seed=1)
    fires_BF = (codes.to_dense()[:, :12] > 0).double()
    together = (fires_BF.T @ fires_BF) / len(fires_BF)
    expected = p.rates_F[:12, None] * p.rates_F[:12]
    deviation = (together - expected) / (expected * (1 - expected) / len(fires_BF)).sqrt()
    assert deviation[~torch.eye(12, dtype=torch.bool)].abs().max() < 4.5
    l0_variance = (p.rates_F * (1 - p.rates_F)).sum()
    assert codes.l0().double().var() == pytest.approx(l0_variance.item(), rel=0.03)


def test_topics_correlate_by_the_stated_copula():
    """P(both fire) is the bivariate normal probability, in one topic with the correlation, in two with none."""
    p = planted("topics", exponent=0.5)
    tokens = 10 * BLOCK
    _, codes = p.sample(tokens, seed=2)
    fires_BF = (codes.to_dense() > 0).double()
    topics, thresholds = p.topics_F, -norm.ppf(p.rates_F.numpy())
    seen = set()
    for i, j in itertools.combinations(range(8), 2):
        correlation = 0.6 * float(topics[i] == topics[j])
        seen.add(correlation)
        law = multivariate_normal([0, 0], [[1, correlation], [correlation, 1]])
        expected = law.cdf([-thresholds[i], -thresholds[j]])
        together = float((fires_BF[:, i] * fires_BF[:, j]).mean())
        assert abs(together - expected) < 4.5 * math.sqrt(expected * (1 - expected) / tokens)
    assert seen == {0.0, 0.6}


@pytest.mark.parametrize("kind", ["trees", "exclusive"])
def test_children_fire_only_with_their_parent(kind):
    p = planted(kind)
    _, codes = p.sample(4 * BLOCK, seed=5)
    fires_BF = codes.to_dense() > 0
    children = (p.parents_F >= 0).nonzero().flatten()
    assert len(children) == 3 * 12  # three trees of 1 + 3 + 9
    assert (p.parents_F[: p.num_roots] == -1).all()
    assert torch.bincount(p.parents_F[children]).unique().tolist() == [0, 3]
    parent_fires = fires_BF[:, p.parents_F[children]]
    assert not (fires_BF[:, children] & ~parent_fires).any()
    trials, hits = parent_fires.sum(0).double(), fires_BF[:, children].sum(0).double()
    c = p.child_rate
    assert ((hits - trials * c) / (trials * c * (1 - c)).sqrt()).abs().max() < 4.5
    brood_BE = torch.stack([fires_BF[:, p.parents_F == parent].sum(1) for parent in p.parents_F[children].unique()], 1)
    assert brood_BE.max() == (1 if kind == "exclusive" else 3)


def test_directions_are_conditionally_orthogonal():
    p = PlantedDictionary(num_features=400, width=256, l0=5, tree_share=1, branching=4, depth=2, sibling_cosine=0.4, seed=7)
    d, parents = p.directions_FD, p.parents_F
    assert d.dtype == torch.float32
    assert torch.allclose(d.norm(dim=1), torch.ones(400), atol=1e-6)
    children = (parents >= 0).nonzero().flatten()
    grandchildren = children[parents[parents[children]] >= 0]
    assert (d[children] * d[parents[children]]).sum(1).abs().max() < 1e-6
    assert (d[grandchildren] * d[parents[parents[grandchildren]]]).sum(1).abs().max() < 1e-6
    siblings = torch.stack([d[parents == parent] @ d[parents == parent].T for parent in parents[children].unique()])
    assert siblings[:, ~torch.eye(4, dtype=torch.bool)].mean() == pytest.approx(0.4, abs=0.02)
    assert not torch.equal(d, PlantedDictionary(**{**p.model_dump(), "seed": 8}).directions_FD)


@pytest.mark.parametrize("kind", KINDS)
def test_x_is_offset_codes_and_noise(kind):
    clean, noisy = planted(kind, noise=0.0, offset=3.0), planted(kind, noise=0.25, offset=3.0)
    x_BD, codes = clean.sample(2000, seed=4)
    assert x_BD.dtype == codes.values.dtype == torch.float32
    assert clean.offset_D.norm() == pytest.approx(3.0, rel=1e-6)
    expected_BD = codes.to_dense().double() @ clean.directions_FD.double() + clean.offset_D.double()
    assert torch.allclose(x_BD.double(), expected_BD, atol=1e-5)
    y_BD, same = noisy.sample(2000, seed=4)
    assert torch.equal(same.indices, codes.indices)
    assert torch.equal(same.values, codes.values)
    assert (y_BD - x_BD).std() == pytest.approx(0.25, rel=0.02)
    assert (y_BD - x_BD).mean().abs() < 4.5 * 0.25 / math.sqrt(y_BD.numel())


def test_magnitudes():
    _, codes = planted(magnitude=2.0, spread=0.5).sample(BLOCK)
    assert codes.values.min() >= 2.0
    assert codes.values.mean() == pytest.approx(2 + 0.5 * math.sqrt(2 / math.pi), rel=0.01)
    assert planted(spread=0.0).sample(10)[1].values.unique().tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_determined_by_its_seed_and_not_by_its_pieces(kind):
    p, tokens = planted(kind), BLOCK + 700
    x_BD, codes = p.sample(tokens, seed=9)
    again_BD, _ = PlantedDictionary(**p.model_dump()).sample(tokens, seed=9)
    assert torch.equal(x_BD, again_BD)
    assert not torch.equal(x_BD[:100], p.sample(100, seed=10)[0])
    assert not torch.equal(codes.to_dense()[:700], codes.to_dense()[BLOCK:])
    for start, stop in ((0, 1), (0, 300), (BLOCK - 5, BLOCK), (BLOCK - 5, BLOCK + 5), (BLOCK, tokens)):
        piece_BD, piece = p.sample(stop - start, seed=9, start=start)
        assert torch.equal(piece_BD, x_BD[start:stop])
        assert torch.equal(piece.indices, codes[start:stop].indices)
        assert torch.equal(piece.values, codes[start:stop].values)
        assert torch.equal(piece.offsets, codes[start:stop].offsets)


def test_codes_are_sorted_within_tokens_and_without_duplicates():
    _, codes = planted("exclusive").sample(3000)
    assert (codes.values > 0).all()
    steps = (codes.tokens * codes.d_sae + codes.indices).diff()
    assert (steps > 0).all()


def test_sixteen_thousand_features():
    p = PlantedDictionary(num_features=16384, width=64, l0=30, correlation=0.5, tree_share=0.5, depth=2)
    x_BD, codes = p.sample(BLOCK, seed=0)
    assert x_BD.shape == (BLOCK, 64)
    assert codes.d_sae == 16384
    assert codes.l0().double().mean() == pytest.approx(30, rel=0.05)
    assert p.directions_FD.shape == (16384, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"l0": 40.0}, "l0=40 exceeds 30, which max_rate=0.5 allows: lower l0 or raise max_rate"),
        ({"tree_share": 0.1, "depth": 3}, "a tree with branching=4 and depth=3 has 85 features, more than tree_share=0.1"),
        (
            {"tree_share": 0.5, "branching": 1, "depth": 24},
            "depth=24 leaves no direction orthogonal to all ancestors in width=24",
        ),
        ({"exclusive": True, "child_rate": 0.4}, "lower child_rate to at most 0.25"),
        ({"correlation": 1.0}, "correlation"),
        ({"rate": 1.0}, "unknown key rate"),
    ],
)
def test_impossible_dictionaries_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        planted(**fields)


def test_impossible_samples_are_refused():
    with pytest.raises(UserError, match="tokens=0, start=0, seed=0"):
        planted().sample(0)
