"""EAP's files: there and back, the circuit that lies on paths, sizes against published numbers, and bad ones."""

import json

import networkx as nx
import pytest
import torch

from saebench.circuits.discovery.examples import Examples
from saebench.circuits.discovery.model_edges import ComponentEffects, Components, EdgeEffects
from saebench.errors import UserError
from saebench.interop import eap_circuit, read_eap, write_eap
from saebench.interop.eap import validate


def effects_of(layers, heads, beside=False, seed=0):
    """Random effects of every edge that such a model has, named and placed by rules of their own: what is computed before is read."""
    sources, targets = ["input"], []
    for layer in range(layers):
        here = [f"a{layer}.h{head}" for head in range(heads)]
        targets += [f"{head}<{kind}>" for kind in "qkv" for head in here] + [f"m{layer}"]
        sources += [*here, f"m{layer}"]
    targets.append("logits")

    def read(target):
        layer = layers if target == "logits" else int(target.split(".")[0][1:])
        stop = 1 + layer * (heads + 1) + (heads if target.startswith("m") and not beside else 0)
        return sources[:stop]

    effect = torch.full((len(sources), len(targets)), torch.nan)
    generator = torch.Generator().manual_seed(seed)
    for t, target in enumerate(targets):
        effect[: len(read(target)), t] = torch.randn(len(read(target)), generator=generator)
    return EdgeEffects(sources, targets, effect)


