"""Circuit without a browser: figures against those of the package, links to features and back, addresses, refusals in a line."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest

pytest.importorskip("streamlit")

from page_run import HOSTILE, NAME, add_app_to_path, hostile_text
from test_pages import html_of, parameter, problems, text_of

from saebench.activations import ActivationStream
from saebench.circuits.graphs.graph_file import load_graph
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.graphs.verification import verify
from saebench.circuits.sets.supernodes import load_supernodes
from saebench.dictionaries import load_dictionary
from saebench.features import index
from saebench.features.labelling.notes import Notes
from saebench.lm import load_lm, pack
from saebench.runs import Run

PROMPT = f"return 17 + 4{HOSTILE}"
SLUG = "by-hand"


@pytest.fixture(scope="module")
def traced_run(hostile_run, tmp_path_factory):
    """A copy of the run with its transcoder indexed and a graph of a hostile prompt; the pruned one has been checked."""
    path = tmp_path_factory.mktemp("traced") / "traced"
    shutil.copytree(hostile_run.path, path)
    run = Run.open(path)
    lm = load_lm(run.record["recipe"]["model"]["name"])
    dictionary = load_dictionary(path / "dictionaries" / "other")
    graph = trace(lm, {"other": dictionary}, PROMPT)
    latent = int(graph.nodes.latent_N[_features(graph)[0]])
    contexts = pack(hostile_text(), lm.tokenizer, 16)
    store = index(dictionary, ActivationStream(lm, contexts, dictionary.config.sites), run.features("other"), lm=lm)
    Notes.open(store).change(latent, label=f"{HOSTILE} {NAME}")
    verify(lm, {"other": dictionary}, graph, 20)
    graph.save(path / "graphs" / f"{SLUG}.json")
    return path


@pytest.fixture
def own_run(traced_run, tmp_path):
    shutil.copytree(traced_run, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture(scope="module")
def graph(traced_run):
    return load_graph(traced_run / "graphs" / f"{SLUG}.json")


def _features(graph) -> list[int]:
    """By influence."""
    influence_N = graph.influence()
    return sorted((n for n in range(len(graph)) if graph.is_kind("feature")[n]), key=lambda n: -influence_N[n])


def press(test, key: str):
    test.button(key=key).click().run()
    assert not test.exception, [one.value for one in test.exception]
    return test


def figure_of(test) -> dict:
    return json.loads(next(chart.proto.spec for chart in test.get("plotly_chart") if "takes away" in chart.proto.spec))


def ids(test) -> list[str]:
    return [id for trace in figure_of(test)["data"] for id in trace.get("customdata", [])]


# --- what is shown ---


def test_scores_before_and_after_pruning_with_their_bounds(opened, traced_run, graph):
    for shares in ((0.8, 0.98), (0.95, 0.9)):
        test = opened("circuit", runs=[traced_run], graph=SLUG, nodes=shares[0], links=shares[1])
        pruned, text = graph.prune(*shares), text_of(test)
        for one in (graph, pruned):
            told = one.scores().as_dict()
            for name in ("replacement", "completeness"):
                assert f"{told[name]:.3f} ({told[f'{name}_low']:.3f} to {told[f'{name}_high']:.3f})" in text
        influence_N, linked = pruned.influence(), set(pruned.sources_E.tolist())
        drawn = ids(test)
        assert len(drawn) == len(set(drawn))
        for n in _features(pruned):
            assert pruned.id(n) in drawn and n in linked
        assert f"{influence_N[_features(pruned)[0]]:.3f}" in text


def test_every_choice_is_in_the_address(opened, traced_run, graph):
    test = opened("circuit", runs=[traced_run], prompt=PROMPT)
    test.selectbox(key="w-explain").set_value("difference").run()
    test.text_input(key="w-logit").set_value("4").run()
    test.text_input(key="w-against").set_value("1").run()
    assert [parameter(test, key) for key in ("prompt", "explain", "logit", "against")] == [PROMPT, "difference", "4", "1"]
    test = opened("circuit", runs=[traced_run], graph=SLUG)
    test.slider(key="w-nodes").set_value(0.5).run()
    test.slider(key="w-links").set_value(0.9).run()
    test.toggle(key="w-grouped").set_value(True).run()
    assert [parameter(test, key) for key in ("graph", "nodes", "links", "grouped")] == [SLUG, "0.5", "0.9", "1"]
    again = opened("circuit", runs=[traced_run], graph=SLUG, nodes=0.5, links=0.9, grouped=1)
    assert figure_of(again) == figure_of(test)
    for wrong in ("nan", "-4", "x", "inf"):
        assert not problems(opened("circuit", runs=[traced_run], graph=SLUG, nodes=wrong, links=wrong, grouped="?"))


def test_the_zoom_is_in_the_address(opened, traced_run):
    ranges = []
    for zoom in ("", "0.25_0.75_0.2_0.4", "nan_1_0_1", "0.9_0.1_0_1", "1_2", "x"):
        axes = figure_of(opened("circuit", runs=[traced_run], graph=SLUG, zoom=zoom))["layout"]
        ranges.append([*axes["xaxis"]["range"], *axes["yaxis"]["range"]])
    (x0, x1, y0, y1), part, *others = ranges
    assert part == pytest.approx([x0 + (x1 - x0) / 4, x1 - (x1 - x0) / 4, y0 + 0.2 * (y1 - y0), y0 + 0.4 * (y1 - y0)])
    assert all(other == ranges[0] for other in others)


def test_hostile_texts_are_text(opened, traced_run, graph):
    node = graph.id(_features(graph)[0])
    test = opened("circuit", runs=[traced_run], graph=SLUG, prompt=PROMPT, node=node)
    assert HOSTILE in text_of(test) and NAME in text_of(test)
    assert "<img" not in html_of(test) and "<b onmouseover" not in html_of(test)
    for chart in test.get("plotly_chart"):
        assert "<img" not in chart.proto.spec and "\\u003cimg" not in chart.proto.spec
    for bad in (HOSTILE, "group/<b>", "feature/other/99/1", "../../etc", "%00"):
        test = opened("circuit", runs=[traced_run], graph=SLUG, node=bad)
        assert len(problems(test)) == 1 and "<img" not in html_of(test) and "<b>'" not in html_of(test)


# --- one node ---


def test_a_node_has_its_strongest_inputs_and_outputs(opened, traced_run, graph):
    number = next(n for n in _features(graph.prune()) if len(graph.prune().edges_into(n)) > 2)
    pruned = graph.prune()
    test = opened("circuit", runs=[traced_run], graph=SLUG, node=pruned.id(number))
    tables = [table for table in re.findall(r"<table.*?</table>", html_of(test), re.S) if "<th>weight</th>" in table]
    assert len(tables) == 2
    into = pruned.edges_into(number)[:12]
    out = sorted(((t, w) for t in range(len(pruned)) for s, w in pruned.edges_into(t) if s == number), key=lambda e: -abs(e[1]))[
        :12
    ]
    for table, expected in zip(tables, (into, out), strict=True):
        assert re.findall(r"</i></span>([-+][^<]+)</td>", table) == [f"{weight:+.3g}" for _, weight in expected]
        nodes = re.findall(r"node=([^\"&]+)\"", table)
        assert [node.replace("%2F", "/") for node in nodes] == [pruned.id(n) for n, _ in expected]


def test_a_node_that_pruning_leaves_out_is_shown_and_said(opened, traced_run, graph):
    gone = [n for n in _features(graph) if graph.id(n) not in {graph.prune(0.3).id(m) for m in range(len(graph.prune(0.3)))}]
    test = opened("circuit", runs=[traced_run], graph=SLUG, nodes=0.3, node=graph.id(gone[0]))
    assert "leaves this node out" in text_of(test) and "Inputs" in text_of(test) and not problems(test)


def test_from_a_node_to_its_feature_to_steering_and_back(opened, traced_run, graph):
    number = _features(graph)[0]
    latent, id = int(graph.nodes.latent_N[number]), graph.id(number)
    shown = html_of(opened("circuit", runs=[traced_run], graph=SLUG, node=id))
    assert f"feature?feature={latent}&amp;run=traced&amp;dictionary=other" in shown
    assert f"steering?edits={latent}&amp;run=traced&amp;dictionary=other" in shown
    feature = opened("feature", runs=[traced_run], dictionary="other", feature=latent)
    (back,) = re.findall(r'href="(circuit\?[^"]+)"', html_of(feature))
    assert f"graph={SLUG}" in back and "zoom=" in back and f"%2F{latent}" in back and "run=traced" in back
    assert "Circuits with this feature" in text_of(feature)
    absent = next(i for i in range(32) if i not in set(graph.nodes.latent_N.tolist()))
    assert "Circuits with" not in text_of(opened("feature", runs=[traced_run], dictionary="other", feature=absent))
    steering = opened("steering", runs=[traced_run], dictionary="other", edits=latent)
    assert not problems(steering) and f"feature?run=traced&amp;dictionary=other&amp;feature={latent}" in html_of(steering)


def test_a_run_that_is_not_indexed_says_so(opened, own_run, graph):
    shutil.rmtree(own_run / "features" / "other")
    test = opened("circuit", runs=[own_run], graph=SLUG, node=graph.id(_features(graph)[0]))
    assert "saebench index" in text_of(test) and "Feature page" not in text_of(test) and not problems(test)


# --- supernodes ---


def test_supernodes_are_drawn_and_edited(opened, own_run, graph):
    path = own_run / "graphs" / f"{SLUG}.json"
    pruned = graph.prune()
    first, second = (pruned.id(n) for n in _features(pruned)[:2])
    test = opened("circuit", runs=[own_run], graph=SLUG, node=first, grouped=1)
    _submit(test, "Move", {"group-to": HOSTILE})
    groups = load_supernodes(path, graph)
    assert groups.of(graph.find(first)) == HOSTILE
    test = opened("circuit", runs=[own_run], graph=SLUG, node=second, grouped=1)
    assert f"group/{HOSTILE}" in ids(test)
    _submit(test, "Move", {"group-to": "other"})
    _submit(test, "Merge", {"group-merged": ["other", HOSTILE], "group-into": "both"})
    groups = load_supernodes(path, graph)
    assert set(groups["both"].members) >= {graph.find(first), graph.find(second)}
    test = opened("circuit", runs=[own_run], graph=SLUG, node="group/both", grouped=1)
    assert "group/both" in ids(test) and first not in ids(test)
    assert "<img" not in html_of(test) and not problems(test)
    _submit(test, "Rename", {"group-old": "both", "group-new": "one"})
    assert parameter(test, "node") == "group/one" and "group/one" in ids(test)
    _submit(test, "Rename", {"group-old": "one", "group-new": " "})
    assert "name is empty" in problems(test)[0]
    _submit(test, "Remove", {"group-gone": "one"})
    assert load_supernodes(path, graph).of(graph.find(first)) is None
    press(test, "group-automatic")
    assert load_supernodes(path, graph) is None


def _submit(test, label: str, values: dict) -> None:
    for key, value in values.items():
        for kind in ("selectbox", "text_input", "multiselect"):
            for widget in test.get(kind):
                if widget.key == key:
                    widget.set_value(value)
    next(button for button in test.button if button.label == label).click().run()
    assert not test.exception, [one.value for one in test.exception]


def test_damaged_supernodes_are_told_and_the_graph_is_shown(opened, own_run):
    (own_run / "graphs" / f"{SLUG}.supernodes.json").write_text("{")
    test = opened("circuit", runs=[own_run], graph=SLUG)
    assert len(problems(test)) == 1 and "supernodes" in problems(test)[0] and ids(test)


# --- predicted against measured ---


def test_what_the_graph_holds_is_shown(opened, traced_run, own_run, graph):
    found, text = graph.extra["verification"], text_of(opened("circuit", runs=[traced_run], graph=SLUG))
    for name in ("total", "edge"):
        assert f"{found[name]['spearman']:.2f}" in text and f"{found[name]['slope']:.2f}" in text
    for kinds in found["by_kind"]:
        assert kinds.replace(">", " to ") in text
    bare = load_graph(traced_run / "graphs" / f"{SLUG}.json")
    bare.extra.clear()
    bare.save(own_run / "graphs" / "bare.json")
    test = opened("circuit", runs=[own_run], graph="bare")
    assert "Not measured yet" in text_of(test) and test.button(key="circuit-verify")
    bare.extra["verification"] = {"edges": 3}
    bare.save(own_run / "graphs" / "bare.json")
    test = opened("circuit", runs=[own_run], graph="bare")
    assert "damaged" in problems(test)[0] and len(problems(test)) == 1


# --- what builds ---


def worker():
    add_app_to_path()
    import circuit_worker

    return circuit_worker


def order(run, slug: str, **asked) -> str:
    whole = {"prompt": PROMPT, "explain": "likeliest", "token": "", "against": "", "dictionary": "", "latent": 0, "place": -1}
    path = run / "graphs" / f"{slug}.json"
    return str(worker().Order(str(run), str(path), whole | asked if asked else {}, verify=10))


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"explain": "likeliest"}, "logit"),
        ({"explain": "token", "token": HOSTILE}, "logit"),
        ({"explain": "difference", "token": "4", "against": "1"}, "difference"),
        ({"explain": "feature", "dictionary": "other", "latent": 5, "place": 3}, "feature"),
    ],
)
def test_the_process_traces_every_target(own_run, asked, kind):
    worker().main(order(own_run, "made", **asked))
    made = load_graph(own_run / "graphs" / "made.json")
    assert {made.node(int(n)).kind for n in made.targets} == {kind} and made.prompt == PROMPT
    if kind == "feature":
        (target,) = made.targets.tolist()
        assert (made.nodes.latent_N[target], made.nodes.position_N[target]) == (5, 3)


def test_the_process_checks_a_graph_in_its_own_numbers(own_run, graph):
    path = own_run / "graphs" / "bare.json"
    bare = load_graph(own_run / "graphs" / f"{SLUG}.json")
    bare.extra.clear()
    bare.save(path)
    worker().main(order(own_run, "bare"))
    found = load_graph(path).extra["verification"]
    assert len(found["edges"]) == 10
    for edge in found["edges"]:
        weight = dict(graph.edges_into(edge["target"]))[edge["source"]]
        assert edge["predicted_edge"] == pytest.approx(found["delta"] * weight, rel=1e-4)
        assert edge["source_kind"] == graph.node(edge["source"]).kind


def test_progress_is_read_while_the_process_writes(opened, traced_run, tmp_path):
    opened("circuit", runs=[traced_run])
    import subprocess
    import sys

    import circuit_building

    lines = ["opening the model", "features: 512/2,048 features, 90 features/s, 3 s left", "x" * 5000]
    with (tmp_path / "said").open("w+b") as messages:
        script = (
            "import sys,time\nfor line in {!r}:\n print(line, file=sys.stderr, flush=True)\n sys.stdin.readline()\ntime.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", script.format(lines)], stdin=subprocess.PIPE, stderr=messages)
        job = circuit_building.Building(process, messages, time.monotonic(), "slug")
        for expected in (("opening the model", None), ("features: 512 of 2,048", 0.25), ("x" * 100, None)):
            until = time.monotonic() + 30
            while job.stage != expected and time.monotonic() < until:
                time.sleep(0.05)
            assert job.stage == expected
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert job.running
        job.stop()
        assert not job.running and job.stopped


# --- refusals ---


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "return 17 + 4 " * 40}, "exceeds the model's 64 positions"),
        ({"prompt": PROMPT, "explain": "token"}, "no token is named"),
        ({"prompt": PROMPT, "explain": "token", "logit": "zebra crossing"}, "is not in the vocabulary as one token"),
        ({"prompt": PROMPT, "explain": "difference", "logit": "4"}, "a difference is of two tokens"),
        ({"prompt": PROMPT, "explain": "difference", "logit": "4", "against": "4"}, "a difference is of two tokens"),
        ({"prompt": PROMPT, "explain": "feature", "dictionary": "a"}, "a is no dictionary of the graph: choose one of other"),
        ({"prompt": PROMPT, "explain": "feature", "dictionary": "other", "place": 400}, "position 400 is outside the prompt's"),
    ],
)
def test_what_cannot_be_traced_is_told_in_a_line(opened, own_run, asked, told):
    test = press(opened("circuit", runs=[own_run], **asked), "circuit-build")
    (problem,) = problems(test)
    assert told in problem and "\n" not in problem.strip()
    assert [path.name for path in (own_run / "graphs").glob("*.json")] == [f"{SLUG}.json"]


def test_a_run_without_transcoders_says_what_to_do(opened, own_run):
    shutil.rmtree(own_run / "dictionaries" / "other")
    shutil.rmtree(own_run / "features" / "other")
    test = opened("circuit", runs=[own_run])
    assert "no transcoder, cross-layer transcoder or Lorsa" in text_of(test) and "saebench train bundled-circuits" in text_of(
        test
    )
    assert not [button for button in test.button if button.key == "circuit-build"] and SLUG in html_of(test)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "damaged"),
        ("[]", "not a saebench-graph"),
        ('{"format": "saebench-graph", "version": 9}', "version 9"),
        ("", "damaged"),
    ],
)
def test_a_damaged_graph_is_told_in_a_line(opened, own_run, content, told):
    (own_run / "graphs" / "broken.json").write_text(content)
    test = opened("circuit", runs=[own_run], graph="broken")
    assert told in problems(test)[-1] and "\n" not in problems(test)[-1].strip()
    assert SLUG in html_of(test)  # the others are there


@pytest.mark.parametrize("slug", ["nowhere", "../secret", "<img src=x>", "a" * 400])
def test_a_graph_that_is_not_there_is_told(opened, traced_run, slug):
    test = opened("circuit", runs=[traced_run], graph=slug)
    assert len(problems(test)) == 1 and "<img" not in html_of(test)


def test_a_graph_of_another_run_is_forgotten(opened, traced_run, hostile_run):
    test = opened("circuit", runs=[traced_run, hostile_run.path], run="traced", graph=SLUG, node="token/1")
    assert ids(test)
    test.selectbox(key="w-run").set_value("small").run()
    assert "graph" not in test.query_params and "node" not in test.query_params and not problems(test)


def test_a_graph_that_is_there_is_not_built_again(opened, own_run):
    test = opened("circuit", runs=[own_run], prompt=PROMPT)
    import circuit_state

    asked = circuit_state.Asked(PROMPT)
    shutil.copy(own_run / "graphs" / f"{SLUG}.json", own_run / "graphs" / f"{asked.slug}.json")
    press(test, "circuit-build")
    assert parameter(test, "graph") == asked.slug and ids(test)


def test_names_of_files_tell_prompts_and_targets_apart():
    add_app_to_path()
    from circuit_state import Asked

    found = [
        Asked("a b"),
        Asked("A b"),
        Asked("a b", "token", "x"),
        Asked("a b", "token", "y"),
        Asked("#!?"),
        Asked("日本語" * 50),
    ]
    assert len({one.slug for one in found}) == len(found)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,50}", one.slug) for one in found)
