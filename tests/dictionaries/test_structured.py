"""The structured dictionary against ReLU with p-annealing, nuclear norms by SVD, and data of both parts."""

import pytest
import torch
from helpers import to_unit_rows

import saebench as sb
from saebench.activations.tensors import TensorSource
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.structured import nuclear_bound
from saebench.kernels import use_implementation

TRANSCODER = {"target": "b", "d_out": 9}


def random_sae(d_sae=30, d_in=7, seed=0, dtype=torch.float32, **options):
    """An initialised dictionary with a low-rank part of some size, and what it reads and writes."""
    generator = torch.Generator().manual_seed(seed)
    options = {"coefficient": 0.3, "coefficient_warmup": 0, "rank": 3, "p_start": 0.0} | options
    sae = sb.Structured(d_sae=d_sae, d_in=d_in, **options).build().to(dtype)
    x = (torch.randn(200, d_in, generator=generator) + 1).to(dtype)
    y = x if sae.config.rewrites else torch.randn(200, sae.config.width_out, generator=generator).to(dtype)
    sae.initialise(x, y, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
        to_unit_rows(sae)
    return sae, x, y


def batch_of(x, y=None, d_sae=30):
    return TrainingBatch(x, x if y is None else y, torch.zeros(d_sae, dtype=torch.bool), 5, 10)


def test_the_bound_is_at_least_the_nuclear_norm_and_equal_where_factors_are_balanced():
    generator = torch.Generator().manual_seed(0)
    scores, Q = torch.randn(50, 4, generator=generator).double(), torch.randn(4, 30, generator=generator).double()
    R = scores @ Q / 50**0.5
    U, singular, V = torch.linalg.svd(R, full_matrices=False)
    assert float(nuclear_bound(scores, Q)) > float(singular.sum())
    root = singular[:4].sqrt()
    balanced = 50**0.5 * U[:, :4] * root, root[:, None] * V[:4]
    torch.testing.assert_close(balanced[0] @ balanced[1] / 50**0.5, R)
    assert float(nuclear_bound(*balanced)) == pytest.approx(float(singular.sum()), rel=1e-12)
    # the number of tokens does not matter
    assert float(nuclear_bound(scores.repeat(3, 1), Q)) == pytest.approx(float(nuclear_bound(scores, Q)), rel=1e-12)


@pytest.mark.parametrize("options", [{}, TRANSCODER, {"decoder": "free", "subtract_b_dec": False}])
def test_what_is_written_is_both_parts_decoded_together(options):
    sae, x, _ = random_sae(**options)
    S, weights = sae.encode(x).to_dense(), sae.weights().folded()
    R = (x if sae.b_in is None else x - sae.b_in) @ sae.P @ sae.Q
    torch.testing.assert_close(sae(x), (S + R) @ weights.W_dec_FD + sae.b_dec, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(x)), S @ weights.W_dec_FD + sae.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, TRANSCODER])
