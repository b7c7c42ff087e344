"""Characteristic features of a dictionary made by hand, whose latents fire on known tokens."""

import math

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations.encoding import Encoded
from saebench.features import characteristic_features, index
from saebench.features.characteristic import LEAD, evidence
from saebench.lm import Contexts

CONTEXTS, SIZE, VOCABULARY = 120, 65, 200
RARE, COPY, TURNED, SELDOM, DENSE, DEAD, MIXED, OTHER = range(8)
TOKENS = {RARE: 7, COPY: 7, TURNED: 7, SELDOM: 9, DENSE: 10, OTHER: 8}
PLACES = {7: 80, 8: 60, 9: 49, 10: 400}


class Held:
    """A source that holds the wanted codes: with an identity encoder the activations are the codes."""

    def __init__(self, x_NSD, contexts):
        self.x_NSD, self.contexts = x_NSD, contexts
        self.widths, self.identity = {"a": x_NSD.shape[2]}, "held"
        self.num_contexts, self.context_size = x_NSD.shape[:2]

    def check_sites(self, sites):
        assert sites == ["a"]

    def fetch(self, contexts_N, sites, out=None):
        return {site: Encoded(self.x_NSD[contexts_N]) for site in sites}


@pytest.fixture(scope="module")
def corpus():
    """Token ids [C, S], where each token of PLACES stands as often as said, and the codes [C, S, F]."""
    generator = torch.Generator().manual_seed(2)
    ids_CS = torch.randint(20, VOCABULARY, (CONTEXTS, SIZE), generator=generator)
    inner = (torch.arange(CONTEXTS)[:, None] * SIZE + torch.arange(1, SIZE)).flatten()
    places = inner[torch.randperm(len(inner), generator=generator)]
    flat_T = ids_CS.view(-1)
    for token, count in PLACES.items():
        flat_T[places[:count]] = token
        places = places[count:]
    codes_TF = torch.zeros(CONTEXTS * SIZE, 8)
    strengths_T = 1 + torch.rand(CONTEXTS * SIZE, generator=generator)
    for latent, token in TOKENS.items():
        codes_TF[:, latent] = (flat_T == token) * strengths_T * (0.5 if latent in (COPY, TURNED) else 1)
    codes_TF[places[:90], MIXED] = strengths_T[places[:90]]
    codes_TF[::SIZE, RARE] = 9.0  # first tokens never count
    return ids_CS, codes_TF.half().float()


@pytest.fixture(scope="module")
def dictionary():
    dictionary = sb.TopK(d_sae=8, k=8, d_in=8, site="a", decoder="unit").build().requires_grad_(False)
    dictionary.W_enc_FD.copy_(torch.eye(8))
    dictionary.W_dec.copy_(torch.eye(8))
    dictionary.W_dec[COPY] = torch.eye(8)[RARE] + 0.5 * torch.eye(8)[COPY]  # cosine 0.89 with RARE
    return dictionary


