import numpy as np
import pytest
import torch
from mixes import MIXES, TEXT

from saebench.circuits.graphs.assembling import strongest
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.targets import Difference, Direction, Feature, Logit
from saebench.circuits.graphs.tracing import trace
from saebench.errors import UserError


@pytest.fixture(params=["gpt2", "llama"])
def name(request):
    return request.param


def sums(graph):
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    return np.bincount(rows_E, weights=graph.weights_E, minlength=len(graph))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("keep, max_features", [(1.0, 10_000), (7, 40)])
def test_edges_dropped_and_constant_add_up_to_the_value_of_every_node(models, mixed, name, mix, keep, max_features):
    graph = trace(models[name], mixed[name, mix], TEXT, keep=keep, max_features=max_features)
    nodes = graph.nodes
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    size_N = np.bincount(rows_E, weights=np.abs(graph.weights_E), minlength=len(graph)) + nodes.dropped_size_N
    left_N = np.abs(sums(graph) + nodes.dropped_N + nodes.constant_N - nodes.value_N)
    assert (left_N <= 1e-5 * np.maximum(size_N, np.abs(nodes.value_N))).all()
    inputs_N = graph.is_kind("feature", "logit")
    assert (size_N[~inputs_N] == 0).all() and (size_N[inputs_N] > 0).all()
    assert graph.is_kind("feature").sum() <= max_features
    if keep == 1.0:
        assert (nodes.dropped_size_N[graph.is_kind("logit")] == 0).all()
    else:
        assert np.diff(graph.offsets_N).max() <= keep


def test_targets_are_the_likeliest_tokens(models, mixed):
    lm = models["gpt2"]
    graph = trace(lm, mixed["gpt2", "transcoders"], TEXT, max_features=20)
    logits_V = lm.logits(torch.tensor([graph.ids]))[0, -1]
    probability_V = logits_V.softmax(0)
    named = [graph.node(n) for n in graph.targets.tolist()]
    assert [node.token for node in named] == probability_V.topk(len(named)).indices.tolist()
    total = sum(node.probability for node in named)
    assert len(named) == 10 or (total >= 0.95 and total - named[-1].probability < 0.95)
    for node in named:
        assert node.probability == pytest.approx(float(probability_V[node.token]), rel=1e-4)
        assert node.weight == pytest.approx(node.probability / total, rel=1e-4)
        assert node.value == pytest.approx(float(logits_V[node.token] - logits_V.mean()), rel=1e-4)
        assert node.label == lm.token_strings[node.token]


def test_any_target(models, mixed):
    lm, dictionaries = models["llama"], dict(zip("abc", mixed["llama", "transcoders"], strict=True))
    model = LocalModel(lm, dictionaries, TEXT)
    active = int(model.parts[2].latents_N[9]), int(model.parts[2].positions_N[9])
    silent = next(i for i in range(64) if i not in model.parts[1].latents_N.tolist())
    direction_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    targets = [
        Difference(5, 6), Direction("blocks.2.hook_resid_mid", direction_D, position=4, label="mine"), Feature("c", active[1], active[0]),
        Feature(1, 3, silent), Logit(9, position=6), Direction("blocks.1.attn.hook_z", direction_D),
        Direction("blocks.1.hook_attn_out", direction_D),
    ]  # fmt: skip
    graph = trace(lm, dictionaries, TEXT, targets=targets, keep=1.0)
    assert graph.nodes.weight_N[graph.targets] == pytest.approx(1 / 7)
    ids = torch.tensor([graph.ids])
    logits_SV = lm.logits(ids)[0]
    sites = ["blocks.2.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"]
    read = lm.read(ids, sites)
    seen = [read[site][0] for site in sites]
    x_D = lm.read(ids, ["blocks.1.mlp.hook_in"])["blocks.1.mlp.hook_in"][0, 3]
    z = dictionaries["b"].W_enc_FD[silent] @ x_D + dictionaries["b"].b_enc[silent]
    found = {graph.id(n): graph.node(n) for n in graph.targets.tolist()}
    last = len(graph.ids) - 1
    expected = {
        f"difference/{last}/0": logits_SV[-1, 5] - logits_SV[-1, 6],
        "direction/4/0": direction_D @ seen[0][4],
        f"feature/c/{active[1]}/{active[0]}": model.parts[2].values_N[9],
        f"feature/b/3/{silent}": z,
        "logit/6/9": logits_SV[6, 9] - logits_SV[6].mean(),
        f"direction/{last}/1": direction_D @ seen[1][-1],
        f"direction/{last}/2": direction_D @ seen[2][-1],
    }
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].value == pytest.approx(float(value), rel=1e-4, abs=1e-4), key
        n = graph.find(key)
        assert sums(graph)[n] + graph.nodes.constant_N[n] + graph.nodes.dropped_N[n] == pytest.approx(
            float(value), rel=1e-4, abs=1e-4
        )
    assert found[f"feature/b/3/{silent}"].activation == 0.0
    assert found["direction/4/0"].label == "mine"


