"""Matryoshka against the worked example, its base rule and dense autograd."""

import json
from functools import cache
from itertools import accumulate

import pytest
import torch

import saebench as sb
from saebench.activations import TensorSource
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.matryoshka import decode_groups
from saebench.errors import UserError
from saebench.kernels import sparse_decode, use_implementation
from saebench.synthetic import PlantedDictionary

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A = torch.tensor([[2, 1.5, -1, 3.0]])
PLANTED = PlantedDictionary(num_features=64, width=24, l0=4)


@cache
def planted():
    return PLANTED.sample(8000)[0]


def fixture_sae(k=3, groups=(0.5, 0.5), **options):
    sae = sb.Matryoshka(d_sae=6, k=k, d_in=4, groups=groups, aux_coefficient=0, **options).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(D)
        sae.W_dec.copy_(D)
    return sae


def random_sae(config=sb.Matryoshka, d_sae=32, d_in=7, k=4, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sae = config(d_sae=d_sae, k=k, d_in=d_in, **options).build()
    x = tokens(200, d_in, seed=3)
    sae.initialise(x, x, generator)
    return sae


def tokens(count=50, d_in=7, seed=5, dtype=torch.float32):
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 3


def batch_of(x, d_sae=32, step=0, steps=1, seed=0):
    return TrainingBatch(x, x, torch.zeros(d_sae, dtype=torch.bool), step, steps, seed)


@pytest.mark.parametrize("rule", ["topk", "batchtopk"])  # the same for one token
def test_worked_example(rule):
    sae = fixture_sae(rule=rule)
    fit = sae.objective(batch_of(X_A, 6), sae.weights())
    assert float(fit.loss.detach()) / 4 == pytest.approx(3.125833, abs=1e-6)
    assert float(fit.parts["prefix_3"]) == pytest.approx(3.0625)  # in units of width * variance, and the variance is 1 here
    assert float(fit.parts["prefix_6"]) == pytest.approx(2.2525)
    torch.testing.assert_close(fit.error_BD[0], torch.tensor([3.44, 1.92, 1.08, 1.44]) - X_A[0])


def test_a_prefix_does_not_see_later_latents():
    sae = fixture_sae()
    codes = sae.select_batch(X_A, sae.weights())
    first, second = decode_groups(codes, sae.W_dec, [3, 3])
    loss = (sae.b_dec + first - X_A).square().sum()
    (gradient,) = torch.autograd.grad(loss, sae.W_dec, retain_graph=True)
    assert gradient[3:].count_nonzero() == 0 and gradient[:3].count_nonzero() > 0
    torch.testing.assert_close(first + second, sparse_decode(codes, sae.W_dec))


def test_one_group_is_the_base_loss_and_that_of_the_bias_alone():
    x = tokens()
    sae, base = random_sae(groups=(1.0,)), random_sae(sb.BatchTopK)
    whole = base.objective(batch_of(x), base.weights())
    bias = (x - base.b_dec).square().sum(1).mean()
    fit = sae.objective(batch_of(x), sae.weights())
    torch.testing.assert_close(fit.loss, (bias + whole.loss) / 2)
    torch.testing.assert_close(fit.error_BD, whole.error_BD)
    assert float(sae.threshold) == float(base.threshold)


@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
@pytest.mark.parametrize("random_prefixes", [0, 4])
def test_loss_and_gradients_equal_the_dense_computation(rule, random_prefixes):
    x = tokens(dtype=torch.float64)
    sae = random_sae(rule=rule, random_prefixes=random_prefixes, k_aux=3, decoder="unit").double()
    batch = TrainingBatch(x, x, torch.arange(32) > 27, 3, 10)
    losses = sae.losses(batch)
    gradients = torch.autograd.grad(losses.total, list(sae.parameters()))
    with use_implementation("reference"):
        weights = sae.weights()
        dense = sae.select_batch(x, weights).to_dense()
        sizes = sae.drawn_sizes(batch) if random_prefixes else sae.config.group_sizes
        ends = [0, *accumulate(sizes)]
        errors = [sae.b_dec + dense[:, :end] @ sae.W_dec[:end] - x for end in ends]
        expected = sum(error.square().sum(1).mean() for error in errors) / len(errors) / (7 * sae.variance)
        torch.testing.assert_close(losses.total, sae.losses(batch).total)
        with_aux = sae.losses(batch)
        slow = torch.autograd.grad(with_aux.total, list(sae.parameters()))
    torch.testing.assert_close(losses.total - losses.parts["auxk"] / 32, expected)
    for fast, reference in zip(gradients, slow, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences():
    sae = random_sae(d_sae=16, d_in=5, aux_coefficient=0).double()
    x = tokens(9, 5, dtype=torch.float64)
    parameters = list(sae.parameters())
    gradients = torch.autograd.grad(sae.losses(batch_of(x)).total, parameters)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        ends = []
        for sign in (1e-7, -2e-7, 1e-7):
            with torch.no_grad():
                for p, direction in zip(parameters, directions, strict=True):
                    p += sign * direction
            ends.append(sae.losses(batch_of(x)).total.item())
        analytic = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
        assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(analytic, rel=1e-5)


def test_default_groups_double():
    assert sb.Matryoshka(d_sae=64).group_sizes == [4, 4, 8, 16, 32]
    assert sb.Matryoshka(d_sae=1000).group_sizes == [62, 63, 125, 250, 500]


def test_random_prefixes_follow_the_pareto_law_and_the_step():
    sae = random_sae(d_sae=1024, random_prefixes=2000)
    draw = lambda **at: list(accumulate(sae.drawn_sizes(batch_of(tokens(2), 1024, **at))))  # noqa: E731
    assert draw() == draw() != draw(step=1) != draw(seed=1)
    assert all(draw(step=step)[-1] == 1024 for step in range(3))
    sae = random_sae(d_sae=1024, random_prefixes=1)
    lengths = torch.tensor([draw(step=step)[0] for step in range(3000)], dtype=torch.float64)
    for n in (2, 8, 64):  # P(length < n) = (1 - n^-0.5) / (1 - 1024^-0.5)
        assert float((lengths < n).double().mean()) == pytest.approx((1 - n**-0.5) / (1 - 1024**-0.5), abs=0.03)


def test_random_prefixes_and_rule_change_the_loss():
    x = tokens()
    losses = set()
    for options in ({}, {"rule": "topk"}, {"random_prefixes": 3}, {"groups": (0.25, 0.75)}):
        sae = random_sae(**options)
        losses.add(sae.objective(batch_of(x), sae.weights()).loss.item())
    assert len(losses) == 4


@pytest.mark.parametrize("options", [{"rule": "topk"}, {}, {"inference": "batch"}])
def test_save_load_and_fold(options, tmp_path):
    sae, x, scale = random_sae(**options), tokens() * 5, 0.37
    sae.objective(batch_of(scale * x), sae.weights())
    sae.threshold *= 0.999
    before, x_hat = sae.encode(scale * x), sae(scale * x) / scale
    scaling = Scaling(torch.zeros(7), torch.full((7,), scale))
    sae.fold(scaling, scaling)
    assert torch.equal(sae.encode(x).to_dense() > 0, before.to_dense() > 0)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-5)
    sae.save(tmp_path / "sae")
    loaded = sb.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())