@pytest.fixture(scope="module")
def store(corpus, dictionary, tmp_path_factory):
    ids_CS, codes_TF = corpus
    documents_CS = (torch.arange(CONTEXTS)[:, None] // 60).expand(-1, SIZE).int()
    contexts = Contexts(ids_CS.int(), documents_CS, torch.zeros_like(documents_CS), ["first.txt", "second.txt"])
    return index(dictionary, Held(codes_TF.view(CONTEXTS, SIZE, 8), contexts), tmp_path_factory.mktemp("features") / "a")


def test_the_specific_are_chosen_and_their_likes_skipped(dictionary, store):
    features = characteristic_features(dictionary, store, 10)
    assert features[-1].latent == MIXED  # fires anywhere
    assert {feature.latent for feature in features[:2]} in ({RARE, OTHER}, {TURNED, OTHER})
    assert len(characteristic_features(dictionary, store, 2)) == 2
    assert store.counts_F[SELDOM] == 49
    assert store.density_F[DENSE] > 0.02
    assert store.counts_F[DEAD] == 0


def test_near_decoders_are_skipped_though_their_tokens_differ(dictionary, store):
    near = sb.TopK(d_sae=8, k=8, d_in=8, site="a", decoder="unit").build().requires_grad_(False)
    near.W_dec.copy_(dictionary.W_dec)
    near.W_dec[[TURNED, COPY, OTHER]] = near.W_dec[RARE].clone()
    assert OTHER not in [feature.latent for feature in characteristic_features(near, store, 10)]
    near.W_dec[OTHER] = -near.W_dec[RARE]
    assert OTHER in [feature.latent for feature in characteristic_features(near, store, 10)]


def test_a_feature_is_described_by_its_firings(corpus, dictionary, store):
    codes_TF = corpus[1].clone()
    codes_TF[::SIZE] = 0
    for feature in characteristic_features(dictionary, store, 10, examples=6, around=10):
        codes_T = codes_TF[:, feature.latent]
        firing = codes_T[codes_T > 0]
        assert feature.density == pytest.approx(len(firing) / (CONTEXTS * (SIZE - 1)))
        assert feature.mean_value == pytest.approx(float(firing.mean()), rel=1e-5)
        assert feature.max_value == pytest.approx(float(firing.max()))
        best_C = codes_T.view(CONTEXTS, SIZE)[:, LEAD:].max(1).values.sort(descending=True).values
        assert [example.values[example.focus] for example in feature.examples] == pytest.approx(best_C[:6].tolist())
        for example in feature.examples:
            assert len(example.ids) == len(example.values) <= 10 + 5 + 1
            assert example.document in ("first.txt", "second.txt")


def test_examples_are_stretches_of_one_context(corpus, dictionary, store):
    ids_CS, codes_TF = corpus
    (feature,) = characteristic_features(dictionary, store, 1, examples=40, around=60)
    for example in feature.examples:
        places = [
            (context, first)
            for context in range(CONTEXTS)
            for first in range(SIZE - len(example.ids) + 1)
            if ids_CS[context, first : first + len(example.ids)].tolist() == example.ids
        ]
        ((context, first),) = places
        stored = codes_TF.view(CONTEXTS, SIZE, 8)[context, first : first + len(example.ids), feature.latent].tolist()
        if first == 0:
            stored[0] = 0.0
        assert example.values == pytest.approx(stored)
        assert example.document == ("first.txt" if context < 60 else "second.txt")


def test_token_shares_by_brute_force(corpus, dictionary, store):
    ids_CS, codes_TF = corpus
    ids_T = ids_CS.flatten()
    features = {feature.latent: feature for feature in characteristic_features(dictionary, store, 10)}
    for latent in (OTHER, MIXED):
        sums: dict[int, float] = {}
        for place in range(CONTEXTS * SIZE):
            if place % SIZE and codes_TF[place, latent] > 0:
                sums[int(ids_T[place])] = sums.get(int(ids_T[place]), 0.0) + float(codes_TF[place, latent])
        shares = {token: value / sum(sums.values()) for token, value in sums.items()}
        assert [share for _, share in features[latent].top_tokens] == pytest.approx(sorted(shares.values(), reverse=True)[:5])
        assert all(share == pytest.approx(shares[token]) for token, share in features[latent].top_tokens)
    first, *others = characteristic_features(dictionary, store, 3)
    assert first.top_tokens == [(TOKENS[first.latent], pytest.approx(1))]
    assert len(others[1].top_tokens) == 5


def test_evidence_of_planted_surroundings(dictionary, tmp_path):
    """One token follows a fixed phrase, another stands anywhere, equally often: the one in the phrase has more evidence, by the
    divergences of one certain token from its share of the corpus."""
    generator = torch.Generator().manual_seed(3)
    ids_CS = torch.randint(10, 200, (250, 40), generator=generator)
    ids_CS[:, 20:25] = torch.tensor([3, 4, 5, 1, 6])
    ids_CS[torch.arange(250), torch.randint(26, 39, (250,), generator=generator)] = 2
    codes_CSF = torch.zeros(250, 40, 8)
    for token, latent in ((1, RARE), (2, OTHER)):
        codes_CSF[..., latent] = (ids_CS == token).float()
    contexts = Contexts(ids_CS.int(), torch.zeros_like(ids_CS).int(), torch.zeros_like(ids_CS).int(), ["d"])
    store = index(dictionary, Held(codes_CSF, contexts), tmp_path / "store")
    corpus_V = np.bincount(store.ids_T) / len(store.ids_T)
    certain = math.log(len(store.ids_T) / 250)
    phrase, anywhere = (evidence(store, *store.postings(latent), corpus_V) for latent in (RARE, OTHER))
    assert phrase == pytest.approx(0.5 * certain + (certain - math.log(3)) + certain, rel=1e-6)
    assert phrase > 1.5 * anywhere
