"""Sets of graphs: sums, presence, intervals, likeness and differences, each against plain loops, closed forms or SciPy's."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import scipy.stats
from hand_graphs import graph_of
from mixes import TEXT

from saebench.circuits.graphs.targets import Logit
from saebench.circuits.graphs.tracing import trace
from saebench.circuits.intervals import means, wilson
from saebench.circuits.sets.graph_sets import GraphSet, difference
from saebench.errors import UserError


def prompt_graph(kinds, latents, positions, edges, weights, texts=None, size=None):
    """A graph by hand with latents (of logits: tokens) and positions of one's own."""
    graph = graph_of(kinds, edges, weights)
    nodes = graph.nodes
    for n, (kind, latent, position) in enumerate(zip(kinds, latents, positions, strict=True)):
        nodes.position_N[n] = position
        if kind == "feature":
            nodes.latent_N[n] = latent
        if kind == "logit":
            nodes.token_N[n] = latent
    size = size or max(positions) + 1
    graph.ids, graph.tokens = [0, *[3] * (size - 1)], texts or ["<s>", *"abcdefghij"[: size - 1]]
    return graph


def random_graph(seed, latents=30, features=12, size=6):
    """Tokens, an error, features of random latents at random positions, and two logits."""
    draw = np.random.default_rng(seed)
    places = sorted({(int(draw.integers(1, size)), int(draw.integers(latents))) for _ in range(features)})
    kinds = ["token"] * size + ["error"] + ["feature"] * len(places) + ["logit"] * 2
    of = [0] * (size + 1) + [latent for _, latent in places] + [5, 7]
    positions = [*range(size), 2, *(position for position, _ in places), size - 1, size - 1]
    edges = {}
    for target in range(size + 1, len(kinds)):
        for source in range(min(target, len(kinds) - 2)):
            if draw.random() < 0.5 or source == 0:
                edges[target, source] = float(draw.normal())
    return prompt_graph(kinds, of, positions, edges, {len(kinds) - 1: 0.25, len(kinds) - 2: 0.75}, size=size)


def closed_form(graph):
    """Figures of nodes and what edges carry, from dense matrices: [N], {(target, source): carried}."""
    W = graph.matrix().toarray().astype(np.float64)
    sums = np.abs(W).sum(1, keepdims=True)
    B = np.abs(W) / np.where(sums == 0, 1, sums)
    p = graph.nodes.weight_N
    figure = p @ np.linalg.inv(np.eye(len(graph)) - B)
    return figure, B * figure[:, None], W


def plain_key(graph, n, from_end):
    node = graph.node(n)
    name = {"feature": node.latent, "error": node.site, "token": graph.tokens[node.position], "logit": node.token}[node.kind]
    return (node.kind, name, (0 if node.position == 0 else node.position - len(graph.ids)) if from_end else None)


def looped(graphs, from_end=False):
    """Nodes and edges of a set by plain loops: {key: [figure by prompt]}, {(source, target): ([weight], [carried])}."""
    nodes = defaultdict(lambda: [None] * len(graphs))
    edges = defaultdict(lambda: ([None] * len(graphs), [None] * len(graphs)))
    for number, graph in enumerate(graphs):
        figure, carried, W = closed_form(graph)
        key = [plain_key(graph, n, from_end) for n in range(len(graph))]
        for n in range(len(graph)):
            nodes[key[n]][number] = (nodes[key[n]][number] or 0.0) + figure[n]
        for target, source in zip(*np.nonzero(W), strict=True):
            for column, value in zip(edges[key[source], key[target]], (W, carried), strict=True):
                column[number] = (column[number] or 0.0) + value[target, source]
    return nodes, edges


def spelled(key):
    kind, name, place = key
    at = "" if place is None else "/start" if place == 0 else f"/{place}"
    return {
        "feature": f"feature/d{at}/{name}",
        "error": f"error/{name}{at}",
        "token": f"token{at}/{name!r}",
        "logit": f"logit{at}/{name}",
    }[kind]


@pytest.mark.parametrize("from_end", [False, True])
def test_nodes_and_edges_are_what_plain_loops_give(from_end):
    graphs = [random_graph(seed, size=5 + seed % 3) for seed in range(5)]
    found = GraphSet(graphs, positions="from_end" if from_end else "dropped")
    nodes, edges = looped(graphs, from_end)
    listed = {node.key: node for node in found.nodes()}
    assert set(listed) == {spelled(key) for key in nodes}
    for key, figures in nodes.items():
        node = listed[spelled(key)]
        assert node.present == tuple(figure is not None for figure in figures)
        assert node.influence.value == pytest.approx(sum(figure or 0.0 for figure in figures) / 5)
        assert node.frequency.value == sum(node.present) / 5
        assert node.influence.low <= node.influence.value <= node.influence.high
    pairs = {(edge.source, edge.target): edge for edge in found.edges()}
    assert set(pairs) == {(spelled(source), spelled(target)) for source, target in edges}
    for (source, target), (weights, carried) in edges.items():
        edge = pairs[spelled(source), spelled(target)]
        assert edge.present == tuple(weight is not None for weight in weights)
        assert edge.weight.value == pytest.approx(sum(weight or 0.0 for weight in weights) / 5, abs=1e-6)
        assert edge.carried.value == pytest.approx(sum(load or 0.0 for load in carried) / 5)


