import numpy as np
import pytest
import torch
from mixes import MIXES, TEXT, lorsa, make, topk, transcoder
from scipy.stats import spearmanr

from saebench.circuits.graphs.interventions import intervene
from saebench.circuits.graphs.targets import Difference, Direction
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.graphs.verification import Agreement, spearman, verify
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.steering.edits import scale
from saebench.steering.hooks import steer


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_the_linear_model_does_what_every_edge_says(models, mixed, name, mix):
    graph = trace(models[name], mixed[name, mix], TEXT, keep=1.0, max_features=60)
    found = graph.verify(top=10)
    assert found.held_error < 1e-4
    assert len(found.edges) == len(found.nodes) == 10
    assert all(np.isfinite([check.measured for check in found.edges]))
    assert graph.extra["verification"]["edge"]["count"] == 10


@pytest.fixture(scope="module")
def linear_lm(tiny_lm):
    """GPT-2 without a non-linearity: MLPs without activation, attention that looks at all positions alike, and layer norms with so large an
    epsilon that their scale is a constant."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tiny_lm.tokenizer), n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0,
        n_inner=24, initializer_range=0.15, activation_function="linear", layer_norm_epsilon=1e8,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for module in hf.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data.fill_(1e4)
            module.bias.data.normal_(0, 0.1)
    for block in hf.transformer.h:
        block.attn.c_attn.weight.data[:, :64] = 0.0
    return LanguageModel("linear", hf, tiny_lm.tokenizer, "linear")


@pytest.fixture(scope="module")
def always_active(linear_lm):
    """Transcoders that are the MLPs themselves, with latents that are active whatever they read: linear too."""
    specs = [
        {
            "architecture": "relu",
            "d_sae": 24,
            "target_l0": 20,
            "site": f"blocks.{n}.mlp.hook_in",
            "target": f"blocks.{n}.hook_mlp_out",
        }
        for n in range(3)
    ]
    dictionaries = make(linear_lm, specs)
    for dictionary, block in zip(dictionaries, linear_lm.hf.transformer.h, strict=True):
        dictionary.W_enc_FD.copy_(block.mlp.c_fc.weight.T)
        dictionary.b_enc.copy_(block.mlp.c_fc.bias + 10.0)
        dictionary.W_dec.copy_(block.mlp.c_proj.weight)
        dictionary.b_dec.copy_(block.mlp.c_proj.bias - 10.0 * dictionary.W_dec.sum(0))
    return dictionaries


def test_on_a_linear_model_attribution_is_ablation(linear_lm, always_active):
    """Every effect along all paths is what taking the node out of the model itself does."""
    targets = [Difference(5, 6), Direction("blocks.2.hook_resid_mid", torch.arange(32) / 10.0, position=6)]
    graph = trace(linear_lm, always_active, TEXT, targets=targets, keep=1.0, max_features=10_000)
    before_last = len(graph.ids) - 2  # of the last MLP no path leads to a target but from the last position
    assert graph.is_kind("feature").sum() == 24 * (3 * (before_last + 1) - before_last)
    found = graph.verify(top=60)
    largest = max(abs(check.measured) for check in found.edges)
    for check in found.edges:
        for measured in (check.frozen, check.measured, check.free):
            assert check.predicted_total == pytest.approx(measured, abs=1e-3 * largest)
    assert found.total.slope == pytest.approx(1, abs=1e-3) and found.node.slope == pytest.approx(1, abs=1e-3)
    assert found.spearman > 0.99
    for key in ("token/3", graph.id(5), graph.id(40)):
        run = graph.intervene(key, factor=-0.5)
        assert np.abs(run.free_N).max() > 1e-3
        np.testing.assert_allclose(run.total_N, run.free_N, atol=1e-3 * np.abs(run.free_N).max())


def test_in_the_model_a_feature_is_scaled_by_steering(models, mixed):
    """Measured beside: the latent's direction added by hand to what the MLP writes."""
    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    graph = trace(lm, dictionaries, TEXT, keep=1.0)
    n = int(np.flatnonzero(graph.is_kind("feature") & (graph.nodes.dictionary_N == 1))[3])
    node = graph.node(n)
    run = intervene(lm, dictionaries, graph, n, factor=3.0)

    def add(x_BSD):
        x_BSD = x_BSD.clone()
        x_BSD[0, node.position] += 2.0 * node.activation * dictionaries[1].W_dec[node.latent]
        return x_BSD

    ids = torch.tensor([graph.ids])
    before = lm.logits(ids)[0, -1]
    with lm.edit({"blocks.1.hook_mlp_out": add}):
        after = lm.logits(ids)[0, -1]
    moved = (after - after.mean()) - (before - before.mean())
    for target in graph.targets.tolist():
        assert run.free_N[target] == pytest.approx(float(moved[graph.node(target).token]), abs=1e-3 * float(moved.abs().max()))
    earlier = (graph.nodes.position_N < node.position) | (graph.nodes.dictionary_N == 0)
    assert np.abs(run.free_N[earlier & graph.is_kind("feature")]).max() < 1e-4
    assert not lm.hf._forward_pre_hooks


