"""BatchTopK against the worked example, TopK, dense autograd and its own threshold on held-out data."""

import json
from functools import cache

import pytest
import torch

import saebench as sb
from saebench.activations import TensorSource
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.sae import Fit
from saebench.errors import UserError
from saebench.kernels import use_implementation
from saebench.synthetic import PlantedDictionary

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X = torch.tensor([[2, 1.5, -1, 3.0], [0.5, 0, 0, -1.0]])
PLANTED = PlantedDictionary(num_features=64, width=24, l0=4)


def fixture_sae(k=2, **options):
    sae = sb.BatchTopK(d_sae=6, k=k, d_in=4, **options).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(D)
        sae.W_dec.copy_(D)
    return sae


def random_sae(config=sb.BatchTopK, d_sae=30, d_in=7, k=4, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sae = config(d_sae=d_sae, k=k, d_in=d_in, **options).build()
    x = torch.randn(200, d_in, generator=generator) + 3
    sae.initialise(x, x, generator)
    return sae


def batch_of(x, y=None, step=0, steps=1, d_sae=30):
    return TrainingBatch(x, x if y is None else y, torch.zeros(d_sae, dtype=torch.bool), step, steps)


def tokens(count=50, d_in=7, seed=5, dtype=torch.float32):
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 3


@cache
def planted(count):
    return PLANTED.sample(count)[0]


def test_worked_example():
    sae = fixture_sae()
    fit = sae.objective(batch_of(X, d_sae=6), sae.weights())
    torch.testing.assert_close(fit.codes.to_dense(), torch.tensor([[2, 1.5, 2.4, 0, 1.8, 0], [0.0] * 6]))
    assert float(fit.parts["smallest_kept"]) == pytest.approx(1.5)
    assert float(sae.threshold) == pytest.approx(1.5)
    torch.testing.assert_close(sae.encode(X).to_dense()[0], torch.tensor([2, 0, 2.4, 0, 1.8, 0]))


def test_one_token_keeps_what_topk_keeps():
    sae, x = random_sae(), tokens()
    topk = sb.TopK(d_sae=30, k=4, d_in=7).build()
    topk.load_state_dict({name: t for name, t in sae.state_dict().items() if name != "threshold"})
    for row in x[:, None]:
        torch.testing.assert_close(sae.select_batch(row, sae.weights()).to_dense(), topk.encode(row).to_dense())
    kept, kept_by_topk = (f.to_dense() for f in (sae.select_batch(x, sae.weights()), topk.encode(x)))
    assert kept.sum() > kept_by_topk.sum()
    assert kept.count_nonzero() == 4 * len(x)


def test_the_threshold_is_a_running_average_that_remembers_a_twentieth_of_the_run():
    sae = random_sae()
    expected = None
    for step in range(5):
        x = tokens(seed=step) * (1 + step)
        smallest = float(sae.select_batch(x, sae.weights()).values.detach().min())
        expected = smallest if expected is None else expected + (smallest - expected) / 10
        sae.objective(batch_of(x, step=step, steps=200), sae.weights())
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-5)
    before = float(sae.threshold)
    sae.objective(batch_of(x, steps=10**6), sae.weights())
    assert float(sae.threshold) == pytest.approx(before + (smallest - before) / 1000, rel=1e-5)


def test_a_batch_without_positive_scores_leaves_the_threshold():
    sae = fixture_sae()
    sae.objective(batch_of(X, d_sae=6), sae.weights())
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    fit = sae.objective(batch_of(X, d_sae=6), sae.weights())
    assert fit.codes.values.numel() == 0
    assert float(sae.threshold) == 1.5


def test_inference_by_batch_depends_on_the_company_and_by_threshold_not():
    x = tokens()
    for inference, same in (("threshold", True), ("batch", False)):
        sae = random_sae(inference=inference)
        sae.objective(batch_of(x), sae.weights())
        together, alone = sae.encode(x).to_dense(), torch.cat([sae.encode(row).to_dense() for row in x[:, None]])
        assert torch.equal(together > 0, alone > 0) == same
        assert float(sae.encode(x).l0().float().mean()) == pytest.approx(4, abs=0.05)