def test_loss_and_gradients_equal_those_of_the_dense_formula(options):
    sae, x, y = random_sae(dtype=torch.float64, low_rank_coefficient=0.8, **options)
    sae.eval()  # p-annealing rests
    p, unit = sae.penalty.power(5, 10)[0], sae.variance.sqrt()
    assert p < 0.8
    centred = x if sae.b_in is None else x - sae.b_dec
    S = (centred @ sae.W_enc_FD.T + sae.b_enc).relu()
    small = 0.01 * unit
    penalty = (((S + small) ** p - small**p) * (S > 0)).sum(1).mean()
    bound = ((centred @ sae.P).square().sum(1).mean() + sae.Q.square().sum()) / 2
    error = ((S + centred @ sae.P @ sae.Q) @ sae.W_dec + sae.b_dec - y).square().sum(1).mean()
    expected = (error + 0.3 * penalty + 0.8 * unit * bound) / (y.shape[1] * sae.variance)
    parameters = list(sae.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            total = sae.losses(batch_of(x, y)).total
            torch.testing.assert_close(total.detach(), expected.detach())
            for one, two in zip(torch.autograd.grad(total, parameters), wanted, strict=True):
                assert two.abs().max() > 0
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def mixture(count, latents=32, width=24, rank=3, seed=0):
    """x = (S0 + R0) W: one latent in twenty active, and three dense directions; and the parts of x."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(latents, width, generator=generator), dim=1)
    S0 = (torch.rand(count, latents, generator=generator) < 0.05) * (torch.rand(count, latents, generator=generator) + 0.5)
    R0 = torch.randn(count, rank, generator=generator) @ torch.randn(rank, latents, generator=generator) / latents**0.5
    return W, S0 @ W, R0 @ W, S0


def trained_on(config, x, steps=300):
    return sb.train(config, TensorSource({"x": x}), sb.TrainConfig(num_tokens=256 * steps, batch_size=256))


def test_an_expensive_low_rank_part_leaves_relu_with_p_annealing():
    x = mixture(20_000)[0:3]
    x = x[1] + x[2]
    shared = {"d_sae": 48, "target_l0": 4, "p_final": 0.5}
    relu = trained_on(sb.ReLU(**shared), x, 150)
    expensive, cheap = (trained_on(sb.Structured(**shared, low_rank_coefficient=c), x, 150) for c in (1e3, 0.3))
    dense = lambda d: (d(x) - d.decode(d.encode(x))).square().sum() / x.square().sum()  # noqa: E731
    assert float(dense(expensive)) < 1e-6
    assert float(dense(cheap)) > 0.1
    fvu = lambda d: float((d(x) - x).square().sum() / (x - x.mean(0)).square().sum())  # noqa: E731
    assert fvu(expensive) == pytest.approx(
        fvu(relu), rel=0.3
    )  # annealing turns rounding, other for other threads, into other minima
    assert fvu(cheap) < 0.8 * fvu(relu)


def test_without_factors_it_is_relu_with_p_annealing_exactly():
    sae, x, _ = random_sae()
    relu = sb.ReLU(d_sae=30, d_in=7, coefficient=0.3, coefficient_warmup=0, p_final=0.5, p_start=0.0).build()
    with torch.no_grad():
        sae.P.zero_()
        sae.Q.zero_()
        for name, parameter in relu.named_parameters():
            parameter.copy_(dict(sae.named_parameters())[name])
        relu.variance.copy_(sae.variance)
    one, two = sae.losses(batch_of(x)).total, relu.losses(batch_of(x)).total
    assert torch.equal(one, two)
    for name, parameter in relu.named_parameters():
        ours = torch.autograd.grad(one, dict(sae.named_parameters())[name], retain_graph=True)[0]
        assert torch.equal(ours, torch.autograd.grad(two, parameter, retain_graph=True)[0])
    for factor in (sae.P, sae.Q):  # and so it stays
        assert torch.autograd.grad(one, factor, retain_graph=True)[0].abs().max() == 0


def test_the_rank_is_that_of_what_bypasses_the_codes():
    x = sum(mixture(10_000)[1:3])
    for rank in (1, 3):
        trained = trained_on(sb.Structured(d_sae=48, target_l0=4, rank=rank, low_rank_coefficient=0.3), x, 60)
        bypass = trained(x) - trained.decode(trained.encode(x))
        singular = torch.linalg.svdvals((bypass - bypass.mean(0)).double())
        assert (singular > 1e-4 * singular[0]).sum() == rank


def test_planted_parts_are_told_apart(capsys):
    """A calibration experiment, not an exact recovery: the problem is not convex."""
    W, sparse, low_rank, S0 = mixture(40_000)
    x = sparse + low_rank
    found = trained_on(sb.Structured(d_sae=48, target_l0=2.5, rank=6, low_rank_coefficient=1.0), x, 600)
    bypass = found(x) - found.decode(found.encode(x))
    singular = torch.linalg.svdvals((bypass - bypass.mean(0)).double())
    energy = singular.square().cumsum(0) / singular.square().sum()
    rank = int((energy < 0.99).sum()) + 1
    explained = 1 - float((bypass - low_rank).square().sum() / low_rank.square().sum())
    cosines = W @ found.W_dec.T
    best, match = cosines.max(1)
    active = found.encode(x[:8000]).to_dense()[:, match] > 0
    true = S0[:8000] > 0
    f1 = float(2 * (active & true).sum() / (active.sum() + true.sum()))
    with capsys.disabled():
        print(
            f"\nplanted rank 3: found {rank}; low-rank part explained {explained:.2f}; support F1 {f1:.2f}; cosine {best.mean():.2f}"
        )
    assert 2 <= rank <= 6
    assert explained > 0.5
    assert f1 > 0.6


@pytest.mark.parametrize("options", [{}, TRANSCODER, {"decoder": "free", "subtract_b_dec": False}])
def test_folding_changes_nothing_but_the_units(options):
    sae, x, _ = random_sae(**options)
    read = Scaling(torch.full((7,), 0.5), torch.full((7,), 0.37))
    write = read if sae.config.rewrites else Scaling(torch.full((9,), -1.0), torch.full((9,), 2.0))
    before, codes = sae(x) / write.scale_D + write.shift_D, sae.encode(x)
    sae.fold(read, write)
    raw = x / 0.37 + 0.5
    torch.testing.assert_close(sae(raw), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.encode(raw).l0(), codes.l0())


def test_the_finished_dictionary_survives_the_disk(tmp_path):
    x = sum(mixture(6000)[1:3])
    trained = trained_on(sb.Structured(d_sae=48, target_l0=4, centre=True), x, 60)
    trained.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    one, two = trained.encode(x), loaded.encode(x)
    assert torch.equal(one.indices, two.indices) and torch.equal(one.values, two.values)
    assert torch.equal(trained(x), loaded(x))
    assert set(trained.public_tensors()) == {"W_enc", "W_dec", "b_enc", "b_dec", "P", "Q", "variance"}


def test_training_a_transcoder_lowers_the_error():
    x = sum(mixture(6000)[1:3])
    y = x[:, :9] @ torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
    fvus = []
    for steps in (3, 150):
        training = sb.TrainConfig(num_tokens=128 * steps, batch_size=128)
        config = sb.Structured(d_sae=48, site="a", target="b", target_l0=4)
        trained = sb.train(config, TensorSource({"a": x, "b": y}), training)
        fvus.append(float((trained(x) - y).square().sum() / (y - y.mean(0)).square().sum()))
    assert fvus[1] < 0.6 * fvus[0]
