"""Supernodes: likeness and clusters against plain twins, the file, and what the collapsed view keeps."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hand_graphs import graph_of
from mixes import TEXT, make, transcoder

from saebench.activations import ActivationStream
from saebench.circuits.graphs.graph import KINDS
from saebench.circuits.graphs.graph_file import graph_path, load_graph
from saebench.circuits.graphs.influence import edge_influence
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.sets.graph_sets import GraphSet
from saebench.circuits.sets.likeness import coactivation, combined, decoder, role
from saebench.circuits.sets.supernodes import (
    Supernode,
    Supernodes,
    clusters,
    collapse,
    in_graph,
    load_supernodes,
    save_supernodes,
    supernodes,
    supernodes_path,
)  # fmt: skip
from saebench.codes import SparseCodes
from saebench.errors import UserError
from saebench.features import index

# 0 and 1 tokens, 2 error, 3 to 6 features, 7 logit. 3 and 4 have the same inputs and outputs; 5 has those inputs with other signs.
PARTS = ["token", "token", "error", "feature", "feature", "feature", "feature", "logit"]
LINKS = {
    (3, 0): 1.0, (3, 1): 2.0, (4, 0): 2.0, (4, 1): 4.0, (5, 0): 1.0, (5, 1): -2.0, (6, 3): 1.0, (6, 4): 2.0, (6, 5): -1.0, (6, 2): 0.5,
    (7, 3): 1.0, (7, 4): 2.0, (7, 6): 3.0, (7, 2): 1.0,
}  # fmt: skip


@pytest.fixture
def hand():
    return graph_of(PARTS, LINKS, {7: 1.0})


@pytest.fixture(scope="module")
def traced(models, mixed):
    return trace(models["gpt2"], mixed["gpt2", "lorsa"], TEXT, max_features=150)


# --- likeness ---


def cosine(a, b):
    return a @ b / np.sqrt(a @ a * (b @ b)) if (a @ a) * (b @ b) else 0.0


def test_role_against_plain_loops(traced):
    W = traced.matrix().toarray().astype(np.float64)
    B = np.abs(W) / np.maximum(np.abs(W).sum(1, keepdims=True), 1e-300)
    figure = traced.nodes.weight_N @ np.linalg.inv(np.eye(len(traced)) - B)
    C = np.sign(W) * B * figure[:, None]
    features = np.flatnonzero(traced.is_kind("feature"))[::7]
    found = role(sp.csr_array(C), features)
    for i, m in enumerate(features):
        for j, n in enumerate(features):
            parts = [(C[m], C[n]), (C[:, m], C[:, n])]
            known = [cosine(a, b) for a, b in parts if a.any() or b.any()]
            assert found[i, j] == pytest.approx(np.mean(known) if known else 0.0, abs=1e-6)


def test_the_same_edges_in_proportion_are_the_same_role(hand):
    made = supernodes(hand)
    assert made.groups == (Supernode(made.names[0], (3, 4)),)
    assert made.names[0] == "d 4 on 'a'"  # the member of more influence


def test_decoder_likeness(models, mixed):
    dictionaries = dict(zip("abcdef", mixed["gpt2", "lorsa"], strict=True))
    latents = [("a", 3), ("a", 3), ("b", 5), ("d", 7), ("e", 1)]
    rows = [dictionaries[name].settled().W_dec[latent].double().numpy() for name, latent in latents]
    expected = [[cosine(a, b) for b in rows] for a in rows]
    np.testing.assert_allclose(decoder(latents, dictionaries), expected, atol=1e-6)
    assert np.isnan(decoder([("a", 1), ("z", 1)], dictionaries)[0, 1])


def test_decoder_likeness_of_all_that_a_latent_writes(mixed):
    """A cross-layer transcoder's latents by the sum over targets; heads' outputs are no stream."""
    (clt,) = mixed["gpt2", "clt"]
    first = [clt.decoder(0, target)[4] for target in range(3)]
    last = clt.decoder(2, 2)[6]
    found = decoder([("clt", 4), ("clt", 86)], {"clt": clt})[0, 1]
    assert found == pytest.approx(cosine(sum(first).double().numpy(), last.double().numpy()), abs=1e-6)
    heads, stream, _ = mixed["gpt2", "heads"]
    found = decoder([("z", 0), ("z", 1), ("o", 0)], {"z": heads, "o": stream})
    rows = heads.settled().W_dec[:2].double().numpy()
    assert found[0, 1] == pytest.approx(cosine(*rows), abs=1e-6) and np.isnan(found[0, 2])


def test_coactivation_is_the_correlation_of_firing():
    draw = torch.Generator().manual_seed(0)
    dense = [(torch.rand(200, 6, generator=draw) < 0.3).float() for _ in range(2)]
    dense[1][:, 2] = dense[0][:, 1]
    dense[1][:, 3] = 0
    codes = {name: SparseCodes.from_dense(code) for name, code in zip("ab", dense, strict=True)}
    latents = [("a", 0), ("a", 1), ("b", 2), ("b", 4), ("b", 3), ("c", 0)]
    found = coactivation(latents, codes)
    rows = np.stack([dense["ab".index(name)][:, latent].numpy() for name, latent in latents[:4]])
    np.testing.assert_allclose(found[:4, :4], np.corrcoef(rows), atol=1e-6)
    assert found[1, 2] == pytest.approx(1.0) and np.isnan(found[4:]).all() and np.isnan(found[:, 4:]).all()
    with pytest.raises(UserError, match="over 100 and 200 tokens"):
        coactivation(latents, {"a": codes["a"], "b": codes["b"][:100]})


def test_measures_are_weighted_and_unknown_ones_left_out():
    nan = float("nan")
    made = {
        "role": np.array([[1, 0.6, -0.5], [0.6, 1, 0.2], [-0.5, 0.2, 1]]),
        "decoder": np.array([[1, 0.2, 0.4], [0.2, 1, nan], [0.4, nan, 1]]),
        "coactivation": np.array([[nan] * 3] * 3),
    }
    expected = [(0.5 * 0.6 + 0.25 * 0.2) / 0.75, 0.25 * 0.4 / 0.75, 0.2]
    found = combined(made)
    assert [found[0, 1], found[0, 2], found[1, 2]] == pytest.approx(expected)
    assert np.diag(found).tolist() == [1, 1, 1]


def merged_by_hand(alike, threshold):
    groups = [[i] for i in range(len(alike))]
    while True:
        pairs = [(np.mean(alike[np.ix_(a, b)]), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups) if i < j]
        if not pairs or max(pairs)[0] < threshold:
            return {frozenset(group) for group in groups}
        _, i, j = max(pairs)
        groups[i] += groups.pop(j)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_clusters_are_those_of_average_linkage(threshold):
    for seed in range(5):
        draw = np.random.default_rng(seed)
        points = draw.normal(size=(25, 2))
        alike = np.exp(-((points[:, None] - points) ** 2).sum(2))
        label = clusters(alike, threshold)
        assert {frozenset(np.flatnonzero(label == n)) for n in label} == merged_by_hand(alike, threshold)


# --- on traced graphs ---


def test_copies_of_a_latent_are_put_together(models, mixed):
    """Latent 64 + i reads and writes what i does: wherever both are active, they play the same part."""
    lm = models["gpt2"]
    dictionaries = make(lm, [transcoder(n, d_sae=128, k=10) for n in range(3)])
    for dictionary in dictionaries:
        for weight in (dictionary.W_enc_FD, dictionary.b_enc, dictionary.W_dec):
            weight.data[64:] = weight.data[:64]
    graph = trace(lm, dictionaries, TEXT, max_features=5000, keep=1.0)
    node = {
        (n.dictionary, n.position, n.latent): number
        for number in range(len(graph))
        if (n := graph.node(number)).kind == "feature"
    }
    pairs = [(number, node[d, s, f + 64]) for (d, s, f), number in node.items() if f < 64 and (d, s, f + 64) in node]
    assert len(pairs) > 50
    out = np.bincount(graph.sources_E, minlength=len(graph)) > 0
    for options in ({}, {"dictionaries": dictionaries}):
        made = supernodes(graph, threshold=0.95, **options)
        assert all(made.of(a) == made.of(b) is not None for a, b in pairs if out[a] and out[b])
    assert not any(graph.nodes.kind_N[n] != KINDS.index("feature") for group in made.groups for n in group.members)


def test_with_feature_stores(models, mixed, contexts, tmp_path):
    lm, listed = models["gpt2"], mixed["gpt2", "transcoders"]
    graph = trace(lm, listed, TEXT, max_features=60)
    sites = [site for dictionary in listed for site in dictionary.config.sites]
    source = ActivationStream(lm, contexts[:20], sites)
    stores = [index(dictionary, source, tmp_path / str(i), lm=lm) for i, dictionary in enumerate(listed)]
    names = [each["name"] for each in graph.dictionaries]
    latents = [(name, latent) for name in names for latent in range(0, 64, 3)]
    found = coactivation(latents, dict(zip(names, stores, strict=True)))
    fires = np.zeros((len(latents), stores[0].num_contexts * stores[0].context_size))
    for row, (name, latent) in zip(fires, latents, strict=True):
        row[stores[names.index(name)].postings(latent)[0]] = 1
    fires = fires.reshape(len(latents), stores[0].num_contexts, -1)[:, :, 1:].reshape(
        len(latents), -1
    )  # nothing fires on first tokens
    with np.errstate(invalid="ignore", divide="ignore"):
        np.testing.assert_allclose(found, np.corrcoef(fires), atol=1e-6)
    assert supernodes(graph, store=stores) == supernodes(graph, store=dict(zip(names, stores, strict=True)))
    assert supernodes(graph, store=stores) != supernodes(graph)
    assert len(supernodes(graph, store=stores[0], dictionaries=listed))
    for wrong in ({"other": stores[0]}, {names[1]: stores[0]}):
        with pytest.raises(UserError, match="is of none of the graph's dictionaries"):
            supernodes(graph, store=wrong)


def test_targets_stay_apart(models, mixed):
    from saebench.circuits.graphs.targets import Feature

    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    whole = trace(lm, dictionaries, TEXT, max_features=40)
    strongest = whole.node(int(np.argmax(whole.influence() * (whole.nodes.dictionary_N == 2))))
    graph = trace(lm, dictionaries, TEXT, targets=[Feature(2, strongest.position, strongest.latent)], max_features=40)
    made = supernodes(graph, threshold=0.01)
    assert len(made) and not any(graph.nodes.weight_N[n] for group in made.groups for n in group.members)


def test_of_a_set(models, mixed):
    """Of one graph with positions kept, the groups are the graph's own; in a set each graph has the members that it has."""
    lm, dictionaries = models["gpt2"], mixed["gpt2", "transcoders"]
    graphs = [trace(lm, dictionaries, text, max_features=60) for text in (TEXT, "# then\n" + TEXT)]
    alone = GraphSet(graphs[:1], positions="from_end")
    own = {frozenset(group.members) for group in supernodes(graphs[0]).groups}
    assert {frozenset(group.members) for group in in_graph(supernodes(alone), alone, 0).groups} == own and own
    both = GraphSet(graphs)
    made = supernodes(both, dictionaries=dictionaries)
    for number, graph in enumerate(graphs):
        spread = in_graph(made, both, number)
        for group in spread.groups:
            latents = {(graph.node(n).dictionary, graph.node(n).latent) for n in group.members}
            known = {(both.dictionaries[k], int(both.latent_K[k])) for k in made[group.name].members}
            assert {(graph.dictionaries[d]["name"], latent) for d, latent in latents} <= known
            everywhere = [n for n in range(len(graph)) if (graph.node(n).dictionary, graph.node(n).latent) in latents]
            assert tuple(everywhere) == group.members


