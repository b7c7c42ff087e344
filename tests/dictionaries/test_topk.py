"""TopK against the worked example of the fixture (unit decoder of six latents in four dimensions), closed forms and autograd."""

import pytest
import torch

import saebench as sb
from saebench.dictionaries import Scaling, TrainingBatch
from saebench.dictionaries.auxk import auxk_loss, default_k_aux
from saebench.dictionaries.geometry import geometric_median, scale_to_unit
from saebench.dictionaries.sae import Weights
from saebench.errors import UserError

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A, X_B = torch.tensor([2, 1.5, -1, 3.0]), torch.tensor([0.5, 0, 0, -1.0])


def fixture_sae(k: int):
    sae = sb.TopK(d_sae=6, k=k, d_in=4).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(D)
        sae.W_dec.copy_(D)
    return sae


def random_sae(d_sae=30, d_in=7, k=4, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sae = sb.TopK(d_sae=d_sae, k=k, d_in=d_in, **options).build()
    x = torch.randn(200, d_in, generator=generator) + 3
    sae.initialise(x, x, generator)
    return sae


@pytest.mark.parametrize(
    ("k", "f", "x_hat", "error"),
    [
        (1, [0, 0, 2.4, 0, 0, 0], [1.44, 1.92, 0, 0], 10.49),
        (2, [2, 0, 2.4, 0, 0, 0], [3.44, 1.92, 0, 0], 12.25),
        (3, [2, 0, 2.4, 0, 1.8, 0], [3.44, 1.92, 1.08, 1.44], 9.01),
        (6, [2, 1.5, 2.4, 0, 1.8, 0], [3.44, 3.42, 1.08, 1.44], 12.52),  # the ReLU code
    ],
)
def test_worked_example(k, f, x_hat, error):
    sae = fixture_sae(k)
    codes = sae.encode(X_A[None])
    torch.testing.assert_close(codes.to_dense()[0], torch.tensor(f))
    torch.testing.assert_close(sae.decode(codes)[0], torch.tensor(x_hat))
    assert float((sae(X_A[None]).detach() - X_A).square().sum()) == pytest.approx(error, rel=1e-6)


def test_second_token_is_reconstructed_exactly():
    torch.testing.assert_close(fixture_sae(2)(X_B[None])[0], X_B)


def test_auxk_of_the_worked_example():
    residual = X_A - fixture_sae(2)(X_A[None])[0]
    assert float(residual.square().sum()) == pytest.approx(12.25)
    dead = torch.tensor([False, True, False, False, True, False])
    batch = torch.stack([X_A, X_A])  # a second token gives the residual a spread
    other = torch.stack([residual, -residual])
    loss = auxk_loss(batch, -other, Weights(D, torch.zeros(6), D), torch.zeros(4), dead, 1)
    decoded = torch.tensor([0, 0, 1.08, 1.44])
    expected = ((decoded - residual).square().sum() + (decoded + residual).square().sum()) / (2 * 12.25)
    assert float((decoded - residual).square().sum()) == pytest.approx(9.01)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_auxk_is_nothing_for_one_token_or_without_dead_latents():
    x = X_A[None].clone().requires_grad_()
    W = D.clone().requires_grad_()
    for dead in (torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        loss = auxk_loss(x, -X_A[None], Weights(W, torch.zeros(6), W), torch.zeros(4), dead, 2)
        assert float(loss) == 0
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, W)
            assert gradient.isfinite().all()


def test_auxk_gradient_reaches_the_encoder_of_dead_latents_only():
    sae = random_sae()
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(5)) + 3
    residual = (x - sae(x)).detach()
    dead = torch.zeros(30, dtype=torch.bool)
    dead[10:20] = True
    loss = auxk_loss(x, -residual, sae.weights(), sae.b_dec, dead, 3)
    encoder, decoder, bias = torch.autograd.grad(loss, [sae.W_enc_FD, sae.W_dec, sae.b_enc])
    assert (encoder[10:20].abs().sum(1) > 0).any()
    for gradient in (encoder, decoder, bias[:, None]):
        assert gradient[~dead].abs().max() == 0
    assert ((encoder.abs().sum(1) > 0) == (decoder.abs().sum(1) > 0)).all()


def test_gradients_of_the_whole_loss_equal_finite_differences():
    sae = random_sae(d_sae=12, d_in=5, k=3, k_aux=2).double()
    sae.variance.fill_(1.7)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    dead = torch.arange(12) >= 8
    target = sae.losses(TrainingBatch(x, x, dead))
    residual = (x - sae(x)).detach()

    def loss(*parameters):
        # the residual of the auxiliary loss is a constant, as in the objective
        for name, value in zip(("W_enc_FD", "W_dec", "b_enc", "b_dec"), parameters, strict=True):
            getattr(sae, name).data = value.detach().clone()
        codes = sae.encode(x)
        main = (sae.decode(codes) - x).square().mean() / sae.variance
        return float(main + auxk_loss(x, -residual, sae.weights(), sae.b_dec, dead, 2) / 32)

    names = ("W_enc_FD", "W_dec", "b_enc", "b_dec")
    start = [getattr(sae, name).detach().clone() for name in names]
    assert loss(*start) == pytest.approx(float(target.total), rel=1e-12)
    gradients = torch.autograd.grad(target.total, [getattr(sae, name) for name in names])
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start]
        ends = [loss(*(p + sign * 1e-7 * d for p, d in zip(start, direction, strict=True))) for sign in (1, -1)]
        numeric = (ends[0] - ends[1]) / 2e-7
        analytic = float(sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)))
        assert numeric == pytest.approx(analytic, rel=1e-6)


