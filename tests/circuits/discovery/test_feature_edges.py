"""Edges of feature circuits: the chain rule, a model run with everything between held fixed, and a planted circuit."""

import pytest
import torch
from test_patching import HEADS, MLP, RESID, induction_prompts, random_examples, sae_at, true_dictionary

from saebench.circuits.discovery.examples import examples_of
from saebench.circuits.discovery.feature_edges import feature_edges
from saebench.circuits.discovery.patching import Patching
from saebench.errors import UserError
from saebench.lm import load_lm
from saebench.synthetic import save_induction_transformer


@pytest.mark.parametrize("keep", [False, True])
def test_the_edges_out_of_a_node_add_up_to_its_effect(tiny_lm, keep):
    saes = [
        sae_at(tiny_lm, RESID[0]),
        sae_at(tiny_lm, HEADS, seed=2),
        sae_at(tiny_lm, MLP[0], target=MLP[1], seed=1, skip=True),
        sae_at(tiny_lm, "blocks.2.hook_resid_post", seed=3),
    ]
    patching = Patching(tiny_lm, saes, random_examples(tiny_lm, length=4), keep_positions=keep, batch_size=2)
    effects = patching.effects("first_order")
    edges = feature_edges(patching, effects, torch.arange(len(effects)))
    out = edges.weight_MM.sum(1) + edges.direct_M
    scale = float(effects.effect_N.abs().max())
    torch.testing.assert_close(out, effects.effect_N, rtol=1e-3, atol=1e-4 * scale)
    first, last = effects.site_N == 0, effects.site_N == 3
    assert edges.weight_MM.tril()[0].abs().max() == 0 and edges.weight_MM[last].abs().max() == 0
    assert edges.direct_M[first].abs().max() == 0  # nothing passes the last site
    assert edges.weight_MM[first][:, effects.site_N == 1].abs().max() > 0.01 * scale
    if keep:  # nothing acts backwards in the text
        backwards = effects.position_N[:, None] > effects.position_N[None]
        assert edges.weight_MM[backwards].abs().max() < 1e-6


def test_an_edge_is_the_change_of_a_pre_activation_by_hand(tiny_lm):
    """From a latent of the stream to one of the next block's heads: the latent's direction through that block's norm and attention."""
    low, high = sae_at(tiny_lm, RESID[0]), sae_at(tiny_lm, "blocks.1.hook_resid_post", seed=3)
    examples = random_examples(tiny_lm, count=1, length=4)
    patching = Patching(tiny_lm, [low, high], examples, patch="zero", keep_positions=True)
    effects = patching.effects("first_order")
    order = effects.order()
    latents = effects.latent_N[order] >= 0
    u = int(order[(effects.site_N[order] == 0) & latents & (effects.position_N[order] == 4)][0])
    d = int(order[(effects.site_N[order] == 1) & latents & (effects.position_N[order] == 4)][0])
    edges = feature_edges(patching, effects, torch.tensor([u, d]))
    x = tiny_lm.read(examples.ids_BS, [RESID[0]])[RESID[0]].clone()
    f = float(low.encode(x[0]).to_dense()[4, effects.latent_N[u]])
    weights = high.weights().folded()

    def pre_activation(step):
        moved = x.clone()
        moved[0, 4] += step * low.W_dec[effects.latent_N[u]]
        y = tiny_lm.hf.transformer.h[1](moved)
        y = (y[0] if isinstance(y, tuple) else y)[0, 4]
        return float((y - high.b_dec) @ weights.W_enc_FD[effects.latent_N[d]])

    slope = (pre_activation(1e-2) - pre_activation(-1e-2)) / 2e-2
    active = float(high.encode(tiny_lm.read(examples.ids_BS, [RESID[1]])[RESID[1]][0]).to_dense()[4, effects.latent_N[d]])
    per_unit = float(effects.effect_N[d]) / -active  # dm/dd, as the node's effect is -d dm/dd
    assert float(edges.weight_MM[0, 1]) == pytest.approx(-f * slope * per_unit, rel=1e-2)
    assert edges.weight_MM[1, 0] == 0
    assert edges.above(0.0)[0][:2] == (0, 1) and len(edges.above(1e9)) == 0


def test_on_the_planted_transformer_the_previous_token_acts_through_the_prediction(tmp_path):
    circuit = save_induction_transformer(tmp_path / "toy", 26, max_context=24, seed=1)
    lm = load_lm(tmp_path / "toy", device="cpu")
    words, answers, patches = induction_prompts()
    saes = [true_dictionary(circuit, site) for site in ("blocks.0.hook_attn_out", "blocks.1.hook_attn_out")]
    # Attention is certain, so that its gradient is 0 where nothing is changed: with a blunt query the edge shows.
    for block in lm.hf.transformer.h[1:]:
        block.attn.c_attn.weight.data[:, : lm.hf.config.n_embd] *= 0.1
        block.attn.c_attn.bias.data[: lm.hf.config.n_embd] *= 0.1
    for word, answer, patch in zip(words, answers, patches, strict=True):
        patching = Patching(lm, saes, examples_of(lm, [word], [answer], counterfactuals=[patch]), keep_positions=True)
        effects = patching.effects("first_order")
        edges = feature_edges(patching, effects, effects.order())
        u, d, weight = edges.above(0.0)[0]
        source, target = (int(edges.nodes_M[i]) for i in (u, d))
        index = {letter: number for number, letter in enumerate(circuit.characters)}
        place = word.index(answer) + 1
        assert (int(effects.site_N[source]), int(effects.position_N[source])) == (0, place)
        assert int(effects.latent_N[source]) in (index[word[place - 2]], index[patch[place - 2]])
        assert (int(effects.position_N[target]), int(effects.latent_N[target])) == (len(word), index[answer])
        assert weight < 0


def test_a_node_that_is_none_is_one_line(tiny_lm):
    patching = Patching(tiny_lm, [sae_at(tiny_lm, RESID[0])], random_examples(tiny_lm))
    effects = patching.effects("first_order")
    with pytest.raises(UserError, match="nodes are numbers from 0 to"):
        feature_edges(patching, effects, torch.tensor([len(effects)]))
    assert feature_edges(patching, effects, effects.above(1e9)).weight_MM.shape == (0, 0)