# --- with other graphs, and the file ---


def test_on_the_pruned_graph(traced):
    made, pruned = supernodes(traced), traced.prune(0.8, 0.9)
    there = made.carried_over(traced, pruned)
    assert 0 < sum(len(group.members) for group in there.groups) < sum(len(group.members) for group in made.groups)
    for group in there.groups:
        assert {pruned.id(n) for n in group.members} <= {traced.id(n) for n in made[group.name].members}
    with pytest.raises(UserError, match="it is of another graph"):
        Supernodes((Supernode("a", (len(pruned),)),)).carried_over(pruned, traced)


def test_the_file_comes_back_the_same(traced, tmp_path):
    path = graph_path(tmp_path, "some-graph")
    assert load_supernodes(path, traced) is None
    made = supernodes(traced).rename(supernodes(traced).names[0], "imports\n'quoted'")
    traced.save(path)
    assert save_supernodes(path, made, traced) == tmp_path / "graphs" / "some-graph.supernodes.json" == supernodes_path(path)
    assert load_supernodes(path, load_graph(path)) == made
    save_supernodes(path, Supernodes(), traced)
    assert load_supernodes(path, traced) == Supernodes()
    with pytest.raises(UserError, match="it is of another graph"):
        save_supernodes(path, Supernodes((Supernode("a", (10**6,)),)), traced)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format="saebench-graph"), "is not a saebench-supernodes: it says 'saebench-graph'"),
        (lambda c: c.update(version=2), "of version 2; this saebench reads version 1"),
        (lambda c: c.update(graph="0"), "is of another graph, of the prompt 'a b'"),
        (lambda c: c["groups"][0]["nodes"].append("feature/d/9/99"), "unknown node 'feature/d/9/99' in 'one'"),
        (lambda c: c["groups"][1]["nodes"].append("feature/d/3/3"), "node 3 is in the supernodes 'one' and 'two'"),
        (lambda c: c["groups"][0]["nodes"].append("feature/d/3/3"), "has a node twice in 'one'"),
        (lambda c: c["groups"][1].update(name="one"), "two supernodes are called 'one'"),
        (lambda c: c["groups"][0].update(nodes=[]), "has no node"),
        (lambda c: c["groups"][0].update(nodes=[3]), "is damaged"),
        (lambda c: c["groups"][0].pop("name"), "is damaged"),
        (lambda c: c.update(groups={}), "is damaged"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(hand, tmp_path, change, message):
    path = graph_path(tmp_path, "hand")
    save_supernodes(path, Supernodes((Supernode("one", (3, 4)), Supernode("two", (5,)))), hand)
    content = json.loads(supernodes_path(path).read_text())
    change(content)
    supernodes_path(path).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_supernodes(path, hand)
    assert "\n" not in str(caught.value)


def test_damaged_and_other_graphs_files(hand, traced, tmp_path):
    path = graph_path(tmp_path, "hand")
    save_supernodes(path, Supernodes((Supernode("one", (3, 4)),)), hand)
    with pytest.raises(UserError, match="is of another graph"):
        load_supernodes(path, traced)
    with pytest.raises(UserError, match=r"unknown node 'feature/d/3/3' in 'one': .* not pruned"):
        load_supernodes(path, hand.only(np.arange(8) != 3, np.ones(hand.num_edges, dtype=bool)))
    for text in ("[]", "3", '{"format":', ""):
        supernodes_path(path).write_text(text)
        with pytest.raises(UserError, match="is not a saebench-supernodes|is damaged"):
            load_supernodes(path, hand)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, float("nan")])
