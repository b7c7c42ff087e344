"""Unrolled ISTA and IHT against closed forms, optimality conditions, one-step autoencoders, and dense autograd."""

import pytest
import torch
from test_matching_pursuit import normal, planted, unit_rows

import saebench as sb
from saebench.codes import SparseCodes
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.unrolled import best_k, lasso, lipschitz, quantile_above
from saebench.errors import UserError
from saebench.kernels import proximal_step, use_implementation
from saebench.trainer import TrainConfig
from saebench.trainer.member import Member

CONFIGS = [
    sb.IHT(d_sae=40, d_in=8, k=4),
    sb.ISTA(d_sae=40, d_in=8, target_l0=4),
    sb.ISTA(d_sae=40, d_in=8, coefficient=1.0),
    sb.ISTA(d_sae=900, d_in=8, target_l0=4),  # sparse enough to go through gathered rows
    sb.IHT(d_sae=900, d_in=8, k=4),
]


def built(config, seed=0):
    dictionary = config.build()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, config.d_in, generator=generator) + 3
    dictionary.initialise(x, x, generator)
    return dictionary


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def objective(x, atoms, codes, penalty):
    dense = codes.to_dense()
    return 0.5 * (x - dense @ atoms).square().sum(1) + penalty * dense.sum(1)


def test_one_step_on_an_orthonormal_dictionary_is_the_lasso():
    atoms = torch.linalg.qr(normal(12, 12, dtype=torch.float64)).Q
    x = normal(40, 12, seed=2, dtype=torch.float64)
    closed = (x @ atoms.T - 0.3).relu()
    torch.testing.assert_close(proximal_step(None, x, atoms, number(1.0), number(0.3)).to_dense(), closed)
    torch.testing.assert_close(lasso(x, atoms, 0.3, steps=20).to_dense(), closed)


def test_a_step_on_the_worked_example():
    from test_topk import X_A, D

    first = proximal_step(None, X_A[None], D, torch.tensor(0.5), torch.tensor(0.25))
    torch.testing.assert_close(first.to_dense()[0], torch.tensor([0.75, 0.5, 0.95, 0, 0.65, 0]))
    residual = X_A - first.to_dense() @ D  # (0.68, 0.24, -1.39, 2.48)
    second = proximal_step(first, residual, D, torch.tensor(0.5), torch.tensor(0.25))
    torch.testing.assert_close(second.to_dense()[0], torch.tensor([0.84, 0.37, 1.0, 0, 0.975, 0]))
    hard = proximal_step(first, residual, D, torch.tensor(0.5), k=2)
    torch.testing.assert_close(hard.to_dense()[0], torch.tensor([0, 0, 1.25, 0, 1.225, 0]))


def test_the_lasso_meets_its_optimality_conditions():
    atoms, x, penalty = unit_rows(14, 10, dtype=torch.float64), normal(20, 10, dtype=torch.float64), 0.2
    codes = lasso(x, atoms, penalty, steps=1500)
    dense = codes.to_dense()
    slope = (x - dense @ atoms) @ atoms.T
    assert (slope[dense > 0] - penalty).abs().max() < 1e-6
    assert slope.max() < penalty + 1e-6
    assert 1 < codes.l0().double().mean() < 10


def test_the_objective_falls_with_every_step_of_at_most_one_over_L():
    atoms, x = unit_rows(60, 10, dtype=torch.float64), normal(50, 10, dtype=torch.float64)
    L = lipschitz(atoms)
    assert pytest.approx(float(torch.linalg.matrix_norm(atoms, 2)) ** 2) == L
    for share in (0.3, 1.0):
        eta, soft, hard, r_soft, r_hard = number(share / L), None, None, x, x
        before_soft = before_hard = 0.5 * x.square().sum(1)
        for _ in range(40):
            soft = proximal_step(soft, r_soft, atoms, eta, eta * 0.1)
            hard = proximal_step(hard, r_hard, atoms, eta, k=3)
            r_soft, r_hard = x - soft.to_dense() @ atoms, x - hard.to_dense() @ atoms
            now_soft, now_hard = objective(x, atoms, soft, 0.1), objective(x, atoms, hard, 0.0)
            assert (now_soft <= before_soft + 1e-12).all() and (now_hard <= before_hard + 1e-12).all()
            before_soft, before_hard = now_soft, now_hard
    far = lasso(x, atoms * 3, 0.1, steps=30)  # atoms of another length: L goes along
    assert (objective(x, atoms * 3, far, 0.1) < 0.5 * x.square().sum(1)).all()


