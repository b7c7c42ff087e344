"""The picture of a graph against graphs written by hand: where nodes stand, which edges are drawn and how, what pointing at them says."""

from __future__ import annotations

import time

import numpy as np
import pytest
from circuits.hand_graphs import graph_of

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.sets.groups import Supernode, Supernodes
from saebench.errors import UserError
from saebench.figures.graph import MOST_EDGES, MOST_OF_CHOSEN, draw_graph, node_name
from saebench.figures.graph_checks import checks_table, effects_figure
from saebench.figures.graph_layout import MOST_NODES, lay_out, level_name, units_of

HOSTILE = "<img src=x onerror=alert(1)>"
SITES = ["blocks.0.attn.hook_in", "blocks.0.hook_mlp_out", "blocks.1.mlp.hook_in", "blocks.0.hook_resid_pre", "ln_final.hook_out"]
ATTENTION, MLP_ERROR, MLP, EMBEDDED, FINAL = range(5)


def small() -> Graph:
    """Two tokens; a feature of attention 0 and an error of MLP 0 on the second, two features of MLP 1 there, a logit."""
    graph = graph_of(
        ["token", "token", "feature", "error", "feature", "feature", "logit"],
        {(2, 0): 1.0, (2, 1): -3.0, (4, 2): 2.0, (4, 3): 1.0, (5, 2): 0.5, (6, 4): 4.0, (6, 5): -1.0, (6, 1): 0.25},
        weights={6: 1.0},
    )
    graph.sites = SITES
    graph.nodes.site_N = np.array([EMBEDDED, EMBEDDED, ATTENTION, MLP_ERROR, MLP, MLP, FINAL], dtype=np.int16)
    graph.nodes.position_N = np.array([0, 1, 1, 1, 1, 1, 1], dtype=np.int32)
    graph.nodes.probability_N[6] = 0.25
    graph.tokens = ["a", HOSTILE, *"cdefg"]
    return graph


def many(features: int = 380, positions: int = 20, seed: int = 0) -> Graph:
    """Features at random places, each with edges from some before it."""
    rng = np.random.default_rng(seed)
    kinds = ["token"] * positions + ["feature"] * features + ["logit"] * 3
    first, edges = positions, {}
    for n in range(first, len(kinds)):
        for source in rng.choice(n if kinds[n] == "feature" else first + features, size=8, replace=False):
            edges[n, int(source)] = float(rng.normal())
    graph = graph_of(kinds, edges, weights={len(kinds) - 3: 0.5, len(kinds) - 2: 0.3, len(kinds) - 1: 0.2})
    graph.sites = [f"blocks.{n}.mlp.hook_in" for n in range(8)] + ["ln_final.hook_out"]
    layer_F = np.sort(rng.integers(0, 8, features))
    graph.nodes.site_N = np.concatenate([np.zeros(positions), layer_F, np.full(3, 8)]).astype(np.int16)
    graph.nodes.position_N = np.concatenate([
        np.arange(positions), rng.integers(0, positions, features), np.full(3, positions - 1),
    ]).astype(np.int32)  # fmt: skip
    return graph


def traces(figure, name: str):
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def lines(figure) -> list:
    return [trace for trace in figure.data if trace.mode == "lines" and not trace.name and len(trace.x)]


def count(figure) -> int:
    """Edges drawn: curves are set apart by NaN."""
    return sum(int(np.isnan(np.asarray(trace.x, dtype=float)).sum()) for trace in lines(figure))


def test_tokens_are_below_layers_above_each_other_and_targets_on_top():
    graph = small()
    units = units_of(graph)
    layout = lay_out(units)
    assert layout.rows == ["embedding", "attention 0", "MLP 0", "MLP 1", "output"]
    assert layout.columns == [0, 1]
    by_node = {int(units.members[u][0]): (layout.x_U[u], layout.y_U[u]) for u in range(len(units))}
    heights = [by_node[n][1] for n in (0, 2, 3, 4, 6)]
    assert heights == sorted(heights) and len(set(heights)) == 5
    assert by_node[4][1] == by_node[5][1] and by_node[0][1] == by_node[1][1]
    assert by_node[0][0] < min(by_node[n][0] for n in (1, 2, 3, 4, 5))
    assert by_node[4][0] != by_node[5][0]


@pytest.mark.parametrize(
    ("value", "name"), [(0.0, "attention 0"), (7.0, "MLP 3"), (3.5, "stream 2"), (4.5, "stream 2 mid"), (-1.0, "embedding")]
)
def test_names_of_rows(value, name):
    assert level_name(value) == name


