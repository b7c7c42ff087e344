"""Graphs of many prompts as one: which nodes and edges they have in common, how often, and how strong.

A prompt's nodes stand at positions, so another prompt's are others. Here a node is what it is of, whatever the prompt:

    positions="dropped"    a latent of a dictionary, an error's site, a token's text, an output token: for prompts of any length and build.
                           What stands at several positions of a prompt is added up.
    positions="from_end"   the same, and the place counted from the end of the prompt: for prompts of one template, whose last tokens play
                           the same parts. Where all begin with the same token (BOS), position 0 is "start" in all.

A node's figure is its influence, and for targets their weight with it; an edge's are its weight and what it carries: its share of the
target's input times the target's figure. All are summed over positions within a prompt, and are 0 in prompts without. So the union is
what is in any, the intersection what is in all, and between lies a frequency. Sizes compare across prompts, whose targets all weigh 1.
Prune the graphs first, alike, where presence is to mean importance.
Shape suffixes: `P` prompts, `K` nodes of the set, `L` its edges, `N` nodes or `E` edges of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.graphs.influence import edge_influence
from saebench.circuits.intervals import Estimate, means, wilson
from saebench.errors import UserError
from saebench.files import identity

if TYPE_CHECKING:
    from saebench.circuits.sets.difference import GraphDifference

Positions = Literal["dropped", "from_end"]
Of = Literal["features", "nodes", "edges"]
FEATURE = KINDS.index("feature")
SHIFT = 32  # an edge's number is its target's, moved up so many bits, and its source's


@dataclass(frozen=True)
class SetNode:
    """One node over a set of prompts."""

    key: str
    """Such as `feature/transcoder-0/123`, and with the place `feature/transcoder-0/-1/123`."""
    kind: str
    label: str
    """Text of a token or target."""
    present: tuple[bool, ...]
    """By prompt."""
    frequency: Estimate
    """Share of the prompts that have it."""
    influence: Estimate
    """Mean over all prompts."""

    def as_dict(self) -> dict[str, Any]:
        return _plain(self)


@dataclass(frozen=True)
class SetEdge:
    """One edge over a set of prompts."""

    source: str
    target: str
    present: tuple[bool, ...]
    frequency: Estimate
    weight: Estimate
    """Mean over all prompts of what the source adds to the target."""
    carried: Estimate
    """Mean over all prompts of what it carries."""

    def as_dict(self) -> dict[str, Any]:
        return _plain(self)


@dataclass(frozen=True)
class Common:
    """Nodes and edges, those of most influence first."""

    nodes: list[SetNode]
    edges: list[SetEdge]


@dataclass(frozen=True)
class Entries:
    """What is in which prompt, sorted by item: the prompt, the item's number, the figure and, for edges, the weight, of each."""

    prompts: np.ndarray
    items: np.ndarray
    figures: np.ndarray
    weights: np.ndarray

    def only(self, kept: np.ndarray) -> Entries:
        return Entries(self.prompts[kept], self.items[kept], self.figures[kept], self.weights[kept])

    def dense(self, items: np.ndarray, prompts: int, column: np.ndarray) -> np.ndarray:
        """A column of some items, ascending: [P, items]."""
        place = np.searchsorted(items, self.items)
        there = np.isin(self.items, items)
        out = np.zeros((prompts, len(items)), dtype=column.dtype)
        out[self.prompts[there], place[there]] = column[there]
        return out


