"""Automatic supernodes of a graph, and the file beside it that holds them once they are edited.

Features as much alike as `likeness.py` says are put together by average linkage: the two groups whose members are most alike in the mean
are merged, again and again, while that mean is `threshold` at least. Targets, errors and tokens are never put into a group here; who wants
that moves them there (groups.py). `collapse` (collapsing.py) shows a graph with every group as one node.

The file is graphs/SLUG.supernodes.json beside graphs/SLUG.json: format `saebench-supernodes`, version 1. It names nodes by id and the graph
by its model, dictionaries and tokens, so that it is read for the graph that it was made for, or not at all.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from saebench.circuits.graphs.graph import Graph
from saebench.circuits.graphs.influence import edge_influence
from saebench.circuits.graphs.replacement import Dictionaries
from saebench.circuits.sets.collapsing import CollapsedGraph, collapse
from saebench.circuits.sets.graph_sets import FEATURE, SHIFT, GraphSet
from saebench.circuits.sets.groups import Supernode, Supernodes
from saebench.circuits.sets.likeness import Stores, coactivation, combined, decoder, named, role, stores_of
from saebench.errors import UserError
from saebench.files import identity, read_json, write_json

__all__ = [
    "Supernode", "Supernodes", "supernodes", "in_graph", "collapse", "CollapsedGraph", "supernodes_path", "save_supernodes",
    "load_supernodes",
]  # fmt: skip

FORMAT, VERSION = "saebench-supernodes", 1
THRESHOLD = 0.5
MOST = 8192  # features, whose pairs take half a gigabyte


def supernodes(
    graph: Graph | GraphSet,
    *,
    dictionaries: Dictionaries | None = None,
    store: Stores | None = None,
    threshold: float = THRESHOLD,
) -> Supernodes:
    """Groups of two features or more that are alike, the most influential group first.

    `dictionaries` are the graph's, for what features write; `store` is the feature store of one of them or several, or by name stores or
    codes of one text, for when features fire. Of a set of graphs, members are numbers of the set's nodes (`in_graph`). Raises UserError
    for a threshold that is not above 0 and at most 1, dictionaries or stores that are not the graph's, and more than 8,192 features.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"threshold={threshold} is no likeness: use a number above 0, at most 1")
    if isinstance(graph, GraphSet):
        one, (features_M, carried_NN, figure_N) = graph.graphs[0], _of_set(graph)
        latents = [(graph.dictionaries[n], int(graph.latent_K[n])) for n in features_M.tolist()]
    else:
        one, (features_M, carried_NN, figure_N) = graph, _of_graph(graph)
        columns = (graph.nodes.dictionary_N[features_M].tolist(), graph.nodes.latent_N[features_M].tolist())
        latents = [(graph.dictionaries[number]["name"], latent) for number, latent in zip(*columns, strict=True)]
    if len(features_M) > MOST:
        raise UserError(f"the graph has {len(features_M):,} features, of which at most {MOST:,} can be grouped: prune it first")
    measures = {"role": role(carried_NN, features_M)}
    if dictionaries is not None:
        measures["decoder"] = decoder(latents, named(dictionaries, one))
    if store is not None:
        measures["coactivation"] = coactivation(latents, stores_of(store, one))
    label_M = clusters(combined(measures), threshold)
    groups = [features_M[label_M == label] for label in np.unique(label_M)]
    groups = sorted((g for g in groups if len(g) > 1), key=lambda g: (-figure_N[g].sum(), g[0]))
    seen: Counter[str] = Counter()
    made = []
    for members in groups:
        name = _name(graph, int(members[np.argmax(figure_N[members])]))
        seen[name] += 1
        made.append(Supernode(name if seen[name] == 1 else f"{name} ({seen[name]})", tuple(members.tolist())))
    return Supernodes(tuple(made))


def clusters(alike_MM: np.ndarray, threshold: float) -> np.ndarray:
    """The number of each row's group by average linkage, merged while groups are alike by `threshold` in the mean: [M]."""
    from scipy.cluster.hierarchy import fcluster, linkage

    count = len(alike_MM)
    if count < 2:
        return np.arange(count)
    apart = (1.0 - alike_MM[np.triu_indices(count, 1)]).clip(0.0)
    return fcluster(linkage(apart, "average"), 1.0 - threshold + 1e-9, criterion="distance")


def _of_graph(graph: Graph) -> tuple[np.ndarray, sp.csr_array, np.ndarray]:
    """The features that are no targets, what edges carry with their signs, and influence."""
    carried_E = edge_influence(graph) * np.sign(graph.weights_E)
    carried_NN = sp.csr_array((carried_E, graph.sources_E, graph.offsets_N), shape=(len(graph), len(graph)))
    return np.flatnonzero(graph.is_kind("feature") & (graph.nodes.weight_N == 0)), carried_NN, graph.influence()


