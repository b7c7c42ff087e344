"""Seed stability where it is known: copies in another order, independent dictionaries, dictionaries of other sizes."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import saebench as sb
from saebench.circuits.matching.seeds import seed_stability
from saebench.errors import UserError

SITE = "blocks.0.hook_resid_post"


def made(W_enc_FD: torch.Tensor, W_dec_FD: torch.Tensor, site: str = SITE) -> sb.Dictionary:
    sae = sb.TopK(d_sae=len(W_enc_FD), k=1, d_in=W_enc_FD.shape[1], site=site).build().requires_grad_(False)
    sae.W_enc_FD.copy_(W_enc_FD)
    sae.W_dec.copy_(W_dec_FD)
    sae.folded = True
    return sae


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("exact_up_to", [10, 1000])
def test_a_permuted_copy_is_wholly_shared(exact_up_to):
    enc, dec, order = 3 * rows(90, 20, 0), rows(90, 20, 1), torch.randperm(90, generator=torch.Generator().manual_seed(2))
    a, b = made(enc, dec), made(enc[order], 0.5 * dec[order])
    found = seed_stability(a, b, candidates=4, exact_up_to=exact_up_to)
    assert found.shared == found.shared_strictly == 1 and found.figures()["mean_largest_cosine"] == pytest.approx(1)
    np.testing.assert_allclose(found.decoder_cosine_M, 1, atol=1e-6)
    assert torch.equal(order[torch.from_numpy(found.latents_b)], torch.arange(90))


def test_independent_dictionaries_share_nothing():
    found = seed_stability(made(rows(600, 768, 0), rows(600, 768, 1)), made(rows(600, 768, 2), rows(600, 768, 3)))
    assert found.shared < 0.01 and found.figures()["largest_above_threshold"] < 0.01


def half():
    """The first 30 of b are latents of a; of the next 20 only the decoder rows are; the next 10 have encoders that others have too."""
    a = made(rows(80, 40, 4), rows(80, 40, 5))
    enc, dec = rows(70, 40, 6), rows(70, 40, 7)
    enc[:30], dec[:30] = a.W_enc_FD[:30], a.W_dec[:30]
    dec[30:50] = a.W_dec[30:50]
    dec[50:60], enc[50:60] = a.W_dec[50:60], a.W_enc_FD[50:60] + 1.2 * enc[50:60]
    enc[60:70] = a.W_enc_FD[50:60]
    return a, made(enc, dec)


def test_shares_by_hand_and_the_other_way_round():
    a, b = half()
    found = seed_stability(a, b)
    assert len(found.latents_a) == 70 and set(found.latents_b[found.shared_M]) == {*range(30), *range(50, 60)}
    assert found.shared == pytest.approx(40 / 70) and found.shared_strictly == pytest.approx(30 / 70)
    back = seed_stability(b, a)
    assert dict(zip(found.latents_a, found.latents_b, strict=True)) == dict(zip(back.latents_b, back.latents_a, strict=True))
    assert (back.shared, back.shared_strictly) == (found.shared, found.shared_strictly)
    assert np.array_equal(back.largest_b, found.largest_a)
    cosine = normalize(a.W_dec, dim=1) @ normalize(b.W_dec, dim=1).T
    np.testing.assert_allclose(found.largest_a, cosine.amax(1), atol=1e-6)
    np.testing.assert_allclose(found.largest_b, cosine.amax(0), atol=1e-6)
    assert seed_stability(a, b, threshold=1.01).shared == 0


def test_dead_latents_are_stated():
    a, b = half()
    a.W_dec[0] = 0
    alive_a, alive_b = np.arange(80) != 0, np.arange(70) < 50
    found = seed_stability(a, b, alive_a, alive_b)
    assert (found.dead_a, found.dead_b) == (1, 20) and found.figures()["dead_b"] == 20
    assert found.shared == pytest.approx(39 / 70)
    pairs = found.alive_M.sum()
    assert pairs <= 50 and found.shared_of_alive == pytest.approx(29 / pairs)
    assert 0 <= found.decoder_cosine_M[found.latents_a == 0].sum() <= 1e-6


def test_what_cannot_be_compared_is_refused():
    a, _ = half()
    with pytest.raises(UserError, match="different sites"):
        seed_stability(a, made(rows(80, 40, 4), rows(80, 40, 5), "blocks.1.hook_resid_post"))