def fvu(x, x_hat):
    return float((x_hat - x).square().sum() / (x - x.mean(0)).square().sum())


def test_trained_prefixes_reconstruct_where_those_of_batchtopk_do_not(tmp_path):
    x = planted()
    training = sb.TrainConfig(num_tokens=256 * 200, batch_size=256, log_every=10)
    configs = {"nested": sb.Matryoshka(d_sae=64, k=6), "plain": sb.BatchTopK(d_sae=64, k=6)}
    trained = dict(zip(configs, sb.train(configs, TensorSource({"x": x}), training, out=tmp_path), strict=True))
    prefix = {}
    for name, sae in trained.items():
        codes = sae.encode(x)
        assert abs(float(codes.l0().double().mean()) - 6) / 6 < 0.05
        dense = codes.to_dense()
        prefix[name] = [fvu(x, dense[:, :end] @ sae.W_dec[:end] + sae.b_dec) for end in (4, 8, 16, 32, 64)]
    assert prefix["nested"] == sorted(prefix["nested"], reverse=True)
    assert prefix["nested"][1] < 0.8 * prefix["plain"][1]
    assert prefix["nested"][-1] < 0.5
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["dictionary"] == "nested"][-1]
    assert last["prefix_64"] == pytest.approx(last["reconstruction"], rel=1e-5)
    assert last["prefix_4"] > last["prefix_8"] > last["prefix_64"]


def test_as_transcoder_it_predicts_another_site():
    x = planted()
    y = (x @ torch.randn(24, 10, generator=torch.Generator().manual_seed(3)) / 5).relu()
    config = sb.Matryoshka(d_sae=64, k=3, site="x", target="y", skip=True)
    sae = sb.train(config, TensorSource({"x": x, "y": y}), sb.TrainConfig(num_tokens=256 * 150, batch_size=256))
    assert fvu(y, sae(x)) < 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": (0.5, 0.25)}, "add up to 0.75 of d_sae: make them add up to 1"),
        ({"groups": (0.5, 0.499, 0.001)}, "every group needs a latent"),
        ({"groups": ()}, "add up to 0"),
        ({"groups": (1.5, -0.5)}, "every group needs a latent"),
        ({"rule": "topk", "inference": "batch"}, "inference=batch is for rule=batchtopk"),
        ({"k": 65}, "k=65 exceeds d_sae=64"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        sb.Matryoshka(**{"d_sae": 64, "k": 4, **settings})
