"""Heads, MLPs and edges: against the model itself with one thing changed by other means, sums that must agree, a planted circuit."""

import pytest
import torch
from torch.nn.functional import layer_norm

from saebench.circuits.discovery.examples import Examples, examples_of, logit_difference
from saebench.circuits.discovery.model_edges import Components
from saebench.circuits.discovery.ranking import precision_recall, roc_auc
from saebench.circuits.discovery.split_model import SplitModel
from saebench.circuits.discovery.tasks import induction_task, sorting_task
from saebench.errors import UserError
from saebench.lm import LanguageModel, load_lm
from saebench.lm.sites import hooked
from saebench.synthetic import save_induction_transformer


def random_examples(lm, count=3, length=7, seed=0):
    """Random tokens behind BOS; counterfactuals with two of them replaced."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(1, lm.hf.config.vocab_size, shape, generator=generator)  # noqa: E731
    clean = torch.zeros(count, 1 + length, dtype=torch.int64)
    clean[:, 1:] = draw(count, length)
    patch = clean.clone()
    patch[:, 2], patch[:, length - 1] = draw(count), draw(count)
    return Examples(clean, torch.full((count,), length), draw(count), draw(count), patch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_lm_directory) -> LanguageModel:
    """Four heads that share the values of two, root-mean-square norms, rotary positions."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    return _random(tmp_path_factory, tiny_lm_directory, AutoTokenizer, LlamaForCausalLM, LlamaConfig, num_key_value_heads=2)


