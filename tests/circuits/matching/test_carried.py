"""Codes that are handed on between layers, against dense codes and against what the matching is known to be."""

import copy

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.circuits.matching.carried import carried, fire_together, handed_on
from saebench.codes import SparseCodes
from saebench.dictionaries import parse_dictionary
from saebench.errors import UserError
from saebench.evaluation.metrics import Reconstruction
from saebench.evaluation.splice import evaluate


def random_codes(count: int, latents: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, latents, generator=generator) * (torch.rand(count, latents, generator=generator) < 0.3)


def test_pairs_fire_together_as_dense_codes_do():
    a, b = random_codes(60, 5, 0), random_codes(60, 7, 1)
    a[:, 4], b[:, 6] = 0, a[:, 1]
    partner = np.array([3, 6, -1, 0, 2])
    found = fire_together(SparseCodes.from_dense(a), SparseCodes.from_dense(b), partner)
    for latent, other in ((0, 3), (1, 6), (3, 0)):
        x, y = (a[:, latent] > 0).double(), (b[:, other] > 0).double()
        assert found.rate_F[latent] == pytest.approx(float((x * y).sum() / x.sum()))
        assert found.phi_F[latent] == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))
    assert found.rate_F[1] == 1 and np.isnan(found.rate_F[[2, 4]]).all() and np.isnan(found.phi_F[[2, 4]]).all()
    assert found.score == pytest.approx(np.nanmean(found.rate_F))
    with pytest.raises(UserError, match="codes of 60 and of 50 tokens"):
        fire_together(SparseCodes.from_dense(a), SparseCodes.from_dense(b[:50]), partner)


def test_codes_are_renumbered_and_rescaled():
    a, partner = random_codes(30, 4, 2), np.array([2, -1, 0, 5])
    scale_a, scale_b = torch.tensor([1.0, 2, 4, 8]), torch.arange(1.0, 7)
    expected = torch.zeros(30, 6)
    for i, j in enumerate(partner):
        if j >= 0:
            expected[:, j] = a[:, i] / scale_a[i] * scale_b[j]
    assert torch.allclose(handed_on(SparseCodes.from_dense(a), partner, scale_a, scale_b).to_dense(), expected)


@pytest.fixture(scope="module")
def sae(tiny_lm, contexts):
    source = sb.ActivationStream(tiny_lm, contexts[:24], ["blocks.1.hook_resid_post"])
    return sb.train(sb.TopK(d_sae=64, k=8), source, sb.TrainConfig(num_tokens=1200, batch_size=64, lr=5e-3))


def test_a_dictionary_matched_to_itself_gives_its_own_figures(tiny_lm, contexts, sae):
    held_out, ones = contexts[24:40], torch.ones(64)
    found = carried(tiny_lm, held_out.ids_NS, sae, sae, np.arange(64), ones, ones, batch_size=5)
    assert found.explained["matched"] == pytest.approx(found.explained["own"], abs=1e-6)
    assert found.explained["unchanged"] == pytest.approx(1, abs=1e-6) and found.explained["random"] < found.explained["own"]
    assert found.loss["unchanged"] == pytest.approx(found.loss["clean"], abs=1e-5)
    expected = evaluate(sae, tiny_lm, held_out)
    assert found.explained["own"] == pytest.approx(1 - expected["fvu"], abs=1e-5)
    assert found.loss["matched"] == pytest.approx(expected["ce_spliced"], abs=1e-4)
    assert found.loss["clean"] == pytest.approx(expected["ce_clean"], abs=1e-4)


def test_a_later_site_is_written_from_an_earlier_one(tiny_lm, contexts, sae):
    earlier = copy.deepcopy(sae)
    earlier.config = sae.config.model_copy(update={"site": "blocks.0.hook_resid_post"})
    held_out, ones = contexts[24:32], torch.ones(64)
    partner = np.random.default_rng(0).permutation(64)
    found = carried(tiny_lm, held_out.ids_NS, earlier, sae, partner, ones, ones)
    seen = tiny_lm.read(held_out.ids_NS, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
    x_BD, y_BD = (value[:, 1:].flatten(0, 1) for value in seen.values())
    dense_BF = earlier.encode(x_BD).to_dense()
    quality = Reconstruction(32, 64)
    quality.update(y_BD, dense_BF @ sae.W_dec[torch.from_numpy(partner)] + sae.b_dec, earlier.encode(x_BD))
    assert found.explained["matched"] == pytest.approx(1 - quality.figures()["fvu"], abs=1e-5)


def test_dictionaries_of_several_sites_are_refused(tiny_lm, contexts, sae):
    sites = {"site": "blocks.1.ln2.hook_out", "target": "blocks.1.hook_mlp_out"}
    config = parse_dictionary({"architecture": "transcoder", "d_sae": 64, "k": 4, "d_in": 32, "d_out": 32, **sites}, "t")
    with pytest.raises(UserError, match="autoencoders of one site each"):
        carried(tiny_lm, contexts.ids_NS[:2], sae, config.build(), np.arange(64), torch.ones(64), torch.ones(64))