def test_hard_thresholding_recovers_a_sparse_code_on_an_incoherent_dictionary():
    atoms = unit_rows(160, 128, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    picked = torch.rand(50, 160, generator=generator).argsort(1)[:, :4]
    true = torch.zeros(50, 160, dtype=torch.float64).scatter_(1, picked, 1 + torch.rand(50, 4, generator=generator).double())
    found = best_k(true @ atoms, atoms, 4, steps=200, eta=0.7)
    assert (found.to_dense() - true).abs().max() < 1e-9
    careful = best_k(true @ atoms, atoms, 4, steps=200)  # of step size 1 / L: some tokens stay in poorer minima
    right = ((careful.to_dense() - true).abs().amax(1) < 1e-6).double().mean()
    assert 0.5 < right < 1


def test_one_step_is_a_tied_autoencoder():
    x = normal(50, 8, seed=4) + 3
    iht = built(sb.IHT(d_sae=40, d_in=8, k=4, steps=1))
    topk = sb.TopK(d_sae=40, d_in=8, k=4).build()
    ista = built(sb.ISTA(d_sae=40, d_in=8, target_l0=5, steps=1))
    relu = sb.ReLU(d_sae=40, d_in=8).build()
    with torch.no_grad():
        for one, other in ((iht, topk), (ista, relu)):
            other.W_dec.copy_(one.W_dec)
            other.W_enc_FD.copy_(one.eta * one.W_dec)
            other.b_dec.copy_(one.b_dec)
        relu.b_enc.fill_(-float(ista.threshold))
    torch.testing.assert_close(iht.encode(x).to_dense(), topk.encode(x).to_dense())
    torch.testing.assert_close(ista.encode(x).to_dense(), relu.encode(x).to_dense())
    torch.testing.assert_close(iht(x), topk(x))
    assert 2 < ista.encode(x).l0().float().mean() < 9


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.default_id)
def test_losses_and_gradients_equal_dense_autograd(config):
    dictionary = built(config).double()
    x = normal(37, 8, seed=5, dtype=torch.float64) + 3
    dead = torch.arange(config.d_sae) % 7 == 0
    dictionary.eval()  # the controller does not move
    results = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            losses = dictionary.losses(TrainingBatch(x, x, dead, step=50, steps=100))
            results.append((losses.codes.to_dense(), losses.total, *torch.autograd.grad(losses.total, dictionary.parameters())))
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < 1e-10
        assert ours.abs().max() > 0


def test_codes_that_went_before_are_found_by_latent():
    """Also where codes before and after have nothing in common, or one of them is empty."""
    atoms = unit_rows(5000, 6, dtype=torch.float64)
    x = normal(9, 6, dtype=torch.float64)
    before = SparseCodes(torch.tensor([[3, 70, 4999]] * 9), torch.rand(9, 3, dtype=torch.float64) + 5, 5000)
    empty = SparseCodes.from_dense(torch.zeros(9, 5000, dtype=torch.float64))
    for codes in (before, empty):
        for rule in ({"threshold": number(1.2)}, {"threshold": number(99.0)}, {"k": 5}):
            ours = proximal_step(codes, x, atoms, number(0.5), **rule)
            with use_implementation("reference"):
                dense = proximal_step(codes, x, atoms, number(0.5), **rule)
            torch.testing.assert_close(ours.to_dense(), dense.to_dense())


def test_first_step_sizes_are_the_best_on_the_sample():
    x = normal(400, 8, seed=0)
    dictionary = sb.IHT(d_sae=40, d_in=8, k=4, steps=1).build()
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    errors = []
    for factor in (1.0, 0.9, 1.1):
        with torch.no_grad():
            dictionary.eta *= factor
            errors.append(float((dictionary(x) - x).square().sum()))
            dictionary.eta /= factor
    assert errors[0] == min(errors)


