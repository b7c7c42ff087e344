"""Circuit: why the model writes a token: the graph of the features it comes through, from a prompt to what is explained.

Graphs are built in a process of their own (`circuit_building.py`) and kept in the run; what is set stands in the query string
(`circuit_state.py`), so an address shows the same to others.
"""

from __future__ import annotations

import html
import math
from functools import cache
from pathlib import Path
from typing import Any

import address
import circuit_building
import circuit_checks
import circuit_files
import circuit_groups
import circuit_nodes
import circuit_state
import layout
import opening
import streamlit as st
from circuit_files import Pruned, Summary
from circuit_state import DIFFERENCE, EXPLAIN, FEATURE, TOKEN, Asked
from opening import Entry, Opened

from saebench.circuits.graphs.influence import Scores
from saebench.circuits.sets.groups import Supernodes
from saebench.errors import UserError
from saebench.figures.graph import draw_graph, short
from saebench.figures.graph_layout import GROUP
from saebench.figures.tokens import alone, visible

EXPLAINED = {
    "likeliest": "The likeliest tokens",
    "token": "A token",
    "difference": "One token against another",
    "feature": "A feature",
}
MAX_CHARACTERS = 6000
NODES, EDGES = 0.8, 0.98
SUGGESTED = (
    "import os\nimport re\nimport ",
    "def add(self, item):\n    self.",
    "for i in range(",
    "if x is not None and y is not ",
)
SCRIPT = Path(__file__).parent.parent / "circuit.js"
MOVES = "Drag to move; the buttons in the corner zoom, a double click shows all; a click on a node opens it."
NODES_MEANT = "The fewest nodes that hold this share of all influence on what is explained; tokens and errors stay."
EDGES_MEANT = "Of the edges between them the fewest that hold this share."


def show() -> None:
    entry = layout.choose()
    run = entry.run
    layout.title("Circuit", run.name)
    circuit_state.forget_other(run)
    traced = circuit_state.traced(run)
    if traced:
        _ask(entry, traced)
    else:
        layout.note(
            f"{run.name} has no transcoder, cross-layer transcoder or Lorsa, which a circuit is traced through: train some, such as "
            "`saebench train bundled-circuits`, and browse that run."
        )
    slug = address.get("graph")
    _list(run, slug)
    if not slug:
        return
    try:
        key = circuit_files.key(run, slug)
        nodes, edges = _shares()
        pruned = circuit_files.pruned(key, nodes, edges)
    except (UserError, OSError) as error:
        layout.problem(str(error))
        return
    _graph(run, slug, key, pruned, nodes, edges)


# --- what is asked for ---


def _ask(entry: Entry, traced: list[str]) -> None:
    if len(address.peek("prompt")) > MAX_CHARACTERS:
        address.put("prompt", address.peek("prompt")[:MAX_CHARACTERS])
    prompt = address.widget(
        st.text_area, "prompt", "Prompt", "", placeholder="Text whose next token is to be explained", height=90, max_chars=MAX_CHARACTERS
    )  # fmt: skip
    if not prompt.strip() and not address.peek("graph"):
        links = [
            f'<a class="sb-chip sb-token" data-go href="{html.escape(address.link("circuit", run=entry.run.name, prompt=text))}">'
            f"{html.escape(visible(text))}</a>"
            for text in SUGGESTED
        ]
        layout.show(f'<span class="sb-dim">Such as</span> {"".join(links)}')
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        explain = address.widget(
            st.selectbox, "explain", "Explain", EXPLAIN[0], options=list(EXPLAINED), format_func=EXPLAINED.__getitem__, width=240
        )  # fmt: skip
        if explain in (TOKEN, DIFFERENCE):
            help = "As one token of the vocabulary; a space in front may be typed as ·, a line end as ↵."
            address.widget(st.text_input, "logit", "Token", "", width=150, help=help)
        if explain == DIFFERENCE:
            address.widget(st.text_input, "against", "Against", "", width=150)
        if explain == FEATURE:
            _feature(entry, traced)
        busy = circuit_building.busy(entry.run)
        pressed = not busy and st.button("Build the graph", key="circuit-build", type="primary", icon=":material/account_tree:")
    circuit_building.watch(entry.run)
    if pressed:
        _build(entry, Asked.of(prompt, explain, entry))


def _feature(entry: Entry, traced: list[str]) -> None:
    try:
        most = opening.config(entry).d_sae - 1
    except (UserError, OSError, KeyError):
        most = 0
    address.widget(st.number_input, "feature", f"Latent of {entry.name}", 0, min_value=0, max_value=most, step=1, width=190)
    address.widget(
        st.number_input, "place", "Position", -1, step=1, width=130, help="Counted from 0, which is BOS; -1 is the last."
    )
    if entry.name not in traced:
        layout.show('<span class="sb-dim">Choose a transcoder or Lorsa in the sidebar.</span>')


def _build(entry: Entry, asked: Asked) -> None:
    """Begin, or show what has been built before."""
    try:
        checked = circuit_state.checked(entry, asked)
    except (UserError, OSError) as error:
        layout.problem(str(error))
        return
    if not _is_there(entry.run, checked):
        circuit_building.begin(entry.run, checked.slug, checked)
    else:
        circuit_state.show_graph(checked.slug)
    address.rerun()


def _is_there(run: Opened, asked: Asked) -> bool:
    """Whether the graph has been built before, and can be opened."""
    try:
        return circuit_files.graph(circuit_files.key(run, asked.slug)).prompt == asked.prompt
    except (UserError, OSError):
        return False


# --- what is there ---