def test_what_is_kept_are_the_strongest_edges(models, mixed):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "lorsa"]
    whole = trace(lm, dictionaries, TEXT, keep=1.0, max_features=10_000)
    few = trace(lm, dictionaries, TEXT, keep=10, max_features=10_000)
    share = trace(lm, dictionaries, TEXT, keep=0.7, max_features=10_000)
    for target in whole.targets.tolist():
        name = whole.id(target)
        edges = [(whole.id(source), weight) for source, weight in whole.edges_into(target)]
        kept = [(few.id(source), weight) for source, weight in few.edges_into(few.find(name))]
        assert kept == edges[:10]
        sizes = np.abs([weight for _, weight in edges])
        count = int(np.searchsorted(sizes.cumsum(), 0.7 * sizes.sum())) + 1
        assert len(share.edges_into(share.find(name))) == count
        assert few.nodes.dropped_size_N[few.find(name)] == pytest.approx(sizes[10:].sum(), rel=1e-5)
        assert few.nodes.dropped_N[few.find(name)] == pytest.approx(
            sum(weight for _, weight in edges[10:]), abs=1e-4 * sizes.sum()
        )


def test_scores_of_a_part_bound_that_of_the_whole(models, mixed, name):
    whole = trace(models[name], mixed[name, "lorsa"], TEXT, keep=1.0, max_features=10_000).scores()
    assert whole.replacement_high - whole.replacement_low < 1e-6
    for keep, features in ((30, 10_000), (0.8, 10_000), (1.0, 25), (10, 60)):
        found = trace(models[name], mixed[name, "lorsa"], TEXT, keep=keep, max_features=features).scores()
        assert found.replacement_low <= whole.replacement <= found.replacement_high
        assert found.completeness_low <= whole.completeness <= found.completeness_high
        assert found.replacement_low <= found.replacement <= found.replacement_high


def test_the_features_taken_have_the_most_influence(models, mixed):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    whole = trace(lm, dictionaries, TEXT, keep=1.0, max_features=10_000)
    part = trace(lm, dictionaries, TEXT, keep=1.0, max_features=30)
    influence = dict(zip(map(whole.id, range(len(whole))), whole.influence(), strict=True))
    taken = [part.id(n) for n in np.flatnonzero(part.is_kind("feature"))]
    best = sum(sorted((influence[whole.id(n)] for n in np.flatnonzero(whole.is_kind("feature"))), reverse=True)[:30])
    assert sum(influence[key] for key in taken) > 0.8 * best


def test_two_traces_are_equal_to_the_last_bit(models, mixed):
    one, two = (trace(models["gpt2"], mixed["gpt2", "lorsa"], TEXT, keep=30, max_features=50) for _ in range(2))
    for column in one.nodes.__dict__:
        np.testing.assert_array_equal(getattr(one.nodes, column), getattr(two.nodes, column))
    np.testing.assert_array_equal(one.weights_E, two.weights_E)
    np.testing.assert_array_equal(one.sources_E, two.sources_E)


def test_strongest():
    row = np.array([0.0, 3.0, -5.0, 1.0, -1.0, 0.0, 1.0], dtype=np.float32)
    assert strongest(row, 2).tolist() == [1, 2]
    assert strongest(row, 4).tolist() == [1, 2, 3, 4]
    assert strongest(row, 1.0).tolist() == strongest(row, 99).tolist() == [1, 2, 3, 4, 6]
    assert strongest(row, 0.72).tolist() == [1, 2]
    assert strongest(row, 0.74).tolist() == [1, 2, 3]
    assert strongest(np.zeros(3, dtype=np.float32), 0.5).tolist() == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ["def value"]}, "is .* tokens"),
        ({"targets": [Logit(99999)]}, "vocabulary has no token 99999"),
        ({"targets": [Logit(3, position=40)]}, "outside the prompt"),
        ({"targets": []}, "no target"),
        ({"targets": [Logit(3), Logit(3)]}, "named twice"),
        ({"targets": [Feature("nobody", 3, 1)]}, "there is no dictionary 'nobody'"),
        ({"targets": [Feature(0, 3, 64)]}, "latent 64 is not one of the 64"),
        ({"targets": [Direction("blocks.0.mlp.hook_post", torch.ones(32))]}, "not a place of a graph"),
        ({"targets": [Direction("blocks.0.hook_mlp_out", torch.ones(32))]}, "not linear"),
        ({"targets": [Direction("blocks.0.hook_resid_pre", torch.ones(31))]}, "needs 32 finite numbers"),
        ({"keep": 0}, "keeps nothing"),
        ({"keep": 1.5}, "keeps nothing"),
        ({"max_features": 0}, "leaves no feature"),
    ],
)
def test_bad_requests_are_refused_in_one_line(models, mixed, options, message):
    with pytest.raises(UserError, match=message) as caught:
        trace(models["gpt2"], mixed["gpt2", "transcoders"], TEXT, **options)
    assert "\n" not in str(caught.value)


def test_a_trained_model(shared_data):
    from mixes import lorsa, make, transcoder

    from saebench.lm import load_lm

    lm = load_lm(shared_data / "stories260k")
    prompt = "Once upon a time, there was a little girl who liked to play"
    graph = trace(
        lm, make(lm, [transcoder(n) for n in range(5)] + [lorsa(n) for n in (1, 3)]), prompt, keep=1.0, max_features=400
    )
    nodes, inputs_N = graph.nodes, graph.is_kind("feature", "logit")
    left_N = np.abs(sums(graph) + nodes.dropped_N + nodes.constant_N - nodes.value_N)
    assert (left_N[inputs_N] / np.abs(nodes.value_N[inputs_N])).max() < 1e-5