def test_no_two_nodes_stand_at_one_place_and_columns_do_not_overlap():
    graph = many()
    units = units_of(graph)
    layout = lay_out(units)
    places = np.stack([layout.x_U, layout.y_U], 1)
    apart = np.abs(places[:, None] - places[None]).max(-1) + np.eye(len(places))
    assert apart.min() > 0.4
    inside = units.level_U < np.inf
    for left, right in zip(layout.columns, layout.columns[1:], strict=False):
        assert layout.x_U[inside & (units.position_U == left)].max() < layout.x_U[inside & (units.position_U == right)].min()
    assert layout.x_U.min() >= 0 and layout.x_U.max() <= layout.width


def test_the_strongest_edges_are_drawn_and_the_rest_is_told():
    graph = many()
    drawing = draw_graph(graph)
    assert count(drawing.figure) == MOST_EDGES < graph.num_edges
    assert f"The {MOST_EDGES} edges that carry most are drawn, of {graph.num_edges:,}" in drawing.said
    few = draw_graph(small())
    assert count(few.figure) == 8 and few.said == "All 8 edges are drawn."


def test_colours_are_signs_and_widths_weights():
    figure = draw_graph(small()).figure
    drawn = lines(figure)
    down = [trace for trace in drawn if "222,106,29" in trace.line.color]
    assert sum(int(np.isnan(np.asarray(t.x, dtype=float)).sum()) for t in down) == 2
    # 4 is the largest: (4 -> logit); 0.25 the smallest
    widths = {trace.line.width: int(np.isnan(np.asarray(trace.x, dtype=float)).sum()) for trace in drawn if trace not in down}
    assert max(widths) == 3.6 and widths[3.6] == 1
    ends = np.asarray(next(t for t in drawn if t.line.width == 3.6).y, dtype=float)
    assert ends[0] < ends[-2]  # upwards


def test_the_edges_of_the_chosen_node_stand_out():
    graph = small()
    plain, chosen = draw_graph(graph).figure, draw_graph(graph, chosen=graph.id(2)).figure
    assert len(plain.data) == len(chosen.data)  # so that plotly keeps its traces
    assert count(chosen) == 8 + 4  # two into it, two out of it
    faint = [trace for trace in lines(chosen) if trace.line.color.endswith(",0.09)")]
    assert sum(int(np.isnan(np.asarray(t.x, dtype=float)).sum()) for t in faint) == 8
    ring = [trace for trace in chosen.data if trace.marker.symbol == "circle-open"]
    assert len(ring) == 1 and len(ring[0].x) == 1
    crowded = many()
    busiest = int(np.bincount(crowded.sources_E, minlength=len(crowded)).argmax())
    assert count(draw_graph(crowded, chosen=crowded.id(busiest)).figure) <= MOST_EDGES + MOST_OF_CHOSEN


def test_pointing_says_label_activation_and_influence_and_escapes_it():
    graph = small()
    figure = draw_graph(graph, names={4: f"about {HOSTILE}"}, facts={4: [f"fires on {HOSTILE}"]}).figure
    features = traces(figure, "features")
    text = dict(zip(features.customdata, features.text, strict=True))[graph.id(4)]
    influence = graph.influence()[4]
    assert "about &lt;img" in text and "fires on &lt;img" in text and "activation 1.5" in text
    assert f"influence {influence:.3f}" in text and "d 4" in text and "(position 1)" in text
    assert "<img" not in figure.to_json() and "\\u003cimg" not in figure.to_json()
    assert "probability 25.0%" in traces(figure, "explained").text[0]
    assert set(features.customdata) == {graph.id(n) for n in (2, 4, 5)}


def test_names_of_nodes():
    graph = small()
    assert node_name(graph, 2) == "d 2" and node_name(graph, 3) == "error of MLP 0" and node_name(graph, 0) == "a"
    assert node_name(graph, 6) == "logit yes" and node_name(graph, 2, {2: "a label"}) == "a label"


def test_supernodes_are_one_node_each_with_the_sum_of_their_edges():
    graph = small()
    figure = draw_graph(graph, supernodes=Supernodes((Supernode("both", (4, 5)),)), chosen="group/both").figure
    grouped = traces(figure, "supernodes")
    assert list(grouped.customdata) == ["group/both"] and "2 nodes" in grouped.text[0]
    assert set(traces(figure, "features").customdata) == {graph.id(2)}
    units = units_of(graph, Supernodes((Supernode("both", (4, 5)),)))
    number = units.names.index("both")
    into = {
        int(units.members[s][0]): w
        for s, t, w in zip(units.sources_E, units.targets_E, units.weights_E, strict=True)
        if t == number
    }
    out = [w for s, w in zip(units.sources_E, units.weights_E, strict=True) if s == number]
    assert into == pytest.approx({2: 2.5, 3: 1.0}) and out == pytest.approx([3.0])
    with pytest.raises(UserError, match="another graph"):
        draw_graph(graph, supernodes=Supernodes((Supernode("far", (99,)),)))


