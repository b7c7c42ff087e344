"""The threshold-activated dictionary: recovery where it is certain, whitening, the way back to raw activations, and training."""

import math

import pytest
import torch

import saebench as sb
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.atoms import just_below, whitening
from saebench.dictionaries.thresholds import SPEED
from saebench.errors import UserError
from saebench.evaluation.atoms import atomic_inner_products, coherence, recovery_interval, second_moment
from saebench.kernels import use_implementation
from saebench.trainer.member import Member


def hadamard(order: int):
    rows = torch.ones(1, 1)
    while len(rows) < order:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows / order**0.5


def dictionary_of(atoms, tau: float):
    """With these atoms and S the identity."""
    dictionary = sb.Threshold(d_sae=len(atoms), d_in=atoms.shape[1], target_l0=1.0).build()
    with torch.no_grad():
        dictionary.atoms_FD.copy_(atoms)
        dictionary.slow_log_threshold.fill_(math.log(tau) / SPEED)
    return dictionary


def correlated(rows=3000, width=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing + 1).to(dtype)


def untrained(d_sae=40, dtype=torch.float64, **options):
    x = correlated(dtype=dtype)
    options = options if "coefficient" in options else {"target_l0": 4.0} | options
    dictionary = sb.Threshold(d_sae=d_sae, d_in=10, **options).build().to(dtype)
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    return dictionary, x


@pytest.mark.parametrize("tau", [0.326, 0.5, 0.756])
def test_recovers_all_supports_with_any_threshold_inside_the_interval(tau):
    atoms = torch.cat([torch.eye(256), hadamard(256)])
    low, high = recovery_interval(coherence(atoms), 4, 1.0, 1.3)
    assert (low, high) == pytest.approx((0.325, 0.75625))
    assert low < tau < high
    generator = torch.Generator().manual_seed(0)
    support_BK = torch.stack([torch.randperm(512, generator=generator)[:4].sort().values for _ in range(500)])
    codes_BF = torch.zeros(500, 512).scatter(1, support_BK, 1 + 0.3 * torch.rand(500, 4, generator=generator))
    found = dictionary_of(atoms, tau).encode(codes_BF @ atoms)
    assert (found.l0() == 4).all()
    assert torch.equal(found.indices.view(500, 4), support_BK)


def test_outside_the_interval_supports_are_lost():
    atoms = torch.cat([torch.eye(256), hadamard(256)])
    generator = torch.Generator().manual_seed(0)
    codes_BF = torch.zeros(500, 512).scatter(1, torch.randint(512, (500, 4), generator=generator), 1.0)
    l0 = codes_BF.count_nonzero(1)
    for tau in (0.1, 1.2):
        assert (dictionary_of(atoms, tau).encode(codes_BF @ atoms).l0() != l0).any()


def test_reaching_the_threshold_is_enough():
    dictionary = dictionary_of(torch.eye(2), 2.0)
    tau = dictionary.thresholds_F.detach()
    x = torch.stack([tau, torch.nextafter(tau, torch.zeros(2))])
    assert dictionary.encode(x).l0().tolist() == [2, 0]
    assert torch.equal(just_below(tau), torch.nextafter(tau, torch.zeros(2)))
    variable = tau.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(just_below(variable).sum(), variable)
    assert gradient.tolist() == [1, 1]


def test_after_whitening_the_second_moment_is_the_identity():
    x = correlated()
    whiten, colour = whitening(second_moment(x))
    assert (second_moment(x @ whiten) - torch.eye(10)).abs().max() < 1e-8
    assert (whiten @ colour - torch.eye(10)).abs().max() < 1e-8
    torch.testing.assert_close(whiten @ whiten, torch.linalg.inv(second_moment(x)))


def test_small_eigenvalues_are_inverted_as_the_floor():
    x = correlated() * torch.tensor([1.0] * 9 + [0.0])
    for floor in (1e-6, 1e-2):
        whiten, colour = whitening(second_moment(x), floor)
        largest = torch.linalg.eigvalsh(second_moment(x))[-1]
        assert float(torch.linalg.eigvalsh(whiten)[-1]) == pytest.approx(float((floor * largest) ** -0.5))
        torch.testing.assert_close(whiten @ colour, torch.eye(10, dtype=torch.float64))


def test_scores_are_the_atomic_definition():
    """z = x S D^T and x_hat = f D, with atoms of length 1 in the atomic product."""
    dictionary, x = untrained(floor=1e-9)
    weights, S = dictionary.weights(), torch.linalg.inv(second_moment(x))
    torch.testing.assert_close(x @ weights.W_enc_FD.T, x @ S @ weights.W_dec_FD.T)
    lengths = (weights.W_dec_FD @ S * weights.W_dec_FD).sum(1)
    torch.testing.assert_close(lengths, torch.ones(40, dtype=torch.float64), rtol=1e-6, atol=0)
    f = x @ S @ weights.W_dec_FD.T
    f = f * (f >= dictionary.thresholds_F)
    torch.testing.assert_close(dictionary(x), f @ weights.W_dec_FD)
    torch.testing.assert_close(dictionary.encode(x).to_dense(), f)
    assert float((f != 0).sum(1).double().mean()) == pytest.approx(4, rel=0.02)