def test_what_is_held_is_reported_apart(models):
    """The three measures differ, each kind of edges has its figure in each, and the one that is shown holds the patterns of attention."""
    lm = models["gpt2"]
    graph = trace(lm, make(lm, [transcoder(n) for n in range(3)] + [lorsa(n) for n in range(3)]), TEXT, keep=1.0, max_features=60)
    found = graph.verify(top=30)
    assert set(found.by_kind) == set(found.frozen_by_kind) == set(found.free_by_kind)
    for name, whole in (("measured", found.total), ("frozen", found.frozen), ("free", found.free)):
        figures = [getattr(edge, name) for edge in found.edges]
        assert whole.spearman == pytest.approx(spearmanr([edge.predicted_total for edge in found.edges], figures).statistic)
    assert found.spearman == found.total.spearman
    to_lorsa = [edge for edge in found.edges if "attn" in graph.node(edge.target).site]
    assert to_lorsa and all(abs(edge.measured - edge.free) > 1e-5 for edge in to_lorsa)
    assert [check["free"] for check in found.as_dict()["edges"]] == [edge.free for edge in found.edges]


def test_in_the_model_a_feature_is_taken_out_as_steering_does(models, mixed):
    """What is added for a node is what an edit of `saebench.steering` does, for dictionaries that write several places too."""
    for mix in ("clt", "lorsa", "heads"):
        lm, dictionaries = models["gpt2"], mixed["gpt2", mix]
        graph = trace(lm, dictionaries, TEXT, keep=1.0, max_features=20)
        for n in np.flatnonzero(graph.is_kind("feature"))[::6].tolist():
            node, run = graph.node(n), graph.intervene(n, 0.0)
            edit = scale(dictionaries[node.dictionary], node.latent, 0.0, positions=f"{node.position}-{node.position + 1}")
            ids = torch.tensor([graph.ids])
            before = lm.logits(ids)[0, -1]
            with steer(lm, edit):
                moved = lm.logits(ids)[0, -1] - before
            for target in graph.targets.tolist():
                expected = float((moved - moved.mean())[graph.node(target).token])
                assert run.free_N[target] == pytest.approx(expected, abs=2e-3 * float(moved.abs().max()) + 1e-4)


def test_small_steps_of_one_node_come_out_as_predicted(models):
    """With norms and attention free, a small step is not the held one, but most of it is predicted."""
    lm = models["gpt2"]
    dictionaries = make(lm, [transcoder(n) for n in range(3)] + [topk("blocks.1.attn.hook_z")])
    graph = trace(lm, dictionaries, TEXT, keep=1.0, max_features=10_000)
    found = verify(lm, dictionaries, graph, top=40, delta=-0.01)
    assert found.edge.count == 40 and -1 <= found.spearman <= 1
    assert set(found.by_kind) <= {f"{s}>{t}" for s in ("feature", "error", "token") for t in ("feature", "logit")}


def test_a_graph_is_verified_with_its_own_model_and_dictionaries_alone(models, mixed, tmp_path):
    from saebench.circuits.graphs.graph_file import load_graph

    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    graph = trace(lm, dictionaries, TEXT, keep=1.0, max_features=40)
    graph.save(tmp_path / "g.json")
    again = load_graph(tmp_path / "g.json")
    assert verify(lm, dictionaries, again, top=5).as_dict() == graph.verify(top=5).as_dict()
    with pytest.raises(UserError, match="other weights"):
        verify(models["llama"], dictionaries, again)
    with pytest.raises(UserError, match="not those of the graph"):
        verify(lm, mixed["gpt2", "skip"], again)
    with pytest.raises(UserError, match="not those of the graph"):
        verify(lm, dictionaries[::-1], again)
    with pytest.raises(UserError, match="is a target"):
        intervene(lm, dictionaries, again, int(again.targets[0]))
    with pytest.raises(UserError, match="is at position 0"):
        intervene(lm, dictionaries, again, "token/0")
    with pytest.raises(UserError, match="no node"):
        intervene(lm, dictionaries, again, "token/99")
    with pytest.raises(UserError, match="check nothing"):
        verify(lm, dictionaries, again, top=0)


def test_agreement():
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 6, 30).astype(float), draw.normal(size=30)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    found = Agreement.of([1.0, 2.0, -1.0], [2.0, 4.0, 2.0])
    assert (found.count, found.slope, found.same_sign) == (3, pytest.approx(8 / 6), pytest.approx(2 / 3))
    assert np.isnan(Agreement.of([1.0], [2.0]).spearman) and np.isnan(Agreement.of([], []).slope)
