"""Kinds of dictionaries in circuits: what is supported is what its parts are, and what is not is refused in one line with the fix."""

import pytest
import torch
from mixes import clt, make, topk, transcoder
from test_patching import random_examples

from saebench.circuits.discovery.edge_circuits import FeatureCircuit, feature_edge_curve
from saebench.circuits.discovery.feature_edges import feature_edges
from saebench.circuits.discovery.patching import Patching
from saebench.circuits.graphs.tracing import trace
from saebench.errors import UserError

SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
CROSSCODER = {"architecture": "crosscoder", "d_sae": 64, "k": 5, "site": SITES}
GROUP = {"architecture": "layer_group", "d_sae": 64, "base": {"architecture": "topk", "k": 5}, "site": SITES}


def test_a_layer_group_is_the_dictionaries_of_its_layers(tiny_lm):
    (group,) = make(tiny_lm, [GROUP])
    examples = random_examples(tiny_lm)
    whole, parts = Patching(tiny_lm, [group], examples), Patching(tiny_lm, [group.at(site) for site in SITES], examples)
    assert [sub.site for sub in whole.subs] == SITES
    effects, expected = whole.effects("integrated", steps=2), parts.effects("integrated", steps=2)
    assert torch.equal(effects.effect_N, expected.effect_N) and effects.effect_N.abs().max() > 1e-3
    edges = feature_edges(whole, effects, effects.order()[:6])
    assert feature_edge_curve(whole, effects, edges, [0, 3]).faithfulness_K[0] == 0
    with pytest.raises(UserError, match=r"give the dictionary of each layer, dictionary.at\(site\)") as caught:
        trace(tiny_lm, [group], "def value")
    assert "\n" not in str(caught.value)
    assert len(trace(tiny_lm, [group.at(site) for site in SITES], "def value")) > 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            CROSSCODER,
            "'crosscoder' dictionary that writes blocks.0.hook_resid_post . .* use dictionaries that write one site each",
        ),
        (clt([0, 1]), "'clt' dictionary that writes .* use dictionaries that write one site each"),
    ],
)
def test_what_writes_several_sites_is_no_submodule(tiny_lm, spec, message):
    for beside in ([], [topk("blocks.2.hook_resid_post")]):
        with pytest.raises(UserError, match=message) as caught:
            Patching(tiny_lm, make(tiny_lm, [*beside, spec]), random_examples(tiny_lm))
        assert "\n" not in str(caught.value)


def test_a_crosscoder_has_no_place_in_a_graph(tiny_lm):
    with pytest.raises(UserError, match="crosscoder .* several sites at once.* such as a transcoder or Lorsa") as caught:
        trace(tiny_lm, make(tiny_lm, [transcoder(0), CROSSCODER]), "def value")
    assert "\n" not in str(caught.value)


def test_dictionaries_of_another_model_other_weights_or_layers_that_are_not_there_are_refused(tiny_lm, tiny_llama):
    examples = random_examples(tiny_lm)
    (sae,) = make(tiny_lm, [topk(SITES[0])])
    sae.trained_on = {"model": tiny_llama.fingerprint}
    (missing,) = make(tiny_lm, [topk(SITES[0])])
    missing.config = missing.config.model_copy(update={"site": "blocks.7.hook_resid_post"})
    (later,) = make(tiny_lm, [transcoder(0) | {"site": "blocks.2.hook_resid_post"}])
    for dictionary, message in (
        (sae, "trained on a model with other weights"),
        (missing, "blocks.7.hook_resid_post"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Patching(tiny_lm, [dictionary], examples)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="reads 'blocks.2.hook_resid_post', which the model computes later"):
        Patching(tiny_lm, [later], examples).effects("first_order")


def test_tasks_that_cannot_be_measured_are_refused(tiny_lm):
    """What comes with examples, not with dictionaries: ids outside the vocabulary, nothing to be faithful to, no nodes."""
    sae, examples = make(tiny_lm, [topk(SITES[0])])[0], random_examples(tiny_lm)
    patching = Patching(tiny_lm, [sae], examples)
    effects = patching.effects("first_order")
    with pytest.raises(UserError, match="nodes are numbers from 0"):
        FeatureCircuit(patching, effects, torch.tensor([10**6]))
    same = type(examples)(examples.ids_BS, examples.ends_B, examples.answers_B, examples.answers_B, examples.patch_BS)
    with pytest.raises(UserError, match="with and without all components: faithfulness is not defined"):
        Patching(tiny_lm, [sae], same).curve(effects)
    wrong = type(examples)(examples.ids_BS + 10**6, examples.ends_B, examples.answers_B, examples.others_B)
    with pytest.raises(UserError, match="not in the model's vocabulary") as caught:
        Patching(tiny_lm, [sae], wrong)
    assert "\n" not in str(caught.value)
    answers = type(examples)(examples.ids_BS, examples.ends_B, examples.answers_B + 10**6, examples.others_B)
    with pytest.raises(UserError, match="not in the model's vocabulary"):
        Patching(tiny_lm, [sae], answers)
    short = type(examples)(examples.ids_BS, examples.ends_B[:1], examples.answers_B, examples.others_B)
    with pytest.raises(UserError, match="3 prompts come with 1 ends"):
        Patching(tiny_lm, [sae], short)
    late = type(examples)(examples.ids_BS, examples.ends_B + 9, examples.answers_B, examples.others_B)
    with pytest.raises(UserError, match="not one of its 8 positions"):
        Patching(tiny_lm, [sae], late)
    longer = type(examples)(examples.ids_BS, examples.ends_B, examples.answers_B, examples.others_B, examples.ids_BS[:, 1:])
    with pytest.raises(UserError, match="prompts are 3 x 8 tokens and counterfactuals 3 x 7"):
        Patching(tiny_lm, [sae], longer)
