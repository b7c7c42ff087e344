"""circuit-tracer's files: there and back with nothing lost, names that no two nodes share, one of circuit-tracer itself, and bad ones."""

import copy
import json
import re
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from circuits.hand_graphs import graph_of
from circuits.mixes import TEXT, make, mixes, prepared

from saebench.circuits import Difference, Direction, Feature, Logit, trace
from saebench.circuits.sets.groups import Supernode, Supernodes
from saebench.errors import UserError
from saebench.interop import documents, read_circuit_tracer, write_circuit_tracer
from saebench.interop.circuit_tracer_schema import pair, unpair, validate

THEIRS = Path(__file__).parent / "circuit_tracer_graph.json"  # as circuit-tracer 0.5.0 wrote it, of a Llama with random weights
TARGETS = [Logit(5), Difference(7, 8), Direction("blocks.1.hook_resid_mid", torch.arange(32.0)), Feature(0, 4, 3)]


@pytest.fixture(scope="module")
def graphs(tiny_lm):
    """By name of the mix."""
    wanted = {"lorsa": TARGETS, "clt": None, "stream": None, "heads": TARGETS[:1], "transcoders": None}
    made = {}
    for name, targets in wanted.items():
        dictionaries = make(tiny_lm, prepared(mixes(3)[name]))
        named = {f"d-{number}": dictionary for number, dictionary in enumerate(dictionaries)}
        made[name] = trace(tiny_lm, named, TEXT[:24], targets=targets, keep=30)
    return made


def written(graph, path):
    write_circuit_tracer(graph, path)
    return json.loads(path.read_text())


def without_own(document):
    """As circuit-tracer would have written it."""
    document = copy.deepcopy(document)
    del document["metadata"]["saebench"]
    for node in document["nodes"]:
        del node["saebench"]
    return document


@pytest.mark.parametrize("name", ["lorsa", "clt", "stream", "heads"])
def test_a_graph_comes_back_the_same(graphs, name, tmp_path):
    graph = graphs[name]
    graph.extra["note"] = [1, "two"]
    document = written(graph, tmp_path / "a.json")
    assert validate(document) == []
    again = read_circuit_tracer(tmp_path / "a.json")
    for column, values in graph.nodes.__dict__.items():
        np.testing.assert_array_equal(values, getattr(again.nodes, column), column)
    for part in ("offsets_N", "sources_E", "weights_E"):
        np.testing.assert_array_equal(getattr(graph, part), getattr(again, part))
    for part in ("prompt", "ids", "tokens", "model", "dictionaries", "sites", "settings", "labels", "vectors", "extra"):
        assert getattr(graph, part) == getattr(again, part), part
    assert again.scores() == graph.scores()
    pruned = graph.prune()
    write_circuit_tracer(pruned, tmp_path / "b.json")
    assert read_circuit_tracer(tmp_path / "b.json").scores() == pruned.scores()


@pytest.mark.parametrize("name", ["lorsa", "clt", "stream", "heads"])
def test_names_are_safe_and_nobody_elses(graphs, name, tmp_path):
    graph = graphs[name]
    nodes = written(graph, tmp_path / "a.json")["nodes"]
    names = [node["node_id"] for node in nodes]
    assert len(set(names)) == len(graph) and all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in names)
    assert all(
        name.split("_")[0] == node["layer"] and name.split("_")[-1] == str(node["ctx_idx"])
        for name, node in zip(names, nodes, strict=True)
    )


def test_an_error_has_another_name_than_a_latent_of_layer_0(tmp_path):
    """circuit-tracer calls both 0_1_2."""
    graph = graph_of(["feature", "error", "logit"], {(2, 0): 1.0, (2, 1): 2.0}, {2: 1.0})
    graph.dictionaries[0] |= {"reads": ["blocks.0.mlp.hook_in"], "writes": ["blocks.0.hook_mlp_out"]}
    graph.sites[:2] = ["blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out"]
    graph.nodes.latent_N[0], graph.nodes.position_N[:] = 1, 2
    names = [node["node_id"] for node in written(graph, tmp_path / "a.json")["nodes"]]
    assert names == ["0_1_2", "1_error_mlp_2", "3_3_2"]
    theirs = written(graph, tmp_path / "a.json")
    theirs["nodes"][1]["node_id"] = theirs["links"][1]["source"] = "0_1_2"
    assert validate(theirs)[0] == (
        "nodes[1].node_id is '0_1_2', as that of nodes[0] (circuit-tracer names an error of layer N and latent N of layer 0 alike): "
        "give every node its own"
    )


