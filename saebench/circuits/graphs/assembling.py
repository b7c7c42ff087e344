"""The edges that are kept while a graph is traced, and the graph that they make in the end.

Shape suffixes: `N` sources or nodes, `R` rows, `E` edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saebench.circuits.graphs.attribution import Sources
from saebench.circuits.graphs.graph import KINDS, Graph, Nodes
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.targets import Row
from saebench.features.building import fingerprint

NO_SOURCES, NO_WEIGHTS = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)


@dataclass
class Kept:
    """The edges kept so far: by row, and with each row what was left out."""

    sources: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    constant: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    dropped_size: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)
    """Sum of the sizes of all edges."""

    def add(self, row_N: np.ndarray, constant: float, keep: int | float) -> None:
        sources = strongest(row_N, keep)
        left = float(np.abs(row_N, dtype=np.float64).sum())
        kept = row_N[sources]
        self.sources.append(sources.astype(np.int32))
        self.weights.append(kept)
        self.constant.append(constant)
        self.size.append(left)
        exact = len(kept) == np.count_nonzero(row_N)
        self.dropped.append(0.0 if exact else float(row_N.sum(dtype=np.float64) - kept.sum(dtype=np.float64)))
        self.dropped_size.append(0.0 if exact else max(0.0, left - float(np.abs(kept).sum(dtype=np.float64))))


def strongest(row_N: np.ndarray, keep: int | float) -> np.ndarray:
    """The largest entries of a row in size, by number: `keep` of them, or for a share (below 1; 1.0 is all) the fewest that hold it."""
    sizes_N = np.abs(row_N)
    if isinstance(keep, float):
        sums_N = np.cumsum(np.sort(sizes_N)[::-1], dtype=np.float64)
        keep = len(row_N) if keep >= 1 else int(np.searchsorted(sums_N, keep * sums_N[-1])) + 1
    if keep < np.count_nonzero(sizes_N):
        chosen_N = np.argpartition(-sizes_N, keep - 1)[:keep]
        least = sizes_N[chosen_N].min()
        above_N = np.flatnonzero(sizes_N > least)  # of equal ones the first
        equal_N = np.flatnonzero(sizes_N == least)[: keep - len(above_N)]
        return np.sort(np.concatenate([above_N, equal_N]))
    return np.flatnonzero(sizes_N)


def assemble(
    model: LocalModel,
    sources: Sources,
    targets: list[Row],
    kept: Kept,
    row_of_N: np.ndarray,
    value_R: np.ndarray,
    settings: dict[str, Any],
) -> Graph:
    """Rows and sources brought together: features with a row, errors, tokens, and the targets that are no active feature. `row_of_N` tells
    the row of each source that has one; the first rows are the targets'. Takes the edges out of `kept` as it goes."""
    features_N = np.flatnonzero(row_of_N >= 0)
    there = [np.flatnonzero((written.error_SD != 0).any(1).cpu().numpy()) for written in sources.places]
    starts = [*sources.of_errors, sources.of_tokens]
    blocks = [start + at for start, at in zip(starts, [*there, np.arange(model.size)], strict=True)]
    columns_N = np.concatenate([features_N, *blocks])
    alone = np.setdiff1d(np.arange(len(targets)), row_of_N[features_N])
    node_of_N = np.full(sources.count, -1, dtype=np.int64)
    node_of_N[columns_N] = np.arange(len(columns_N))
    row_of_node = np.concatenate([row_of_N[columns_N], alone])

    table, sites = _table(model, sources, targets, columns_N, alone)
    offsets, edges, weights = [0], [], []
    for node, row in enumerate(row_of_node.tolist()):
        if row >= 0:
            nodes, weight = node_of_N[kept.sources[row]], kept.weights[row]
            stays = nodes >= 0
            edges.append(nodes[stays].astype(np.int32))
            weights.append(weight[stays])
            left = weight[~stays].astype(np.float64)
            kept.sources[row], kept.weights[row] = NO_SOURCES, NO_WEIGHTS  # not views, which would hold what they are views of
            table.value_N[node], table.constant_N[node] = value_R[row], kept.constant[row]
            table.dropped_N[node] = kept.dropped[row] + left.sum()
            table.dropped_size_N[node] = kept.dropped_size[row] + np.abs(left).sum()
        offsets.append(offsets[-1] + (len(edges[-1]) if row >= 0 else 0))
    for row, target in enumerate(targets):
        node = int(np.flatnonzero(row_of_node == row)[0])
        table.weight_N[node], table.probability_N[node] = target.weight, target.probability
    labels = {int(np.flatnonzero(row_of_node == row)[0]): t.label for row, t in enumerate(targets) if t.label}
    vectors = {
        int(np.flatnonzero(row_of_node == row)[0]): [*t.vector_D.tolist(), t.bias]
        for row, t in enumerate(targets)
        if t.kind in ("difference", "direction") and t.vector_D is not None
    }
    strings = model.lm.token_strings
    return Graph(
        prompt=model.prompt,
        ids=model.ids,
        tokens=[strings[i] if i < len(strings) else f"token {i}" for i in model.ids],
        model={"name": model.lm.name, "fingerprint": model.lm.fingerprint},
        dictionaries=[
            {
                "name": name,
                "architecture": dictionary.config.architecture,
                "d_sae": dictionary.config.d_sae,
                "reads": list(dictionary.config.reads),
                "writes": list(dictionary.config.writes),
                "fingerprint": fingerprint(dictionary),
            }
            for name, dictionary in zip(model.names, model.dictionaries, strict=True)
        ],
        sites=sites,
        nodes=table,
        offsets_N=np.array(offsets, dtype=np.int64),
        sources_E=np.concatenate(edges),
        weights_E=np.concatenate(weights).astype(np.float32),
        labels=labels,
        vectors=vectors,
        settings={**settings, "active_features": sources.latents},
        origin=model,
    )