def _of_set(graphs: GraphSet) -> tuple[np.ndarray, sp.csr_array, np.ndarray]:
    """The same, summed over the graphs of a set."""
    edges, nodes, count = graphs.edge_entries, graphs.node_entries, len(graphs.keys)
    codes = graphs.edge_codes[edges.items]
    place = (codes >> SHIFT, codes & ((1 << SHIFT) - 1))
    carried_KK = sp.csr_array(sp.coo_array((edges.figures * np.sign(edges.weights), place), shape=(count, count)))
    targets = [key for graph, of_N in zip(graphs.graphs, graphs.of_nodes, strict=True) for key in of_N[graph.targets].tolist()]
    free_K = graphs.kind_K == FEATURE
    free_K[targets] = False
    return np.flatnonzero(free_K), carried_KK, np.bincount(nodes.items, weights=nodes.figures, minlength=count)


def in_graph(found: Supernodes, graphs: GraphSet, number: int) -> Supernodes:
    """The supernodes of a set as those of its graph `number`: the nodes that it has of them."""
    of_N = graphs.of_nodes[number]
    made = [Supernode(group.name, tuple(np.flatnonzero(np.isin(of_N, group.members)).tolist())) for group in found.groups]
    return Supernodes(tuple(group for group in made if group.members))


def _name(graph: Graph | GraphSet, node: int) -> str:
    """After the member of most influence: its dictionary and latent, and in a graph the token that it is on."""
    if isinstance(graph, GraphSet):
        return f"{graph.dictionaries[node]} {graph.latent_K[node]}"
    nodes = graph.nodes
    token = graph.tokens[nodes.position_N[node]]
    return f"{graph.dictionaries[nodes.dictionary_N[node]]['name']} {nodes.latent_N[node]} on {token!r}"


# --- the file ---


def supernodes_path(path_of_graph: str | Path) -> Path:
    """Where the supernodes of the graph in that file are."""
    path = Path(path_of_graph)
    return path.with_name(f"{path.name.removesuffix('.json')}.supernodes.json")


def save_supernodes(path_of_graph: str | Path, found: Supernodes, graph: Graph) -> Path:
    """Write them beside the graph's file, atomically. Raises UserError for nodes that the graph lacks."""
    found.check(graph)
    path = supernodes_path(path_of_graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = [{"name": group.name, "nodes": [graph.id(n) for n in group.members]} for group in found.groups]
    write_json(path, {"format": FORMAT, "version": VERSION, "graph": _mark(graph), "prompt": graph.prompt, "groups": groups})
    return path


def load_supernodes(path_of_graph: str | Path, graph: Graph) -> Supernodes | None:
    """Those beside a graph's file; None where there is no such file. Raises UserError for another format or version, a file made for
    another graph, unknown nodes, a node in two groups, and anything damaged."""
    path = supernodes_path(path_of_graph)
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        kind = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} is not a {FORMAT}: it says {kind!r}")
    if content.get("version") != VERSION:
        raise UserError(f"{path} is a {FORMAT} of version {content.get('version')!r}; this saebench reads version {VERSION}")
    if content.get("graph") != _mark(graph):
        raise UserError(
            f"{path} is of another graph, of the prompt {str(content.get('prompt'))[:40]!r}: remove it, or open that graph"
        )
    groups = content.get("groups")
    if not isinstance(groups, list) or not all(_whole(group) for group in groups):
        raise UserError(f"{path} is damaged: each of its groups needs a name and nodes, correct or remove it")
    known = {graph.id(n): n for n in range(len(graph))}
    for group in groups:
        if unknown := [name for name in group["nodes"] if name not in known]:
            raise UserError(
                f"{path} has the unknown node {unknown[0]!r} in {group['name']!r}: it is for the graph as its file has it, not pruned"
            )
        if len(set(group["nodes"])) < len(group["nodes"]):
            raise UserError(f"{path} has a node twice in {group['name']!r}: remove one")
    try:
        return Supernodes(tuple(Supernode(g["name"], tuple(known[name] for name in g["nodes"])) for g in groups))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _whole(group: Any) -> bool:
    if not isinstance(group, dict) or not isinstance(group.get("name"), str) or not isinstance(group.get("nodes"), list):
        return False
    return all(isinstance(name, str) for name in group["nodes"])


def _mark(graph: Graph) -> str:
    """What a graph is of: model, dictionaries, tokens and targets."""
    marks = sorted((each["name"], each["fingerprint"]) for each in graph.dictionaries)
    return identity([graph.model["fingerprint"], marks, graph.ids, [graph.id(int(n)) for n in graph.targets]])