def test_features_are_numbered_along_diagonals():
    """Cantor's order, walked."""
    walked = ((both - index, index) for both in count() for index in range(both + 1))
    for number, (layer, index) in zip(range(5000), walked, strict=False):
        assert pair(layer, index) == number and unpair(number) == (layer, index)
    assert unpair(pair(40, 3_000_000)) == (40, 3_000_000)


def test_latents_of_a_cross_layer_transcoder_are_numbered_by_layer(graphs, tmp_path):
    graph = graphs["clt"]  # 40 latents a layer
    for number, node in enumerate(written(graph, tmp_path / "a.json")["nodes"]):
        if node["feature_type"] == "cross layer transcoder":
            layer, index = divmod(int(graph.nodes.latent_N[number]), 40)
            assert unpair(node["feature"]) == (layer, index) and node["node_id"] == f"{layer}_{index}_{node['ctx_idx']}"


def test_the_slider_shows_the_nodes_of_most_influence(graphs, tmp_path):
    """At a share, those that hold it, but for the one that reaches over it."""
    graph = graphs["transcoders"]
    nodes = written(graph, tmp_path / "a.json")["nodes"]
    influence_N = graph.influence()
    for share in (0.3, 0.8):
        shown = [number for number, node in enumerate(nodes) if node.get("influence", 2.0) <= share]
        held, total = influence_N[shown].sum(), influence_N.sum()
        beyond = np.delete(influence_N, shown).max()
        assert held <= share * total + 1e-9 < held + beyond + 2e-9
        assert influence_N[shown].min() >= beyond
    assert all("(p=" in node["clerp"] and "influence" not in node for node in nodes if node["feature_type"] == "logit")


@pytest.mark.parametrize("name", ["lorsa", "transcoders"])
def test_a_graph_without_our_own_part_keeps_nodes_and_edges(graphs, name, tmp_path):
    graph = graphs[name]
    theirs = without_own(written(graph, tmp_path / "a.json"))
    (tmp_path / "b.json").write_text(json.dumps(theirs))
    again = read_circuit_tracer(tmp_path / "b.json")
    assert (again.ids, again.tokens, again.prompt) == (graph.ids, graph.tokens, graph.prompt)
    np.testing.assert_array_equal(again.offsets_N, graph.offsets_N)
    np.testing.assert_array_equal(again.weights_E, graph.weights_E)
    np.testing.assert_array_equal(again.nodes.activation_N, graph.nodes.activation_N)
    np.testing.assert_array_equal(again.is_kind("feature", "error", "token"), graph.is_kind("feature", "error", "token"))
    features = graph.is_kind("feature")
    np.testing.assert_array_equal(again.nodes.latent_N[features], graph.nodes.latent_N[features])
    into = np.asarray(again.matrix().sum(1)) + again.nodes.constant_N + again.nodes.dropped_N
    np.testing.assert_allclose(into[features], again.nodes.value_N[features], rtol=1e-6, atol=1e-6)
    if name == "transcoders":
        assert again.scores().replacement == pytest.approx(graph.scores().replacement, rel=1e-6)
        assert {d["name"]: d["reads"] for d in again.dictionaries} == {f"mlp-{n}": [f"blocks.{n}.mlp.hook_in"] for n in range(3)}
    write_circuit_tracer(again, tmp_path / "c.json")
    assert read_circuit_tracer(tmp_path / "c.json").scores() == again.scores()