class GraphSet:
    """Graphs of several prompts, of one model and the same dictionaries."""

    def __init__(self, graphs: Sequence[Graph], *, positions: Positions = "dropped"):
        """Raises UserError for no graph, graphs of different models or dictionaries, and unknown `positions`."""
        if not graphs:
            raise UserError("the set has no graph: give at least one")
        if positions not in ("dropped", "from_end"):
            raise UserError(f"positions={positions!r} is unknown: use 'dropped' or 'from_end'")
        check_alike(graphs)
        self.graphs, self.positions = list(graphs), positions
        start = len({graph.ids[0] for graph in graphs}) == 1
        numbers: dict[str, int] = {}
        self.labels: list[str] = []
        """By node of the set."""
        self.dictionaries: list[str] = []
        """By node of the set: the name of a feature's dictionary, "" of others."""
        spaces: list[str] = []
        latents: list[int] = []
        kinds: list[int] = []
        self.of_nodes: list[np.ndarray] = []
        for graph in graphs:
            found = []
            for node, key in enumerate(node_keys(graph, positions, start)):
                if key not in numbers:
                    numbers[key] = len(numbers)
                    self.labels.append(_label(graph, node))
                    kinds.append(int(graph.nodes.kind_N[node]))
                    owner = int(graph.nodes.dictionary_N[node])
                    self.dictionaries.append(graph.dictionaries[owner]["name"] if kinds[-1] == FEATURE else "")
                    latents.append(int(graph.nodes.latent_N[node]) if kinds[-1] == FEATURE else -1)
                    spaces.append(key.rpartition("/")[0] if kinds[-1] == FEATURE else "")
                found.append(numbers[key])
            self.of_nodes.append(np.array(found, dtype=np.int64))
        self.keys = list(numbers)
        self.kind_K = np.array(kinds)
        self.latent_K = np.array(latents)
        """-1 for what is no feature."""
        self.spaces = spaces
        """Of features, the key without the latent; "" of others."""
        self._numbers = numbers

    def __len__(self) -> int:
        """Prompts."""
        return len(self.graphs)

    def __repr__(self) -> str:
        return f"GraphSet({len(self)} prompts, {len(self.keys):,} nodes, positions={self.positions!r})"

    def where(self, key: str) -> list[tuple[int, ...]]:
        """The numbers that a node of the set has in each graph. Raises UserError for an unknown key."""
        if key not in self._numbers:
            raise UserError(f"the set has no node {key!r}: nodes are such as {self.keys[0]}")
        return [tuple(np.flatnonzero(of_N == self._numbers[key]).tolist()) for of_N in self.of_nodes]

    # --- what the set has ---

    def nodes(self, least: float = 0.0, *, kinds: Sequence[str] = KINDS, top: int | None = None) -> list[SetNode]:
        """Those of some kinds in at least such a share of the prompts, by mean influence, `top` of them."""
        entries = self.node_entries
        wanted_K = np.isin(self.kind_K, [KINDS.index(kind) for kind in kinds])
        items = self._most(entries, len(self.keys), least, top, wanted_K)
        present, influence = self._present(entries, items), means(entries.dense(items, len(self), entries.figures))
        found = [
            SetNode(self.keys[k], KINDS[self.kind_K[k]], self.labels[k], tuple(there), wilson(sum(there), len(self)), mean)
            for k, there, mean in zip(items.tolist(), present.T.tolist(), influence, strict=True)
        ]
        return sorted(found, key=lambda node: -node.influence.value)

    def edges(self, least: float = 0.0, *, top: int | None = None) -> list[SetEdge]:
        """Those in at least such a share of the prompts, by what they carry in the mean, `top` of them."""
        entries = self.edge_entries
        items = self._most(entries, len(self.edge_codes), least, top)
        present = self._present(entries, items)
        weight, carried = (means(entries.dense(items, len(self), column)) for column in (entries.weights, entries.figures))
        found = [
            SetEdge(*self.ends(edge), tuple(there), wilson(sum(there), len(self)), mean, load)
            for edge, there, mean, load in zip(items.tolist(), present.T.tolist(), weight, carried, strict=True)
        ]
        return sorted(found, key=lambda edge: -edge.carried.value)

    def union(self, *, top: int | None = None) -> Common:
        """What is in any prompt."""
        return Common(self.nodes(top=top), self.edges(top=top))

    def intersection(self, *, top: int | None = None) -> Common:
        """What is in all prompts."""
        return Common(self.nodes(1.0, top=top), self.edges(1.0, top=top))

    def stability(self, of: Of = "features", *, control: GraphSet | None = None) -> Any:
        """How alike the prompts' graphs are, against chance or an unrelated set (stability.py)."""
        from saebench.circuits.sets.stability import stability

        return stability(self, of, control=control)

    def ends(self, edge: int) -> tuple[str, str]:
        """The keys of source and target of an edge, by number."""
        code = int(self.edge_codes[edge])
        return self.keys[code & ((1 << SHIFT) - 1)], self.keys[code >> SHIFT]

    # --- entries ---

    def entries(self, of: Of) -> Entries:
        """What is in which prompt, of features, all nodes, or edges. Raises UserError for anything else."""
        if of == "edges":
            return self.edge_entries
        if of not in ("features", "nodes"):
            raise UserError(f"of={of!r} is unknown: use 'features', 'nodes' or 'edges'")
        every = self.node_entries
        return every if of == "nodes" else every.only(self.kind_K[every.items] == FEATURE)

    @cached_property
    def node_entries(self) -> Entries:
        parts = []
        for prompt, (graph, of_N) in enumerate(zip(self.graphs, self.of_nodes, strict=True)):
            figure_N = graph.influence() + graph.nodes.weight_N
            parts.append(_summed(prompt, of_N, figure_N, figure_N))
        return _sorted(parts)

    @cached_property
    def _edges(self) -> tuple[np.ndarray, Entries]:
        parts = []
        for prompt, (graph, of_N) in enumerate(zip(self.graphs, self.of_nodes, strict=True)):
            rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
            codes_E = (of_N[rows_E] << SHIFT) | of_N[graph.sources_E]
            parts.append(_summed(prompt, codes_E, edge_influence(graph), graph.weights_E.astype(np.float64)))
        every = _sorted(parts)
        codes_L, items = np.unique(every.items, return_inverse=True)
        return codes_L, Entries(every.prompts, items, every.figures, every.weights)

    @property
    def edge_codes(self) -> np.ndarray:
        """The ends of each edge of the set, target << 32 | source: [L]."""
        return self._edges[0]

    @property
    def edge_entries(self) -> Entries:
        return self._edges[1]

    def _most(self, entries: Entries, count: int, least: float, top: int | None, wanted: np.ndarray | None = None) -> np.ndarray:
        """Numbers, ascending, of the items present often enough, of these the `top` by the sum of their figures."""
        often = np.bincount(entries.items, minlength=count) >= max(1, int(np.ceil(least * len(self) - 1e-9)))
        sums = np.bincount(entries.items, weights=entries.figures, minlength=count)
        kept = np.flatnonzero(often if wanted is None else often & wanted)
        return np.sort(kept[np.argsort(-sums[kept], kind="stable")][:top])

    def _present(self, entries: Entries, items: np.ndarray) -> np.ndarray:
        return entries.dense(items, len(self), np.ones(len(entries.items), dtype=bool))