def test_objective_is_the_whitened_error_and_l0_and_its_gradients_equal_the_dense_ones():
    dictionary, x = untrained(coefficient=0.3, coefficient_warmup=0.0)  # thresholds for an L0 of 32
    batch = TrainingBatch(x[:100], x[:100], torch.zeros(40, dtype=torch.bool))
    losses = dictionary.losses(batch)
    codes = dictionary.encode(x[:100])
    whitened = ((dictionary(x[:100]) - x[:100]) @ dictionary.whiten_DD).square().sum(1).mean()
    expected = (whitened + 0.3 * codes.l0().double().mean()) / 10
    assert float(losses.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(
        losses.squared_error_B, (dictionary(x[:100]) - x[:100]).square().sum(1).detach(), rtol=1e-5, atol=1e-6
    )
    gradients = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            gradients.append(torch.autograd.grad(dictionary.losses(batch).total, list(dictionary.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.abs().sum() > 0


def test_the_finished_dictionary_is_an_ordinary_one_on_raw_activations(tmp_path):
    dictionary, x = untrained()
    scaling = Scaling(torch.full((10,), 0.7, dtype=torch.float64), torch.ones(10, dtype=torch.float64))
    before, x_hat = dictionary.encode(scaling(x)), dictionary(scaling(x)) + 0.7
    dictionary.fold(scaling, scaling)
    torch.testing.assert_close(dictionary(x), x_hat)
    assert torch.equal(dictionary.encode(x).indices, before.indices)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64))
    z = x @ dictionary.W_enc + dictionary.b_enc
    torch.testing.assert_close(dictionary(x), (z * (z >= dictionary.threshold)) @ dictionary.W_dec + dictionary.b_dec)

    single = dictionary.float()
    single.save(tmp_path / "atoms")
    loaded = sb.load(tmp_path / "atoms")
    assert set(loaded.public_tensors()) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    x = x.float()
    assert torch.equal(loaded.encode(x).to_dense(), single.encode(x).to_dense())
    assert torch.equal(loaded(x), single(x))
    loaded.save(tmp_path / "again")
    assert torch.equal(sb.load(tmp_path / "again")(x), single(x))


def test_an_unfinished_dictionary_is_saved_as_an_ordinary_one(tmp_path):
    dictionary, x = untrained(dtype=torch.float32)
    dictionary.save(tmp_path / "atoms")
    loaded = sb.load(tmp_path / "atoms")
    torch.testing.assert_close(loaded(x), dictionary(x), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def mixed():
    """Twelve sparse causes written by a skewed basis: (source, held-out, basis)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(12, 12, generator=generator) @ torch.diag(torch.linspace(0.3, 3, 12))
    causes = torch.rand(40_000, 12, generator=generator) * (torch.rand(40_000, 12, generator=generator) < 0.15)
    return sb.TensorSource({"a": causes[:35_000] @ basis}), causes[35_000:] @ basis, basis


def test_training_finds_the_atoms_at_the_stated_l0(mixed):
    source, held_out, basis = mixed
    training = sb.TrainConfig(num_tokens=80_000, batch_size=200)
    trained = sb.train(sb.Threshold(d_sae=24, target_l0=1.5), source, training)
    assert float(trained.encode(held_out).l0().float().mean()) == pytest.approx(1.5, rel=0.05)
    error = (trained(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert float(error) < 0.1
    products = atomic_inner_products(basis, trained.W_dec, second_moment(held_out))
    assert products.max(1).values.min() > 0.95


@pytest.mark.parametrize(
    "options", [{"floor": 0.3}, {"bandwidth": 2.0}, {"initial_threshold": 0.5}, {"target_l0": 3.0}, {"centre": False}]
)
def test_every_option_changes_the_training(options):
    data = correlated(2000, dtype=torch.float32)
    weights = []
    for each in ({}, options):
        config = sb.Threshold(d_sae=40, **{"target_l0": 4.0} | each)
        member = Member.create(config, sb.TrainConfig(num_tokens=2000, batch_size=200), {"a": data})
        for step in range(10):
            member.step(data[200 * step : 200 * step + 200], step)
        weights.append(torch.cat([p.detach().flatten() for p in member.dictionary.parameters()]))
        torch.testing.assert_close(member.dictionary.atoms_FD.norm(dim=1).detach(), torch.ones(40))
    assert not torch.equal(*weights)


def test_continues_bit_identically_from_its_state():
    data = correlated(2000, dtype=torch.float32)
    config, training = sb.Threshold(d_sae=40, target_l0=3.0), sb.TrainConfig(num_tokens=2000, batch_size=200)
    whole, second = Member.create(config, training, {"a": data}), Member.create(config, training, {"a": data})
    for step, batch in enumerate(data.split(200)):
        if step == 5:
            second.load_state({name: t.clone() for name, t in whole.state().items()})
        whole.step(batch, step)
        if step >= 5:
            second.step(batch, step)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "a", "target": "b"}, "leave target out"),
        ({"normalise": "sqrt_d"}, "normalise='sqrt_d'"),
        ({"floor": 0}, "floor=0"),
        ({"target_l0": 9}, "target_l0=9 exceeds d_sae=8"),
        ({"decoder": "free"}, "unknown key decoder"),
    ],
)
def test_wrong_configurations_name_the_key(settings, message):
    with pytest.raises(UserError, match=message):
        sb.Threshold(**{"d_sae": 8, "target_l0": 4} | settings)