def test_union_and_intersection_by_hand():
    """Latent 4 at two places of one prompt, at one of the other; 6 in the first alone."""
    kinds = ["token", "token", "feature", "feature", "feature", "logit"]
    edges = {(2, 0): 1.0, (3, 1): 1.0, (4, 1): 1.0, (5, 2): 1.0, (5, 3): 2.0, (5, 4): -1.0}
    one = prompt_graph(kinds, [0, 0, 4, 4, 6, 9], [0, 1, 0, 1, 1, 1], edges, {5: 1.0})
    two = prompt_graph(["token", "token", "feature", "logit"], [0, 0, 4, 9], [0, 1, 1, 1], {(2, 1): 3.0, (3, 2): 5.0}, {3: 1.0})
    found = GraphSet([one, two])
    four = next(node for node in found.nodes() if node.key == "feature/d/4")
    assert four.influence.value == pytest.approx((3 / 4 + 1) / 2)
    assert found.where("feature/d/4") == [(2, 3), (2,)]
    edge = next(edge for edge in found.edges() if edge.source == "feature/d/4")
    assert (edge.target, edge.weight.value) == ("logit/9", pytest.approx((3.0 + 5.0) / 2))
    both = found.intersection()
    assert {node.key for node in both.nodes} == {"token/'<s>'", "token/'a'", "feature/d/4", "logit/9"}
    assert {(edge.source, edge.target) for edge in both.edges} == {("token/'a'", "feature/d/4"), ("feature/d/4", "logit/9")}
    assert {node.key for node in found.union().nodes} - {node.key for node in both.nodes} == {"feature/d/6"}
    assert [node.key for node in found.nodes(kinds=["feature"], top=1)] == ["feature/d/4"]
    aligned = {node.key for node in GraphSet([one, two], positions="from_end").intersection().nodes}
    assert aligned == {"token/start/'<s>'", "token/-1/'a'", "feature/d/-1/4", "logit/-1/9"}


