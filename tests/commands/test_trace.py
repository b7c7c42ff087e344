"""`saebench trace`: the graph, its scores and its check, as the library makes them, of one prompt or several; wrong input in one line."""

import json
import re

import pytest
from helpers import SENTENCE

from saebench.circuits.graphs.graph_file import load_graph
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.sets.graph_sets import GraphSet
from saebench.cli import main
from saebench.commands.trace import chosen
from saebench.interop import read_circuit_tracer
from saebench.runs import Run

PROMPT = "def value_3(x):"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm_directory):
    """A transcoder for each of the three MLPs, one Lorsa, and an SAE, trained by the command."""
    folder = tmp_path_factory.mktemp("trace")
    (folder / "text.txt").write_text("".join(SENTENCE.format(i, i * i % 17) for i in range(120)))
    mlp = [(f"blocks.{n}.mlp.hook_in", f"blocks.{n}.hook_mlp_out") for n in range(3)]
    attention = ("blocks.1.attn.hook_in", "blocks.1.hook_attn_out")
    sites = [*(site for pair in [*mlp, attention] for site in pair), "blocks.1.hook_resid_post"]
    transcoders = "".join(
        f'[[dictionaries]]\nid = "mlp-{n}"\narchitecture = "transcoder"\nsite = "{a}"\ntarget = "{b}"\nd_sae = 48\nk = 4\n'
        for n, (a, b) in enumerate(mlp)
    )
    (folder / "recipe.toml").write_text(f"""
name = "tiny"
model = {{ name = "{tiny_lm_directory}" }}
text = {{ source = "{folder / "text.txt"}" }}
activations = {{ sites = {json.dumps(sites)}, context_size = 16, mode = "stream" }}
training = {{ num_tokens = 1600, batch_size = 64, lr = 0.01 }}
evaluation = {{ num_tokens = 256 }}
{transcoders}
[[dictionaries]]
id = "attention-1"
architecture = "lorsa"
site = "{attention[0]}"
target = "{attention[1]}"
d_sae = 32
k = 4
[[dictionaries]]
id = "stream"
architecture = "topk"
site = "blocks.1.hook_resid_post"
d_sae = 48
k = 4
""")
    assert main(["train", str(folder / "recipe.toml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def call(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main(["trace", *map(str, arguments), "--json"]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_graph_scores_and_check(run, tiny_lm, capsys):
    result, err = call(capsys, run, "--prompt", PROMPT, "--verify", 10)
    assert result["graph"] == str(run / "graphs" / "def-value-3-x.json")
    graph = load_graph(result["graph"])
    again = trace(tiny_lm, chosen(Run.open(run), None), PROMPT, max_features=2048)
    assert (len(graph), graph.num_edges) == (len(again), again.num_edges) == (result["nodes"], result["edges"])
    assert {each["name"] for each in graph.dictionaries} == {
        "mlp-0",
        "mlp-1",
        "mlp-2",
        "attention-1",
    }  # the SAE writes what it reads
    assert result["replacement_score"] == pytest.approx(again.scores().replacement)
    assert result["completeness_score"] == pytest.approx(again.scores().completeness)
    assert -1 <= result["spearman"] <= 1 and 0 < result["nodes_pruned"] <= result["nodes"]
    assert sum(result["targets"].values()) <= 1 and "Spearman" in err and "replacement" in err


def test_what_is_explained(run, tiny_lm, capsys):
    a, b = tiny_lm.token_strings[60], tiny_lm.token_strings[70]
    result, _ = call(capsys, run, "--prompt", PROMPT, "--token", a, "--against", b, "--verify", 0, "--name", "two")
    assert result["spearman"] is None and len(result["targets"]) == 1
    assert result["graph"].endswith("graphs/two.json")
    one, _ = call(capsys, run, "--prompt", PROMPT, "--token", a, "--verify", 0, "--dictionary", "mlp-1")
    assert len(load_graph(one["graph"]).dictionaries) == 1


def test_what_is_checked_is_numbered_as_in_the_file(run, capsys):
    """Edges are checked in the pruned graph; what is kept names the nodes of the whole one."""
    result, _ = call(capsys, run, "--prompt", PROMPT, "--verify", 5)
    graph = load_graph(result["graph"])
    assert graph.extra["verification"] == result["verification"]
    weights = {(source, target): weight for target in range(len(graph)) for source, weight in graph.edges_into(target)}
    for check in result["verification"]["edges"]:
        assert check["predicted_edge"] == pytest.approx(-weights[check["source"], check["target"]], rel=1e-4)
        kinds = graph.node(check["source"]).kind, graph.node(check["target"]).kind
        assert kinds == (check["source_kind"], check["target_kind"])
    for check in result["verification"]["nodes"]:
        assert graph.node(check["node"]).kind == check["kind"]


def test_the_pruned_graph_for_circuit_tracer(run, tmp_path, capsys):
    result, _ = call(capsys, run, "--prompt", PROMPT, "--verify", 0, "--export", tmp_path / "graph.json")
    read = read_circuit_tracer(tmp_path / "graph.json")
    assert (len(read), read.num_edges) == (result["nodes_pruned"], result["edges_pruned"])
    assert main(["trace", str(run), "--prompt", PROMPT, "--prompt", "x", "--export", str(tmp_path / "two.json")]) == 2
    assert "--export is for the graph of one prompt" in capsys.readouterr().err and not (tmp_path / "two.json").exists()


def test_several_prompts(run, tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text("def value_4(x):\n\ndef value_5(x):\n")
    result, err = call(capsys, run, "--prompt", PROMPT, "--prompts", lines, "--verify", 3)
    assert [each["prompt"] for each in result["prompts"]] == [PROMPT, "def value_4(x):", "def value_5(x):"]
    graphs = [load_graph(each["graph"]) for each in result["prompts"]]
    expected = GraphSet([graph.prune() for graph in graphs])
    assert result["stability"] == {of: expected.stability(of).as_dict() for of in ("features", "nodes", "edges")}
    assert result["nodes"] == [node.as_dict() for node in expected.nodes(top=100)]
    assert result["edges"] == [edge.as_dict() for edge in expected.edges(top=100)]
    assert result["nodes_in_all"] == len(expected.intersection().nodes)
    assert all(len(each["verification"]["edges"]) == 3 for each in result["prompts"])
    assert "stability of features" in err and "3 of 3" in err and result["nodes"][0]["key"][:9] in err
    again, err = call(capsys, run, "--prompt", PROMPT, "--prompts", lines, "--verify", 3)
    assert all(each.pop("loaded") for each in again["prompts"]) and "(there already)" in err
    for each in result["prompts"]:
        each.pop("loaded")
    assert again == result
    placed, _ = call(capsys, run, "--prompt", PROMPT, "--prompts", lines, "--verify", 0, "--positions", "from_end")
    assert "/start/" in json.dumps([node["key"] for node in placed["nodes"]])


def test_prompts_of_several_lines(run, tmp_path, capsys):
    lines = tmp_path / "prompts.jsonl"
    prompts = ["def a(x):\n    return", "x = 3\ny ="]
    lines.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    result, _ = call(capsys, run, "--prompts", lines, "--verify", 0, "--features", 20)
    assert [each["prompt"] for each in result["prompts"]] == prompts
    lines.write_text(json.dumps(prompts[0]))
    one, _ = call(capsys, run, "--prompts", lines, "--verify", 0, "--features", 20)
    assert load_graph(one["graph"]).prompt == prompts[0] and "stability" not in one


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, [], "there is no file .*: name one with a prompt on each line"),
        ("\n \n", [], "has no prompt: give one a line"),
        ("x\n", ["--prompt", "x"], "prompt 2 is the same as prompt 1"),
        ("x\ny\n", ["--name", "z"], "--name is for the graph of one prompt"),
        (b"\xff\xfe\x00", [], "is not text in UTF-8"),
    ],
)
def test_wrong_files_of_prompts(content, arguments, said, run, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    result, err = call(capsys, run, "--prompts", path, *arguments, code=2)
    assert re.search(said, result["error"]) and "\n" not in result["error"] and "Traceback" not in err


@pytest.mark.parametrize("line", ["x = 3", "3", '["x"]'])
def test_lines_that_are_no_json_strings(line, run, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"x"\n{line}\n')
    result, _ = call(capsys, run, "--prompts", path, code=2)
    assert "line 2 of" in result["error"] and "is no JSON string" in result["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no prompt: give --prompt TEXT, or --prompts FILE"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "x" * 500], "positions|tokens"),
        (["--prompt", "x", "--token", "no such token"], "token"),
        (["--prompt", "x", "--against", "y"], "--against compares with --token"),
        (["--prompt", "x", "--dictionary", "other"], "no dictionary 'other': it has attention-1, mlp-0"),
        (["--prompt", "x", "--dictionary", "stream"], "has no transcoder, cross-layer transcoder or Lorsa"),
        (["--prompt", "x", "--features", 0], "max_features=0"),
        (["--prompt", "x", "--keep", 0], "keep=0"),
        (["--prompt", "x", "--name", "../up"], "graph name '../up'"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, run, capsys):
    result, err = call(capsys, run, *arguments, code=2)
    assert re.search(said, result["error"]) and "\n" not in result["error"] and "Traceback" not in err