def test_thresholds_are_checked(hand, threshold):
    with pytest.raises(UserError, match="is no likeness"):
        supernodes(hand, threshold=threshold)


def test_other_dictionaries_are_refused(traced, mixed):
    with pytest.raises(UserError, match="is none of the graph's"):
        supernodes(traced, dictionaries=mixed["gpt2", "skip"])


# --- the view ---


def test_collapsed_by_hand(hand):
    view = collapse(hand, Supernodes((Supernode("pair", (3, 4)), Supernode("six", (5, 6)))))
    assert view.members == [(0,), (1,), (2,), (3, 4), (5, 6), (7,)]
    assert view.names == {3: "pair", 4: "six"} and view.labels == {3: "pair", 4: "six", 5: "yes"}
    assert dict(view.edges_into(3)) == {0: 3.0, 1: 6.0}
    assert dict(view.edges_into(4)) == {0: 1.0, 1: -2.0, 2: 0.5, 3: 3.0}
    assert dict(view.edges_into(5)) == {2: 1.0, 3: 3.0, 4: 3.0}
    assert (view.inside_M[4], view.inside_size_M[4], view.inside_M[3]) == (-1.0, 1.0, 0.0)
    assert view.id(3) == "feature/d/4/4" and view.find("feature/d/4/4") == 3  # the member of more influence
    assert view.targets.tolist() == [5] and view.num_edges == 9


