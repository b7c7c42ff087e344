"""Controls against means, components and draws computed by hand."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from saebench.errors import UserError
from saebench.steering.activity import Activity, activity
from saebench.steering.baselines import (
    Method,
    diff_mean,
    first_component,
    random_dictionary,
    random_directions,
    random_latents,
    unit_of,
)
from saebench.steering.edits import add

SITE = "blocks.1.hook_resid_post"
A = ["def value_1(x): return x", "def value_2(x): return 2 * x", "x"]
B = ["the number and the name", "# the name of the number 3"]


def rows(lm, texts):
    found = []
    for text in texts:
        ids = torch.tensor([lm.prompt_ids(text)])
        found.append(lm.read(ids, [SITE])[SITE][0, 1:])
    return torch.cat(found)


def test_difference_of_means(tiny_lm):
    expected = rows(tiny_lm, A).mean(0) - rows(tiny_lm, B).mean(0)
    torch.testing.assert_close(diff_mean(tiny_lm, SITE, A, B), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="1 positives are too few"):
        diff_mean(tiny_lm, SITE, A[:1], B)


def test_first_component_holds_most_variance(tiny_lm):
    towards = diff_mean(tiny_lm, SITE, A, B)
    u = first_component(tiny_lm, SITE, A, towards)
    x = rows(tiny_lm, A)
    centred = (x - x.mean(0)).double()
    assert float((centred @ u.double()).square().sum()) == pytest.approx(
        float(torch.linalg.eigvalsh(centred.T @ centred)[-1]), rel=1e-4
    )
    assert float(u @ towards) >= 0 and float(u.norm()) == pytest.approx(1.0, rel=1e-5)


def test_unit_is_a_tenth_of_the_mean_length(tiny_lm):
    assert unit_of(tiny_lm, [SITE], A) == pytest.approx(float(rows(tiny_lm, A).norm(dim=1).mean()) / 10, rel=1e-5)


def test_random_directions_are_of_unit_length_and_seeded():
    u = random_directions(32, 5, seed=3)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(5))
    assert torch.equal(u, random_directions(32, 5, seed=3)) and not torch.equal(u, random_directions(32, 5, seed=4))


def test_random_latents_are_as_dense_as_those_they_stand_for():
    firings = np.concatenate([np.zeros(10), np.arange(1, 1001)]).astype(np.int64)
    texts = Activity(np.array([5000]), firings, firings.astype(float), sp.csr_array((1, len(firings))))
    like = [509, 1009]  # 500 and 1000 firings
    for drawn in random_latents(texts, like, 20):
        assert len(set(drawn)) == 2 and not set(drawn) & set(like)
        assert all(firings[latent] > 0 for latent in drawn)
        assert 445 <= firings[drawn[0]] <= 560 and firings[drawn[1]] >= 899  # the hundred nearest by ratio
    with pytest.raises(UserError, match="too few"):
        random_latents(texts, range(600), 1)


def test_a_random_dictionary_keeps_k_of_random_directions(tiny_lm):
    dictionary = random_dictionary(tiny_lm, SITE, A, d_sae=64, k=5, seed=1)
    x = rows(tiny_lm, A)
    codes = dictionary.encode(x)
    z = (x - x.mean(0)) @ dictionary.W_dec.T
    expected = torch.zeros_like(z).scatter(1, z.topk(5).indices, z.topk(5).values.clamp_min(0))
    torch.testing.assert_close(codes.to_dense(), expected, rtol=1e-4, atol=1e-4)
    assert dictionary.config.writes == (SITE,)


def test_strengths_multiply(kinds):
    method = Method("m", "features", (add(kinds["topk"], 3, 2.0), add(kinds["topk"], 4, -1.0)))
    assert [edit.strength for edit in method.at(3.0)] == [6.0, -3.0]
    assert method.dosed and not Method("p", "baseline", prefix="x").dosed


def test_activity_against_dense_codes(tiny_lm, kinds):
    """Counts, sums and texts by encoding each text alone."""
    for kind in ("topk", "jumprelu", "transcoder", "lorsa"):
        dictionary, texts = kinds[kind], [*A, ""]
        found = activity(tiny_lm, dictionary, texts)
        dense = []
        for text in texts:
            ids = torch.tensor([tiny_lm.prompt_ids(text)])
            read = tiny_lm.read(ids, list(dictionary.config.reads))[dictionary.config.reads[0]]
            dense.append(dictionary.encode_contexts(read).to_dense() if ids.shape[1] > 1 else torch.zeros(0, 64))
        together = torch.cat(dense)
        assert found.tokens_U.tolist() == [len(f) for f in dense]
        np.testing.assert_array_equal(found.firings_F, (together != 0).sum(0))
        np.testing.assert_allclose(found.sums_F, together.double().sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.texts_F, sum((f != 0).any(0).long() for f in dense))
        sums = np.stack([f.double().sum(0).numpy() for f in dense])
        np.testing.assert_allclose(found.sums_UF.toarray(), sums, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.means_UF.toarray()[0], dense[0].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="no tokens"):
        activity(tiny_lm, kinds["topk"], ["", ""])
