"""top-AFA against the worked example, the full sort, and orthonormal atoms."""

import json

import pytest
import torch

import saebench as sb
from saebench.activations import TensorSource
from saebench.dictionaries import Scaling, TrainingBatch, topafa
from saebench.dictionaries.topafa import code_lengths, encode_to_length, nearest_count
from saebench.errors import UserError
from saebench.kernels import scores, use_implementation
from saebench.synthetic import PlantedDictionary

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A = torch.tensor([[2, 1.5, -1, 3.0]])


def sae_with(rows, **options):
    sae = sb.TopAFA(d_sae=len(rows), d_in=rows.shape[1], aux_coefficient=0, **options).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(rows)
        sae.W_dec.copy_(rows)
    return sae


def random_sae(d_sae=40, d_in=7, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sae = sb.TopAFA(d_sae=d_sae, d_in=d_in, **options).build()
    x = tokens(200, d_in, seed=3)
    sae.initialise(x, x, generator)
    return sae


def tokens(count=50, d_in=7, seed=5, dtype=torch.float32):
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 3


def batch_of(x, d_sae=40):
    return TrainingBatch(x, x, torch.zeros(d_sae, dtype=torch.bool))


def test_worked_example():
    sae = sae_with(D)
    ranked = torch.tensor([[2.4, 2, 1.8, 1.5, 0, 0]])
    lengths = ranked.square().cumsum(1).sqrt()
    torch.testing.assert_close(lengths[0], torch.tensor([2.4, 3.1241, 3.6056, 3.9051, 3.9051, 3.9051]), atol=5e-5, rtol=0)
    lengths[:, -1] = torch.inf
    assert nearest_count(lengths, X_A.norm(dim=1)).tolist() == [4]
    fit = sae.objective(batch_of(X_A, 6), sae.weights())
    torch.testing.assert_close(fit.codes.to_dense()[0], torch.tensor([2, 1.5, 2.4, 0, 1.8, 0]))
    assert float(fit.error_BD.detach().square().sum()) / 4 == pytest.approx(3.13)
    assert float(fit.parts["afa"]) == pytest.approx(0.015877, abs=1e-6)
    assert fit.loss.item() / 4 == pytest.approx(3.13 + 0.015877 / 32, abs=1e-5)


@pytest.mark.parametrize("support", [1, 2, 5, 7])
def test_orthonormal_atoms_are_counted_exactly(support):
    generator = torch.Generator().manual_seed(support)
    rows = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    sae = sae_with(rows.float()).double()
    with torch.no_grad():
        sae.W_enc_FD.copy_(rows)
        sae.W_dec.copy_(rows)
    f = torch.zeros(30, 8, dtype=torch.float64)
    for token in range(30):
        f[token, torch.randperm(8, generator=generator)[:support]] = torch.rand(support, generator=generator).double() + 0.1
    fit = sae.objective(batch_of(f @ rows, 8), sae.weights())
    assert fit.codes.l0().tolist() == [support] * 30
    torch.testing.assert_close(fit.codes.to_dense(), f)
    assert float(fit.parts["afa"]) < 1e-20


@pytest.mark.parametrize("candidates", [1, 3, 64])
@pytest.mark.parametrize("scale", [0.01, 0.5, 1.0, 3.0, 100.0])  # of the wanted length: from one latent to all but one
def test_growing_candidates_equal_the_full_sort(candidates, scale, monkeypatch):
    monkeypatch.setattr(topafa, "CANDIDATES", candidates)
    monkeypatch.setattr(scores, "BLOCK_BYTES", 11 * 123 * 8)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, W, b_in = draw(50, 6).requires_grad_(), draw(123, 6).requires_grad_(), draw(6).requires_grad_()
    with torch.no_grad():
        W[40:80] = W[:40]  # equal scores
        x[7] = b_in  # a token of length 0
    length = (x - b_in).detach().norm(dim=1) * scale
    results = []
    for name in ("stock", "reference"):
        with use_implementation(name):
            codes = encode_to_length(x, W, torch.zeros(123, dtype=torch.float64), b_in, length)
            dense = codes.to_dense()
            results.append((dense, *torch.autograd.grad(dense.pow(3).sum(), [x, W, b_in])))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    counts = codes.l0()
    assert counts.max() <= 122
    assert counts[7] == 0


def test_all_latents_are_never_active():
    x = torch.ones(3, 4)
    codes = encode_to_length(x, torch.ones(5, 4), torch.zeros(5), None, torch.full((3,), 1e6))
    assert codes.to_dense().tolist() == [[4.0, 4, 4, 4, 0]] * 3
    codes = encode_to_length(x, -torch.ones(5, 4), torch.zeros(5), None, torch.full((3,), 1e6))
    assert codes.values.numel() == 0 and len(codes) == 3


def test_of_two_counts_equally_near_the_lower_is_taken():
    x = torch.tensor([[3.0, 4.0, 0.1]])  # lengths 4 and 5: 4.5 lies between
    codes = encode_to_length(x, torch.eye(3), torch.zeros(3), None, torch.tensor([4.5]))
    assert codes.to_dense().tolist() == [[0, 4, 0]]


def test_lengths_of_codes_and_their_gradient_at_zero():
    sae = random_sae()
    x = torch.cat([tokens(), sae.b_dec.detach()[None]])  # the last has no active latent
    codes = sae.encode(x)
    lengths = code_lengths(codes)
    torch.testing.assert_close(lengths, codes.to_dense().norm(dim=1))
    (gradient,) = torch.autograd.grad(lengths.sum(), sae.W_enc_FD)
    assert gradient.isfinite().all() and float(lengths[-1].detach()) == 0


def test_loss_and_gradients_equal_the_dense_reference():
    x = tokens(dtype=torch.float64)
    results = []
    for name in ("stock", "reference"):
        sae = random_sae(k_aux=3).double()
        trained = [p for p in sae.parameters() if p.requires_grad]
        with use_implementation(name):
            losses = sae.losses(TrainingBatch(x, x, torch.arange(40) > 30))
            results.append((losses.total, *torch.autograd.grad(losses.total, trained)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences():
    sae = random_sae(d_sae=20, d_in=5, aux_coefficient=0, afa_coefficient=0.5).double()
    x = tokens(9, 5, dtype=torch.float64)
    parameters = [p for p in sae.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sae.losses(batch_of(x, 20)).total, parameters)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        ends = []
        for sign in (1e-7, -2e-7, 1e-7):
            with torch.no_grad():
                for p, direction in zip(parameters, directions, strict=True):
                    p += sign * direction
            ends.append(sae.losses(batch_of(x, 20)).total.item())
        analytic = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
        assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(analytic, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"decoder": "free"}, {"subtract_b_dec": False}])
def test_save_load_and_fold(options, tmp_path):
    sae, x = random_sae(**options), tokens() * 5
    with torch.no_grad():
        if options.get("decoder") == "free":
            sae.W_dec.mul_(torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) + 0.5)
    scaling = Scaling(torch.full((7,), 0.6), torch.full((7,), 0.37))
    before, x_hat = sae.encode(scaling(x)), sae(scaling(x)) / 0.37 + 0.6
    sae.fold(scaling, scaling)
    assert torch.equal(sae.encode(x).to_dense() > 0, before.to_dense() > 0)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)
    sae.save(tmp_path / "sae")
    loaded = sb.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert torch.equal(loaded.encode(x).to_dense(), sae.encode(x).to_dense())