def test_loss_and_gradients_equal_the_dense_reference():
    x = tokens(dtype=torch.float64)
    results = []
    for name in ("stock", "reference"):
        sae = random_sae(k_aux=3).double()
        batch = TrainingBatch(x, x, torch.arange(30) > 20)
        with use_implementation(name):
            losses = sae.losses(batch)
            results.append((losses.total, *torch.autograd.grad(losses.total, list(sae.parameters()))))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences():
    sae = random_sae(d_sae=12, d_in=5, k=3, aux_coefficient=0).double()
    x = tokens(9, 5, dtype=torch.float64)
    parameters = list(sae.parameters())
    gradients = torch.autograd.grad(sae.losses(batch_of(x)).total, parameters)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        ends = []
        for sign in (1e-7, -2e-7):
            with torch.no_grad():
                for p, direction in zip(parameters, directions, strict=True):
                    p += sign * direction
            ends.append(sae.losses(batch_of(x)).total.item())
        with torch.no_grad():
            for p, direction in zip(parameters, directions, strict=True):
                p += 1e-7 * direction
        analytic = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
        assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(analytic, rel=1e-5)


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_folding_takes_the_threshold_along(decoder):
    sae, x, scale = random_sae(decoder=decoder), tokens() * 5, 0.37
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(4))
        if decoder == "free":
            sae.W_dec.mul_(torch.rand(30, 1, generator=torch.Generator().manual_seed(1)) + 0.5)
    sae.objective(batch_of(scale * x), sae.weights())
    sae.threshold *= 0.999  # just after its first step it is equal to a score, which rounding would move across
    threshold = float(sae.threshold)
    before, x_hat = sae.encode(scale * x), sae(scale * x) / scale
    scaling = Scaling(torch.zeros(7), torch.full((7,), scale))
    sae.fold(scaling, scaling)
    assert float(sae.threshold) == pytest.approx(threshold / scale)
    assert torch.equal(sae.encode(x).to_dense() > 0, before.to_dense() > 0)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-5)


def test_folding_leaves_an_unknown_threshold_unknown():
    sae = random_sae()
    scaling = Scaling(torch.zeros(7), torch.full((7,), 0.1))
    sae.fold(scaling, scaling)
    assert float(sae.threshold) == -1


@pytest.mark.parametrize("config", [sb.BatchTopK, sb.OrtSAE])
def test_save_and_load_give_identical_codes(config, tmp_path):
    sae, x = random_sae(config), tokens()
    sae.objective(batch_of(x), sae.weights())
    sae.save(tmp_path / "sae")
    loaded = sb.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert float(loaded.threshold) == float(sae.threshold)
    assert torch.equal(loaded.encode(x).to_dense(), sae.settled().encode(x).to_dense())
    assert json.loads((tmp_path / "sae" / "config.json").read_text())["config"]["inference"] == "threshold"


@pytest.mark.parametrize("steps", [150, 400])
def test_after_training_the_threshold_gives_k_latents_on_held_out_tokens(steps, tmp_path):
    x = planted(16_000)
    train, held_out = x[:8000], x[8000:]
    training = sb.TrainConfig(num_tokens=256 * steps, batch_size=256, log_every=10)
    sae = sb.train(sb.BatchTopK(d_sae=96, k=6), TensorSource({"x": train}), training, out=tmp_path)
    codes = sae.encode(held_out)
    assert abs(float(codes.l0().double().mean()) - 6) / 6 < 0.05
    fvu = float((sae(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert fvu < 0.5 * rows[0]["fvu"]
    assert rows[-1]["l0"] == pytest.approx(6, abs=1e-6)
    assert rows[-1]["threshold"] == pytest.approx(rows[-1]["smallest_kept"], rel=0.05)
    spread = float(codes.l0().double().std())
    assert spread > 0.5  # a token gets as many as it needs


def test_resuming_is_exact(tmp_path, monkeypatch):
    from saebench.errors import Interrupted
    from saebench.trainer import Member

    source, config = TensorSource({"x": planted(16_000)}), {"sae": sb.BatchTopK(d_sae=48, k=4)}
    training = sb.TrainConfig(num_tokens=64 * 40, batch_size=64, checkpoint_every=1000)
    (whole,) = sb.train(config, source, training, out=tmp_path / "whole")
    step, calls = Member.step, []

    def stopping(self, x, number):
        calls.append(1)
        if len(calls) == 17:
            import signal

            signal.raise_signal(signal.SIGINT)
        step(self, x, number)

    monkeypatch.setattr(Member, "step", stopping)
    with pytest.raises(Interrupted):
        sb.train(config, source, training, out=tmp_path / "parts")
    monkeypatch.setattr(Member, "step", step)
    (parts,) = sb.train(config, source, training, out=tmp_path / "parts")
    for name, tensor in whole.public_tensors().items():
        assert torch.equal(tensor, parts.public_tensors()[name]), name


def test_as_transcoder_it_predicts_another_site():
    x = planted(16_000)
    matrix = torch.randn(24, 10, generator=torch.Generator().manual_seed(3)) / 5
    source = TensorSource({"x": x, "y": (x @ matrix).relu()})
    config = sb.BatchTopK(d_sae=96, k=3, site="x", target="y")
    sae = sb.train(config, source, sb.TrainConfig(num_tokens=256 * 150, batch_size=256))
    y = (x @ matrix).relu()
    assert float((sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()) < 0.3
    assert abs(float(sae.encode(x).l0().double().mean()) - 3) / 3 < 0.05


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="k=9 exceeds d_sae=8"):
        sb.BatchTopK(d_sae=8, k=9)
    with pytest.raises(UserError, match="inference"):
        sb.BatchTopK(d_sae=8, k=2, inference="token")


def test_the_objective_is_the_family_s_with_another_selection():
    sae, x = random_sae(), tokens()
    fit = sae.objective(batch_of(x), sae.weights())
    assert isinstance(fit, Fit)
    assert fit.loss.item() == pytest.approx((sae.decode(fit.codes) - x).square().sum(1).mean().item(), rel=1e-6)