def test_intervals():
    for count, of in ((0, 7), (3, 7), (7, 7), (40, 100)):
        low, high = scipy.stats.binomtest(count, of).proportion_ci(method="wilson")
        assert (wilson(count, of).low, wilson(count, of).high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    draw = np.random.default_rng(0)
    for count in (2, 4):  # Student's
        few = draw.normal(size=(count, 3))
        for k, found in enumerate(means(few)):
            low, high = scipy.stats.t.interval(0.95, count - 1, few[:, k].mean(), scipy.stats.sem(few[:, k]))
            assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    many = draw.normal(size=(300, 3))
    for k, found in enumerate(means(many, draws=4000)):
        half = scipy.stats.t.ppf(0.975, 299) * many[:, k].std(ddof=1) / math.sqrt(300)
        assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert math.isnan(means(few[:1])[0].low)


def test_intervals_cover():
    """Of 600 samples of eight, nineteen in twenty intervals should hold the mean; with tails this long a little fewer do."""
    samples = np.random.default_rng(1).exponential(size=(8, 600))
    held = np.mean([found.low <= 1.0 <= found.high for found in means(samples)])
    assert 0.89 <= held <= 0.97


# --- stability ---


def jaccard_by_hand(a, b):
    keys = set(a) | set(b)
    least = sum(min(a.get(key, 0.0), b.get(key, 0.0)) for key in keys)
    return least / sum(max(a.get(key, 0.0), b.get(key, 0.0)) for key in keys)


def test_stability_is_the_mean_jaccard_of_pairs():
    graphs = [random_graph(seed, latents=8) for seed in range(6)]
    found, (nodes, edges) = GraphSet(graphs), looped(graphs)
    tables = {
        "nodes": [{key: figures[p] for key, figures in nodes.items() if figures[p] is not None} for p in range(6)],
        "edges": [{key: load[p] for key, (_, load) in edges.items() if load[p] is not None} for p in range(6)],
    }
    tables["features"] = [{key: value for key, value in table.items() if key[0] == "feature"} for table in tables["nodes"]]
    for of, listed in tables.items():
        pairs = list(itertools.combinations(listed, 2))
        known = found.stability(of)
        assert known.weighted.value == pytest.approx(np.mean([jaccard_by_hand(*pair) for pair in pairs]))
        assert known.plain.value == pytest.approx(np.mean([len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in pairs]))
        assert known.weighted.low <= known.weighted.value <= known.weighted.high
    assert found.stability().as_dict() == GraphSet(graphs).stability().as_dict()


def test_equal_graphs_are_stable_and_four_have_no_interval():
    graph = random_graph(3)
    same = GraphSet([graph] * 5).stability("edges")
    assert (same.weighted.value, same.weighted.low, same.plain.value) == pytest.approx((1.0, 1.0, 1.0))
    four = GraphSet([graph, *map(random_graph, range(4, 7))]).stability()
    assert math.isnan(four.weighted.low) and four.as_dict()["weighted"][1] is None
    with pytest.raises(UserError, match="nothing to be compared with"):
        GraphSet([graph]).stability()


def only_features(latents):
    """A prompt whose features all carry the same."""
    kinds = ["token", *["feature"] * len(latents), "logit"]
    edges = {(1 + i, 0): 1.0 for i in range(len(latents))} | {(len(latents) + 1, 1 + i): 1.0 for i in range(len(latents))}
    return prompt_graph(kinds, [0, *latents, 5], [0, *[1] * len(latents), 1], edges, {len(latents) + 1: 1.0})


def test_chance_is_that_of_drawing_latents_from_the_dictionary():
    """Ten of 99 latents in either prompt, of equal figures: the overlap is hypergeometric, and J = overlap / (20 - overlap)."""
    graphs = [only_features(range(10)), only_features(range(10))]
    found = GraphSet(graphs).stability()
    overlap = np.arange(11)
    expected = (scipy.stats.hypergeom(99, 10, 10).pmf(overlap) * overlap / (20 - overlap)).sum()
    assert found.weighted.value == pytest.approx(1.0)
    assert found.chance.value == pytest.approx(expected, abs=0.012)
    assert found.chance_p == pytest.approx(1 / 101)


def test_control_of_unrelated_prompts():
    """Every prompt has latents 0 to 4; the set shares 10 to 19 beside, the control 20 to 29."""
    draw = np.random.default_rng(0)
    some = lambda first: [*range(5), *draw.choice(np.arange(first, first + 10), 8, replace=False)]  # noqa: E731
    a, b = ([only_features(some(first)) for _ in range(6)] for first in (10, 20))
    found = GraphSet(a).stability(control=GraphSet(b))
    assert found.between.value == pytest.approx(5 / 21)
    assert found.excess.value == pytest.approx(found.weighted.value - 5 / 21)
    assert found.excess.low > 0 and found.between_p < 0.01
    alike = GraphSet(a[:3]).stability(control=GraphSet(a[3:]))
    assert alike.between_p > 0.05 and abs(alike.excess.value) < 0.15


# --- differences ---


def test_two_graphs_by_hand():
    a, b = only_features([1, 2]), only_features([2, 3, 4])
    found = difference(a, b)
    changes = {change.key: change for change in found.nodes}
    assert {key: (change.a, change.b, change.only) for key, change in changes.items() if change.kind == "feature"} == {
        "feature/d/1": (pytest.approx(1 / 2), 0.0, "a"), "feature/d/2": (pytest.approx(1 / 2), pytest.approx(1 / 3), ""),
        "feature/d/3": (0.0, pytest.approx(1 / 3), "b"), "feature/d/4": (0.0, pytest.approx(1 / 3), "b"),
    }  # fmt: skip
    assert changes["feature/d/2"].change.value == pytest.approx(1 / 6)
    assert math.isnan(changes["feature/d/2"].change.low) and math.isnan(changes["feature/d/2"].p)
    assert found.num_nodes == {"both": 3, "a": 1, "b": 2} and found.num_edges == {"both": 2, "a": 2, "b": 4}
    assert found.where("feature/d/2") == [(2,), (1,)]
    assert found.nodes[0].key == "feature/d/1" and found.as_dict()["nodes"][0]["only"] == "a"
    assert {edge.change.value for edge in found.edges if edge.only == "b"} == {-1.0}
    assert not any(node.change.value for node in difference(a, a).nodes)


def test_two_sets_against_scipy():
    graphs = [random_graph(seed, latents=10) for seed in range(11)]
    found = difference(GraphSet(graphs[:6]), graphs[6:])
    nodes, edges = looped(graphs)
    tables = {spelled(key): figures for key, figures in nodes.items()}
    listed = {change.key: change for change in found.nodes}
    links = {(change.source, change.target): change for change in found.edges}
    for key, (weights, _) in edges.items():
        if (change := links.get((spelled(key[0]), spelled(key[1])))) is not None:
            tables[change.source, change.target], listed[change.source, change.target] = weights, change
    tested = []
    for key, figures in tables.items():
        if key not in listed:
            continue
        x = np.array([figure or 0.0 for figure in figures])
        if np.ptp(x) < 1e-12:
            assert listed[key].change.value == pytest.approx(0.0, abs=1e-12) and not listed[key].p < 1
            continue
        own = scipy.stats.ttest_ind(x[:6], x[6:], equal_var=False)
        dealt = x.std(ddof=1) * math.sqrt(1 / 6 + 1 / 5)
        change = x[:6].mean() - x[6:].mean()
        error = max(abs(change / own.statistic) if own.statistic else 0.0, dealt)
        assert listed[key].change.value == pytest.approx(change, abs=1e-9)
        assert (listed[key].present_a, listed[key].present_b) == tuple(
            sum(f is not None for f in part) for part in (figures[:6], figures[6:])
        )
        half = scipy.stats.t.ppf(0.975, 4) * error
        assert (listed[key].change.low, listed[key].change.high) == (
            pytest.approx(change - half, abs=1e-6),
            pytest.approx(change + half, abs=1e-6),
        )
        if sum(figure is not None for figure in figures) >= 2:
            p = 2 * scipy.stats.t.sf(abs(change) / error, 4) if error else 1.0
            assert listed[key].p == pytest.approx(p, rel=1e-5)
            tested.append(key)
        else:
            assert math.isnan(listed[key].p)
    keys = [key for key in listed if isinstance(key, str) and not math.isnan(listed[key].p)]
    assert len(keys) > 10 and len(tested) > len(keys) + 50
    q = scipy.stats.false_discovery_control([listed[key].p for key in keys])
    assert [listed[key].q for key in keys] == pytest.approx(q.tolist())
    back = {change.key: change for change in difference(graphs[6:], graphs[:6]).nodes}
    for key in keys:
        assert back[key].change.value == pytest.approx(-listed[key].change.value) and back[key].p == pytest.approx(listed[key].p)


def test_a_planted_difference_is_found_and_others_are_not():
    draw = np.random.default_rng(0)
    common = lambda: list(draw.choice(np.arange(20, 60), 12, replace=False))  # noqa: E731
    a, b = [only_features([1, *common()]) for _ in range(10)], [only_features([2, *common()]) for _ in range(10)]
    found = difference(a, b)
    assert {change.key for change in found.nodes if change.q < 0.05} == {"feature/d/1", "feature/d/2"}
    assert [change.only for change in found.nodes[:2]] in (["a", "b"], ["b", "a"])


# --- traced graphs, and what is refused ---


def test_traced_prompts(models, mixed):
    lm, dictionaries = models["gpt2"], mixed["gpt2", "lorsa"]
    prompts = [TEXT, TEXT.replace("3", "4"), "# one more line\n" + TEXT]
    graphs = [trace(lm, dictionaries, prompt, targets=[Logit(5)], max_features=60) for prompt in prompts]
    found = GraphSet([graph.prune() for graph in graphs])
    stable = found.stability("nodes")
    assert stable.chance.value < stable.weighted.value < 1
    assert "logit/5" in {node.key for node in found.intersection().nodes}
    total = sum(node.influence.value for node in GraphSet(graphs).nodes())
    assert total == pytest.approx(np.mean([graph.influence().sum() + 1 for graph in graphs]))
    assert difference(graphs[0], graphs[0]).num_nodes["a"] == 0


def test_what_cannot_be_compared_is_refused_in_one_line():
    one, other = random_graph(0), random_graph(1)
    for change, message in (
        (lambda g: g.model.update(fingerprint="other"), "of different models"),
        (lambda g: g.dictionaries[0].update(fingerprint="other"), "of different dictionaries"),
        (lambda g: g.dictionaries[0].update(name="e"), "of different dictionaries"),
    ):
        wrong = random_graph(1)
        change(wrong)
        for call in (lambda w=wrong: GraphSet([one, w]), lambda w=wrong: difference(one, w)):
            with pytest.raises(UserError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value)
    for call, message in (
        (lambda: GraphSet([]), "has no graph"),
        (lambda: GraphSet([one], positions="middle"), "positions='middle' is unknown"),
        (lambda: GraphSet([one, other]).stability("tokens"), "of='tokens' is unknown"),
        (lambda: GraphSet([one]).where("feature/d/999"), "no node 'feature/d/999'"),
        (lambda: difference([], [one]), "has no graph"),
    ):
        with pytest.raises(UserError, match=message):
            call()
