"""Where firings of attention latents come from: parts that add up to the stored value."""

import numpy as np
import pytest
import torch

import saebench as sb
from saebench.activations import ActivationStream
from saebench.dictionaries.attention_output import head_shares
from saebench.errors import UserError
from saebench.features import index
from saebench.features.examples import quantile_groups, top_examples
from saebench.features.prompts import feature_on_text
from saebench.features.sources import example_sources
from saebench.lm.attention import attention_weights

SITE, HEADS = "blocks.1.attn.hook_z", 4


@pytest.fixture(scope="module")
def heads_store(tiny_lm, contexts, tmp_path_factory):
    """An attention-output dictionary with biases, and its store."""
    stream = ActivationStream(tiny_lm, contexts[:60], [SITE])
    x_BD = stream.fetch(torch.arange(60), [SITE])[SITE].decode().flatten(0, 1)
    config = sb.TopK(d_sae=40, k=5, site=SITE).for_sites(stream.widths)
    sae = config.build()
    generator = torch.Generator().manual_seed(1)
    sae.initialise(x_BD, x_BD, generator)
    sae = sae.settled().requires_grad_(False)
    sae.b_enc.normal_(std=float(x_BD.std()), generator=generator)
    sae.W_dec += 0.1 * torch.randn(sae.W_dec.shape, generator=generator)
    return index(sae, stream, tmp_path_factory.mktemp("heads") / "a", lm=tiny_lm), sae


def some_examples(store):
    alive = np.flatnonzero(store.counts_F)
    for latent in alive[:: max(1, len(alive) // 6)].tolist():
        groups = quantile_groups(store, latent, 2, 1)
        for example in (*top_examples(store, latent, 2, before=2, after=2), *groups[-1].examples):
            yield latent, example


def test_heads_and_positions_add_up_to_the_value(heads_store, tiny_lm):
    store, sae = heads_store
    shares_FH = head_shares(sae, HEADS)
    for latent, example in some_examples(store):
        found = example_sources(store, tiny_lm, sae, latent, example)
        length = example.token % 16 + 1
        assert found.by_head_HS.shape == (HEADS, length)
        assert (found.first, found.ids) == (example.context * 16, store.ids_T[found.first : example.token + 1].tolist())
        assert found.value == pytest.approx(example.values[example.focus], rel=2e-3)
        np.testing.assert_allclose(found.by_head_HS.sum(0), found.by_source_S, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.head_shares_H, shares_FH[latent], rtol=1e-5)
        strongest = found.strongest(3)
        assert [value for _, _, value in strongest] == sorted(found.by_source_S.tolist(), reverse=True)[:3]
        assert all(store.ids_T[token] == id_ and token <= example.token for token, id_, _ in strongest)


def test_parts_by_position_from_the_weights_alone(heads_store, tiny_lm):
    """A[t, s] v_s . w with patterns and values computed from the attention layer's weights."""
    store, sae = heads_store
    host = attention_weights(tiny_lm, 1)
    for latent, example in list(some_examples(store))[:4]:
        found = example_sources(store, tiny_lm, sae, latent, example)
        x_CSD = tiny_lm.read(torch.tensor([found.ids]), ["blocks.1.attn.hook_in"])["blocks.1.attn.hook_in"]
        w_HE = sae.W_enc_FD[latent].view(HEADS, -1)
        carried_HS = torch.einsum("hse,he->hs", host.values(x_CSD)[0], w_HE)
        np.testing.assert_allclose(found.by_head_HS, host.pattern(x_CSD)[0, :, -1] * carried_HS, rtol=1e-3, atol=1e-5)


def test_sources_of_each_kind(small, tiny_lm):
    for latent, example in some_examples(small.store):
        found = example_sources(small.store, tiny_lm, small.dictionary, latent, example)
        if small.kind != "lorsa":
            assert found is None
            continue
        x_SD = tiny_lm.read(torch.tensor([found.ids]), [small.dictionary.config.reads[0]])[small.dictionary.config.reads[0]][0]
        v_S = x_SD @ small.dictionary.W_V_FD[latent] + small.dictionary.b_V[latent]
        assert found.pattern_S.sum() == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(found.by_source_S, found.pattern_S * v_S.numpy(), rtol=1e-4, atol=1e-6)
        assert found.value == pytest.approx(example.values[example.focus], rel=2e-3, abs=1e-5)
        assert found.by_head_HS is None and found.head_shares_H is None


def test_typed_texts_have_no_sources_and_unknown_latents_are_named(heads_store, tiny_lm):
    store, sae = heads_store
    assert example_sources(store, tiny_lm, sae, 3, feature_on_text(tiny_lm, sae, 3, "def value")) is None
    example = next(some_examples(store))[1]
    with pytest.raises(UserError, match="latent 40 is not one of the 40"):
        example_sources(store, tiny_lm, sae, 40, example)
