"""JumpReLU against the worked example, closed forms of its penalties, its dense twin, and the L0 that was asked for."""

import math

import pytest
import torch

import saebench as sb
from saebench.codes import SparseCodes
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.thresholds import SPEED, shortfall, upper_quantile
from saebench.errors import UserError
from saebench.kernels import encode_above, use_implementation
from saebench.trainer.member import Member

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A, X_B = torch.tensor([2, 1.5, -1, 3.0]), torch.tensor([0.5, 0, 0, -1.0])
FORMS = {
    "l0": {},
    "quadratic": {"penalty": "quadratic"},
    "tanh": {"penalty": "tanh"},
    "frequency": {"frequency_limit": 0.1},
    "free": {"decoder": "free", "pull": 0.01},
    "transcoder": {"target": "b", "d_out": 9},
}


def fixture_sae(threshold: float, **options):
    sae = sb.JumpReLU(d_sae=6, d_in=4, **{"coefficient": 1.0, "bandwidth": 0.4} | options).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(D)
        sae.W_dec.copy_(D)
        sae.slow_log_threshold.fill_(math.log(threshold) / SPEED)
    return sae


def random_sae(d_sae=30, d_in=7, seed=0, dtype=torch.float32, scale=1.0, **options):
    """An initialised dictionary, and what it reads and writes."""
    generator = torch.Generator().manual_seed(seed)
    options = {"target_l0": 4.0} | options if "coefficient" not in options else options
    sae = sb.JumpReLU(d_sae=d_sae, d_in=d_in, **options).build().to(dtype)
    x = scale * torch.randn(400, d_in, generator=generator).to(dtype)
    y = x if sae.config.rewrites else scale * torch.randn(400, sae.config.width_out, generator=generator).to(dtype)
    sae.initialise(x, y, generator)
    return sae, x, y


def batch_of(sae, x, y, step=5, steps=10):
    return TrainingBatch(x, y, torch.zeros(sae.config.d_sae, dtype=torch.bool), step, steps)


def test_worked_example():
    sae = fixture_sae(1.9)
    torch.testing.assert_close(sae.encode(X_A[None]).to_dense()[0], torch.tensor([2, 0, 2.4, 0, 0, 0]))
    assert float((sae(X_A[None]).detach() - X_A).square().sum()) == pytest.approx(12.25)
    losses = sae.losses(batch_of(sae, X_A[None], X_A[None]))
    assert float(losses.total.detach()) == pytest.approx((12.25 + 2) / 4)
    (gradient,) = torch.autograd.grad(losses.total, sae.slow_log_threshold)
    by_hand = torch.tensor([-13.68 - 2.5, 0, 0, 0, 17.1 - 2.5, 0]) * 1.9 * SPEED / 4
    torch.testing.assert_close(gradient, by_hand)


def test_without_thresholds_it_is_the_relu_dictionary():
    sae, x, _ = random_sae()
    with torch.no_grad():
        sae.slow_log_threshold.fill_(-10)
    expected = encode_above(x, sae.W_enc_FD, sae.b_enc, None)
    assert torch.equal(sae.encode(x).to_dense(), expected.to_dense())


