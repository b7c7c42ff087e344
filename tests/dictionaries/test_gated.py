"""Gated against the worked example, the dictionaries it equals, its dense twin, and its zero gradients."""

import pytest
import torch
from helpers import to_unit_rows

import saebench as sb
from saebench.activations.tensors import TensorSource
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.kernels import encode_above, use_implementation
from saebench.trainer.member import Member

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A = torch.tensor([[2, 1.5, -1, 3.0]])
FORMS = {
    "unit": {},
    "free": {"decoder": "free", "subtract_b_dec": False},
    "transcoder": {"target": "b", "d_out": 9, "skip": True},
}


def fixture_sae(coefficient=0.5):
    sae = sb.Gated(d_sae=6, d_in=4, coefficient=coefficient, coefficient_warmup=0, decoder="unit").build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(D)
        sae.W_dec.copy_(D)
        sae.b_enc.fill_(-1.9)
    return sae


def random_sae(d_sae=30, d_in=7, seed=0, dtype=torch.float32, **options):
    """An initialised dictionary whose gates and magnitudes differ, and what it reads and writes."""
    generator = torch.Generator().manual_seed(seed)
    sae = (
        sb.Gated(d_sae=d_sae, d_in=d_in, **{"coefficient": 0.3, "coefficient_warmup": 0, "decoder": "unit"} | options)
        .build()
        .to(dtype)
    )
    x = (torch.randn(200, d_in, generator=generator) + 1).to(dtype)
    y = x if sae.config.rewrites else torch.randn(200, sae.config.width_out, generator=generator).to(dtype)
    sae.initialise(x, y, generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            size = 0.3 if name in ("r_mag", "b_mag", "b_enc") else 0.05
            parameter += size * torch.randn(parameter.shape, generator=generator).to(dtype)
        to_unit_rows(sae)
    return sae, x, y


def batch_of(x, y=None, d_sae=30):
    return TrainingBatch(x, x if y is None else y, torch.zeros(d_sae, dtype=torch.bool), 5, 10)


def test_worked_example():
    sae = fixture_sae(0.5)
    gate, codes = sae.gate_and_values(X_A, sae.weights())
    torch.testing.assert_close(codes.to_dense(), torch.tensor([[2, 0, 2.4, 0, 0, 0]]))
    torch.testing.assert_close(gate.to_dense(), torch.tensor([[0.1, 0, 0.5, 0, 0, 0]]))
    losses = sae.losses(batch_of(X_A, d_sae=6))
    assert float(losses.squared_error_B) == pytest.approx(12.25, rel=1e-6)
    assert float(losses.parts["gate"]) == pytest.approx(13.77 / 4, rel=1e-6)
    assert float(losses.total.detach()) == pytest.approx((12.25 + 0.5 * 0.6 + 13.77) / 4, rel=1e-6)


def gate_losses(sae, x):
    weights = sae.weights()
    gate, codes = sae.gate_and_values(x, weights)
    return gate, (sae.write(codes, weights, x) - x).square().sum(1).mean()


def test_what_gets_no_gradient():
    sae, x, _ = random_sae()
    batch = batch_of(x)
    with torch.no_grad():
        sae.b_dec.zero_()
    _, squared_error = gate_losses(sae, x)
    assert torch.autograd.grad(squared_error, sae.b_enc, materialize_grads=True)[0].abs().max() == 0
    total = sae.losses(batch).total * sae.variance * 7
    penalty = 0.3 * gate_losses(sae, x)[0].values.sum() / len(x)
    decoder = torch.autograd.grad(total - squared_error - penalty, sae.W_dec, retain_graph=True)[0]
    assert decoder.abs().max() < 1e-6  # the auxiliary term is what is left: its decoder is a copy
    for parameter in (sae.r_mag, sae.b_mag):
        own = torch.autograd.grad(squared_error, parameter, retain_graph=True)[0]
        assert own.abs().max() > 0
        torch.testing.assert_close(torch.autograd.grad(total, parameter, retain_graph=True)[0], own)
    assert torch.autograd.grad(total, sae.b_enc)[0].abs().max() > 0


def test_with_equal_biases_it_is_the_relu_dictionary():
    sae, x, _ = random_sae()
    with torch.no_grad():
        sae.r_mag.zero_()
        sae.b_mag.copy_(sae.b_enc)
    relu = sb.ReLU(d_sae=30, d_in=7, target_l0=4).build()
    with torch.no_grad():
        for name, parameter in relu.named_parameters():
            parameter.copy_(dict(sae.named_parameters())[name])
    torch.testing.assert_close(sae.encode(x).to_dense(), relu.encode(x).to_dense())
    torch.testing.assert_close(sae(x), relu(x))


def test_it_is_a_jumprelu_dictionary_where_thresholds_are_not_negative():
    sae, x, _ = random_sae()
    with torch.no_grad():
        scale = sae.r_mag.exp()
        sae.b_mag.copy_(torch.maximum(sae.b_mag, scale * sae.b_enc + 0.01))
        threshold = sae.b_mag - scale * sae.b_enc
        jump = encode_above(x, scale[:, None] * sae.W_enc_FD, sae.b_mag, sae.b_in, threshold)
    torch.testing.assert_close(sae.encode(x).to_dense(), jump.to_dense())
    assert float(jump.l0().float().mean()) > 3


def test_an_open_gate_without_magnitude_is_not_active():
    sae = fixture_sae()
    with torch.no_grad():
        sae.b_mag[2] = -2.4
        sae.b_mag[0] = -3.0
    codes = sae.encode(X_A)
    assert codes.values.tolist() == [0.0, 0.0]
    assert int(codes.l0()) == 0 and codes.firings().sum() == 0
    torch.testing.assert_close(sae(X_A), torch.zeros(1, 4))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_the_dense_formula(form):
    """The definition, over full matrices."""
    sae, x, y = random_sae(dtype=torch.float64, **FORMS[form])
    parameters = dict(sae.named_parameters())
    total = sae.losses(batch_of(x, y)).total
    norm = sae.W_dec.norm(dim=1) if form == "free" else torch.ones(30, dtype=torch.float64)
    centred = x - sae.b_dec if form == "unit" else x
    p = norm * (centred @ sae.W_enc_FD.T)
    g = (p + norm * sae.b_enc).relu()
    f = (p + norm * sae.b_enc > 0) * (sae.r_mag.exp() * p + norm * sae.b_mag).relu()
    W_dec = sae.W_dec / norm[:, None]
    around = [sae.b_dec + (x @ sae.W_skip if form == "transcoder" else 0) for _ in range(2)]
    main = (f @ W_dec + around[0] - y).square().sum(1).mean()
    auxiliary = (g @ W_dec.detach() + around[1].detach() - y).square().sum(1).mean()
    expected = (main + 0.3 * g.sum(1).mean() + auxiliary) / (y.shape[1] * sae.variance)
    torch.testing.assert_close(total.detach(), expected.detach())
    for name, parameter in parameters.items():
        one, two = (torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (total, expected))
        assert two.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, msg=name)