def _list(run: Opened, slug: str) -> None:
    paths = circuit_files.saved(run)
    if not paths:
        layout.empty("No graph is kept in this run yet. It takes some seconds to build one for a short prompt.")
        return
    with st.expander(f"Saved graphs ({len(paths):,})", icon=":material/folder_open:", expanded=not slug):
        known = [circuit_files.summary(path) for path in paths[: circuit_files.MOST]]
        rows = [_row(run, one) for one in known if not one.problem]
        if rows:
            layout.table(("prompt", "explained", "tokens", "nodes", "edges", "Spearman", ""), rows, numbers=(2, 3, 4, 5))
        for one in known:
            if one.problem:
                layout.problem(one.problem)
        if len(paths) > len(known):
            layout.show(f'<span class="sb-dim">The newest {len(known)} of {len(paths):,}.</span>')


def _row(run: Opened, one: Summary) -> list[str]:
    end = one.prompt if len(one.prompt) <= 60 else f"…{one.prompt[-59:]}"
    explained = ", ".join(alone(name) for name in one.explained[:4]) + (" …" if len(one.explained) > 4 else "")
    return [
        f'<span class="sb-token">{html.escape(visible(end))}</span>',
        f'<span class="sb-token">{html.escape(short(explained, 40))}</span>',
        f"{one.tokens:,}",
        f"{one.nodes:,}",
        f"{one.edges:,}",
        "-" if one.spearman is None else f"{one.spearman:.2f}",
        layout.a("open", "circuit", run=run.name, graph=one.slug, node="", zoom=""),
    ]


# --- the graph ---


def _shares() -> tuple[float, float]:
    for key in ("nodes", "links"):
        if not math.isfinite(address.get_number(key, 1.0)):
            address.drop(key)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
        nodes = address.widget(
            st.slider, "nodes", "Influence kept by nodes", NODES, min_value=0.05, max_value=1.0, step=0.01, width=280, help=NODES_MEANT
        )  # fmt: skip
        edges = address.widget(
            st.slider, "links", "Influence kept by edges", EDGES, min_value=0.05, max_value=1.0, step=0.01, width=280, help=EDGES_MEANT
        )  # fmt: skip
    return nodes, edges


def _graph(run: Opened, slug: str, key: str, pruned: Pruned, nodes: float, edges: float) -> None:
    graph = pruned.graph
    found = circuit_nodes.named(run, graph, circuit_nodes.most_pointed(graph, pruned.influence))
    text = "".join(visible(token) for token in graph.tokens[-24:])
    explained = ", ".join(alone(graph.labels.get(int(n), graph.id(int(n)))) for n in graph.targets[:6])
    explained += " …" if len(graph.targets) > 6 else ""
    layout.heading(short(f"{'…' if len(graph.tokens) > 24 else ''}{text}", 110), f"explained: {short(explained, 80)}")
    _scores(pruned)
    supernodes = circuit_groups.of(run, slug, key, pruned)
    grouped = supernodes is not None and address.widget(st.toggle, "grouped", "Draw supernodes as one node each", False)
    groups = supernodes.shown if supernodes is not None and grouped else Supernodes()
    chosen = address.get("node")
    left, right = st.columns([2.4, 1], gap="medium")
    with left:
        drawing = draw_graph(
            graph, names=found.names, facts=found.facts, supernodes=groups, chosen=chosen, view=circuit_state.zoom()
        )
        _plot(drawing.figure)
        layout.show(f'<span class="sb-dim">{html.escape(drawing.said)} {MOVES}</span>')
    with right, st.container(key="circuit-panel"):
        if chosen.startswith(f"{GROUP}/"):
            circuit_nodes.group_panel(run, slug, pruned, found, groups, chosen.partition("/")[2])
        elif chosen:
            circuit_nodes.panel(run, slug, pruned, found, chosen)
        else:
            circuit_nodes.strongest(run, slug, pruned, found)
    circuit_checks.show(run, slug, pruned, found, nodes, edges)
    if supernodes is not None:
        circuit_groups.show(run, slug, pruned, found, supernodes)


def _scores(pruned: Pruned) -> None:
    def row(name: str, nodes: int, edges: int, scores: Scores) -> list[str]:
        told = scores.as_dict()
        bounds = [
            f'{told[what]:.3f} <span class="sb-dim">({told[f"{what}_low"]:.3f} to {told[f"{what}_high"]:.3f})</span>'
            for what in ("replacement", "completeness")
        ]
        return [name, f"{nodes:,}", f"{edges:,}", *bounds]

    whole, left = pruned.whole, pruned.graph
    layout.table(
        ("", "nodes", "edges", "replacement score", "completeness score"),
        [row("whole", len(whole), whole.num_edges, pruned.whole_scores), row("pruned", len(left), left.num_edges, pruned.scores)],
        numbers=(1, 2, 3, 4),
    )
    layout.show(
        '<span class="sb-dim">Replacement: share of the influence that comes from tokens, not errors. Completeness: share of what goes '
        "into nodes that is not error. In brackets: bounds, whatever the edges left out carry.</span>"
    )


@cache
def _clicks() -> Any:
    from streamlit.components.v2 import component

    return component("saebench_circuit", js=SCRIPT.read_text(encoding="utf-8"), isolate_styles=False)


def _plot(figure: Any) -> None:
    """The figure; a click chooses a node, and the zoom stands in the address: Streamlit draws a figure anew when it changes."""
    with st.container(key="circuit-figure"):
        layout.plot(figure, key="circuit-graph")
        _clicks()(key="circuit-clicks")