def test_what_circuit_tracer_wrote():
    document = json.loads(THEIRS.read_text())
    assert validate(document) == [] and "saebench" not in document["metadata"]
    graph = read_circuit_tracer(THEIRS)
    assert len(graph) == len(document["nodes"]) and graph.num_edges == len(document["links"])
    called = {}
    for node in document["nodes"]:
        first, second, position = node["node_id"].split("_")
        called[node["node_id"]] = {
            "cross layer transcoder": f"feature/mlp-{first}/{position}/{second}",
            "mlp reconstruction error": f"error/blocks.{second}.hook_mlp_out/{position}",
            "embedding": f"token/{position}",
            "logit": f"logit/{position}/{second}",
        }[node["feature_type"]]
        if node["feature_type"] == "embedding":
            assert graph.ids[int(position)] == int(second)
    matrix = graph.matrix().toarray()
    for link in document["links"]:
        weight = matrix[graph.find(called[link["target"]]), graph.find(called[link["source"]])]
        assert weight == pytest.approx(link["weight"], rel=1e-6)
    assert graph.nodes.weight_N.sum() == pytest.approx(1.0) and 0 < graph.scores().replacement <= 1
    best = next(node for node in document["nodes"] if node["is_target_logit"])
    assert best["clerp"].startswith(f'Output "{graph.node(called[best["node_id"]]).label}" (p=')


def test_groups_go_there_and_what_was_pinned_there_goes_back(graphs, tmp_path):
    graph = graphs["transcoders"].prune()
    features = np.flatnonzero(graph.is_kind("feature"))[:3].tolist()
    groups = Supernodes((Supernode("one", tuple(features[:2])), Supernode("two", (features[2],))))
    write_circuit_tracer(graph, tmp_path / "a.json", supernodes=groups)
    document = json.loads((tmp_path / "a.json").read_text())
    first, second, third = (document["nodes"][n]["node_id"] for n in features)
    assert document["qParams"]["supernodes"] == [["one", first, second], ["two", third]]
    assert document["qParams"]["pinnedIds"] == [first, second, third]
    again = read_circuit_tracer(tmp_path / "a.json")
    assert written(again, tmp_path / "b.json")["qParams"] == document["qParams"]
    pruned = again.only(np.arange(len(again)) != features[0], np.ones(again.num_edges, dtype=bool))
    pruned.extra = again.extra
    assert written(pruned, tmp_path / "b.json")["qParams"]["supernodes"] == [["one", second], ["two", third]]
    with pytest.raises(UserError, match="it is of another graph"):
        write_circuit_tracer(graph, tmp_path / "c.json", supernodes=Supernodes((Supernode("one", (10**6,)),)))
    theirs = json.loads(THEIRS.read_text())
    error = next(node["node_id"] for node in theirs["nodes"] if "error" in node["feature_type"])
    theirs["qParams"] |= {"pinnedIds": [error, "gone"], "supernodes": [["group", error], []]}
    (tmp_path / "a.json").write_text(json.dumps(theirs))
    _, layer, position = error.split("_")
    assert written(read_circuit_tracer(tmp_path / "a.json"), tmp_path / "b.json")["qParams"]["supernodes"] == [
        ["group", f"{layer}_error_mlp_{position}"]
    ]


def change(document, *path, to):
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to


