"""ReLU + L1 against the worked example, closed forms, its dense twin, and dictionaries that are known."""

import pytest
import torch
from helpers import to_unit_rows

import saebench as sb
from saebench.activations.tensors import TensorSource
from saebench.codes import SparseCodes
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.relu import PNormPenalty, powers
from saebench.errors import UserError
from saebench.kernels import use_implementation
from saebench.trainer.member import Member

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A = torch.tensor([[2, 1.5, -1, 3.0]])
FORMS = {
    "classic": {},
    "april": {"decoder": "free", "subtract_b_dec": False},
    "annealed": {"p_final": 0.5, "p_start": 0.0},
    "transcoder": {"target": "b", "d_out": 9, "skip": True},
}


def fixture_sae(coefficient=0.5):
    sae = sb.ReLU(d_sae=6, d_in=4, coefficient=coefficient, coefficient_warmup=0).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(D)
        sae.W_dec.copy_(D)
    return sae


def random_sae(d_sae=30, d_in=7, seed=0, dtype=torch.float32, **options):
    """An initialised dictionary, and what it reads and writes."""
    generator = torch.Generator().manual_seed(seed)
    options = {"coefficient": 0.3, "coefficient_warmup": 0} | options
    sae = sb.ReLU(d_sae=d_sae, d_in=d_in, **options).build().to(dtype)
    x = (torch.randn(200, d_in, generator=generator) + 1).to(dtype)
    y = x if sae.config.rewrites else torch.randn(200, sae.config.width_out, generator=generator).to(dtype)
    sae.initialise(x, y, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
        to_unit_rows(sae)
    return sae, x, y


def batch_of(x, y=None, step=5, steps=10, d_sae=30):
    return TrainingBatch(x, x if y is None else y, torch.zeros(d_sae, dtype=torch.bool), step, steps)


def test_worked_example():
    coefficient = 0.5
    sae = fixture_sae(coefficient)
    codes = sae.encode(X_A)
    torch.testing.assert_close(codes.to_dense(), torch.tensor([[2, 1.5, 2.4, 0, 1.8, 0]]))
    torch.testing.assert_close(sae.decode(codes), torch.tensor([[3.44, 3.42, 1.08, 1.44]]))
    losses = sae.losses(batch_of(X_A, d_sae=6))
    assert float(losses.squared_error_B) == pytest.approx(12.52, rel=1e-6)
    assert float(losses.total.detach()) == pytest.approx((12.52 + coefficient * 7.7) / 4, rel=1e-6)
    (gradient,) = torch.autograd.grad(losses.total, sae.b_enc)
    expected = torch.tensor([2.88, 3.84, 4.8, 0, 0, 0]) + coefficient * torch.tensor([1.0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(4 * gradient, expected)


def test_a_pair_of_identities_reconstructs_exactly():
    sae = sb.ReLU(d_sae=8, d_in=4, coefficient=1.0).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        sae.W_dec.copy_(sae.W_enc_FD)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae(x), x)


def test_a_free_decoder_costs_the_same_at_every_length():
    sae, x, _ = random_sae(**FORMS["april"])
    before = sae.losses(batch_of(x)).total.detach()
    a = torch.rand(30, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    with torch.no_grad():
        sae.W_dec *= a[:, None]
        sae.W_enc_FD /= a[:, None]
        sae.b_enc /= a
    torch.testing.assert_close(sae.losses(batch_of(x)).total.detach(), before, rtol=1e-6, atol=0)


def test_the_april_form_starts_small_and_centres_nothing():
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) + 2
    for options, length in ((FORMS["april"], 0.1), (FORMS["classic"], 1.0)):
        sae = sb.ReLU(d_sae=30, d_in=7, coefficient=5.0, **options).build()
        sae.initialise(x, x, torch.Generator().manual_seed(0))
        for rows in (sae.W_dec, sae.W_enc_FD):
            torch.testing.assert_close(rows.norm(dim=1), torch.full((30,), length))
        assert (sae.b_in is None) == (length == 0.1)
        assert sae.b_enc.abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_the_dense_twin(form):
    sae, x, y = random_sae(dtype=torch.float64, **FORMS[form])
    sae.eval()  # p-annealing rests
    parameters = list(sae.parameters())
    results = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            total = sae.losses(batch_of(x, y)).total
            results.append((total.detach(), torch.autograd.grad(total, parameters)))
    torch.testing.assert_close(*(total for total, _ in results))
    for one, two in zip(*(gradients for _, gradients in results), strict=True):
        assert two.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_finite_differences(form):
    sae, x, y = random_sae(d_sae=12, d_in=5, dtype=torch.float64, **FORMS[form])
    sae.eval()  # p-annealing rests
    loss = lambda: sae.losses(batch_of(x[:20], y[:20], d_sae=12)).total  # noqa: E731
    parameters = list(sae.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        ends = []
        for step in (1e-7, -2e-7):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += step * direction
                ends.append(float(loss()))
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += 1e-7 * direction
        analytic = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
        assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(analytic, rel=1e-6)


def test_p_falls_in_equal_steps_between_start_and_end():
    def course(**options):
        penalty = PNormPenalty(sb.ReLU(d_sae=8, coefficient=1.0, **options))
        return [penalty.power(step, 100)[0] for step in range(100)]

    ps = course(p_final=0.5, p_updates=5, p_start=0.2, p_end=0.6)
    changes = [step for step in range(1, 100) if ps[step] != ps[step - 1]]
    assert changes == [20, 30, 40, 50, 60]
    assert [ps[step] for step in changes] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert ps[0] == 1 and ps[99] == 0.5
    once = course(p_final=0.5, p_updates=1, p_start=0.2, p_end=0.6)
    assert once == [1.0] * 20 + [0.5] * 80
    penalty = PNormPenalty(sb.ReLU(d_sae=8, coefficient=1.0, p_final=0.5, p_updates=5, p_start=0.2, p_end=0.6))
    for step in range(99):  # what is announced as next is what comes
        now, announced = penalty.power(step, 100)
        assert penalty.power(step + 1, 100)[0] in (now, announced)


def test_the_penalty_is_continuous_when_p_changes():
    generator = torch.Generator().manual_seed(0)
    config = sb.ReLU(d_sae=20, coefficient=0.7, coefficient_warmup=0, p_final=0.4, p_updates=4, p_start=0.3, p_end=0.9)
    penalty, unit = PNormPenalty(config), torch.tensor(1.3)
    x = torch.zeros(50, 2)
    same = SparseCodes.from_dense(torch.rand(50, 20, generator=generator) * (torch.rand(50, 20, generator=generator) < 0.3))
    values = [float(penalty(same, batch_of(x, step=step, steps=60, d_sae=20), unit)) for step in range(60)]
    assert values == pytest.approx([values[0]] * 60, rel=1e-5)  # on codes that do not change, at every p
    assert float(penalty.rescaling) != pytest.approx(1, abs=0.05)
    assert penalty.power(59, 60)[0] == pytest.approx(0.4)


def test_powers_in_closed_form():
    codes = SparseCodes.from_dense(torch.tensor([[0.0, 4, 9], [1, 0, 0], [0, 0, 0]]))
    assert float(powers(codes, 1)) == pytest.approx(14 / 3)
    assert float(powers(codes, 0.5, 0.0)) == pytest.approx((2 + 3 + 1) / 3)
    assert float(powers(codes, 0.5, 0.25)) == pytest.approx((4.25**0.5 + 9.25**0.5 + 1.25**0.5 - 3 * 0.5) / 3)


def test_a_lower_power_makes_active_latents_larger():
    """At equal L0: the penalty on large values is flatter, so that they are shrunk less."""
    x = planted_sums(20_000)[0]
    sizes = []
    for p in (1.0, 0.4):
        config = sb.ReLU(d_sae=64, target_l0=3, p_final=p)
        trained = sb.train(config, TensorSource({"x": x}), sb.TrainConfig(num_tokens=256 * 300, batch_size=256))
        codes, error = trained.encode(x), trained(x) - x
        sizes.append((float(codes.values.sum() / len(x)), float(error.square().sum() / x.square().sum())))
    assert sizes[1][0] > 1.1 * sizes[0][0]
    assert sizes[1][1] < 0.8 * sizes[0][1]


def planted_sums(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, 32, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.rand(count, 64, generator=generator).topk(3, 1).indices
    f = torch.zeros(count, 64).scatter_(1, chosen, torch.rand(count, 3, generator=generator) + 0.5)
    return f @ directions, directions


def test_planted_directions_are_found():
    """The recipe of the specification in an eighth of its steps at three times its learning rate."""
    x, directions = planted_sums(100_000)
    config = sb.ReLU(d_sae=64, coefficient=0.3, coefficient_warmup=0.2, normalise="none")
    trained = sb.train(config, TensorSource({"x": x}), sb.TrainConfig(num_tokens=512 * 1200, batch_size=512, lr=3e-3, warmup=0.0))
    cosines = (directions @ trained.W_dec.T).max(1).values
    assert float(cosines.mean()) > 0.95
    codes, error = trained.encode(x[:8192]), trained(x[:8192]) - x[:8192]
    assert float(error.square().sum() / (x[:8192] - x.mean(0)).square().sum()) < 0.12
    assert 3 < float(codes.l0().float().mean()) < 8


@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_error_and_the_finished_dictionary_survives_the_disk(form, tmp_path):
    x = planted_sums(8000)[0]
    source = TensorSource({"a": x, "b": x[:, :9] @ torch.randn(9, 9, generator=torch.Generator().manual_seed(1))})
    options = {"target_l0": 4, "site": "a"} | {key: value for key, value in FORMS[form].items() if key != "d_out"}
    fvus = []
    for steps in (3, 150):
        training = sb.TrainConfig(num_tokens=128 * steps, batch_size=128)
        trained = sb.train(sb.ReLU(d_sae=64, **options), source, training)
        target = source.fetch(torch.arange(8000), [trained.config.writes[0]])[trained.config.writes[0]].values[:, 0]
        fvus.append(float((trained(x) - target).square().sum() / (target - target.mean(0)).square().sum()))
    assert fvus[1] < 0.6 * fvus[0]
    trained.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    one, two = trained.encode(x), loaded.encode(x)
    assert torch.equal(one.indices, two.indices) and torch.equal(one.values, two.values)
    assert torch.equal(trained(x), loaded(x))
    assert set(trained.public_tensors()) - {"W_skip"} == {"W_enc", "W_dec", "b_enc", "b_dec", "variance"}


@pytest.mark.parametrize("form", FORMS)
def test_folding_changes_nothing_but_the_units(form):
    sae, x, y = random_sae(**FORMS[form])
    read = Scaling(torch.full((7,), 0.5), torch.full((7,), 0.37))
    width = y.shape[1]
    write = read if sae.config.rewrites else Scaling(torch.full((width,), -1.0), torch.full((width,), 2.0))
    raw = x / 0.37 + 0.5
    before, codes = sae(x) / write.scale_D + write.shift_D, sae.encode(x)
    sae.fold(read, write)
    torch.testing.assert_close(sae(raw), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.encode(raw).l0(), codes.l0())


def test_resampling_gives_dead_latents_a_new_start_and_touches_no_other():
    x = planted_sums(4000)[0]
    config = sb.ReLU(d_sae=48, coefficient=0.05, site="x", normalise="none")
    training = sb.TrainConfig(num_tokens=64 * 40, batch_size=64, resample_every=64 * 1_000, resample_warmup=5)
    member = Member.create(config, training, x)
    for step in range(10):
        member.step(x[64 * step : 64 * (step + 1)], step)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[3, 17, 40]] = True
    member.silent_F[dead] = 10**9
    with torch.no_grad():
        member.dictionary.b_enc[dead] = -100.0
    sae = member.dictionary
    batch = TrainingBatch(x[640:704], x[640:704], dead, 10, 40, seed=3)
    before = {name: tensor.clone() for name, tensor in member.state().items()}
    errors = (sae(batch.x) - batch.x).square().sum(1).double()
    drawn = torch.multinomial(errors.square(), 3, generator=batch.generator())
    member.resample(batch)
    after = member.state()
    for name, tensor in after.items():
        if tensor.ndim and len(tensor) == 48 and name != "silent":
            assert torch.equal(tensor[~dead], before[name][~dead]), name
            if name.endswith(("exp_avg", "exp_avg_sq")):
                assert tensor[dead].abs().max() == 0
    directions = batch.x[drawn] - sae.b_dec.detach()
    directions = directions / directions.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec[dead].detach(), directions)
    length = 0.2 * before["dictionary.W_enc_FD"][~dead].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc_FD[dead].norm(dim=1).detach(), length.expand(3))
    assert sae.b_enc[dead].abs().max() == 0
    assert (member.silent_F[dead] == 0).all()
    codes = sae.encode(batch.x[drawn]).to_dense()
    assert (codes[range(3), dead.nonzero()[:, 0]] > 0).all()
    assert member.rate_at(11) == pytest.approx(member.lr * training.rate_at(11) / 5)  # and the learning rate rises anew


def test_resampling_happens_where_it_is_asked_for():
    x = planted_sums(6000)[0]
    ends = []
    for every in (None, 128 * 20):
        training = sb.TrainConfig(num_tokens=128 * 100, batch_size=128, resample_every=every, dead_after=128, resample_warmup=5)
        ends.append(sb.train(sb.ReLU(d_sae=64, target_l0=2), TensorSource({"x": x}), training).W_dec)
    assert not torch.equal(*ends)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p_final": 0}, "p_final=0"),
        ({"p_final": 1.5}, "p_final=1.5"),
        ({"p_start": 0.8, "p_end": 0.5}, r"p_start=0.8 is not before p_end=0.5: lower p_start or raise p_end"),
        ({"p_updates": 0}, "p_updates=0"),
    ],
)
def test_wrong_settings_name_the_key(settings, message):
    with pytest.raises(UserError, match=message):
        sb.ReLU(d_sae=64, **settings)