@pytest.fixture(scope="module")
def neox(tmp_path_factory, tiny_lm_directory) -> LanguageModel:
    """Attention and MLP side by side."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    return _random(
        tmp_path_factory, tiny_lm_directory, AutoTokenizer, GPTNeoXForCausalLM, GPTNeoXConfig, use_parallel_residual=True
    )


def _random(tmp_path_factory, tiny_lm_directory, tokenizers, model, config, **options):
    directory = tmp_path_factory.mktemp("models") / config.model_type
    tokenizer = tokenizers.from_pretrained(tiny_lm_directory)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = config(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **sizes, **options)
    model(shape).save_pretrained(directory)
    return load_lm(directory)


@pytest.fixture(params=["tiny_lm", "llama", "neox"])
def lm(request) -> LanguageModel:
    return request.getfixturevalue(request.param)


def test_the_model_in_parts_has_the_models_logits_and_its_sources_add_up(lm):
    model, ids = SplitModel(lm), random_examples(lm).ids_BS
    assert model.parallel == (lm.hf.config.model_type == "gpt_neox")
    logits, written = model.run(model.embedding(ids))
    torch.testing.assert_close(logits, lm.logits(ids), rtol=1e-4, atol=1e-4)
    stacked = model.stacked(written)
    assert stacked.shape[1] == len(model.sources)
    last = f"blocks.{model.num_layers - 1}.hook_resid_post"
    biases = sum(weights.b_O_D for weights in model.attention)
    torch.testing.assert_close(stacked.sum(1) + biases, lm.read(ids, [last])[last], rtol=1e-4, atol=1e-3)
    for layer in range(model.num_layers):
        mlp = f"blocks.{layer}.hook_mlp_out"
        torch.testing.assert_close(written.mlps[layer], lm.read(ids, [mlp])[mlp], rtol=1e-4, atol=1e-4)


def test_the_edges_out_of_a_component_add_up_to_its_own_effect(lm):
    """Edges on the model in parts, effects of nodes by hooks on the model itself: the chain rule joins them."""
    for patch in ("zero", "mean", "resample"):
        components = Components(lm, random_examples(lm), patch=patch, batch_size=2)
        for method in ("eap", "eap_ig"):
            nodes, edges = components.effects(method, steps=3), components.edges(method, steps=3)
            out_U = dict(zip(edges.sources, edges.effect_UT.nansum(1).tolist(), strict=True))
            scale = float(nodes.effect_N.abs().max())
            if method == "eap" or patch == "resample":
                for name, effect in zip(nodes.names, nodes.effect_N.tolist(), strict=True):
                    assert out_U[name] == pytest.approx(effect, rel=2e-3, abs=2e-4 * scale)


def test_exact_effects_are_those_of_the_output_projection_without_a_head(tiny_lm):
    """Zero patch of a head, done to the weights instead: its rows of the output projection are emptied."""
    examples = random_examples(tiny_lm)
    found = Components(tiny_lm, examples, patch="zero").effects("exact")
    clean = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
    for layer, head in ((0, 1), (2, 3)):
        weight = tiny_lm.hf.transformer.h[layer].attn.c_proj.weight
        kept = weight.detach().clone()
        weight.data[head * 8 : head * 8 + 8] = 0
        try:
            without = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
        finally:
            weight.data.copy_(kept)
        assert float(found.heads_LH[layer, head]) == pytest.approx(float(without - clean), rel=1e-3, abs=1e-5)
    mlp = tiny_lm.site("blocks.1.hook_mlp_out")
    with hooked(tiny_lm.hf, {mlp: torch.zeros_like}):
        without = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
    assert float(found.mlps_L[1]) == pytest.approx(float(without - clean), rel=1e-3, abs=1e-5)
    assert found.names[:5] == ["a0.h0", "a0.h1", "a0.h2", "a0.h3", "a1.h0"] and found.names[-1] == "m2"


def test_exact_edges_are_those_of_the_model_run_with_one_input_changed(tiny_lm):
    examples = random_examples(tiny_lm, count=2)
    edges = Components(tiny_lm, examples, patch="resample").edges("exact")
    effect = lambda u, t: float(edges.effect_UT[edges.sources.index(u), edges.targets.index(t)])  # noqa: E731
    clean = logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean()
    site = "blocks.0.attn.hook_z"
    z, z_patch = (tiny_lm.read(ids, [site])[site].clone() for ids in (examples.ids_BS, examples.patch_BS))
    block = tiny_lm.hf.transformer.h
    delta = (z_patch - z)[..., 8:16] @ block[0].attn.c_proj.weight[8:16]  # what head 0.1 writes

    def measured(site, function):
        with tiny_lm.edit({site: function}):
            return float(logit_difference(tiny_lm.logits(examples.ids_BS), examples).mean() - clean)

    assert effect("a0.h1", "m1") == pytest.approx(measured("blocks.1.ln2.hook_in", lambda x: x + delta), rel=1e-3, abs=1e-5)
    assert effect("a0.h1", "logits") == pytest.approx(measured("ln_final.hook_in", lambda x: x + delta), rel=1e-3, abs=1e-5)
    # Into the values, then the queries, of head 2.3: its columns of the fused projection get another input.
    attention, norm = block[2].attn, block[2].ln_1
    for kind, first in (("v", 64), ("q", 0)):
        own, seen = slice(first + 24, first + 32), {}

        def with_own_input(_module, arguments, output, own=own, attention=attention, norm=norm, seen=seen):
            normed = layer_norm(seen["x"] + delta, (32,), norm.weight, norm.bias, norm.eps)
            output = output.clone()
            output[..., own] = normed @ attention.c_attn.weight[:, own] + attention.c_attn.bias[own]
            return output

        handle = attention.c_attn.register_forward_hook(with_own_input)
        try:
            assert effect("a0.h1", f"a2.h3<{kind}>") == pytest.approx(
                measured("blocks.2.hook_resid_pre", lambda x, seen=seen: seen.update(x=x)), rel=1e-3, abs=1e-5
            )
        finally:
            handle.remove()
    assert torch.isnan(edges.effect_UT[edges.sources.index("a1.h0"), edges.targets.index("a1.h1<q>")])
    assert not torch.isnan(edges.effect_UT[edges.sources.index("a1.h0"), edges.targets.index("m1")])
    ranked = edges.ranked()
    assert len(ranked) == int((~edges.effect_UT.isnan()).sum())
    sizes = [abs(effect) for _, _, effect in ranked]
    assert sizes == sorted(sizes, reverse=True) and effect(*ranked[0][:2]) == ranked[0][2]


@pytest.mark.parametrize("patch", ["zero", "mean", "resample"])
def test_where_the_metric_is_linear_in_what_a_layer_writes_all_methods_agree_on_its_heads(tiny_lm, patch):
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    seen = {}
    with hooked(tiny_lm.hf, {tiny_lm.site("ln_final.hook_in"): lambda value: seen.update(x=value)}):
        components = Components(tiny_lm, random_examples(tiny_lm), metric=lambda _l, _e: (seen["x"] * w).sum((1, 2)), patch=patch)
        exact = components.effects("exact")
        for method in ("eap", "eap_ig"):
            found = components.effects(method)
            torch.testing.assert_close(found.mlps_L[2], exact.mlps_L[2], rtol=1e-3, atol=1e-3)
    assert exact.mlps_L[2].abs() > 0.1


def test_all_kept_is_the_model_and_none_kept_is_all_patched(lm):
    examples = random_examples(lm)
    for patch in ("zero", "mean", "resample"):
        components = Components(lm, examples, patch=patch, batch_size=2)
        effects = components.effects("eap")
        curve = components.curve(effects, [0, 3, len(effects.effect_N)])
        assert curve.faithfulness_K[0] == 0 and curve.faithfulness_K[-1] == 1
        assert curve.full == pytest.approx(float(logit_difference(lm.logits(examples.ids_BS), examples).mean()), abs=1e-4)


# --- the planted circuit ---


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy") / "induction"
    circuit = save_induction_transformer(directory, 26, max_context=24, seed=1)
    return load_lm(directory, device="cpu"), circuit


def planted_examples(lm):
    words, answers = ["gxyhklbmx", "abcdefghb", "qwertyuiw", "mnopqrstn"], ["y", "c", "e", "o"]
    return examples_of(lm, words, answers, counterfactuals=["gzyhklbmx", "axcdefghb", "qaertyuiw", "mzopqrstn"])


@pytest.mark.parametrize("method", ["exact", "eap", "eap_ig"])
def test_on_the_planted_transformer_both_heads_rank_first(planted, method):
    lm, circuit = planted
    truth = torch.zeros(2, 2, dtype=torch.bool)
    truth[circuit.previous_token_head] = truth[circuit.induction_head] = True
    components = Components(lm, planted_examples(lm))
    effects = components.effects(method)
    found = precision_recall(effects.heads_LH.abs(), truth)
    report = (roc_auc(effects.heads_LH.abs(), truth), found.precision, found.recall)
    assert report == (1.0, 1.0, 1.0)
    kept = torch.cat([truth.flatten(), torch.zeros(2, dtype=torch.bool)])
    assert components.metric_of(kept) == pytest.approx(components.metric_of(torch.ones(6, dtype=torch.bool)), abs=1e-3)


@pytest.mark.parametrize("method", ["exact", "eap_ig"])
def test_on_the_planted_transformer_the_edges_are_those_of_the_algorithm(planted, method):
    lm, _ = planted
    edges = Components(lm, planted_examples(lm)).edges(method)
    wanted = {("input", "a0.h0<v>"), ("a0.h0", "a1.h1<k>"), ("a1.h1", "logits")}
    assert {edge[:2] for edge in edges.ranked()[:3]} == wanted
    assert abs(edges.ranked()[3][2]) < 1e-2 * abs(edges.ranked()[2][2])


def test_bad_input_is_one_line(tiny_lm):
    examples = random_examples(tiny_lm)
    bare = Examples(examples.ids_BS, examples.ends_B, examples.answers_B)
    for build, message in (
        (lambda: Components(tiny_lm, examples, patch="median"), "patch 'median' is unknown"),
        (lambda: Components(tiny_lm, bare, patch="resample"), "have none: use zero"),
        (lambda: Components(tiny_lm, bare, metric=logit_difference).effects(), "needs what answers are compared with"),
        (lambda: Components(tiny_lm, examples).effects("acdc"), "method 'acdc' is unknown"),
        (lambda: Components(tiny_lm, examples).edges("eap_ig", steps=0), "steps=0"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)


# --- trained models ---


def heads_of_circuit(components, exact, share):
    """Heads whose removal costs at least a share of all that heads and MLPs do for the metric, and this total."""
    everything = torch.ones(len(exact.effect_N), dtype=torch.bool)
    done = components.metric_of(everything) - components.metric_of(~everything)
    return exact.heads_LH.abs() > share * abs(done), done


def test_on_the_model_that_sorts_first_order_ranks_the_heads_as_exhaustive_ablation_does(shared_data):
    lm = load_lm(shared_data / "gpt-nano-sort", device="cpu")
    examples = sorting_task(32)
    assert (lm.logits(examples.ids_BS)[:, -1].argmax(-1) == examples.answers_B).all()
    components = Components(lm, examples)
    truth, done = heads_of_circuit(components, components.effects("exact"), 0.05)
    assert done > 20 and truth.sum() == 5
    assert roc_auc(components.effects("eap").heads_LH.abs(), truth) == 1.0
    assert roc_auc(components.effects("eap_ig").heads_LH.abs(), truth) >= 0.9


@pytest.mark.slow
def test_on_the_bundled_model_first_order_ranks_the_heads_of_induction_as_exhaustive_ablation_does(builtin_lm):
    examples = induction_task(builtin_lm.hf.config.vocab_size - 1)
    components = Components(builtin_lm, examples)
    truth, done = heads_of_circuit(components, components.effects("exact"), 0.05)
    assert 5 <= truth.sum() <= 16 and done > 3
    for method in ("eap", "eap_ig"):
        assert roc_auc(components.effects(method).heads_LH.abs(), truth) > 0.95