BAD = [
    (["nodes", 0, "feature_type"], "ghost", r"nodes\[0\].feature_type is 'ghost': it must be one of cross layer transcoder"),
    (["nodes", 0, "feature_type"], 3, r"nodes\[0\].feature_type is 3: it must be text"),
    (["nodes", 0, "activation"], float("nan"), r"nodes\[0\].activation is nan: it must be a number or null"),
    (["nodes", 0, "ctx_idx"], True, r"nodes\[0\].ctx_idx is True: it must be a whole number"),
    (["nodes", 0, "ctx_idx"], 99, r"nodes\[0\].ctx_idx is 99: it must be a position among"),
    (["nodes", 0, "layer"], "x", r"nodes\[0\].layer is 'x': it must be the number of a layer"),
    (["nodes", 0, "feature"], 10**30, r"nodes\[0\].feature is 10+\.\.\.|it must be a whole number"),
    (["nodes", 0, "feature"], 8, r"nodes\[0\].feature is 8, latent 2 of layer 1, and its layer is 0"),
    (["nodes", 0], [], r"nodes\[0\] is a list of 0: it must be an object"),
    (["nodes", -1, "clerp"], "yes", r"clerp is 'yes': it must be empty or end in \(p=PROBABILITY\)"),
    (["nodes"], {}, r"the graph.nodes is an object of 0: it must be a list"),
    (["links", 0, "source"], "0_0_0", r"links\[0\].source is '0_0_0', which no node has: add the node or remove the link"),
    (["links", 0, "weight"], "1", r"links\[0\].weight is '1': it must be a number"),
    (["links", 0, "weight"], float("inf"), r"links\[0\].weight is inf: it must be a number"),
    (["metadata", "schema_version"], 2, r"metadata.schema_version is 2: it must be 1"),
    (["metadata", "prompt_tokens", 1], None, r"metadata.prompt_tokens\[1\] is null: it must be text"),
    (["metadata", "prompt_tokens"], "ab", r"metadata.prompt_tokens is 'ab': it must be a list"),
    (["qParams", "supernodes"], [["a"], [1]], r"qParams.supernodes\[1\] is a list of 1: it must be a list of texts"),
    (["metadata", "saebench"], {"version": 7}, r"metadata.saebench is of version 7, and this saebench reads 1: remove it"),
    (["metadata", "saebench", "sites"], [], r"what stands under 'saebench' is damaged \(its parts do not fit together\)"),
    (["nodes", 0, "saebench"], {}, r"what stands under 'saebench' is damaged \(KeyError: 'kind'\)"),
    (["nodes", 0, "saebench", "kind"], "ghost", r"what stands under 'saebench' is damaged"),
    (["nodes", 0, "saebench", "value"], "x", r"what stands under 'saebench' is damaged"),
]


@pytest.mark.parametrize(("path", "to", "message"), BAD)
def test_bad_values_are_named_in_one_line(graphs, path, to, message, tmp_path):
    document = written(graphs["transcoders"], tmp_path / "a.json")
    assert document["nodes"][0]["layer"] == "0"
    change(document, *path, to=to)
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as caught:
        read_circuit_tracer(tmp_path / "a.json")
    assert "\n" not in str(caught.value) and str(tmp_path / "a.json") in str(caught.value)


def test_nodes_and_links_that_are_there_twice(graphs, tmp_path):
    document = written(graphs["transcoders"], tmp_path / "a.json")
    twice = copy.deepcopy(document)
    twice["nodes"].append(twice["nodes"][0])
    assert "as that of nodes[0]" in validate(twice)[0]
    twice["nodes"][-1] = twice["nodes"][0] | {"node_id": "other"}
    (tmp_path / "b.json").write_text(json.dumps(twice))
    with pytest.raises(UserError, match=r"nodes\[\d+\] and nodes\[0\] are both feature/d-0/"):
        read_circuit_tracer(tmp_path / "b.json")
    twice = copy.deepcopy(document)
    twice["links"].append(twice["links"][3])
    assert validate(twice) == [f"links[{len(twice['links']) - 1}] joins the nodes that links[3] joins: keep one of them"]
    back = {"source": document["links"][0]["target"], "target": document["links"][0]["source"], "weight": 1.0}
    assert "links go in a circle through the node" in validate(document | {"links": [*document["links"], back]})[0]
    round_ = {"source": document["nodes"][0]["node_id"], "target": document["nodes"][0]["node_id"], "weight": 1.0}
    assert "links go in a circle" in validate(document | {"links": [*document["links"], round_]})[0]
    broken = document | {"links": [{"source": "?", "target": "?", "weight": 0}] * 500}
    assert len(validate(broken)) == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: .* at line 1, column 2"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON: Exceeds the limit"),
        (b"[]", "the graph is a list of 0: it must be an object"),
        (b"null", "the graph is null: it must be an object"),
        (b"{}", r"the graph lacks 'metadata': add it, an object \(and 3 more\)"),
        (
            b'{"nodes": [], "nodes": [], "links": [], "metadata": {}, "qParams": {}}',
            "the graph has 'nodes' twice: keep one of them",
        ),
    ],
)
def test_files_that_are_no_graph(content, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_circuit_tracer(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_files_that_are_missing_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is missing: check the path"):
        read_circuit_tracer(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_circuit_tracer(tmp_path)
    monkeypatch.setattr(documents, "LARGEST", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4, 5]")
    with pytest.raises(UserError, match="prune what it holds before saving"):
        read_circuit_tracer(tmp_path / "a.json")
