"""ZF points against the worked example and the bound that they are read by, on any dictionary."""

import math

import pytest
import torch

import saebench as sb
from saebench.errors import UserError
from saebench.evaluation.afa import ZFPoints, zf_data, zf_points, zf_slopes

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A = torch.tensor([[2, 1.5, -1, 3.0]])


def fixture_sae(k=6, b_dec=(0.0, 0, 0, 0)):
    sae = sb.TopK(d_sae=6, k=k, d_in=4, decoder="unit").build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(D)
        sae.W_dec.copy_(D)
        sae.b_dec.copy_(torch.tensor(b_dec))
    return sae


def points_of(sae, x):
    codes = sae.encode(x)
    return zf_points(sae, codes, x, sae.decode(codes))


def test_worked_example():
    sae = fixture_sae()
    points = points_of(sae, X_A)
    codes = sae.encode(X_A).to_dense().detach()
    gap = abs(float((codes @ D).square().sum() - codes.square().sum()))
    assert gap == pytest.approx(11.52, rel=1e-5)
    assert gap <= 0.8 * float(codes.sum() ** 2 - codes.square().sum())  # 35.232: the largest |cosine| of two rows is 0.8
    assert float(points.code_length_B) == pytest.approx(15.25**0.5)
    assert float(points.length_B) == pytest.approx(16.25**0.5)
    assert points.l0_B.tolist() == [4]
    assert float(points.error_B) == pytest.approx(12.52 / 16.25)
    assert float(points.eps_lbo_B) == pytest.approx(1 / (3 * 15.25), rel=1e-5)


def test_the_decoder_bias_and_decoder_norms_count():
    sae = fixture_sae(b_dec=(0, 0, 3.0, 4.0))
    x = X_A + sae.b_dec.detach()
    assert float(points_of(sae, x).code_length_B) == pytest.approx((15.25 + 25) ** 0.5)
    sae = fixture_sae()
    before = points_of(sae, X_A).code_length_B
    with torch.no_grad():
        sae.W_dec *= 3
    torch.testing.assert_close(points_of(sae, X_A).code_length_B, 3 * before)


def test_one_active_latent_explains_nothing_and_is_dropped():
    points = points_of(fixture_sae(k=1), torch.cat([X_A, X_A]))
    assert points.eps_lbo_B.isnan().all()
    assert len(points.eps_lbo_for_violin()) == 0
    assert points.figures()["too_few_active"] == 1


def test_orthonormal_rows_need_no_slack_and_no_row_pair_beats_the_bound():
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    sae = sb.TopK(d_sae=8, k=3, d_in=8).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(rows)
        sae.W_dec.copy_(rows)
    f = torch.zeros(20, 8)
    f[:, :3] = torch.rand(20, 3, generator=generator) + 0.1
    assert points_of(sae, f @ rows).eps_lbo_B.max() < 1e-5
    # for what the dictionary itself writes, eps_LBO never exceeds the largest cosine
    W = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator))
    sae = sb.TopK(d_sae=30, k=5, d_in=8).build()
    with torch.no_grad():
        sae.W_enc_FD.copy_(W)
        sae.W_dec.copy_(W)
    codes = sae.encode(torch.randn(200, 8, generator=generator))
    y = sae.decode(codes)
    largest = (W @ W.T - torch.eye(30)).abs().max()
    assert zf_points(sae, codes, y, y).eps_lbo_B.nan_to_num(0).max() <= largest + 1e-5


def test_violins_are_clipped_at_a_quantile():
    ones = torch.ones(1000, dtype=torch.float64)
    points = ZFPoints(torch.linspace(1, 2, 1000, dtype=torch.float64), ones, 3 * ones, ones)
    eps = points.eps_lbo_for_violin(0.9)
    assert len(eps) == 1000
    assert float(eps.max()) == pytest.approx(float(points.eps_lbo_B.quantile(0.9)))
    assert float(points.eps_lbo_B.max()) == pytest.approx(1.5)


def test_slopes():
    slopes = zf_slopes()
    assert slopes[0.5] == pytest.approx((math.sqrt(2 / 3), math.sqrt(2)))
    assert slopes[1.0] == (pytest.approx(math.sqrt(0.5)), math.inf)


@pytest.mark.parametrize("target", [None, "blocks.0.hook_mlp_out"])
def test_points_of_the_last_tokens_of_contexts(tiny_lm, contexts, target):
    site = "blocks.1.hook_resid_post"
    sae = sb.TopK(d_sae=64, k=4, site=site, target=target, d_in=32, d_out=32).build()
    few = contexts[:10]
    seen = tiny_lm.read(few.ids_NS, list(sae.config.sites))
    x, y = seen[site][:, -1].clone(), seen[target or site][:, -1].clone()
    sae.initialise(x, y, torch.Generator().manual_seed(0))
    points = zf_data(sae, tiny_lm, few, batch_size=4)
    expected = zf_points(sae, sae.encode(x), y, sae(x))
    for name in ("length_B", "code_length_B", "l0_B", "error_B"):
        torch.testing.assert_close(getattr(points, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert set(points.figures()) == {"eps_lbo_median", "code_length_ratio_median", "l0", "too_few_active"}


def test_what_has_no_decoder_rows_is_refused():
    sae = fixture_sae()
    codes = sae.encode(X_A)
    del sae.W_dec
    with pytest.raises(UserError, match="no decoder row per latent"):
        zf_points(sae, codes, X_A, X_A)
