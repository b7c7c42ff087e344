"""What nodes of a graph are called, what pointing at them says, and the panel of the one that is chosen."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import address
import layout
import naming
import numpy as np
import opening
import streamlit as st
from circuit_files import Pruned
from naming import link_chip
from opening import Entry, Opened

from saebench.circuits.graphs.graph import Graph, Node
from saebench.circuits.sets.groups import Supernodes
from saebench.errors import UserError
from saebench.features.store import FeatureStore
from saebench.figures.graph import node_name, short
from saebench.figures.graph_layout import GROUP, units_of
from saebench.figures.tokens import alone

SHOWN, TOKENS, POINTED, LETTERS = 12, 4, 400, 46
BAR = 100.0


@dataclass(frozen=True)
class Named:
    """Nodes of a pruned graph by number: labels, and further lines of what pointing at them says."""

    names: dict[int, str]
    facts: dict[int, list[str]]


def named(run: Opened, graph: Graph, pointed: Iterable[int]) -> Named:
    """From the feature stores of a run, as far as it is indexed; `pointed` are the nodes with further lines."""
    names: dict[int, str] = {}
    facts: dict[int, list[str]] = {}
    wanted, known = set(pointed), {}
    for number in np.flatnonzero(graph.is_kind("feature")).tolist():
        of, latent = int(graph.nodes.dictionary_N[number]), int(graph.nodes.latent_N[number])
        if of not in known:
            known[of] = _indexed(run.entries.get(graph.dictionaries[of]["name"]))
        if (found := known[of]) is None or latent >= found[1].d_sae:
            continue
        key, store, name = found
        names[number] = name(latent)
        if number in wanted:
            facts[number] = list(_facts(key, store, latent))
    return Named(names, facts)


def most_pointed(graph: Graph, influence_N: np.ndarray) -> list[int]:
    """The features of most influence, about which more is read than their names."""
    features = np.flatnonzero(graph.is_kind("feature"))
    return features[np.argsort(-influence_N[features], kind="stable")][:POINTED].tolist()


def _indexed(entry: Entry | None) -> tuple[str, FeatureStore, Callable[[int], str]] | None:
    """Key, store and names of a dictionary; None where it is not indexed, or the store is damaged, as its own pages say."""
    if entry is None or not entry.indexed:
        return None
    try:
        return entry.key, opening.store(entry), naming.names(entry)
    except UserError:
        return None


@st.cache_resource(show_spinner=False, max_entries=64)
def _known(key: str) -> dict[int, tuple[str, ...]]:
    return {}


def _facts(key: str, store: FeatureStore, latent: int) -> tuple[str, ...]:
    known = _known(key)
    if latent not in known:
        details = store.details(latent)
        said = []
        for what, ids in (("fires on", [i for i, *_ in details.tokens]), ("promotes", [i for i, _ in details.promoted])):
            if ids:
                said.append(f"{what} " + "  ".join(alone(store.token_strings[i]) for i in ids[:TOKENS]))
        known[latent] = tuple(said)
    return known[latent]


# --- the chosen node ---


def chip(run: Opened, slug: str, id: str, text: str, aside: str = "") -> str:
    """A node that is chosen by a click, as HTML; the texts are plain."""
    href = html.escape(address.link("circuit", run=run.name, graph=slug, node=id))
    small = f"<small>{html.escape(aside)}</small>" if aside else ""
    title = html.escape(f"{text} {aside}".strip())
    return f'<a class="sb-chip" data-go href="{href}" title="{title}"><span>{html.escape(short(text, LETTERS))}</span>{small}</a>'


def chip_of(run: Opened, slug: str, graph: Graph, number: int, names: Mapping[int, str]) -> str:
    """The same for a node by its number: its name, and where it is."""
    return chip(run, slug, graph.id(number), *_called(graph, number, names))


def _called(graph: Graph, number: int, names: Mapping[int, str]) -> tuple[str, str]:
    """A node's name, and what tells it from others of that name."""
    node, name = graph.node(number), node_name(graph, number, names)
    if node.kind != "feature":
        return name, "" if node.kind in ("logit", "difference") else f"@ {node.position}"
    whole = f"{graph.dictionaries[node.dictionary]['name']} {node.latent}"
    return name, f"@ {node.position}" if name == whole else f"{whole} @ {node.position}"


def panel(run: Opened, slug: str, pruned: Pruned, found: Named, chosen: str) -> None:
    """The chosen node: what it is, what it gets and what it gives. One that pruning left out is shown as the whole graph has it."""
    graph, names = pruned.graph, found.names
    try:
        number = graph.find(chosen)
        influence = float(pruned.influence[number])
    except UserError:
        try:
            number = pruned.whole.find(chosen)
        except UserError as error:
            layout.problem(str(error))
            return
        graph, found = pruned.whole, named(run, pruned.whole, [number])
        names, influence = found.names, float(graph.influence()[number])
        layout.note("Pruning as set above leaves this node out; these are its edges in the whole graph.")
    node = graph.node(number)
    _head(run, graph, node, number, names)
    token = alone(graph.tokens[node.position])
    items = [("on", f"{short(token, 14)} ({node.position})"), ("influence", f"{influence:.3f}")]
    items += [("activation", f"{node.activation:.3f}")] if node.kind == "feature" else []
    items += [("probability", f"{node.probability:.1%}")] if node.kind == "logit" else []
    layout.figures(items)
    for line in found.facts.get(number, ()):
        layout.show(f'<span class="sb-dim">{html.escape(line)}</span>')
    into = graph.edges_into(number)
    column = graph.matrix()[:, [number]].tocoo()
    out = sorted(zip(column.coords[0].tolist(), column.data.tolist(), strict=True), key=lambda edge: -abs(edge[1]))
    edges("Inputs", [(chip_of(run, slug, graph, n, names), weight) for n, weight in into[:SHOWN]], len(into))
    edges("Outputs", [(chip_of(run, slug, graph, n, names), weight) for n, weight in out[:SHOWN]], len(out))