def _table(
    model: LocalModel, sources: Sources, targets: list[Row], columns_N: np.ndarray, alone: np.ndarray
) -> tuple[Nodes, list[str]]:
    """The nodes, those of the columns and then targets that are none of them, and the sites they are at."""
    count = len(columns_N) + len(alone)
    ids_S = np.array(model.ids)
    sites: list[str] = []
    nothing = {
        name: np.zeros(count) for name in ("value_N", "weight_N", "probability_N", "constant_N", "dropped_N", "dropped_size_N")
    }
    table = Nodes(
        kind_N=np.zeros(count, dtype=np.int8),
        site_N=np.zeros(count, dtype=np.int16),
        dictionary_N=np.full(count, -1, dtype=np.int16),
        position_N=np.zeros(count, dtype=np.int32),
        latent_N=np.full(count, -1, dtype=np.int32),
        token_N=np.zeros(count, dtype=np.int32),
        activation_N=np.zeros(count, dtype=np.float32),
        **nothing,
    )

    def at(site: str) -> int:
        if site not in sites:
            sites.append(site)
        return sites.index(site)

    for number, part in enumerate(model.parts):
        begin = sources.of_parts[number]
        mine = np.flatnonzero((columns_N >= begin) & (columns_N < begin + len(part)))
        entries = columns_N[mine] - begin
        table.site_N[mine], table.dictionary_N[mine] = at(part.place.site), part.number
        table.position_N[mine] = part.positions_N.cpu().numpy()[entries]
        table.latent_N[mine] = part.latents_N.cpu().numpy()[entries] + part.first
        table.activation_N[mine] = part.values_N.cpu().numpy()[entries]
    places = [(begin, KINDS.index("error"), w.place.site) for begin, w in zip(sources.of_errors, sources.places, strict=True)]
    for begin, kind, site in [*places, (sources.of_tokens, KINDS.index("token"), "blocks.0.hook_resid_pre")]:
        mine = np.flatnonzero((columns_N >= begin) & (columns_N < begin + model.size))
        table.kind_N[mine], table.site_N[mine] = kind, at(site)
        table.position_N[mine] = columns_N[mine] - begin
    for node, row in enumerate(alone.tolist(), start=len(columns_N)):
        target = targets[row]
        table.kind_N[node], table.position_N[node] = KINDS.index(target.kind), target.position
        if target.place is not None:
            table.site_N[node] = at(target.place.site)
        else:
            part = model.parts[target.part]
            table.site_N[node], table.dictionary_N[node] = at(part.place.site), part.number
            table.latent_N[node] = part.first + target.latent
    table.token_N = ids_S[table.position_N].astype(np.int32)
    for node, row in enumerate(alone.tolist(), start=len(columns_N)):
        if targets[row].token >= 0:
            table.token_N[node] = targets[row].token
    return table, sites
