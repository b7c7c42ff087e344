"""The group lasso's proximal step against closed forms and a planted regression; in training, exact zeros that cost what they should."""

from functools import cache

import pytest
import torch

import saebench as sb
from saebench.activations import TensorSource
from saebench.dictionaries.group_penalty import block_lengths, column_blocks, shrink_blocks
from saebench.errors import UserError
from saebench.synthetic import PlantedDictionary


def test_the_proximal_step_of_a_block():
    W = torch.tensor([[2.0, 0], [0, 0.4], [0, 0]])
    shrink_blocks(W, 0.5, 1, [2])
    assert W.tolist() == [[1.5, 0], [0, 0], [0, 0]]
    W = torch.tensor([[1.2, 0, 1], [1.6, 0.3, 0]])  # blocks of two rows: (1.2, 1.6) of norm 2, (0, 0.3) of 0.3, (1, 0) of 1
    shrink_blocks(W, 0.5, 2, [1, 1, 1])
    torch.testing.assert_close(W, torch.tensor([[0.9, 0, 0.5], [1.2, 0, 0]]))


def test_the_proximal_step_minimises_what_it_should():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    objective = lambda V: float((V - W).square().sum() / 2 + 0.9 * block_lengths(V, 2, [3, 2]).sum())  # noqa: E731
    best = W.clone()
    shrink_blocks(best, 0.9, 2, [3, 2])
    for _ in range(200):
        assert objective(best) <= objective(best + 0.05 * torch.randn(6, 5, generator=generator, dtype=torch.float64))


def test_columns_are_cut_within_sites():
    assert column_blocks([8, 5], None) == [8, 5]
    assert column_blocks([8, 5], 4) == [4, 4, 4, 1]


def test_a_planted_regression_recovers_the_zero_blocks():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    zero = torch.rand(4, 2, generator=generator) < 0.5
    truth.view(4, 3, 2, 4)[zero[:, None, :, None].expand(4, 3, 2, 4)] = 0
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    y = x @ truth + 0.1 * torch.randn(400, 8, generator=generator, dtype=torch.float64)
    W = torch.zeros(12, 8, dtype=torch.float64)
    eta = 0.5
    for _ in range(300):
        W -= eta * x.T @ (x @ W - y) / 400
        shrink_blocks(W, eta * 0.1, 3, [4, 4])
    assert torch.equal(block_lengths(W, 3, [4, 4]) == 0, zero)
    assert float((W - truth).norm() / truth.norm()) < 0.15


@cache
def planted():
    return PlantedDictionary(num_features=24, width=16, l0=3).sample(8000)[0]


def trained(x, *weights, steps=250, **options):
    configs = [sb.TopK(d_sae=48, k=4, decoder="free", group_penalty=weight, **options) for weight in weights]
    return sb.train(configs, TensorSource({"x": x}), sb.TrainConfig(num_tokens=128 * steps, batch_size=128, lr=4e-3))


def fvu(sae, x):
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@cache
def by_weight():
    """Dictionaries of blocks of four columns, by the weight of the penalty."""
    weights = (0.0, 1.0, 2.0)
    return dict(zip(weights, trained(planted(), *weights, group_columns=4), strict=True))


def test_more_weight_makes_more_blocks_exactly_zero():
    saes = by_weight().values()
    zeros = [float((block_lengths(sae.W_dec, 1, [4] * 4) == 0).double().mean()) for sae in saes]
    errors = [fvu(sae, planted()) for sae in saes]
    assert zeros[0] == 0 and 0.2 < zeros[1] < zeros[2] - 0.2
    assert errors == sorted(errors)
    assert errors[1] < 0.3


def test_groups_of_latents_live_or_die_together():
    (sae,) = trained(planted(), 5.0, group_latents=4)
    dead = (sae.W_dec.norm(dim=1) == 0).view(-1, 4)
    assert dead.any() and not dead.all()
    assert torch.equal(dead.any(1), dead.all(1))


def test_total_correlation_of_latents_falls_with_the_weight():
    values = []
    for weight in (0.0, 2.0):
        f = by_weight()[weight].encode(planted()).to_dense().double()
        covariance = torch.cov(f[:, (f != 0).any(0)].T)
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance))
        values.append(float(covariance.diagonal().log().sum() / 2 - torch.linalg.slogdet(covariance).logabsdet / 2))
    assert values[1] < 0.7 * values[0]


def test_the_encoder_cannot_grow_in_the_decoders_place():
    config = sb.TopK(d_sae=8, k=2, d_in=4, decoder="free", group_penalty=0.1)
    sae = config.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc_FD.copy_(5 * torch.randn(8, 4, generator=generator))
        sae.W_dec.copy_(torch.randn(8, 4, generator=generator))
        sae.b_enc.copy_(torch.randn(8, generator=generator))
    x = torch.randn(30, 4, generator=generator)
    before = sae(x)
    sae.constrain(0.0)
    torch.testing.assert_close(sae.W_enc_FD.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(sae(x), before)  # the same function, and the decoder carries the length
    length = sae.W_dec.norm(dim=1)
    sae.constrain(0.5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), length - 0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_penalty": 0.1, "decoder": "unit"}, "set decoder=free"),
        ({"group_penalty": 0.1, "decoder": "free", "group_latents": 3}, "group_latents=3 does not divide d_sae=8"),
        ({"group_penalty": -0.1}, "group_penalty=-0.1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        sb.TopK(d_sae=8, k=2, **settings)