def difference(a: Graph | Sequence[Graph] | GraphSet, b: Graph | Sequence[Graph] | GraphSet, **options: Any) -> GraphDifference:
    """What two graphs, or two sets of them, differ in: a less b (difference.py)."""
    from saebench.circuits.sets.difference import compare

    return compare(a, b, **options)


def check_alike(graphs: Sequence[Graph]) -> None:
    """Raises UserError for graphs of different models or dictionaries."""
    first = graphs[0]
    expected = _dictionaries(first)
    for graph in graphs[1:]:
        if graph.model["fingerprint"] != first.model["fingerprint"]:
            raise UserError(
                f"the graphs are of different models, {first.model['name']!r} ({first.model['fingerprint']}) and "
                f"{graph.model['name']!r} ({graph.model['fingerprint']}): compare graphs of one model"
            )
        if wrong := sorted(expected.symmetric_difference(_dictionaries(graph))):
            raise UserError(
                f"the graphs are of different dictionaries, only one has {wrong[0][0]!r} ({wrong[0][1]}): trace them with the same"
            )


def _dictionaries(graph: Graph) -> set[tuple[str, str]]:
    return {(each["name"], each["fingerprint"]) for each in graph.dictionaries}


def node_keys(graph: Graph, positions: Positions, start: bool) -> list[str]:
    """What each node is called in a set: [N]. With `start`, position 0 is the same in all prompts."""
    nodes, size = graph.nodes, len(graph.ids)
    names = []
    for n in range(len(graph)):
        kind, at = KINDS[nodes.kind_N[n]], int(nodes.position_N[n])
        place = "" if positions == "dropped" else "/start" if start and at == 0 else f"/{at - size}"
        if kind == "feature":
            names.append(f"feature/{graph.dictionaries[nodes.dictionary_N[n]]['name']}{place}/{nodes.latent_N[n]}")
        elif kind == "error":
            names.append(f"error/{graph.sites[nodes.site_N[n]]}{place}")
        elif kind == "token":
            names.append(f"token{place}/{graph.tokens[at]!r}")
        elif kind == "logit":
            names.append(f"logit{place}/{nodes.token_N[n]}")
        else:  # two of the same label may differ
            label = graph.labels.get(n, "")
            names.append(f"{kind}/{graph.sites[nodes.site_N[n]]}{place}/{label}/{identity(graph.vectors.get(n))[:8]}")
    return names


def _label(graph: Graph, node: int) -> str:
    if KINDS[graph.nodes.kind_N[node]] == "token":
        return graph.tokens[graph.nodes.position_N[node]]
    return graph.labels.get(node, "")


def _summed(prompt: int, items: np.ndarray, figures: np.ndarray, weights: np.ndarray) -> Entries:
    """Entries of one prompt, an item once."""
    kept, place = np.unique(items, return_inverse=True)
    figures, weights = (np.bincount(place, weights=column, minlength=len(kept)) for column in (figures, weights))
    return Entries(np.full(len(kept), prompt), kept, figures, weights)


def _sorted(parts: list[Entries]) -> Entries:
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("prompts", "items", "figures", "weights")]
    order = np.argsort(columns[1], kind="stable")
    return Entries(*(column[order] for column in columns))


def _plain(value: Any) -> Any:
    """Plain data of a node or edge of a set."""
    out = {}
    for name, entry in value.__dict__.items():
        out[name] = entry.as_list() if isinstance(entry, Estimate) else list(entry) if isinstance(entry, tuple) else entry
    return out