def test_the_sparse_path_equals_the_reference_implementation():
    sae, x, y = random_sae(dtype=torch.float64)
    results = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            total = sae.losses(batch_of(x, y)).total
            results.append([total.detach(), *torch.autograd.grad(total, list(sae.parameters()))])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_folding_changes_nothing_but_the_units(form):
    sae, x, _ = random_sae(**FORMS[form])
    read = Scaling(torch.full((7,), 0.5), torch.full((7,), 0.37))
    write = read if sae.config.rewrites else Scaling(torch.full((9,), -1.0), torch.full((9,), 2.0))
    before, codes = sae(x) / write.scale_D + write.shift_D, sae.encode(x)
    sae.fold(read, write)
    raw = x / 0.37 + 0.5
    torch.testing.assert_close(sae(raw), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.encode(raw).l0(), codes.l0())


@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_error_and_the_finished_dictionary_survives_the_disk(form, tmp_path):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    x = ((torch.rand(8000, 64, generator=generator) < 0.05) * (torch.rand(8000, 64, generator=generator) + 0.5)) @ directions
    y = x[:, :9] @ torch.randn(9, 9, generator=generator)
    source = TensorSource({"a": x, "b": y})
    options = {"target_l0": 4, "site": "a"} | {key: value for key, value in FORMS[form].items() if key != "d_out"}
    fvus = []
    for steps in (3, 150):
        trained = sb.train(sb.Gated(d_sae=64, **options), source, sb.TrainConfig(num_tokens=128 * steps, batch_size=128))
        target = y if trained.config.writes == ("b",) else x
        fvus.append(float((trained(x) - target).square().sum() / (target - target.mean(0)).square().sum()))
    assert fvus[1] < 0.6 * fvus[0]
    trained.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    one, two = trained.encode(x), loaded.encode(x)
    assert torch.equal(one.indices, two.indices) and torch.equal(one.values, two.values)
    assert torch.equal(trained(x), loaded(x))
    names = {"W_enc", "W_dec", "b_enc", "b_dec", "r_mag", "b_mag", "variance"}
    assert set(trained.public_tensors()) - {"W_skip"} == names


def test_values_are_shrunk_less_than_by_the_relu_dictionary():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    x = ((torch.rand(20_000, 64, generator=generator) < 0.05) * (torch.rand(20_000, 64, generator=generator) + 0.5)) @ directions
    biases = []
    for rule in (sb.ReLU, sb.Gated):
        config = rule(d_sae=64, target_l0=3)
        trained = sb.train(config, TensorSource({"x": x}), sb.TrainConfig(num_tokens=256 * 200, batch_size=256))
        x_hat, centre = trained(x) - trained.b_dec, x - trained.b_dec
        biases.append(float(x_hat.square().sum() / (x_hat * centre).sum()))  # methods.md 0.3: below 1 is shrinkage
    assert biases[0] < 0.9
    assert biases[1] == pytest.approx(1, abs=0.03)


def test_resampling_resets_magnitudes_too():
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    training = sb.TrainConfig(num_tokens=64 * 30, batch_size=64)
    member = Member.create(sb.Gated(d_sae=48, coefficient=0.05, site="x"), training, x)
    for step in range(10):
        member.step(x[64 * step : 64 * (step + 1)], step)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[3, 17]] = True
    member.silent_F[dead] = 10**9
    before = {name: tensor.clone() for name, tensor in member.state().items()}
    batch = TrainingBatch(member.read(x[640:704]), member.read(x[640:704]), dead, 10, 30)
    member.resample(batch)
    for name, tensor in member.state().items():
        if tensor.ndim and len(tensor) == 48 and name != "silent":
            assert torch.equal(tensor[~dead], before[name][~dead]), name
            if name.endswith(("exp_avg", "exp_avg_sq")) or name in ("dictionary.r_mag", "dictionary.b_mag", "dictionary.b_enc"):
                assert tensor[dead].abs().max() == 0, name
    new = member.dictionary.encode(batch.x).to_dense()[:, dead]
    assert (new > 0).any(0).all()


def test_adam_does_not_average_gradients_by_default():
    assert sb.Gated.betas == (0.0, 0.999)
