import pytest
import torch

import saebench as sb
from saebench.errors import UserError
from saebench.evaluation import evaluate

SITE = "blocks.1.hook_resid_post"


def identity_sae(width: int, sign: int = 1):
    """[x, -x] through ReLU: reconstructs exactly (sign 1)."""
    sae = sb.TopK(d_sae=2 * width, k=2 * width, d_in=width, site=SITE).build()
    with torch.no_grad():
        eye = torch.eye(width)
        sae.W_enc_FD.copy_(torch.cat([eye, -eye]))
        sae.W_dec.copy_(sign * torch.cat([eye, -eye]))
    return sae


def test_exact_reconstruction_costs_nothing(tiny_lm, contexts):
    figures = evaluate(identity_sae(32), tiny_lm, contexts[:20])
    assert figures["fvu"] == pytest.approx(0, abs=1e-9)
    assert figures["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert figures["ce_recovered_zero"] == pytest.approx(1, abs=1e-3)
    assert figures["kl_spliced"] == pytest.approx(0, abs=1e-5)
    assert figures["l0"] == pytest.approx(32)


def test_no_reconstruction_is_the_zero_ablation(tiny_lm, contexts):
    sae = identity_sae(32)
    with torch.no_grad():
        sae.W_dec.zero_()
    figures = evaluate(sae, tiny_lm, contexts[:20])
    assert figures["ce_spliced"] == pytest.approx(figures["ce_zero"], rel=1e-6)
    assert figures["ce_recovered_zero"] == pytest.approx(0, abs=1e-6)
    assert figures["kl_recovered_zero"] == pytest.approx(0, abs=1e-6)


def test_clean_loss_equals_a_plain_forward_pass(tiny_lm, contexts):
    ids = contexts.ids_NS[:20].long()
    expected = torch.nn.functional.cross_entropy(tiny_lm.logits(ids)[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
    for batch_size in (20, 7):
        figures = evaluate(identity_sae(32), tiny_lm, contexts[:20], batch_size=batch_size)
        assert figures["ce_clean"] == pytest.approx(float(expected), rel=1e-5)


def test_a_dictionary_of_another_width_is_refused(tiny_lm, contexts):
    with pytest.raises(UserError, match="16 wide at .* is 32"):
        evaluate(sb.TopK(d_sae=8, k=2, d_in=16, site=SITE).build(), tiny_lm, contexts[:2])
    with pytest.raises(UserError, match="names no site"):
        evaluate(sb.TopK(d_sae=8, k=2, d_in=32).build(), tiny_lm, contexts[:2])
