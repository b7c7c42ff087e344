"""Reading all postings in blocks: every entry once and in order, wherever files, row groups and blocks end."""

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations.encoding import Encoded
from saebench.features import index
from saebench.features.scanning import blocks
from saebench.lm import Contexts

CONTEXTS, SIZE, D_SAE = 40, 12, 60


class Held:
    """A source that holds the wanted codes: with an identity encoder the activations are the codes."""

    identity, num_contexts, context_size, widths = "held", CONTEXTS, SIZE, {"a": D_SAE}

    def __init__(self, x_NSD):
        nothing = torch.zeros(CONTEXTS, SIZE, dtype=torch.int32)
        self.x_NSD, self.contexts = x_NSD, Contexts(nothing, nothing, nothing, ["d"])

    def check_sites(self, sites):
        pass

    def fetch(self, contexts_N, sites, out=None):
        return {site: Encoded(self.x_NSD[contexts_N]) for site in sites}


@pytest.fixture(params=[(64, 300), (1 << 18, 300), (50, 1 << 20)], ids=["small groups", "many files", "one file"])
def scattered(request, tmp_path, monkeypatch):
    """A store in small pieces, and its dense codes. Some latents are silent, among them the first and the last; one has a third of all."""
    group, entries = request.param
    monkeypatch.setattr("saebench.features.layout.POSTINGS_GROUP", group)
    monkeypatch.setattr("saebench.features.building.RANGE_ENTRIES", entries)
    generator = torch.Generator().manual_seed(1)
    x_NSD = torch.rand(CONTEXTS, SIZE, D_SAE, generator=generator) + 0.5
    x_NSD *= torch.rand(x_NSD.shape, generator=generator) < 0.03
    x_NSD[..., [0, 1, 20, 21, 22, 59]] = 0
    x_NSD[..., 30] = 1
    dictionary = sb.TopK(d_sae=D_SAE, k=D_SAE, d_in=D_SAE, site="a", decoder="unit").build().requires_grad_(False)
    dictionary.W_enc_FD.copy_(torch.eye(D_SAE))
    dictionary.W_dec.copy_(torch.eye(D_SAE))
    x_NSD[:, 0] = 0
    return index(dictionary, Held(x_NSD), tmp_path / "store"), x_NSD.half().float().flatten(0, 1).numpy()


@pytest.mark.parametrize("entries", [1, 100, 1 << 20])
@pytest.mark.parametrize("values", [True, False])
def test_blocks_hold_every_entry_once(scattered, monkeypatch, entries, values):
    store, dense_TF = scattered
    monkeypatch.setattr("saebench.features.scanning.BLOCK_ENTRIES", entries)
    seen = []
    for block in blocks(store, values=values):
        assert block.starts[0] == 0 and block.starts[-1] == len(block.tokens_N)
        assert len(block.tokens_N) <= entries or np.count_nonzero(np.diff(block.starts)) == 1
        for latent, tokens_N, values_N in block:
            seen.append(latent)
            assert tokens_N.tolist() == np.flatnonzero(dense_TF[:, latent]).tolist()
            assert values_N.tolist() == (dense_TF[tokens_N, latent].tolist() if values else [])
    assert seen == list(range(D_SAE))


def test_blocks_without_a_wanted_latent_are_left_out(scattered, monkeypatch):
    store, _ = scattered
    monkeypatch.setattr("saebench.features.scanning.BLOCK_ENTRIES", 60)
    wanted_F = np.zeros(D_SAE, dtype=bool)
    wanted_F[[5, 50]] = True
    seen = [latent for block in blocks(store, latents_F=wanted_F) for latent, *_ in block]
    assert {5, 50} <= set(seen)
    assert len(seen) < D_SAE // 2