def test_more_steps_explain_more_even_untrained():
    x = normal(300, 8, seed=7) + 3
    fvu = {}
    for steps in (1, 3):
        for config in (sb.IHT(d_sae=40, d_in=8, k=4, steps=steps), sb.ISTA(d_sae=40, d_in=8, target_l0=4, steps=steps)):
            missed = (built(config)(x) - x).square().sum() / (x - x.mean(0)).square().sum()
            fvu[config.architecture, steps] = missed.item()
    assert fvu["iht", 3] < 0.9 * fvu["iht", 1] and fvu["ista", 3] < 0.9 * fvu["ista", 1]


def test_first_thresholds_follow_the_coefficient_or_the_target():
    dictionary = built(sb.ISTA(d_sae=40, d_in=8, coefficient=1.0))
    torch.testing.assert_close(dictionary.threshold, dictionary.eta / 2)
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + 3
    for target in (2.0, 6.0):
        reached = built(sb.ISTA(d_sae=40, d_in=8, target_l0=target)).encode(x).l0().double().mean()
        assert float(reached) == pytest.approx(target, rel=0.02)
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 0, 5, 2], [4, 3, 0, 0]]))
    assert [float(quantile_above(codes, l0)) for l0 in (0.5, 1.0, 2.0, 9.0)] == [5, 4, 2, 1]


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: config.default_id)
def test_folding_changes_nothing_but_the_units(config):
    dictionary, x = built(config), normal(60, 8, seed=6) * 5 + 2
    shift, scale = normal(8, seed=7), 0.37
    scaled = (x - shift) * scale
    before, x_hat = dictionary.encode(scaled), dictionary(scaled) / scale + shift
    scaling = Scaling(shift, torch.full((8,), scale))
    dictionary.fold(scaling, scaling)
    torch.testing.assert_close(dictionary(x), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary.encode(x).to_dense(), before.to_dense() / scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: config.default_id)
def test_save_and_load_give_identical_codes(config, tmp_path):
    dictionary, x = built(config), normal(30, 8) + 3
    dictionary.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    assert torch.equal(loaded.encode(x).to_dense(), dictionary.encode(x).to_dense())
    assert torch.equal(loaded(x), dictionary(x)) and loaded.config == dictionary.config


def test_training_lowers_the_error_at_the_sparsity_asked_for():
    x, _ = planted(4000)
    source = sb.TensorSource({"a": x})
    configs = [
        sb.IHT(d_sae=24, k=2),
        sb.ISTA(d_sae=24, target_l0=2),
        sb.ISTA(d_sae=24, coefficient=3.0),
        sb.ISTA(d_sae=24, coefficient=0.3),
    ]
    training = TrainConfig(num_tokens=128 * 250, batch_size=128, lr=8e-3, dead_after=5000)
    trained = sb.train(configs, source, training)
    fvu, l0 = [], []
    for config, dictionary in zip(configs, trained, strict=True):
        untrained = Member.create(config.for_sites({"a": 16}), TrainConfig(), x).finished()
        before, after = (float((d(x) - x).square().sum() / (x - x.mean(0)).square().sum()) for d in (untrained, dictionary))
        assert after < 0.8 * before
        fvu.append(after)
        l0.append(float(dictionary.encode(x).l0().double().mean()))
        assert getattr(dictionary, "threshold", torch.zeros(1)).min() >= 0
    assert fvu[0] < 0.15 and fvu[1] < 0.3
    assert l0[0] <= 2 and l0[1] == pytest.approx(2, rel=0.15)
    assert l0[2] < l0[3] and fvu[2] > fvu[3]


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (sb.IHT, {"d_sae": 8, "k": 9}, "k=9 exceeds d_sae=8"),
        (sb.IHT, {"d_sae": 8, "k": 2, "steps": 0}, "steps=0"),
        (sb.IHT, {"d_sae": 8, "k": 2, "coefficient": 1}, "unknown key coefficient"),
        (sb.ISTA, {"d_sae": 8, "k": 2}, "unknown key k"),
        (sb.ISTA, {"d_sae": 8, "target_l0": 9}, "target_l0=9 exceeds d_sae=8"),
        (sb.ISTA, {"d_sae": 64, "site": "a", "target": "b"}, "ista explains what it reads and has no other target"),
    ],
)
def test_wrong_configurations_are_named(config, settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)