def test_a_graph_of_many_nodes_keeps_the_strongest_and_its_targets():
    graph = many(features=MOST_NODES + 300, positions=30)
    units = units_of(graph)
    assert len(units) == MOST_NODES
    kept = {int(members[0]) for members in units.members}
    assert set(graph.targets.tolist()) <= kept
    influence_N = graph.influence()
    features = np.flatnonzero(graph.is_kind("feature"))
    left = [n for n in features if n not in kept]
    assert influence_N[left].max() <= min(influence_N[n] for n in kept if KINDS[graph.nodes.kind_N[n]] == "feature")
    assert f"{len(graph) - MOST_NODES:,} nodes that carry nothing or least are not." in draw_graph(graph).said


def test_an_unknown_site_and_an_empty_graph_are_drawn():
    graph = small()
    graph.sites = ["somewhere", *SITES[1:]]
    assert count(draw_graph(graph).figure) == 8
    empty = graph.only(np.zeros(len(graph), dtype=bool), np.zeros(graph.num_edges, dtype=bool))
    assert "no node" in draw_graph(empty).said


def test_four_hundred_nodes_are_drawn_at_once():
    graph = many()
    draw_graph(graph)
    began = time.process_time()
    draw_graph(graph, chosen=graph.id(100)).figure.to_json()
    assert time.process_time() - began < 1.5


def test_a_part_of_the_picture():
    whole, part = draw_graph(small()).figure.layout, draw_graph(small(), view=(0.25, 0.75, 0.0, 0.5)).figure.layout
    (x0, x1), (y0, y1) = whole.xaxis.range, whole.yaxis.range
    assert tuple(whole.meta["whole"]) == pytest.approx((x0, x1, y0, y1))
    assert part.xaxis.range == pytest.approx((x0 + (x1 - x0) / 4, x1 - (x1 - x0) / 4)) and tuple(part.meta["whole"]) == (
        x0,
        x1,
        y0,
        y1,
    )
    assert part.yaxis.range == pytest.approx((y0, (y0 + y1) / 2))


# --- predicted against measured ---


def agreement(spearman: float | None) -> dict:
    return {"count": 3, "spearman": spearman, "slope": 0.5, "same_sign": 1.0}


def found() -> dict:
    names = ("source", "target", "source_kind", "target_kind", "predicted_edge", "predicted_total", "measured")
    rows = [(1, 2, "token", "feature", 1.0, 2.0, 1.5), (4, 6, "feature", "logit", -1.0, -2.0, 1.0)]
    edges = [dict(zip(names, row, strict=True)) for row in rows]
    return {
        "delta": -1.0, "edges": edges, "nodes": [], "edge": agreement(0.9), "total": agreement(0.8), "node": agreement(None),
        "by_kind": {"token>feature": agreement(0.7), "feature>logit": agreement(-1.0)},
    }  # fmt: skip


def test_effects_are_points_by_kind():
    figure = effects_figure(found(), lambda n: f"{HOSTILE} {n}")
    points = {trace.name: trace for trace in figure.data if trace.mode == "markers"}
    assert {name: (list(t.x), list(t.y)) for name, t in points.items()} == {
        "token to feature": ([2.0], [1.5]),
        "feature to logit": ([-2.0], [1.0]),
    }
    assert "<img" not in figure.to_json() and "\\u003cimg" not in figure.to_json()
    (level,) = [trace for trace in figure.data if trace.mode == "lines"]
    assert list(level.x) == list(level.y) and level.x[0] < -2.0 and level.x[1] > 2.0


def test_the_table_has_figures_by_kind():
    rows = {row["what"].strip(): row for row in checks_table(found())}
    assert rows["edges, along all paths"]["Spearman"] == "0.80" and rows["token to feature"]["calibration"] == "0.50"
    assert rows["nodes, on what is explained"]["Spearman"] == "-" and rows["edges, each alone"]["pairs"] == "3"
    assert "edges, nothing held" not in rows
    rows = {row["what"]: row for row in checks_table(found() | {"free": agreement(0.1)})}
    assert rows["edges, nothing held"]["Spearman"] == "0.10"


@pytest.mark.parametrize("damage", [{"edges": 3}, {"edges": [{}]}, {"total": None}, {"by_kind": []}])
def test_a_damaged_verification_is_told(damage):
    with pytest.raises(UserError, match="damaged"):
        effects_figure(found() | damage, str)
        checks_table(found() | damage)