@pytest.mark.parametrize("norm", [0.1, 0.4])
def test_short_free_rows_start_tied_and_write_little(norm):
    sae = random_sae(d_sae=64, d_in=16, k=64, initial_norm=norm)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((64,), norm))
    cosines = torch.nn.functional.cosine_similarity(sae.W_enc_FD, sae.W_dec, dim=1)
    torch.testing.assert_close(cosines, torch.ones(64))
    unit = random_sae(d_sae=64, d_in=16, k=64, decoder="unit")
    torch.testing.assert_close(sae.W_enc_FD, norm * unit.W_enc_FD)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(sae(x) - sae.b_dec, norm**2 * (unit(x) - unit.b_dec))


def test_initialisation_gives_unit_reconstructions_and_a_tied_unit_decoder():
    sae = random_sae(d_sae=64, d_in=16, k=64, decoder="unit")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    cosines = torch.nn.functional.cosine_similarity(sae.W_enc_FD, sae.W_dec, dim=1)
    torch.testing.assert_close(cosines, torch.ones(64))
    u = torch.randn(2000, 16, generator=torch.Generator().manual_seed(9))
    u /= u.norm(dim=1, keepdim=True)
    assert float((sae(u + sae.b_dec) - sae.b_dec).norm(dim=1).mean()) == pytest.approx(1, abs=0.05)


def test_geometric_median_is_not_moved_by_an_outlier():
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    torch.testing.assert_close(geometric_median(cross + 5), torch.tensor([5.0, 5.0]), rtol=0, atol=1e-4)
    line = torch.tensor([[0.0], [1], [2], [3], [1000]])
    assert float(geometric_median(line)) == pytest.approx(2, abs=0.05)


def test_rows_are_scaled_to_unit_length():
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    scale_to_unit(rows)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))


def test_folding_the_scale_changes_nothing_but_the_units():
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(4))
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(6)) * 5 + 2
    scale = 0.37
    before, x_hat = sae.encode(scale * x), sae(scale * x) / scale
    scaling = Scaling(torch.zeros(7), torch.full((7,), scale))
    sae.fold(scaling, scaling)
    after = sae.encode(x)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.indices, before.indices)
    torch.testing.assert_close(after.values, before.values / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))


def test_save_and_load_give_identical_codes(tmp_path):
    sae = random_sae()
    sae.trained_on = {"site": "blocks.0.hook_resid_post"}
    sae.save(tmp_path / "sae")
    loaded = sb.load(tmp_path / "sae")
    x = torch.randn(30, 7, generator=torch.Generator().manual_seed(8)) + 3
    # the lengths of free rows are multiplied into the file's encoder: the same up to rounding
    torch.testing.assert_close(loaded.encode(x).to_dense(), sae.encode(x).to_dense())
    torch.testing.assert_close(loaded(x), sae(x))
    loaded.save(tmp_path / "again")
    assert torch.equal(sb.load(tmp_path / "again")(x), loaded(x))
    assert loaded.config == sae.config
    assert loaded.trained_on == sae.trained_on
    from safetensors import safe_open

    with safe_open(tmp_path / "sae" / "weights.safetensors", "pt") as file:
        assert file.get_slice("W_enc").get_shape() == [7, 30]
        assert file.get_slice("W_dec").get_shape() == [30, 7]


def test_damaged_and_unknown_files_are_refused(tmp_path):
    sae = random_sae()
    sae.save(tmp_path / "sae")
    with pytest.raises(UserError, match="exists already"):
        sae.save(tmp_path / "sae")
    config = tmp_path / "sae" / "config.json"
    text = config.read_text()
    for old, new, message in (
        ('"topk"', '"topp"', "'topp' is unknown"),
        ('"k": 4', '"q": 4', "unknown key"),
        ('"version": 1', '"version": 7', "version 7"),
        ('"k": 4', '"k": 31', "k=31 exceeds d_sae=30"),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            sb.load(tmp_path / "sae")
    config.write_text(text)
    weights = tmp_path / "sae" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"weights.safetensors is damaged"):
        sb.load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_sae": 8, "k": 9}, "k=9 exceeds d_sae=8"),
        ({"d_sae": 8, "k": 0}, "k=0"),
        ({"d_sae": "many", "k": 2}, "d_sae='many'"),
        ({"d_sae": 8, "topk": 2}, "unknown key topk"),
        ({"k": 2}, "missing key d_sae"),
    ],
)
def test_wrong_configurations_name_the_key(settings, message):
    with pytest.raises(UserError, match=message):
        sb.TopK(**settings)


def test_default_k_aux_is_the_nearest_power_of_two_up_to_32():
    assert [default_k_aux(d) for d in (2, 20, 24, 64, 256, 2304)] == [1, 8, 16, 32, 32, 32]


@pytest.mark.parametrize("rule", [sb.TopK, sb.BatchTopK, sb.Matryoshka, sb.OrtSAE])
def test_lengths_of_free_rows_cancel_in_the_gradient(rule, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator, dtype=torch.float64) + 1
    sae = rule(d_sae=32, k=4, d_in=7, aux_coefficient=0.5).build().double()
    sae.initialise(x, x, generator)
    with torch.no_grad():
        sae.W_dec *= torch.rand(32, 1, generator=generator, dtype=torch.float64) + 0.5
    batch = TrainingBatch(x, x, torch.arange(32) > 24, 3, 10)
    short = torch.autograd.grad(sae.losses(batch).total, list(sae.parameters()))
    monkeypatch.setattr(type(sae), "norms_cancel", False)
    full = torch.autograd.grad(sae.losses(batch).total, list(sae.parameters()))
    for one, other in zip(short, full, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
