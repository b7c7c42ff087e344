"""Matching pursuit against the worked example of the fixture, its invariants, closed forms, and autograd of the unrolled loop."""

from itertools import pairwise

import pytest
import torch
from test_topk import X_A, D

import saebench as sb
from saebench.codes import SparseCodes
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.matching_pursuit import merged
from saebench.dictionaries.sparse_coding import amortisation_gap
from saebench.errors import UserError
from saebench.kernels import encode_topk, matching_pursuit, use_implementation
from saebench.trainer import TrainConfig
from saebench.trainer.member import Member

# the kernel's module: the package shows the function under the same name
kernel = __import__("sys").modules["saebench.kernels.matching_pursuit"]


def unit_rows(rows, width, seed=0, dtype=torch.float32):
    draw = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return draw / draw.norm(dim=1, keepdim=True)


def normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted(tokens, width=16, features=24, active=2, seed=3):
    """Tokens that are sums of a few unit directions, with coefficients between a half and one and a half."""
    generator = torch.Generator().manual_seed(seed)
    directions = unit_rows(features, width, seed)
    picked = torch.rand(tokens, features, generator=generator).argsort(1)[:, :active]
    coefficients = 0.5 + torch.rand(tokens, active, generator=generator)
    return (coefficients[:, :, None] * directions[picked]).sum(1) + 0.3, directions


def fixture(steps):
    dictionary = sb.MatchingPursuit(d_sae=6, steps=steps, d_in=4).build()
    with torch.no_grad():
        dictionary.W_dec.copy_(D)
    return dictionary


def random_dictionary(d_sae=40, d_in=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    dictionary = sb.MatchingPursuit(d_sae=d_sae, d_in=d_in, **{"steps": 6, **options}).build()
    x = torch.randn(200, d_in, generator=generator) + 3
    dictionary.initialise(x, x, generator)
    return dictionary


@pytest.mark.parametrize(
    ("steps", "f", "error"),
    [
        (1, [0, 0, 2.4, 0, 0, 0], 10.49),
        (2, [0, 0, 2.4, 0, 1.8, 0], 7.25),
        (3, [0.56, 0, 2.4, 0, 1.8, 0], 6.9364),
        (6, [0.56, 0, 2.4, 0, 1.8, 0], 6.9364),  # no score is positive any more
    ],
)
@pytest.mark.parametrize("implementation", ["stock", "reference"])
def test_worked_example(steps, f, error, implementation):
    with use_implementation(implementation), torch.no_grad():
        dictionary = fixture(steps)
        codes = dictionary.encode(X_A[None])
        torch.testing.assert_close(codes.to_dense()[0], torch.tensor(f))
        assert int(codes.l0()) == sum(value > 0 for value in f)
        assert float((dictionary(X_A[None]) - X_A).square().sum()) == pytest.approx(error, rel=1e-6)


def test_steps_may_differ_from_training():
    one, three = fixture(1), fixture(3)
    assert torch.equal(one.encode(X_A[None], steps=3).to_dense(), three.encode(X_A[None]).to_dense())
    assert torch.equal(three.encode(X_A[None], steps=1).to_dense(), one.encode(X_A[None]).to_dense())


def test_trace_tells_the_steps_in_order():
    trace = fixture(3).trace(X_A[None], steps=5)
    assert trace.atoms_BT[0, :3].tolist() == [2, 4, 0]
    torch.testing.assert_close(trace.coefficients_BT[0], torch.tensor([2.4, 1.8, 0.56, 0, 0]))
    torch.testing.assert_close(trace.norms_BT[0].square(), torch.tensor([10.49, 7.25, 6.9364, 6.9364, 6.9364]))


@pytest.mark.parametrize("gram", [True, False])
def test_every_step_takes_its_square_off_and_leaves_nothing_along_its_atom(gram, monkeypatch):
    monkeypatch.setattr(kernel, "_gram_pays", lambda *_: gram)
    x, atoms = normal(50, 12, dtype=torch.float64), unit_rows(60, 12, dtype=torch.float64)
    pursuit = matching_pursuit(x, atoms, 10)
    before = torch.cat([x.norm(dim=1, keepdim=True), pursuit.norms_BT[:, :-1]], 1)
    torch.testing.assert_close(pursuit.norms_BT**2, before**2 - pursuit.coefficients_BT**2)
    assert (pursuit.coefficients_BT >= 0).all()
    for steps in range(1, 11):
        last = matching_pursuit(x, atoms, steps)
        taken = last.coefficients_BT[:, -1] > 0
        assert (last.residual_BD * atoms[last.atoms_BT[:, -1]]).sum(1)[taken].abs().max() < 1e-12
        decoded = torch.zeros(50, 60, dtype=torch.float64).scatter_add(1, last.atoms_BT, last.coefficients_BT) @ atoms
        torch.testing.assert_close(x - decoded, last.residual_BD)


def test_an_orthonormal_dictionary_gives_topk():
    atoms = torch.linalg.qr(normal(12, 12, dtype=torch.float64)).Q
    x = normal(40, 12, seed=2, dtype=torch.float64)
    ours = matching_pursuit(x, atoms, 5)
    theirs = encode_topk(x, atoms, x.new_zeros(12), None, 5)
    torch.testing.assert_close(merged(ours.atoms_BT, ours.coefficients_BT, 12).to_dense(), theirs.to_dense())


@pytest.mark.parametrize("tolerance", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(50, 16, 20), (37, 9, 300), (5, 3, 4)])
@pytest.mark.parametrize("gram", [True, False])
def test_steps_and_gradients_equal_autograd_of_the_loop(tolerance, shape, gram, monkeypatch):
    monkeypatch.setattr(kernel, "_gram_pays", lambda *_: gram)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 7 * shape[2] * 8)  # blocks of seven tokens
    tokens, width, count = shape
    x = normal(tokens, width, dtype=torch.float64).requires_grad_()
    atoms = unit_rows(count, width, dtype=torch.float64).requires_grad_()
    weights = normal(tokens, 12, seed=5, dtype=torch.float64)
    results = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            pursuit = matching_pursuit(x, atoms, 12, tolerance)
        loss = (pursuit.coefficients_BT * weights).sum() + pursuit.residual_BD.pow(3).sum()
        results.append((pursuit.coefficients_BT, pursuit.norms_BT, pursuit.residual_BD, *torch.autograd.grad(loss, [x, atoms])))
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < 1e-8
    stopped = results[0][0] == 0
    assert stopped.any() == (tolerance > 0 or shape[2] < 20)


