"""Circuits of edges: whole and empty ones are the model and its patch, closed ones those of nodes, and single edges the exhaustive ones."""

import pytest
import torch
from test_model_edges import planted_examples
from test_patching import HEADS, MLP, RESID, induction_prompts, random_examples, sae_at, true_dictionary

from saebench.circuits.discovery.edge_circuits import (
    FeatureCircuit,
    edge_curve,
    exact_feature_edges,
    feature_edge_curve,
    metric_of_edges,
)
from saebench.circuits.discovery.examples import examples_of, logit_difference
from saebench.circuits.discovery.feature_edges import feature_edges
from saebench.circuits.discovery.model_edges import Components
from saebench.circuits.discovery.patching import Patching
from saebench.circuits.discovery.ranking import roc_auc
from saebench.circuits.discovery.tasks import induction_task
from saebench.errors import UserError
from saebench.lm import load_lm
from saebench.synthetic import save_induction_transformer

# --- heads and MLPs ---


def table(edges, fill):
    return torch.full(edges.effect_UT.shape, fill)


@pytest.mark.parametrize("model", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("patch", ["zero", "mean", "resample"])
def test_every_edge_is_the_model_and_none_is_its_patch(models, model, patch):
    lm = models[model]
    examples = random_examples(lm)
    if model == "gemma":
        with pytest.raises(UserError, match="no sum of embedding"):
            metric_of_edges(Components(lm, examples, patch=patch), torch.zeros(1, 1))
        return
    components = Components(lm, examples, patch=patch, batch_size=2)
    edges = components.edges("eap")
    value = lambda ids: float(logit_difference(lm.logits(ids), examples).mean())  # noqa: E731
    assert metric_of_edges(components, table(edges, True)) == pytest.approx(value(examples.ids_BS), abs=1e-4)
    if patch == "resample":  # nothing of the clean prompt is left
        assert metric_of_edges(components, table(edges, False)) == pytest.approx(value(examples.patch_BS), abs=1e-4)


@pytest.mark.parametrize("patch", ["zero", "mean", "resample"])
def test_without_the_edges_out_of_some_components_these_are_patched(models, patch):
    """By hooks on the model as it runs, where a component is taken away for all that read it."""
    for lm in (models["gpt2"], models["llama"]):
        components = Components(lm, random_examples(lm), patch=patch, batch_size=2)
        edges = components.edges("eap")
        names = components.effects("eap").names
        gone = ["a0.h1", "a1.h0", "a1.h3", "m1"]
        kept_UT = table(edges, True)
        kept_UT[[edges.sources.index(name) for name in gone]] = False
        kept_N = torch.tensor([name not in gone for name in names])
        assert metric_of_edges(components, kept_UT) == pytest.approx(components.metric_of(kept_N), abs=1e-4)


def test_without_one_edge_the_metric_falls_by_its_exact_effect(tiny_lm):
    components = Components(tiny_lm, random_examples(tiny_lm), batch_size=2)
    exact = components.edges("exact")
    full = metric_of_edges(components, table(exact, True))
    for source, target, effect in [exact.ranked()[i] for i in (0, 1, 5, 40)]:
        kept_UT = table(exact, True)
        kept_UT[exact.sources.index(source), exact.targets.index(target)] = False
        assert metric_of_edges(components, kept_UT) - full == pytest.approx(effect, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "induction"
    circuit = save_induction_transformer(directory, 26, max_context=24, seed=1)
    return load_lm(directory, device="cpu"), circuit


def test_four_edges_are_the_planted_algorithm(planted):
    """Previous token to the induction head's keys, what it looks for and what it carries; the metric needs no other."""
    lm, _ = planted
    components = Components(lm, planted_examples(lm))
    edges = components.edges("exact")
    curve = edge_curve(components, edges, [0, 1, 3, 10, int((~edges.effect_UT.isnan()).sum())])
    assert curve.faithfulness_K[0] == 0 and curve.faithfulness_K[-1] == 1
    kept_UT = table(edges, False)
    for source, target in (("input", "a0.h0<v>"), ("a0.h0", "a1.h1<k>"), ("a1.h1", "logits")):
        kept_UT[edges.sources.index(source), edges.targets.index(target)] = True
    # Of the counterfactual prompt all else is right as well: one letter differs, and only the previous-token head reads it.
    assert metric_of_edges(components, kept_UT) == pytest.approx(curve.full, abs=0.02)
    assert metric_of_edges(components, ~kept_UT) == pytest.approx(curve.none, abs=0.02)
    assert curve.faithfulness_K[2] == pytest.approx(1, abs=0.01) and curve.completeness_K[2] == pytest.approx(0, abs=0.01)


def test_a_table_of_another_shape_is_one_line(tiny_lm):
    with pytest.raises(UserError, match="there are 16 sources and 40 targets"):
        metric_of_edges(Components(tiny_lm, random_examples(tiny_lm)), torch.ones(2, 2, dtype=torch.bool))


# --- latents ---


def mixed(lm):
    return [
        sae_at(lm, RESID[0]),
        sae_at(lm, HEADS, seed=2),
        sae_at(lm, MLP[0], target=MLP[1], seed=1, skip=True),
        sae_at(lm, "blocks.2.hook_resid_post", seed=3),
    ]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("patch", ["zero", "mean", "resample"])
def test_with_all_edges_between_some_nodes_the_circuit_is_that_of_the_nodes(tiny_lm, patch, keep):
    examples = random_examples(tiny_lm, length=5)
    patching = Patching(tiny_lm, mixed(tiny_lm), examples, patch=patch, keep_positions=keep, batch_size=2)
    effects = patching.effects("first_order")
    nodes_M = torch.randperm(len(effects), generator=torch.Generator().manual_seed(4))[: 2 * len(effects) // 3]
    circuit = FeatureCircuit(patching, effects, nodes_M)
    every_MM, every_M = torch.ones(len(nodes_M), len(nodes_M), dtype=torch.bool), torch.ones(len(nodes_M), dtype=torch.bool)
    kept = torch.zeros(len(effects), dtype=torch.bool)
    kept[nodes_M] = True
    of_nodes = patching.metric_of(effects, kept)
    assert circuit.metric_of(every_MM, every_M, others=False) == pytest.approx(of_nodes, abs=1e-3)
    assert circuit.metric_of(~every_MM, ~every_M, others=False) == pytest.approx(
        patching.metric_of(effects, ~kept & kept), abs=1e-3
    )
    clean = float(logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean())
    assert circuit.metric_of(every_MM, every_M, others=True) == pytest.approx(clean, abs=1e-3)
    none = patching.metric_of(effects, ~kept & kept)
    assert abs(of_nodes - clean) > 0.01 and abs(of_nodes - none) > 0.01  # so that the first comparison tells something


def test_without_the_edges_out_of_a_node_it_is_patched_for_all(tiny_lm):
    """All edges out of one node patched, everything else running: the exact effect of the node, from a run of the model alone."""
    patching = Patching(tiny_lm, mixed(tiny_lm), random_examples(tiny_lm, count=1, length=5), keep_positions=True)
    effects = patching.effects("exact")
    nodes_M = effects.order()[:6]
    circuit = FeatureCircuit(patching, effects, nodes_M)
    every_MM, every_M = torch.ones(6, 6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    # Edges to nodes outside have no switch of their own, so a node whose readers are all listed is taken: one of the last submodule.
    last = (effects.site_N[nodes_M] == 3).nonzero()[:, 0].tolist()
    assert last
    full = circuit.metric_of(every_MM, every_M, others=True)
    for node in last:
        kept_M = every_M.clone()
        kept_M[node] = False
        found = circuit.metric_of(every_MM, kept_M, others=True) - full
        assert found == pytest.approx(float(effects.effect_N[nodes_M[node]]), rel=1e-2, abs=1e-3)


def test_one_edge_is_what_its_target_makes_of_the_patched_source_and_nothing_else_does(tiny_lm):
    """By hand: the source patched at its place, the target read off that run, and the clean run with the target alone set to it."""
    saes = [sae_at(tiny_lm, RESID[0]), sae_at(tiny_lm, RESID[1], seed=3)]
    examples = random_examples(tiny_lm, count=1, length=5)
    patching = Patching(tiny_lm, saes, examples, patch="zero", keep_positions=True)
    effects = patching.effects("first_order")
    order = effects.order()
    latents = order[effects.latent_N[order] >= 0]
    sources, targets = (latents[(effects.site_N[latents] == n) & (effects.position_N[latents] >= 2)][:2] for n in (0, 1))
    nodes_M = torch.cat([sources, targets])
    exact = exact_feature_edges(patching, effects, nodes_M)
    x, y = (tiny_lm.read(examples.ids_BS, [site])[site].clone() for site in RESID)
    clean = float(logit_difference(tiny_lm.logits(examples.ids_BS), examples))
    codes = lambda sae, value: sae.encode(value[0]).to_dense()  # noqa: E731
    compared = 0
    for u, source in enumerate(sources.tolist()):
        for d, target in enumerate(targets.tolist(), 2):
            (s, i), (t, j) = ((int(effects.position_N[n]), int(effects.latent_N[n])) for n in (source, target))
            moved = x.clone()
            moved[0, s] -= codes(saes[0], x)[s, i] * saes[0].W_dec[i]
            with tiny_lm.edit({RESID[0]: lambda _value, moved=moved: moved}):
                seen = tiny_lm.read(examples.ids_BS, [RESID[1]])[RESID[1]].clone()
            new = y.clone()
            new[0, t] += (codes(saes[1], seen) - codes(saes[1], y))[t, j] * saes[1].W_dec[j]
            with tiny_lm.edit({RESID[1]: lambda _value, new=new: new}):
                expected = float(logit_difference(tiny_lm.logits(examples.ids_BS), examples)) - clean
            assert float(exact.weight_MM[u, d]) == pytest.approx(expected, rel=1e-2, abs=1e-4)
            compared += abs(expected) > 1e-3
    assert compared >= 1


def test_the_curve_of_edges_begins_with_the_patch_and_ends_with_the_model(tiny_lm):
    examples = random_examples(tiny_lm, length=5)
    patching = Patching(tiny_lm, mixed(tiny_lm), examples, keep_positions=True)
    effects = patching.effects("first_order")
    edges = feature_edges(patching, effects, effects.order()[:8])
    count = int(FeatureCircuit(patching, effects, edges.nodes_M).before_MM.sum()) + 8
    curve = feature_edge_curve(patching, effects, edges, [0, 4, count, count + 1])
    assert curve.faithfulness_K[0] == 0 and curve.faithfulness_K[-1] == 1
    assert curve.completeness_K[0] == 1 and curve.completeness_K[-1] == 0
    assert feature_edge_curve(patching, effects, edges, points=3).sizes_K[-2:] == [count, count + 1]
    kept = torch.zeros(len(effects), dtype=torch.bool)
    kept[edges.nodes_M] = True
    whole = (patching.metric_of(effects, kept) - curve.none) / (curve.full - curve.none)
    assert curve.faithfulness_K[2] == pytest.approx(whole, abs=1e-3)  # all edges between eight nodes: the eight nodes
    assert curve.full == pytest.approx(float(logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()), abs=1e-3)


def test_of_latents_of_the_planted_transformer_one_edge_between_and_one_out_is_the_circuit(planted):
    lm, circuit = planted
    words, answers, patches = induction_prompts()
    saes = [true_dictionary(circuit, site) for site in ("blocks.0.hook_attn_out", "blocks.1.hook_attn_out")]
    index = {letter: number for number, letter in enumerate(circuit.characters)}
    for word, answer, patch in zip(words[:2], answers[:2], patches[:2], strict=True):
        patching = Patching(lm, saes, examples_of(lm, [word], [answer], counterfactuals=[patch]), keep_positions=True)
        effects = patching.effects("exact")
        nodes_M = effects.order()[:4]
        exact = exact_feature_edges(patching, effects, nodes_M)
        u, d, _ = exact.above(0.0)[0]
        source, target = (int(nodes_M[i]) for i in (u, d))
        place = word.index(answer) + 1
        assert (int(effects.site_N[source]), int(effects.position_N[source])) == (0, place)
        assert int(effects.latent_N[source]) == index[word[place - 2]]
        assert (int(effects.site_N[target]), int(effects.latent_N[target])) == (1, index[answer])
        assert int(exact.direct_M.abs().argmax()) == d
        truth_MM = torch.zeros(4, 4, dtype=torch.bool)
        truth_MM[u, d] = True
        before_MM = FeatureCircuit(patching, effects, nodes_M).before_MM
        assert roc_auc(exact.weight_MM[before_MM].abs(), truth_MM[before_MM]) == 1.0
        of_circuit = FeatureCircuit(patching, effects, nodes_M).metric_of(truth_MM, truth_MM[u], others=False)
        assert of_circuit == pytest.approx(patching.metric_of(effects, torch.ones(len(effects), dtype=torch.bool)), abs=0.02)


def test_a_node_that_is_none_is_one_line(tiny_lm):
    patching = Patching(tiny_lm, [sae_at(tiny_lm, RESID[0])], random_examples(tiny_lm))
    effects = patching.effects("first_order")
    with pytest.raises(UserError, match="nodes are numbers from 0 to"):
        FeatureCircuit(patching, effects, torch.tensor([-1]))


@pytest.mark.slow
def test_on_the_bundled_model_edges_by_gradient_agree_with_the_ablation_of_each(builtin_lm):
    components = Components(builtin_lm, induction_task(builtin_lm.hf.config.vocab_size - 1, 4))
    exact = components.edges("exact")
    there = ~exact.effect_UT.isnan()
    assert int(there.sum()) == 1519
    curve = edge_curve(components, exact, [0, 100, 1519])
    truth = exact.effect_UT[there].abs() > 0.02 * abs(curve.full - curve.none)
    assert truth.sum() > 20 and curve.faithfulness_K[1] > 0.8
    for method in ("eap", "eap_ig"):
        assert roc_auc(components.edges(method).effect_UT[there].abs(), truth) > 0.95
