"""Postings against brute force: every code of every token but the first of each context, sorted by latent."""

import pytest
import torch

import saebench as sb
from saebench.activations.encoding import Encoded
from saebench.features import collect
from saebench.lm import Contexts

SITE, CONTEXTS, SIZE, D_IN, D_SAE, K = "a", 70, 9, 6, 20, 3


class Held:
    """A source whose activations [N, S, D] are given."""

    def __init__(self, x_NSD, contexts):
        self.x_NSD, self.contexts = x_NSD, contexts
        self.widths = {SITE: x_NSD.shape[2]}
        self.num_contexts, self.context_size = x_NSD.shape[:2]

    def fetch(self, contexts_N, sites, out=None):
        return {site: Encoded(self.x_NSD[contexts_N]) for site in sites}


def contexts_of(ids_NS, names=("only",)):
    return Contexts(ids_NS.int(), torch.zeros_like(ids_NS).int(), torch.zeros_like(ids_NS).int(), list(names))


@pytest.fixture(scope="module")
def x_NSD():
    return torch.randn(CONTEXTS, SIZE, D_IN, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def dictionary():
    generator = torch.Generator().manual_seed(6)
    dictionary = sb.TopK(d_sae=D_SAE, k=K, d_in=D_IN, site=SITE, decoder="unit").build().requires_grad_(False)
    dictionary.W_enc_FD.copy_(torch.randn(D_SAE, D_IN, generator=generator))
    dictionary.W_dec.copy_(torch.randn(D_SAE, D_IN, generator=generator))
    dictionary.b_enc.copy_(torch.randn(D_SAE, generator=generator) * 0.3)
    dictionary.b_dec.copy_(torch.randn(D_IN, generator=generator))
    dictionary.b_enc[4] = -1e3  # never fires
    return dictionary


@pytest.fixture(scope="module")
def dense_TF(x_NSD, dictionary):
    """The codes of all tokens by the definition, those of first tokens left out."""
    z_TF = (x_NSD.flatten(0, 1) - dictionary.b_dec) @ dictionary.W_enc_FD.T + dictionary.b_enc
    kept = z_TF >= z_TF.sort(1, descending=True).values[:, K - 1 : K]
    codes_TF = torch.where(kept, z_TF.clamp_min(0), 0)
    codes_TF[::SIZE] = 0
    return codes_TF


@pytest.fixture(scope="module")
def postings(x_NSD, dictionary):
    ids_NS = torch.arange(CONTEXTS * SIZE).view(CONTEXTS, SIZE) % 11
    return collect(dictionary, Held(x_NSD, contexts_of(ids_NS)), SITE)


def test_postings_equal_the_dense_codes(postings, dense_TF):
    assert int(postings.counts_F.sum()) == int((dense_TF > 0).sum())
    for latent in range(D_SAE):
        tokens, values = postings.of(latent)
        assert torch.equal(tokens.long(), dense_TF[:, latent].nonzero()[:, 0])
        torch.testing.assert_close(values, dense_TF[tokens.long(), latent], rtol=1e-5, atol=1e-5)
    assert len(postings.of(4)[0]) == 0


def test_density_is_the_share_of_counted_tokens(postings, dense_TF):
    counted = torch.ones(CONTEXTS, SIZE, dtype=torch.bool)
    counted[:, 0] = False
    torch.testing.assert_close(postings.density_F(), (dense_TF > 0)[counted.flatten()].double().mean(0))


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_top_gives_the_strongest_of_each_context_in_order(postings, dense_TF, count):
    for latent in range(D_SAE):
        best_C, place_C = dense_TF[:, latent].view(CONTEXTS, SIZE).max(1)
        order = sorted((c for c in range(CONTEXTS) if best_C[c] > 0), key=lambda c: -float(best_C[c]))
        expected = [c * SIZE + int(place_C[c]) for c in order[:count]]
        found = postings.top(latent, count)
        assert [token for token, _ in found] == expected
        for token, value in found:
            assert value == pytest.approx(float(dense_TF[token, latent]), rel=1e-4)


def test_a_limit_spreads_over_the_whole_source(x_NSD, dictionary, dense_TF):
    ids_NS = torch.arange(CONTEXTS * SIZE).view(CONTEXTS, SIZE)
    part = collect(dictionary, Held(x_NSD, contexts_of(ids_NS)), SITE, limit=CONTEXTS // 2)
    chosen = [number * CONTEXTS // (CONTEXTS // 2) for number in range(CONTEXTS // 2)]
    expected = dense_TF.view(CONTEXTS, SIZE, -1)[chosen] > 0
    assert torch.equal(part.counts_F, expected.sum((0, 1)))
    assert part.contexts.ids_NS[:, 0].tolist() == [number * SIZE for number in chosen]


def test_top_can_skip_the_start_of_contexts(postings, dense_TF):
    for latent in range(D_SAE):
        assert all(token % SIZE >= 3 for token, _ in postings.top(latent, 50, skip=3))
