"""Every edge of a graph checked, and how well the graph foretells effects by kinds of ends, over many prompts.

`verify` looks at the strongest edges of one graph; most of these lead from a token to a latent of the first layer, which is nearly exact
by construction, so a figure over all hides what is weak. Here every source is taken out once and all edges out of it are read off, and
kinds are told apart: which layer type a feature or an error is of, and how many layers an edge spans.
Shape suffixes: `E` edges, `P` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.graphs.influence import edge_influence
from saebench.circuits.graphs.interventions import Interventions
from saebench.circuits.graphs.parts import Place
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.verification import Agreement
from saebench.circuits.intervals import Estimate, means

ENOUGH = 10  # edges of a kind for a prompt to count in the mean
BAR = 0.72  # Spearman of influence with measured effect, features on features, published for cross-layer transcoders (Ameisen et al. 2025)
MEASURES = ("held", "frozen", "measured", "free")


@dataclass(frozen=True)
class EdgeEffects:
    """The edges of one graph from nodes that can be changed: by how much the target changes when the source is multiplied by `factor`."""

    factor: float
    kinds_E: np.ndarray
    """Such as `mlp feature > logit`."""
    layers_E: np.ndarray
    """From where the source writes to where the target reads."""
    carries_E: np.ndarray
    """Share of the edge in what is explained (influence.py)."""
    edge_E: np.ndarray
    total_E: np.ndarray
    held_E: np.ndarray
    frozen_E: np.ndarray
    measured_E: np.ndarray
    free_E: np.ndarray

    def __len__(self) -> int:
        return len(self.kinds_E)

    def only(self, rows: np.ndarray) -> EdgeEffects:
        """Some of the edges."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return EdgeEffects(**{name: value[rows] if name.endswith("_E") else value for name, value in columns.items()})

    def strongest(self, count: int) -> EdgeEffects:
        """The edges of every kind that carry most, at most so many of each."""
        rows = [r for kind in np.unique(self.kinds_E) if len(r := np.flatnonzero(self.kinds_E == kind))]
        return self.only(np.sort(np.concatenate([r[np.argsort(-self.carries_E[r], kind="stable")[:count]] for r in rows])))


@dataclass(frozen=True)
class KindAgreement:
    """Of the edges of a kind."""

    edges: int
    prompts: int
    """With at least ENOUGH of them."""
    spearman: Estimate
    """Mean over these prompts of the correlation within each, with a 95 % interval over prompts."""
    pooled: Agreement
    """Of the edges of all prompts together."""