def test_the_gram_matrix_is_used_where_it_pays():
    atoms = unit_rows(512, 4)
    assert kernel._gram_pays(1000, 8, atoms)
    assert not kernel._gram_pays(10, 8, atoms)  # few tokens
    assert not kernel._gram_pays(10**6, 8, atoms.expand(1000, 512, 4).reshape(-1, 4))  # too large a matrix


def test_backward_keeps_one_residual_per_token_not_one_per_step():
    x, atoms = normal(64, 16).requires_grad_(), unit_rows(32, 16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        matching_pursuit(x, atoms, 20)
    assert sum(kept) <= atoms.numel() + 2 * 64 * 20 + 64 * 16


def test_an_atom_taken_twice_is_one_entry():
    indices = torch.tensor([[4, 2, 4, 4, 0], [1, 1, 3, 1, 3]])
    values = torch.tensor([[1.0, 2, 3, 4, 0], [1, 2, 3, 0, 5]], requires_grad=True)
    codes = merged(indices, values, 6)
    assert codes.values.tolist() == [[8, 2, 0, 0, 0], [3, 0, 8, 0, 0]]
    assert codes.l0().tolist() == [2, 2] and codes.firings().tolist() == [0, 1, 1, 1, 1, 0]
    torch.testing.assert_close(codes.to_dense(), SparseCodes(indices, values, 6).to_dense())
    (gradient,) = torch.autograd.grad((codes.values * torch.arange(5.0)).sum(), values)
    assert gradient.tolist() == [[0, 1, 0, 0, 4], [0, 0, 2, 0, 2]]


def test_reselection_is_counted_once_and_reconstructs():
    dictionary = random_dictionary(d_sae=12, steps=40)
    x = normal(100, 8) + 3
    codes, trace = dictionary.encode(x), dictionary.trace(x)
    taken = (trace.coefficients_BT > 0).sum(1)
    assert (codes.l0() < taken).any()
    assert codes.l0().tolist() == (codes.to_dense() > 0).sum(1).tolist()
    torch.testing.assert_close((dictionary(x) - x).norm(dim=1), trace.norms_BT[:, -1], rtol=1e-4, atol=1e-4)


def test_more_steps_never_reconstruct_worse():
    dictionary, x = random_dictionary(), normal(100, 8) + 3
    errors = [(dictionary.decode(dictionary.encode(x, steps=steps)) - x).square().sum(1) for steps in (1, 2, 5, 20, 80)]
    for fewer, more in pairwise(errors):
        assert (more <= fewer + 1e-5).all()
    assert errors[-1].sum() < 0.1 * errors[0].sum()


def test_tolerance_stops_tokens_that_are_close_enough():
    dictionary, x = random_dictionary(steps=30), normal(100, 8) + 3
    whole, part = dictionary.encode(x), dictionary.encode(x, tolerance=0.3)
    assert (part.l0() <= whole.l0()).all() and part.l0().sum() < 0.5 * whole.l0().sum()
    lengths = (x - dictionary.b_dec).norm(dim=1)
    assert ((dictionary.decode(part) - x).norm(dim=1) < 0.3 * lengths + 1e-5).all()
    one_less = dictionary.trace(x, tolerance=0.3)
    last = (one_less.coefficients_BT > 0).sum(1)
    before = torch.cat([lengths[:, None], one_less.norms_BT], 1).gather(1, (last - 1)[:, None])[:, 0]
    assert (before >= 0.3 * lengths * (1 - 1e-5)).all()
    trained = random_dictionary(steps=30, tolerance=0.3)
    assert torch.equal(trained.encode(x).values, part.values)


def test_nan_stays_visible():
    x = X_A[None].clone()
    x[0, 1] = float("nan")
    assert fixture(2)(x).isnan().any()


def test_gradients_of_the_whole_loss_equal_autograd_of_the_loop():
    dictionary = random_dictionary(d_sae=24, d_in=5, k_aux=2).double()
    x = normal(30, 5, dtype=torch.float64) + 3
    dead = torch.arange(24) >= 18
    results = []
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            losses = dictionary.losses(TrainingBatch(x, x, dead))
            results.append((losses.total, *torch.autograd.grad(losses.total, [dictionary.W_dec, dictionary.b_dec])))
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < 1e-8
    expected = (dictionary(x) - x).square().mean() / dictionary.variance + losses.parts["auxk"] / 32
    assert float(results[0][0].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_auxk_reaches_dead_atoms_only_and_its_settings_matter():
    dictionary = random_dictionary(k_aux=3)
    residual = normal(50, 8, seed=9)
    dead = torch.arange(40) >= 30
    loss = dictionary._auxk(residual, dead)
    (gradient,) = torch.autograd.grad(loss, dictionary.W_dec)
    assert gradient[:30].abs().max() == 0 and (gradient[30:].abs().sum(1) > 0).any()
    pursuit = matching_pursuit(residual, dictionary.W_dec[30:], 3)
    expected = pursuit.residual_BD.square().sum() / (residual - residual.mean(0)).square().sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert random_dictionary(k_aux=1)._auxk(residual, dead).item() > loss.item()
    assert dictionary._auxk(residual, torch.zeros(40, dtype=torch.bool)).item() == 0
    x = normal(50, 8) + 3
    totals = [
        random_dictionary(aux_coefficient=weight).losses(TrainingBatch(x, x, dead)).total.item() for weight in (0.0, 1 / 32, 1.0)
    ]
    assert totals[0] < totals[1] < totals[2]


def test_resampled_atoms_are_taken_by_the_inputs_they_were_drawn_from():
    dictionary = random_dictionary(steps=1)
    x = normal(64, 8) * 2 + 3
    dead = torch.arange(40) % 5 == 0
    before = dictionary.W_dec.detach().clone()
    rows = dictionary.resample(TrainingBatch(x, x, dead, seed=4))
    assert rows["W_dec"].tolist() == dead.nonzero()[:, 0].tolist()
    assert torch.equal(dictionary.W_dec[~dead], before[~dead])
    torch.testing.assert_close(dictionary.W_dec[dead].norm(dim=1), torch.ones(8))
    assert (dictionary.encode(x).firings()[dead] > 0).all()
    assert dictionary.resample(TrainingBatch(x, x, ~torch.zeros(40, dtype=torch.bool))) == {}


def test_folding_changes_nothing_but_the_units():
    dictionary, x = random_dictionary(steps=12), normal(60, 8, seed=6) * 5 + 2
    shift, scale = normal(8, seed=7), 0.37
    scaled = (x - shift) * scale
    before, x_hat = dictionary.encode(scaled, tolerance=0.2), dictionary(scaled) / scale + shift
    scaling = Scaling(shift, torch.full((8,), scale))
    dictionary.fold(scaling, scaling)
    after = dictionary.encode(x, tolerance=0.2)
    torch.testing.assert_close(dictionary(x), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.to_dense(), before.to_dense() / scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(40))


def test_folding_two_sites_of_different_scale_keeps_the_codes():
    dictionary, x = random_dictionary(steps=8), normal(60, 8, seed=6) + 2
    scale = torch.tensor([3.0] * 5 + [0.2] * 3)
    raw = x / scale
    before, x_hat = dictionary.encode(x), dictionary(x) / scale
    scaling = Scaling(torch.zeros(8), scale)
    dictionary.fold(scaling, scaling)
    after = dictionary.encode(raw)
    torch.testing.assert_close(dictionary(raw), x_hat, rtol=1e-4, atol=1e-4)
    ratio = after.to_dense() / before.to_dense()
    assert float(ratio[ratio.isfinite()].std()) < 1e-4
    torch.testing.assert_close(dictionary.atoms.norm(dim=1), torch.ones(40))


def test_save_and_load_give_identical_codes(tmp_path):
    dictionary, x = random_dictionary(), normal(30, 8) + 3
    dictionary.save(tmp_path / "it")
    loaded = sb.load(tmp_path / "it")
    assert torch.equal(loaded.encode(x).to_dense(), dictionary.encode(x).to_dense())
    assert torch.equal(loaded(x), dictionary(x)) and loaded.config == dictionary.config


def test_training_finds_planted_directions_and_shows_its_error():
    x, directions = planted(4000)
    source = sb.TensorSource({"a": x})
    config = sb.MatchingPursuit(d_sae=24, steps=2)
    member = Member.create(config.for_sites({"a": 16}), TrainConfig(), x)
    untrained = member.finished()
    trained = sb.train(config, source, TrainConfig(num_tokens=128 * 400, batch_size=128, lr=5e-3, dead_after=5000))
    fvu = [float((d(x) - x).square().sum() / (x - x.mean(0)).square().sum()) for d in (untrained, trained)]
    assert fvu[1] < 0.1 < 0.3 < fvu[0]
    assert float((directions @ trained.W_dec.T).amax(1).mean()) > 0.95


def test_two_sites_of_different_scale_count_the_same():
    x, _ = planted(1000)
    sites = {"a": x[:, :8], "b": 100 * x[:, 8:]}
    config = sb.MatchingPursuit(d_sae=24, steps=2, site=("a", "b"))
    trained = sb.train(config, sb.TensorSource(sites), TrainConfig(num_tokens=100 * 100, batch_size=100, lr=1e-2))
    raw = torch.cat(list(sites.values()), 1)
    missed, spread = (trained(raw) - raw).square().sum(0), (raw - raw.mean(0)).square().sum(0)
    assert (missed[:8].sum() / spread[:8].sum()).item() < 0.3 and (missed[8:].sum() / spread[8:].sum()).item() < 0.3
    torch.testing.assert_close(trained.atoms.norm(dim=1), torch.ones(24))
    assert trained.W_dec[:, 8:].norm() > 50 * trained.W_dec[:, :8].norm()


def test_an_encoder_is_held_against_a_greedy_search_on_its_own_dictionary():
    generator = torch.Generator().manual_seed(0)
    x = normal(200, 8) + 3
    topk = sb.TopK(d_sae=40, d_in=8, k=4).build()
    topk.initialise(x, x, generator)
    assert amortisation_gap(topk, x) > 0.1
    pursuit = random_dictionary(steps=2)  # too few to take an atom twice
    assert abs(amortisation_gap(pursuit, x)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_sae": 8, "steps": 0}, "steps=0"),
        ({"d_sae": 8, "tolerance": 1.0}, r"tolerance=1\.0"),
        ({"d_sae": 8, "site": "a", "target": "b"}, "matching_pursuit explains what it reads and has no other target"),
    ],
)
def test_wrong_configurations_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        sb.MatchingPursuit(**settings)


def test_wrong_steps_at_inference_are_refused():
    for options in ({"steps": 0}, {"tolerance": 1.5}):
        with pytest.raises(UserError, match=next(iter(options))):
            fixture(2).encode(X_A[None], **options)