def test_training_lowers_the_error_keeps_the_encoder_bias_at_zero_and_logs_the_outcome(tmp_path):
    x, _ = PlantedDictionary(num_features=64, width=24, l0=4).sample(8000)
    training = sb.TrainConfig(num_tokens=256 * 200, batch_size=256, log_every=10, resample_every=256 * 70, dead_after=512)
    sae = sb.train(sb.TopAFA(d_sae=96), TensorSource({"x": x}), training, out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    codes = sae.encode(x)
    fvu = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < 0.5 * rows[0]["fvu"]
    assert float(codes.l0().double().mean()) == pytest.approx(rows[-1]["l0"], rel=0.05)
    assert rows[-1]["afa"] < rows[0]["afa"]
    assert sae.b_enc.count_nonzero() == 0
    assert 1 < rows[-1]["l0"] < 48


def test_centring_keeps_a_large_mean_from_breaking_the_count():
    x = PlantedDictionary(num_features=48, width=24, l0=4, offset=8.0).sample(4000)[0]
    training = sb.TrainConfig(num_tokens=128 * 100, batch_size=128)
    configs = [sb.TopAFA(d_sae=48, centre=centre) for centre in (True, False)]
    errors = []
    for sae in sb.train(configs, TensorSource({"x": x}), training):
        errors.append(float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_the_coefficient_brings_lengths_together():
    x, _ = PlantedDictionary(num_features=64, width=24, l0=4, seed=1).sample(4000)
    training = sb.TrainConfig(num_tokens=128 * 100, batch_size=128)
    configs = [sb.TopAFA(d_sae=48, afa_coefficient=c) for c in (0.0, 1.0)]
    gaps = []
    for sae in sb.train(configs, TensorSource({"x": x}), training):
        gaps.append(float((sae.encode(x).to_dense().norm(dim=1) - (x - x.mean(0)).norm(dim=1)).square().mean()))
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "a", "target": "b"}, "target='b'.*for autoencoders of one site"),
        ({"site": ("a", "b")}, "lengths at several sites"),
        ({"skip": True}, "skip=true"),
        ({"afa_coefficient": -1}, "afa_coefficient=-1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        sb.TopAFA(d_sae=8, **settings)