def test_penalties_in_closed_form():
    sae = fixture_sae(1.0, penalty="tanh", coefficient=0.3, coefficient_warmup=0.0, pull=0.0, decoder="unit")
    f = torch.tensor([[2, 1.5, 2.4, 0, 1.8, 0], [0.0] * 6])
    x = torch.stack([X_A, X_B * 0.1])
    error = (f @ D - x).square().sum(1).mean()
    expected = (error + 0.3 * (4 * f).tanh().sum(1).mean()) / 4
    assert float(sae.losses(batch_of(sae, x, x)).total.detach()) == pytest.approx(float(expected), rel=1e-6)

    crowded = fixture_sae(1.0, coefficient=0.3, coefficient_warmup=0.0, frequency_limit=0.2)
    rates = (f > 0).float().mean(0)
    expected = (error + 0.3 * (rates * (1 + rates / 0.2)).sum()) / 4
    assert float(crowded.losses(batch_of(crowded, x, x)).total.detach()) == pytest.approx(float(expected), rel=1e-6)

    quadratic = fixture_sae(1.0, penalty="quadratic", coefficient=None, target_l0=1.5, quadratic_weight=3, coefficient_warmup=0.0)
    expected = (error + 3 * 4 * (2 / 1.5 - 1) ** 2) / 4  # L0 of the batch is (4 + 0) / 2: the mean comes before the square
    assert float(quadratic.losses(batch_of(quadratic, x, x)).total.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_pull_is_the_dense_sum_over_silent_latents():
    sae, x, _ = random_sae(dtype=torch.float64, decoder="free")
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.3, 2, 30)[:, None]
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    results = []
    for dense in (False, True):
        weights = sae.weights().folded()
        threshold = sae.threshold_for(weights)
        if dense:
            z = (x - sae.b_dec) @ weights.W_enc_FD.T + weights.b_enc_F
            loss = (threshold - z).relu().sum(1).mean()
        else:
            codes = encode_above(x, weights.W_enc_FD, weights.b_enc_F, sae.b_dec, threshold.detach())
            loss = shortfall(x, weights, sae.b_dec, codes, threshold)
        inputs = [sae.W_enc_FD, sae.b_enc, sae.slow_log_threshold, sae.b_dec]
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_whole_loss_equal_the_dense_ones(form):
    sae, x, y = random_sae(dtype=torch.float64, **FORMS[form])
    results = []
    for implementation in ("stock", "reference"):
        sae.sparsity.load_state_dict({name: t.clone() for name, t in sae.sparsity.state_dict().items()})
        with use_implementation(implementation):
            sae.eval()  # the controller takes note in training only
            total = sae.losses(batch_of(sae, x, y)).total
            results.append((total, *torch.autograd.grad(total, list(sae.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1:])


@pytest.mark.parametrize("form", ["l0", "tanh"])
def test_a_free_decoder_cannot_cheat_by_its_norms(form):
    """Decoder rows times a, encoder, bias and threshold divided by a: the same loss."""
    sae, x, y = random_sae(dtype=torch.float64, **{"decoder": "free", **FORMS[form]})
    sae.eval()
    before = float(sae.losses(batch_of(sae, x, y)).total.detach())
    a = torch.linspace(0.2, 3, 30, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec *= a[:, None]
        sae.W_enc_FD /= a[:, None]
        sae.b_enc /= a
        sae.slow_log_threshold -= a.log() / SPEED
    assert float(sae.losses(batch_of(sae, x, y)).total.detach()) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("form", ["l0", "quadratic", "tanh"])
def test_nothing_depends_on_the_units_of_the_input(form):
    """Window, thresholds and penalties move with the normalisation: a hundredth of the input, the same loss and threshold gradient."""
    results = []
    for scale in (1.0, 0.01):
        sae, x, y = random_sae(dtype=torch.float64, scale=scale, initial_bias="mean", **FORMS[form])
        sae.sparsity.start(0.3 * scale**2)
        sae.eval()
        total = sae.losses(batch_of(sae, x, y)).total
        results.append((total.detach(), torch.autograd.grad(total, sae.slow_log_threshold)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_initial_thresholds_let_every_latent_fire_equally_often():
    for options, l0 in (({}, 4.0), ({"initial_l0": 7.5}, 7.5), ({"coefficient": 1.0, "initial_l0": 2.0}, 2.0)):
        sae, x, _ = random_sae(**options)
        codes = sae.encode(x)
        assert float(codes.l0().float().mean()) == pytest.approx(l0, rel=0.05)
        assert codes.firings().unique().tolist() == [round(l0 / 30 * 400)]
        overshoot = ((sae(x) - sae.b_dec) * (x - sae.b_dec)).sum() / (sae(x) - sae.b_dec).square().sum()
        assert float(overshoot.detach()) == pytest.approx(1, abs=1e-3)
    sae, _, _ = random_sae(initial_threshold=0.05, normalise="unit_ms")
    torch.testing.assert_close(sae.threshold_for(sae.weights()), (0.05 * sae.variance.sqrt()).expand(30))
    torch.testing.assert_close(sae.W_enc_FD.norm(dim=1), torch.ones(30))


def test_upper_quantile_is_exceeded_on_the_stated_share():
    sae, x, _ = random_sae()
    quantile = upper_quantile(x, sae.weights(), None, 0.1)
    z = x @ sae.W_enc_FD.T + sae.b_enc
    assert ((z > quantile).sum(0) == 40).all()


@pytest.mark.parametrize("options", [{}, {"decoder": "free"}, {"penalty": "tanh"}, {"subtract_b_dec": True}, {"skip": True}])
def test_folding_changes_nothing_but_the_units(options):
    sae, _, _ = random_sae(**options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.b_enc.normal_(generator=generator).mul_(0.1)
        sae.b_dec.normal_(generator=generator)
        if sae.config.decoder == "free":
            sae.W_dec *= torch.linspace(0.5, 2, 30)[:, None]
    raw = torch.randn(60, 7, generator=generator) * 3 + 5
    scaling = Scaling(torch.full((7,), 5.0), torch.full((7,), 0.37))
    before, x_hat = sae.encode(scaling(raw)), sae(scaling(raw)) / 0.37 + 5
    sae.fold(scaling, scaling)
    after = sae.encode(raw)
    torch.testing.assert_close(sae(raw), x_hat, rtol=1e-5, atol=2e-5)
    assert torch.equal(after.indices, before.indices)
    assert sae.threshold.min() > 0 and after.values.min() > sae.threshold.min()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))
    torch.testing.assert_close(after.values, before.values / 0.37, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folded", [True, False])
def test_save_and_load_give_identical_codes(folded, tmp_path):
    sae, x, _ = random_sae()
    if folded:
        sae.fold(*[Scaling(torch.full((7,), 0.2), torch.full((7,), 1.3))] * 2)
    sae.save(tmp_path / "sae")
    loaded = sb.load(tmp_path / "sae")
    assert set(loaded.public_tensors()) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold", "variance"}
    assert loaded.public_tensors()["threshold"].shape == (30,)
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())
    assert torch.equal(loaded(x), sae(x))
    assert loaded.config == sae.config
    loaded.save(tmp_path / "again")
    assert torch.equal(sb.load(tmp_path / "again")(x), sae(x))


PLANTED = sb.PlantedDictionary(num_features=96, width=32, l0=4, exponent=0.5, noise=0.02)


@pytest.fixture(scope="module")
def planted():
    return sb.TensorSource({"a": PLANTED.sample(60_000, seed=0)[0]}), PLANTED.sample(8000, seed=1)[0]


def trained(planted, **options):
    """(dictionary, held-out FVU, held-out L0)"""
    source, held_out = planted
    training = options.pop("training", sb.TrainConfig(num_tokens=100_000, batch_size=400))
    config = options.pop("config", None) or sb.JumpReLU(d_sae=128, **options)
    sae = sb.train(config, source, training)
    error = (sae(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    return sae, float(error), float(sae.encode(held_out).l0().float().mean())


@pytest.fixture(scope="module")
def fvu_of_topk(planted):
    return trained(planted, config=sb.TopK(d_sae=128, k=5))[1]


@pytest.mark.parametrize(("target", "form"), [(3, "l0"), (5, "l0"), (8, "l0"), (5, "quadratic"), (5, "tanh")])
def test_reaches_the_stated_l0_and_reconstructs_as_topk_does(planted, fvu_of_topk, target, form):
    _, fvu, l0 = trained(planted, target_l0=target, **FORMS[form])
    assert l0 == pytest.approx(target, rel=0.05)
    if target == 5:
        assert fvu < 1.15 * fvu_of_topk


def test_thresholds_move_together_towards_the_target_at_the_end_only():
    sae, x, y = random_sae(initial_l0=8.0)
    for step, moved in ((7, False), (8, True)):
        before = sae.slow_log_threshold.detach().clone()
        sae.losses(batch_of(sae, x, y, step))
        sae.constrain()
        shift = SPEED * (sae.slow_log_threshold.detach() - before)
        torch.testing.assert_close(shift, torch.full((30,), 0.05 * math.log(2) if moved else 0.0), rtol=1e-3, atol=1e-6)
        sae.constrain()  # once
        torch.testing.assert_close(SPEED * (sae.slow_log_threshold.detach() - before), shift)
    fixed, x, y = random_sae(coefficient=1.0)
    before = fixed.slow_log_threshold.detach().clone()
    fixed.losses(batch_of(fixed, x, y, 9))
    fixed.constrain()
    assert torch.equal(fixed.slow_log_threshold, before)


def test_a_fixed_coefficient_trades_sparsity_for_error(planted):
    training = sb.TrainConfig(num_tokens=60_000, batch_size=400)
    (_, dense_fvu, dense_l0), (_, fvu, l0) = (
        trained(planted, coefficient=coefficient, initial_l0=4, training=training) for coefficient in (0.02, 2.0)
    )
    assert l0 < 0.8 * dense_l0 and fvu > dense_fvu


def test_a_frequency_limit_makes_frequent_latents_rarer(planted):
    rates = []
    for limit in (None, 0.02):
        sae, _, l0 = trained(planted, target_l0=6, frequency_limit=limit)
        assert l0 == pytest.approx(6, rel=0.08)
        rates.append(float(sae.encode(planted[1]).firings().max()) / 8000)
    assert rates[1] < 0.8 * rates[0]


@pytest.mark.parametrize(
    "options",
    [
        {"bandwidth": 2.0},
        {"straight_through": True},
        {"pull": 1.0},
        {"initial_l0": 9.0},
        {"initial_threshold": 0.2},
        {"frequency_limit": 0.1},
        {"penalty": "quadratic"},
        {"penalty": "quadratic", "quadratic_weight": 1.0},
        {"penalty": "tanh"},
        {"coefficient_warmup": 0.9},
        {"target_l0": 5.0},
    ],
)
def test_every_option_changes_the_training(options):
    data = PLANTED.sample(2000, seed=3)[0]
    base = {"penalty": options["penalty"]} if len(options) > 1 else {}
    weights = []
    for each in (base, options):
        member = Member.create(
            sb.JumpReLU(d_sae=64, **{"target_l0": 4.0} | each), sb.TrainConfig(num_tokens=2000, batch_size=200), {"a": data}
        )
        for step in range(10):
            member.step(data[200 * step : 200 * step + 200], step)
        weights.append(torch.cat([p.detach().flatten() for p in member.dictionary.parameters()]))
    assert not torch.equal(*weights)


def test_continues_bit_identically_from_its_state():
    data = PLANTED.sample(2000, seed=3)[0]
    config, training = sb.JumpReLU(d_sae=64, target_l0=3.0), sb.TrainConfig(num_tokens=2000, batch_size=200)
    whole, first, second = (Member.create(config, training, {"a": data}) for _ in range(3))
    batches = data.split(200)
    for step in range(10):
        whole.step(batches[step], step)
        if step < 5:
            first.step(batches[step], step)
        elif step == 5:
            second.load_state({name: t.clone() for name, t in first.state().items()})
        if step >= 5:
            second.step(batches[step], step)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_a_transcoder_reaches_its_l0():
    generator = torch.Generator().manual_seed(0)
    x = PLANTED.sample(40_000, seed=0)[0]
    y = (x @ torch.randn(32, 20, generator=generator)).relu()
    source = sb.TensorSource({"a": x, "b": y})
    config = sb.JumpReLU(d_sae=128, site="a", target="b", target_l0=6)
    sae = sb.train(config, source, sb.TrainConfig(num_tokens=80_000, batch_size=400))
    error = (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert float(error) < 0.5
    assert float(sae.encode(x).l0().float().mean()) == pytest.approx(6, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_l0": 3, "initial_threshold": 0.1}, "initial_l0 and initial_threshold are both given"),
        ({"initial_l0": 9}, "initial_l0=9 exceeds d_sae=8"),
        ({"target_l0": 9}, "target_l0=9 exceeds d_sae=8"),
        ({"penalty": "quadratic", "coefficient": 1.0}, "give target_l0 instead of coefficient"),
        ({"quadratic_weight": 1.0}, "quadratic_weight is for penalty='quadratic', not 'l0'"),
        ({"penalty": "tan"}, "penalty='tan'"),
        ({"bandwidth": 0}, "bandwidth=0"),
    ],
)
def test_wrong_configurations_name_the_key(settings, message):
    with pytest.raises(UserError, match=message):
        sb.JumpReLU(**{"d_sae": 8, "target_l0": 4} | settings if "coefficient" not in settings else {"d_sae": 8} | settings)


def test_the_tanh_form_brings_its_own_defaults_and_keeps_what_is_given():
    config = sb.JumpReLU(d_sae=8, target_l0=4, penalty="tanh")
    assert (config.decoder, config.straight_through, config.bandwidth, config.pull) == ("free", True, 2.0, 3e-6)
    assert sb.JumpReLU(d_sae=8, penalty="tanh", coefficient=1.0).coefficient_warmup == 1.0
    assert sb.JumpReLU(d_sae=8, target_l0=4, penalty="tanh", decoder="unit").decoder == "unit"
    assert sb.JumpReLU(**config.model_dump()) == config


def test_padding_that_only_carries_gradient_is_not_counted():
    sae, x, y = random_sae(bandwidth=3.0)
    codes = sae.losses(batch_of(sae, x, y)).codes
    assert isinstance(codes, SparseCodes)
    assert len(codes.values) > int((codes.values != 0).sum())
    assert torch.equal(codes.firings(), sae.encode(x).firings())
