import json

import numpy as np
import pytest
from hand_graphs import graph_of
from mixes import TEXT

from saebench.circuits.graphs.graph_file import graph_path, load_graph
from saebench.circuits.graphs.targets import Difference, Logit
from saebench.circuits.graphs.tracing import trace
from saebench.errors import UserError


@pytest.fixture
def saved(tmp_path):
    graph = graph_of(["feature", "feature", "token", "logit"], {(3, 0): 0.1, (0, 2): 2.0, (3, 1): 1 / 3}, {3: 1.0})
    path = graph_path(tmp_path, "hand")
    graph.save(path)
    return path


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_graph_comes_back_the_same(models, mixed, tmp_path):
    targets = [Logit(5), Difference(7, 8)]
    graph = trace(models["gpt2"], mixed["gpt2", "lorsa"], TEXT, targets=targets, keep=20)
    graph.extra["note"] = {"by": "hand"}
    path = graph_path(tmp_path, "a-graph_1.2")
    assert path == tmp_path / "graphs" / "a-graph_1.2.json"
    graph.save(path)
    again = load_graph(path)
    for name, column in graph.nodes.__dict__.items():
        np.testing.assert_array_equal(column, getattr(again.nodes, name))
    for name in ("offsets_N", "sources_E", "weights_E"):
        np.testing.assert_array_equal(getattr(graph, name), getattr(again, name))
    for name in ("prompt", "ids", "tokens", "model", "dictionaries", "sites", "settings", "labels", "vectors", "extra"):
        assert getattr(graph, name) == getattr(again, name), name
    assert again.scores() == graph.scores()
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first
    with pytest.raises(UserError, match="has no model with it"):
        again.verify()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format="other"), "is not a saebench-graph: it says 'other'"),
        (lambda c: c.update(version=2), "of version 2; this saebench reads version 1"),
        (lambda c: c["nodes"]["kind"].__setitem__(0, "ghost"), "unknown kind 'ghost'"),
        (lambda c: (c["nodes"]["position"].__setitem__(1, 0), c["nodes"]["latent"].__setitem__(1, 0)), "feature/d/0/0 twice"),
        (lambda c: c["edges"]["sources"].__setitem__(1, 0) or c["edges"]["sources"].__setitem__(2, 0), "an edge twice"),
        (lambda c: c["edges"]["sources"].__setitem__(0, 9), "edges do not fit"),
        (lambda c: c["edges"]["offsets"].__setitem__(1, 7), "edges do not fit"),
        (lambda c: c["nodes"]["position"].pop(), "do not fit together"),
        (lambda c: c["nodes"]["site"].__setitem__(0, 40), "do not fit together"),
        (lambda c: c["nodes"]["value"].__setitem__(0, float("nan")), "do not fit together"),
        (lambda c: c["nodes"].update(colour=[]), "other columns"),
        (lambda c: c["nodes"]["value"].__setitem__(0, "x"), "is damaged"),
        (lambda c: c.pop("tokens"), "lacks 'tokens'"),
        (lambda c: c.update(more=1), "unknown field 'more'"),
        (lambda c: c.update(nodes=3), "is damaged"),
    ],
)
def test_what_is_no_graph_is_refused_in_one_line(saved, change, message):
    changed(saved, change)
    with pytest.raises(UserError, match=message) as caught:
        load_graph(saved)
    assert "\n" not in str(caught.value)


def test_missing_and_cut_files(saved, tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_graph(tmp_path / "none.json")
    saved.write_text(saved.read_text()[:-50])
    with pytest.raises(UserError, match="is damaged"):
        load_graph(saved)
    saved.write_text("[]")
    with pytest.raises(UserError, match="is not a saebench-graph"):
        load_graph(saved)


@pytest.mark.parametrize("slug", ["", "../up", "a/b", "Big", ".hidden", "a b"])
def test_names_are_file_names(slug, tmp_path):
    with pytest.raises(UserError, match="is no file name"):
        graph_path(tmp_path, slug)


def test_ids_find_nodes(saved):
    graph = load_graph(saved)
    assert [graph.find(graph.id(n)) for n in range(len(graph))] == list(range(len(graph)))
    assert graph.node("token/2").kind == "token"
    with pytest.raises(UserError, match="no node 'token/9'"):
        graph.node("token/9")
    with pytest.raises(UserError, match="no node 77"):
        graph.node(77)