@pytest.mark.parametrize(("layers", "heads", "beside"), [(2, 3, False), (3, 2, True), (1, 1, False), (1, 1, True)])
def test_a_circuit_comes_back_the_same(layers, heads, beside, tmp_path):
    effects = effects_of(layers, heads, beside)
    components = ComponentEffects(torch.randn(layers, heads), torch.randn(layers))
    circuit = eap_circuit(effects, 64, top=5, components=components)
    write_eap(circuit, tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["cfg"] == {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": beside, "d_model": 64}
    assert validate(document) == []
    again = read_eap(tmp_path / "a.json")
    assert (again.effects.sources, again.effects.targets) == (effects.sources, effects.targets)
    torch.testing.assert_close(again.effects.effect_UT, effects.effect_UT, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again.kept_UT, circuit.kept_UT) and again.nodes == circuit.nodes and again.size == circuit.size
    assert again.scores == pytest.approx(dict(zip(components.names, components.effect_N.tolist(), strict=True)))
    write_eap(again, tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_effects_of_a_model_are_written_by_its_names(tiny_lm, tmp_path):
    examples = Examples(torch.tensor([[0, 5, 6, 7]]), torch.tensor([3]), torch.tensor([8]), torch.tensor([9]))
    components = Components(tiny_lm, examples)
    effects = components.edges("eap")
    circuit = eap_circuit(effects, 32, top=20, components=components.effects("eap"))
    write_eap(circuit, tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}
    source, target, effect = effects.ranked()[0]
    assert document["edges"][f"{source}->{target}"]["score"] == pytest.approx(effect)
    assert set(document["nodes"]) == {"input", "logits"} | {f"a{n}.h{h}" for n in range(3) for h in range(4)} | {"m0", "m1", "m2"}
    assert read_eap(tmp_path / "a.json").effects.ranked() == effects.ranked()


def test_the_number_of_edges_is_that_of_the_papers(tmp_path):
    """GPT-2 small has 32,491 edges between its components (Conmy et al. 2023; Syed et al. 2023)."""
    write_eap(eap_circuit(effects_of(12, 12), 768), tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert len(document["edges"]) == 32_491 and len(document["nodes"]) == 158
    assert all(edge["in_graph"] for edge in document["edges"].values())
    read_eap(tmp_path / "a.json")


@pytest.mark.parametrize("top", [1, 6, 15, 40])
def test_a_circuit_is_what_lies_on_paths(top):
    """Against a graph library's ancestors and descendants."""
    for seed in range(5):
        effects = effects_of(3, 2, seed=seed)
        circuit = eap_circuit(effects, 8, top=top)
        strongest = [(source, target) for source, target, _ in effects.ranked()[:top]]
        whole = nx.MultiDiGraph([(source, target.split("<")[0]) for source, target in strongest])
        whole.add_nodes_from(["input", "logits"])
        fed = nx.descendants(whole, "input") | {"input"}
        needed = nx.ancestors(whole, "logits") | {"logits"}
        expected = {(s, t) for s, t in strongest if s in fed and t.split("<")[0] in needed}
        kept = {(effects.sources[u], effects.targets[t]) for u, t in circuit.kept_UT.nonzero().tolist()}
        assert kept == expected
        touched = {name for s, t in expected for name in (s, t.split("<")[0])} | {"logits"}
        assert {name for name, inside in circuit.nodes.items() if inside} == touched


def test_what_a_file_leaves_out_scores_nothing(tmp_path):
    """As EAP's own reader has it."""
    cfg = {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 4, "d_head": 2}
    edges = {"input->a0.h1<v>": {"score": -0.5, "in_graph": True}, "a0.h1->m0": {"score": 2, "in_graph": False}}
    nodes = {"input": {"in_graph": True}, "a0.h1": {"in_graph": True, "neurons": [True] * 4}}
    (tmp_path / "a.json").write_text(json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}))
    circuit = read_eap(tmp_path / "a.json")
    assert circuit.effects.ranked()[:2] == [("a0.h1", "m0", 2.0), ("input", "a0.h1<v>", -0.5)]
    assert int((circuit.effects.effect_UT == 0).sum()) == 6 + 3 + 4 - 2 and int(circuit.kept_UT.sum()) == 1
    assert [name for name, inside in circuit.nodes.items() if inside] == ["input", "a0.h1"]


BAD = [
    (lambda d: d.pop("edges"), "the circuit lacks 'edges': add it, an object"),
    (lambda d: d["cfg"].update(n_layers="2"), r"cfg.n_layers is '2': it must be a whole number"),
    (lambda d: d["cfg"].update(n_heads=0), "cfg.n_heads is 0: it must be at least 1"),
    (lambda d: d["cfg"].update(n_layers=10**9), "cfg has 1000000000 layers of 2 heads, and at most"),
    (lambda d: d["cfg"].update(parallel_attn_mlp=1), "cfg.parallel_attn_mlp is 1: it must be true or false"),
    (lambda d: d["cfg"].pop("d_model"), "cfg lacks 'd_model'"),
    (
        lambda d: d["nodes"].update({"m9": {"in_graph": True}}),
        r"nodes\['m9'\] is no component of a model of 2 layers and 2 heads",
    ),
    (lambda d: d["nodes"].update(m0=True), r"nodes\['m0'\] is True: it must be an object"),
    (lambda d: d["nodes"]["m0"].update(score=float("nan")), r"nodes\['m0'\].score is nan: it must be a number"),
    (lambda d: d["edges"].update({"m0->a1.h0": {"score": 0.0, "in_graph": True}}), r"edges\['m0->a1.h0'\] is no edge of a model"),
    (lambda d: d["edges"].update({"m1->m0": {"score": 0.0, "in_graph": True}}), r"edges\['m1->m0'\] goes backwards"),
    (lambda d: d["edges"].update({"m0->m0": {"score": 0.0, "in_graph": True}}), r"edges\['m0->m0'\] goes backwards"),
    (lambda d: d["edges"]["m0->m1"].update(score=None), r"edges\['m0->m1'\].score is null: it must be a number"),
    (lambda d: d["edges"]["m0->m1"].update(in_graph=0), r"edges\['m0->m1'\].in_graph is 0: it must be true or false"),
    (lambda d: d["edges"]["m0->m1"].pop("score"), r"edges\['m0->m1'\] lacks 'score'"),
    (lambda d: d["edges"]["m0->m1"].update(score=float("inf")), r"edges\['m0->m1'\].score is inf"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_bad_values_of_a_circuit_are_named_in_one_line(spoil, message, tmp_path):
    path = tmp_path / "a.json"
    write_eap(eap_circuit(effects_of(2, 2), 4), path)
    document = json.loads(path.read_text())
    spoil(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as caught:
        read_eap(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_edge_that_is_there_twice_and_a_circuit_of_too_many(tmp_path):
    path = tmp_path / "a.json"
    write_eap(eap_circuit(effects_of(1, 1), 4), path)
    text = path.read_text()
    path.write_text(text.replace('"edges": {', '"edges": {"input->m0": {"score": 1.0, "in_graph": true}, '))
    with pytest.raises(UserError, match="edges has 'input->m0' twice: keep one of them"):
        read_eap(path)
    for top in (0, 10**6):
        with pytest.raises(UserError, match=rf"top={top} edges: the model has 8, use a number from 1 to that"):
            eap_circuit(effects_of(1, 1), 4, top=top)