def grouped(graph, seed, count=12):
    """Any nodes in any groups, targets, tokens and errors too."""
    draw = np.random.default_rng(seed)
    label = draw.integers(-3, count, len(graph))
    return Supernodes(
        tuple(Supernode(f"g{n}", tuple(np.flatnonzero(label == n).tolist())) for n in range(count) if (label == n).any())
    )


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_in_the_view(traced, seed):
    made = grouped(traced, seed)
    view = collapse(traced, made)
    G = np.zeros((len(view), len(traced)))
    for m, members in enumerate(view.members):
        G[m, list(members)] = 1
    assert (G.sum(0) == 1).all()
    for name, group in made.as_dict().items():
        assert view.members[next(m for m, own in view.names.items() if own == name)] == tuple(group)
    W = traced.matrix().toarray().astype(np.float64)
    carried = traced.matrix()
    carried.data = edge_influence(traced)
    for dense, column, inside in (
        (W, view.weights_E, view.inside_M), (np.abs(W), view.sizes_E, view.inside_size_M),
        (carried.toarray(), view.carried_E, view.inside_carried_M),
    ):  # fmt: skip
        expected = G @ dense @ G.T
        found = view.matrix()
        found.data = column
        np.testing.assert_allclose(found.toarray() + np.diag(inside), expected, atol=1e-9)
        assert column.sum() + inside.sum() == pytest.approx(dense.sum())
    assert view.influence() == pytest.approx(G @ traced.influence())
    assert view.influence().sum() == pytest.approx(traced.influence().sum())
    by_source = np.bincount(view.sources_E, weights=view.carried_E, minlength=len(view)) + view.inside_carried_M
    assert by_source == pytest.approx(view.influence())  # what goes out of a node is its influence
    rows_E = np.repeat(np.arange(len(view)), np.diff(view.offsets_N))
    into = np.bincount(rows_E, weights=view.weights_E, minlength=len(view)) + view.inside_M
    nodes = view.nodes
    size = np.bincount(rows_E, weights=view.sizes_E, minlength=len(view)) + view.inside_size_M + nodes.dropped_size_N
    assert (np.abs(into + nodes.dropped_N + nodes.constant_N - nodes.value_N) <= 1e-5 * np.maximum(size, 1)).all()
    assert nodes.weight_N.sum() == pytest.approx(1.0)
    assert view.scores() == traced.scores()


def test_a_view_is_no_graph_to_work_on(hand, tmp_path):
    view = collapse(hand, Supernodes())
    np.testing.assert_array_equal(view.matrix().toarray(), hand.matrix().toarray())
    for call in (view.prune, view.verify, lambda: view.intervene(0), lambda: view.save(tmp_path / "x.json")):
        with pytest.raises(UserError, match="use the graph itself"):
            call()
    with pytest.raises(UserError, match="it is of another graph"):
        collapse(hand, Supernodes((Supernode("a", (99,)),)))
