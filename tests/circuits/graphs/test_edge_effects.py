import numpy as np
import pytest
from mixes import TEXT, lorsa, make, transcoder
from scipy.stats import spearmanr

from saebench.circuits.graphs.edge_effects import EdgeEffects, agreement, by_kind, by_layers, edge_effects, role, sample
from saebench.circuits.graphs.tracing import trace


@pytest.fixture(scope="module")
def graph(models):
    lm = models["gpt2"]
    dictionaries = make(lm, [transcoder(n) for n in range(3)] + [lorsa(n) for n in range(3)])
    return trace(lm, dictionaries, TEXT, keep=12, max_features=30)


def test_every_edge_is_what_taking_its_source_out_does(graph):
    found = edge_effects(graph, graph.origin)
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    behind = graph.nodes.position_N[graph.sources_E] >= 1
    assert len(found) == behind.sum()
    np.testing.assert_allclose(found.edge_E, -graph.weights_E[behind], rtol=1e-5)
    np.testing.assert_allclose(found.held_E, found.edge_E, atol=1e-4 * np.abs(found.edge_E).max())
    for e in range(0, len(found), 37):
        source, target = int(graph.sources_E[behind][e]), int(rows_E[behind][e])
        run = graph.intervene(source, 0.0)
        for name in ("total", "frozen", "measured", "free"):
            assert getattr(found, f"{name}_E")[e] == pytest.approx(getattr(run, f"{name}_N")[target], rel=1e-3, abs=1e-4)
        assert found.kinds_E[e] == f"{role(graph, source)} > {role(graph, target)}"
    assert {"token > attention feature", "mlp feature > attention feature"} <= set(found.kinds_E)


def test_a_sample_has_all_sources_of_targets_and_some_others(graph):
    near = {source for target in graph.targets.tolist() for source, _ in graph.edges_into(target)}
    near = {n for n in near if graph.node(n).position >= 1}
    with_edges = {n for n in set(graph.sources_E.tolist()) if graph.node(n).position >= 1}
    chosen = sample(graph, 7)
    assert near <= set(chosen) <= with_edges and len(chosen) == len(near) + 7
    assert set(sample(graph, 0)) == near and set(sample(graph, 10**6)) == with_edges and sample(graph, 7) == chosen
    whole, some = edge_effects(graph, graph.origin), edge_effects(graph, graph.origin, sources=chosen)
    mine = np.isin(graph.sources_E[np.isin(graph.sources_E, sorted(with_edges))], chosen)
    np.testing.assert_allclose(some.measured_E, whole.measured_E[mine], atol=1e-4)


def test_layers_are_counted_from_where_a_node_writes(graph):
    found = edge_effects(graph, graph.origin)
    site = [graph.sites[s] for s in graph.nodes.site_N]
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    behind = graph.nodes.position_N[graph.sources_E] >= 1
    expected = {
        ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_in"): 0, ("blocks.0.hook_resid_pre", "blocks.1.mlp.hook_in"): 1,
        ("blocks.0.attn.hook_in", "blocks.0.mlp.hook_in"): 0, ("blocks.0.attn.hook_in", "blocks.1.attn.hook_in"): 0,
        ("blocks.0.mlp.hook_in", "blocks.1.attn.hook_in"): 0, ("blocks.0.mlp.hook_in", "ln_final.hook_out"): 2,
    }  # fmt: skip
    seen = set()
    for layers, s, t in zip(found.layers_E, graph.sources_E[behind], rows_E[behind], strict=True):
        if (site[s], site[t]) in expected and role(graph, s).split()[-1] in ("feature", "token"):
            assert layers == expected[site[s], site[t]]
            seen.add((site[s], site[t]))
    assert len(seen) >= 4


def made(kinds, predicted, measured, carries=None, layers=None):
    """Effects written by hand."""
    count = len(kinds)
    column = np.array(measured, dtype=float)
    return EdgeEffects(
        0.0, np.array(kinds), np.array(layers if layers is not None else [0] * count),
        np.array(carries if carries is not None else [1.0] * count), np.array(predicted, dtype=float),
        np.array(predicted, dtype=float), column, column, column, -column,
    )  # fmt: skip


def test_figures_are_means_over_prompts_by_kind():
    draw = np.random.default_rng(0)
    kinds = ["mlp feature > logit"] * 12 + ["token > mlp feature"] * 15 + ["mlp feature > attention feature"] * 4
    prompts, layers = [], [0] * 20 + [1] * 11
    for _ in range(5):
        x = draw.normal(size=31)
        prompts.append(made(kinds, x, x + draw.normal(size=31), layers=layers))
    found = by_kind(prompts)
    assert set(found) == {"all", "feature > feature", *kinds}
    for kind, rows in (("mlp feature > logit", slice(0, 12)), ("token > mlp feature", slice(12, 27)), ("all", slice(0, 31))):
        each = [spearmanr(p.total_E[rows], p.measured_E[rows]).statistic for p in prompts]
        assert found[kind].spearman.value == pytest.approx(np.mean(each))
        assert min(each) <= found[kind].spearman.low < np.mean(each) < found[kind].spearman.high <= max(each)
        assert (found[kind].prompts, found[kind].edges) == (5, 5 * (rows.stop - rows.start))
    few = found["mlp feature > attention feature"]
    assert few.prompts == 0 and np.isnan(few.spearman.value) and few.edges == 20  # too few edges in each prompt
    together = [np.concatenate([getattr(p, name)[27:] for p in prompts]) for name in ("total_E", "measured_E")]
    assert few.pooled.spearman == pytest.approx(spearmanr(*together).statistic)
    assert agreement(prompts, "free").spearman.value == pytest.approx(-agreement(prompts).spearman.value)
    inside = by_layers(prompts, enough=3)
    assert list(inside) == [1] and inside[1].edges == 20


def test_strongest_edges_are_chosen_within_each_kind():
    kinds = ["a > b", "c > d", "a > b", "a > b", "c > d"]
    some = made(kinds, range(5), range(5), carries=[0.1, 0.9, 0.3, 0.2, 0.8]).strongest(2)
    assert some.kinds_E.tolist() == ["c > d", "a > b", "a > b", "c > d"] and some.carries_E.tolist() == [0.9, 0.3, 0.2, 0.8]
