"""A graph as one JSON file, `graphs/SLUG.json` of a run: format `saebench-graph`, version 1.

Columns of nodes and edges are lists; numbers of float32 are written as short as they come back the same. Whoever reads a file gets a
graph that is whole, or one line that says why not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from saebench.circuits.graphs.graph import KINDS, Graph, Nodes
from saebench.errors import UserError
from saebench.files import read_json, replacing

FORMAT, VERSION = "saebench-graph", 1
FOLDER = "graphs"
HEAD = ("prompt", "ids", "tokens", "model", "dictionaries", "sites", "settings", "extra")
EDGES = ("offsets", "sources", "weights")
COLUMNS = {
    "site": np.int16, "dictionary": np.int16, "position": np.int32, "latent": np.int32, "token": np.int32,
    "activation": np.float32, "value": np.float64, "weight": np.float64, "probability": np.float64, "constant": np.float64,
    "dropped": np.float64, "dropped_size": np.float64,
}  # fmt: skip


def graph_path(run: str | Path, slug: str) -> Path:
    """Where a run keeps the graph of that name. Raises UserError for a name that is no plain file name."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", slug):
        raise UserError(f"the graph name {slug!r} is no file name: use small letters, digits and - _ .")
    return Path(run) / FOLDER / f"{slug}.json"


def save_graph(graph: Graph, path: str | Path) -> None:
    """Write it, atomically; what stood there is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **{name: getattr(graph, name) for name in HEAD}}
    nodes: dict[str, Any] = {"kind": [KINDS[kind] for kind in graph.nodes.kind_N]}
    nodes |= {name: _plain(getattr(graph.nodes, f"{name}_N")) for name in COLUMNS}
    nodes["label"] = {str(number): text for number, text in sorted(graph.labels.items())}
    nodes["vector"] = {str(number): vector for number, vector in sorted(graph.vectors.items())}
    content["nodes"] = nodes
    content["edges"] = {
        "offsets": graph.offsets_N.tolist(),
        "sources": graph.sources_E.tolist(),
        "weights": _plain(graph.weights_E),
    }
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, allow_nan=False, separators=(",", ":"))
        file.write("\n")


def _plain(column: np.ndarray) -> list:
    if column.dtype == np.float32:
        return [float(text) for text in column.astype(str)]
    return column.tolist()


def load_graph(path: str | Path) -> Graph:
    """Read and check a file. Raises UserError for another format or version, unknown kinds of nodes, nodes that are there twice, and
    anything missing or damaged."""
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} is not a {FORMAT}: it says {found!r}")
    if content.get("version") != VERSION:
        raise UserError(f"{path} is a {FORMAT} of version {content.get('version')!r}; this saebench reads version {VERSION}")
    expected = {"format", "version", "nodes", "edges", *HEAD}
    if wrong := sorted(expected.symmetric_difference(content)):
        raise UserError(
            f"{path} {'lacks' if wrong[0] in expected else 'has the unknown field'} {wrong[0]!r}: trace the prompt again"
        )
    try:
        graph = _graph(content, path)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"{path} is damaged ({reason}): trace the prompt again") from None
    _check(graph, path)
    return graph


def _graph(content: dict[str, Any], path: Path) -> Graph:
    nodes, edges = dict(content["nodes"]), content["edges"]
    kinds, labels, vectors = (nodes.pop(name) for name in ("kind", "label", "vector"))
    if unknown := sorted({str(kind) for kind in kinds} - set(KINDS)):
        raise UserError(f"{path} has nodes of unknown kind {unknown[0]!r}: this saebench knows {', '.join(KINDS)}")
    if wrong := sorted(set(nodes).symmetric_difference(COLUMNS)):
        raise UserError(f"{path} has other columns of nodes than version {VERSION}: {wrong[0]!r}")
    columns = {f"{name}_N": np.array(nodes[name], dtype=kind) for name, kind in COLUMNS.items()}
    table = Nodes(kind_N=np.array([KINDS.index(kind) for kind in kinds], dtype=np.int8), **columns)
    offsets_N, sources_E, weights_E = (
        np.array(edges[name], dtype=kind) for name, kind in zip(EDGES, (np.int64, np.int32, np.float32), strict=True)
    )
    head = {name: content[name] for name in HEAD}
    return Graph(
        nodes=table, offsets_N=offsets_N, sources_E=sources_E, weights_E=weights_E,
        labels={int(number): str(text) for number, text in labels.items()},
        vectors={int(number): [float(x) for x in vector] for number, vector in vectors.items()}, **head,
    )  # fmt: skip


def _check(graph: Graph, path: Path) -> None:
    """Raises UserError for what does not fit together."""
    nodes, count = graph.nodes, len(graph)
    damaged = (
        any(column.shape != (count,) for column in nodes.__dict__.values())
        or not all(np.isfinite(column).all() for column in (*nodes.__dict__.values(), graph.weights_E))
        or len(graph.ids) != len(graph.tokens)
        or (count > 0 and not _within(nodes.position_N, 0, len(graph.ids)))
        or (count > 0 and not _within(nodes.site_N, 0, len(graph.sites)))
        or not _within(nodes.dictionary_N[graph.is_kind("feature")], 0, len(graph.dictionaries))
        or not _within(np.array(sorted(graph.labels)), 0, count)
        or set(graph.vectors) != set(np.flatnonzero(graph.is_kind("difference", "direction")).tolist())
    )
    if damaged:
        raise UserError(f"{path} is damaged: its columns of nodes do not fit together, trace the prompt again")
    offsets_N, sources_E = graph.offsets_N, graph.sources_E
    if (
        len(offsets_N) != count + 1
        or offsets_N[0] != 0
        or (np.diff(offsets_N) < 0).any()
        or not offsets_N[-1] == len(sources_E) == len(graph.weights_E)
        or not _within(sources_E, 0, count)
    ):
        raise UserError(f"{path} is damaged: its edges do not fit its {count:,} nodes, trace the prompt again")
    seen: set[str] = set()
    for number in range(count):
        name = graph.id(number)
        if name in seen:
            raise UserError(f"{path} has the node {name} twice: trace the prompt again")
        seen.add(name)
    into_E = np.repeat(np.arange(count), np.diff(offsets_N))
    if len(np.unique(into_E * count + sources_E)) < len(sources_E):
        raise UserError(f"{path} has an edge twice: trace the prompt again")


def _within(numbers: np.ndarray, first: int, end: int) -> bool:
    return not len(numbers) or bool(numbers.min() >= first and numbers.max() < end)