def _head(run: Opened, graph: Graph, node: Node, number: int, names: Mapping[int, str]) -> None:
    entry = run.entries.get(graph.dictionaries[node.dictionary]["name"]) if node.kind == "feature" else None
    aside = "" if node.kind != "feature" else f"{graph.dictionaries[node.dictionary]['name']} {node.latent}"
    name = node_name(graph, number, names)
    layout.heading(name, aside if aside != name else "")
    links = []
    if entry is not None and entry.indexed:
        where = {"run": run.name, "dictionary": entry.name}
        links.append(link_chip("Feature page", "feature", feature=node.latent, **where))
        links.append(link_chip("Steer with it", "steering", edits=node.latent, **where))
    elif node.kind == "feature":
        layout.show(
            '<span class="sb-dim">No label, page or steering: the run is not indexed for this dictionary '
            f"(<code>saebench index {html.escape(str(run.path))}</code>).</span>"
        )
    links.append(link_chip("Close", "circuit", run=run.name, node=""))
    layout.show(f'<div class="sb-chips">{"".join(links)}</div>')


def edges(what: str, found: list[tuple[str, float]], total: int) -> None:
    """The strongest edges as a table: (chip of the other end, weight), strongest first, of `total`."""
    layout.heading(what, "what they add to it" if what == "Inputs" else "what it adds to them")
    if not found:
        layout.show('<span class="sb-dim">none</span>')
        return
    largest = max(abs(weight) for _, weight in found) or 1.0
    layout.table(("node", "weight"), [[other, f"{_bar(weight / largest)}{weight:+.3g}"] for other, weight in found])
    if len(found) < total:
        layout.show(f'<span class="sb-dim">The strongest {len(found)} of {total:,}.</span>')


def _bar(share: float) -> str:
    kind = " cold" if share >= 0 else ""  # blue adds, as in the figure
    return f'<span class="sb-bar sb-short{kind}"><i style="width:{BAR * min(1.0, abs(share)):.0f}%"></i></span>'


def strongest(run: Opened, slug: str, pruned: Pruned, found: Named) -> None:
    """The features of most influence, for a beginning."""
    graph = pruned.graph
    features = np.flatnonzero(graph.is_kind("feature"))
    order = features[np.argsort(-pruned.influence[features], kind="stable")][:SHOWN]
    layout.heading("Most influence", "click a node to see its inputs and outputs")
    rows = [[chip_of(run, slug, graph, n, found.names), f"{pruned.influence[n]:.3f}"] for n in order.tolist()]
    if rows:
        layout.table(("feature", "influence"), rows, numbers=(1,))
    else:
        layout.empty("Pruning as set above leaves no feature: keep more of the influence.")


def group_panel(run: Opened, slug: str, pruned: Pruned, found: Named, supernodes: Supernodes, name: str) -> None:
    """A supernode: its members, what they get together and what they give together."""
    graph = pruned.graph
    if name not in supernodes.names:
        layout.problem(f"there is no supernode {name!r} at this pruning: choose another one, or draw single nodes")
        return
    units = units_of(graph, supernodes)
    layout.heading(name, "supernode")
    layout.show(f'<div class="sb-chips">{link_chip("Close", "circuit", run=run.name, node="")}</div>')
    members = sorted(supernodes[name].members, key=lambda n: -pruned.influence[n])
    layout.figures([("nodes", f"{len(members)}"), ("influence", f"{sum(pruned.influence[n] for n in members):.3f}")])
    rows = [[chip_of(run, slug, graph, n, found.names), f"{pruned.influence[n]:.3f}"] for n in members[:SHOWN]]
    layout.table(("member", "influence"), rows, numbers=(1,))
    mine = [u for u in range(len(units)) if units.kinds[u] == GROUP and units.names[u] == name]
    for what, here, there in (("Inputs", units.targets_E, units.sources_E), ("Outputs", units.sources_E, units.targets_E)):
        touched = np.flatnonzero(np.isin(here, mine)).tolist()
        touched.sort(key=lambda e: -abs(units.weights_E[e]))
        listed = []
        for e in touched[:SHOWN]:
            u = int(there[e])
            if units.kinds[u] == GROUP:
                other = chip(run, slug, f"{GROUP}/{units.names[u]}", units.names[u], "supernode")
            else:
                other = chip_of(run, slug, graph, int(units.members[u][0]), found.names)
            listed.append((other, float(units.weights_E[e])))
        edges(what, listed, len(touched))