@torch.no_grad()
def edge_effects(graph: Graph, model: LocalModel, factor: float = 0.0, *, sources: Sequence[int] | None = None) -> EdgeEffects:
    """Multiply every source of an edge, or some of them, by a factor, 0 to take it out, each by itself. `model` is the linear model that
    the graph was made from. Raises UserError for a node that cannot be changed."""
    runs = Interventions(model, graph)
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    if sources is None:
        sources = [n for n in np.unique(graph.sources_E).tolist() if runs.can(n)]
    chosen_E = np.flatnonzero(np.isin(graph.sources_E, sources))
    found = {name: np.zeros(len(chosen_E)) for name in ("edge", "total", *MEASURES)}
    place_of = {n: np.flatnonzero(graph.sources_E[chosen_E] == n) for n in sources}
    for run in runs.many(sources, factor):
        mine = place_of[run.node]
        for name, column_E in found.items():
            column_E[mine] = getattr(run, f"{name}_N")[rows_E[chosen_E[mine]]]
    roles = [role(graph, n) for n in range(len(graph))]
    ends = zip(graph.sources_E[chosen_E].tolist(), rows_E[chosen_E].tolist(), strict=True)
    pairs = [
        (f"{roles[s]} > {roles[t]}", _point(graph, model, t, reads=True) - _point(graph, model, s, reads=False)) for s, t in ends
    ]
    return EdgeEffects(
        factor,
        np.array([kinds for kinds, _ in pairs]),
        np.array([points // 2 for _, points in pairs], dtype=np.int64),
        edge_influence(graph)[chosen_E],
        **{f"{name}_E": column_E for name, column_E in found.items()},
    )


def sample(graph: Graph, others: int, seed: int = 0) -> list[int]:
    """Nodes that can be changed: all with an edge into a target of the graph, and at random so many of the others with edges."""
    rows_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
    can_N = graph.is_kind("feature", "error", "token") & (graph.nodes.position_N >= 1) & (graph.nodes.weight_N == 0)
    every = np.unique(graph.sources_E[can_N[graph.sources_E]])
    near = np.isin(every, graph.sources_E[np.isin(rows_E, graph.targets)])
    rest = every[~near]
    drawn = np.random.default_rng(seed).permutation(rest)[:others]
    return sorted([*every[near].tolist(), *drawn.tolist()])


def role(graph: Graph, number: int) -> str:
    """The kind of a node, with the layer type for features and errors: `attention feature`, `mlp error`, `stream feature`, `logit`."""
    kind = KINDS[graph.nodes.kind_N[number]]
    if kind not in ("feature", "error"):
        return kind
    site = graph.sites[graph.nodes.site_N[number]]
    if kind == "feature":
        site = graph.dictionaries[graph.nodes.dictionary_N[number]]["writes"][0]
    return f"{'attention' if 'attn' in site else 'mlp' if 'mlp' in site else 'stream'} {kind}"


def _point(graph: Graph, model: LocalModel, number: int, *, reads: bool) -> int:
    """Where on the stream a node reads, or is behind what it writes first (parts.py)."""
    place = Place.of(graph.sites[graph.nodes.site_N[number]], model.layers)
    if reads:
        return place.point
    kind = KINDS[graph.nodes.kind_N[number]]
    return place.point + (place.kind != "stream" and kind in ("feature", "error"))


def by_kind(
    prompts: Sequence[EdgeEffects], measure: str = "measured", prediction: str = "total", *, enough: int = ENOUGH
) -> dict[str, KindAgreement]:
    """Prediction against one of MEASURES by kinds, and of all edges, and of those between features."""
    groups: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "all": lambda kinds_E: np.ones(len(kinds_E), dtype=bool),
        "feature > feature": lambda kinds_E: _ends(kinds_E, "feature", "feature"),
    }
    for kind in sorted({kind for p in prompts for kind in p.kinds_E.tolist()}):
        groups[kind] = partial(np.equal, kind)
    chosen = {name: [p.only(among(p.kinds_E)) for p in prompts] for name, among in groups.items()}
    return {name: agreement(some, measure, prediction, enough=enough) for name, some in chosen.items()}


def by_layers(prompts: Sequence[EdgeEffects], measure: str = "measured", *, enough: int = ENOUGH) -> dict[int, KindAgreement]:
    """The edges between features by how many layers they span."""
    inside = [p.only(_ends(p.kinds_E, "feature", "feature")) for p in prompts]
    spans = sorted({span for p in inside for span in p.layers_E.tolist()})
    return {span: agreement([p.only(p.layers_E == span) for p in inside], measure, enough=enough) for span in spans}


def agreement(
    prompts: Sequence[EdgeEffects], measure: str = "measured", prediction: str = "total", *, enough: int = ENOUGH
) -> KindAgreement:
    """Of all the edges given."""
    pairs = [(getattr(p, f"{prediction}_E"), getattr(p, f"{measure}_E")) for p in prompts]
    each = list(_each(pairs, enough))
    mean = means(np.array(each)[:, None])[0] if each else Estimate(math.nan)
    mean = Estimate(mean.value, *np.clip((mean.low, mean.high), -1.0, 1.0).tolist())  # of very few prompts it could reach further
    pooled = Agreement.of(*(np.concatenate(column).tolist() for column in zip(*pairs, strict=True)))
    return KindAgreement(pooled.count, len(each), mean, pooled)


def _each(pairs: Sequence[tuple[np.ndarray, np.ndarray]], enough: int) -> Iterator[float]:
    for predicted_E, measured_E in pairs:
        if len(predicted_E) >= enough:
            found = Agreement.of(predicted_E.tolist(), measured_E.tolist()).spearman
            if math.isfinite(found):
                yield found


def _ends(kinds_E: np.ndarray, source: str, target: str) -> np.ndarray:
    """Edges by the ends of the names of their sources and targets."""
    sides = [kinds.split(" > ") for kinds in kinds_E.tolist()]
    return np.array([s.endswith(source) and t.endswith(target) for s, t in sides], dtype=bool)
