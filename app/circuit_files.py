"""The graphs that a run keeps: which there are, what they explain, in which of them a feature is, and opened, once for all visitors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import layout
import numpy as np
import opening
import streamlit as st
from naming import link_chip
from opening import Entry, Opened

from saebench.circuits.graphs.graph import Graph
from saebench.circuits.graphs.graph_file import FOLDER, graph_path, load_graph
from saebench.circuits.graphs.influence import Scores
from saebench.errors import UserError
from saebench.figures.graph import short
from saebench.figures.tokens import alone, visible
from saebench.files import read_json

MOST, LISTED, LETTERS = 40, 8, 36  # graphs that are searched, the newest first; graphs and letters that are shown


@dataclass(frozen=True)
class Summary:
    """What a list says of a saved graph."""

    slug: str
    prompt: str = ""
    explained: tuple[str, ...] = ()
    """Names of the targets, the weightiest first."""
    tokens: int = 0
    nodes: int = 0
    edges: int = 0
    spearman: float | None = None
    features: dict[tuple[str, int], str] = field(default_factory=dict, repr=False)
    """By dictionary and latent: the id of its node of the largest activation."""
    problem: str = ""


def saved(run: Opened) -> list[Path]:
    """The files of graphs, the newest first; what stands beside a graph is none."""
    found = [path for path in (run.path / FOLDER).glob("*.json") if not path.name.endswith(".supernodes.json")]
    return sorted(found, key=lambda path: (-(opening.stamp(path) or (0, 0, 0))[2], path.name))


def summary(path: Path) -> Summary:
    return _summary(str(path), opening.stamp(path))


@st.cache_resource(show_spinner=False, max_entries=400)
def _summary(path: str, at: opening.Stamp | None) -> Summary:
    slug = Path(path).stem
    try:
        content: Any = read_json(Path(path))
        nodes, edges = content["nodes"], content["edges"]
        weights = np.array(nodes["weight"], dtype=np.float64)
        order = [int(n) for n in np.argsort(-weights, kind="stable") if weights[n] > 0]
        dictionaries = [str(dictionary["name"]) for dictionary in content["dictionaries"]]
        explained = tuple(_explained(nodes, dictionaries, n) for n in order)
        found = (content.get("extra") or {}).get("verification") or {}
        spearman = found.get("total", {}).get("spearman")
        return Summary(
            slug, str(content["prompt"]), explained, len(content["ids"]), len(nodes["kind"]), len(edges["sources"]),
            float(spearman) if spearman is not None else None, _features(nodes, dictionaries),
        )  # fmt: skip
    except (UserError, OSError) as error:
        return Summary(slug, problem=str(error))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        said = f"{path} is damaged ({type(error).__name__}): trace the prompt again"
        return Summary(slug, problem=said)


def _explained(nodes: dict[str, Any], dictionaries: list[str], n: int) -> str:
    label = nodes["label"].get(str(n), "")
    if nodes["kind"][n] == "feature":
        return f"{dictionaries[nodes['dictionary'][n]]} {nodes['latent'][n]}"
    return str(label)


def _features(nodes: dict[str, Any], dictionaries: list[str]) -> dict[tuple[str, int], str]:
    best: dict[tuple[str, int], tuple[float, str]] = {}
    columns = (nodes[name] for name in ("kind", "dictionary", "latent", "position", "activation"))
    for kind, number, latent, position, activation in zip(*columns, strict=True):
        if kind == "feature":
            key = dictionaries[number], int(latent)
            if key not in best or activation > best[key][0]:
                best[key] = float(activation), f"feature/{key[0]}/{position}/{latent}"
    return {key: node for key, (_, node) in best.items()}


def containing(entry: Entry, latent: int) -> list[tuple[Summary, str]]:
    """The newest saved graphs with a node of a feature, and the id of the strongest such node."""
    found = []
    for path in saved(entry.run)[:MOST]:
        known = summary(path)
        if (node := known.features.get((entry.name, latent))) is not None:
            found.append((known, node))
    return found


def show_containing(entry: Entry, latent: int) -> None:
    """On the page of a feature: the saved graphs that it is in, if there are any."""
    found = containing(entry, latent)
    if not found:
        return
    layout.heading("Circuits with this feature", "saved graphs of the run")
    chips = [
        link_chip(
            short("".join(visible(letter) for letter in one.prompt[-LETTERS:]), LETTERS), "circuit",
            aside=short(", ".join(alone(name) for name in one.explained), LETTERS), run=entry.run.name, graph=one.slug, node=node, zoom="",
        )
        for one, node in found[:LISTED]
    ]  # fmt: skip
    layout.show(f'<div class="sb-chips">{"".join(chips)}</div>')
    if len(found) > LISTED:
        layout.show(f'<span class="sb-dim">The newest {LISTED} of {len(found)}.</span>')


# --- opened ---


def key(run: Opened, slug: str) -> str:
    """A name for what is kept in memory of a graph as its file is now. Raises UserError for a name that is none, or has no file."""
    path = graph_path(run.path, slug)
    at = opening.stamp(path)
    if at is None:
        raise UserError(f"{run.name} has no graph {slug!r}: it may have been deleted; choose another one, or build it")
    return f"{path}\n{at}"


def graph(key: str) -> Graph:
    """As the file has it. Raises UserError for a damaged one."""
    return _graph(key)


@st.cache_resource(show_spinner="Opening the graph", max_entries=16)
def _graph(key: str) -> Graph:
    return load_graph(key.partition("\n")[0])


@dataclass(frozen=True, eq=False)
class Pruned:
    """A graph, and what pruning leaves of it."""

    whole: Graph
    graph: Graph
    numbers: np.ndarray
    """Of the nodes that are left, in the whole graph."""
    whole_scores: Scores
    scores: Scores
    influence: np.ndarray
    """Of every node of the pruned graph."""


@st.cache_resource(show_spinner="Pruning the graph", max_entries=64)
def pruned(key: str, nodes: float, edges: float) -> Pruned:
    """Raises UserError for a damaged graph, one with a cycle, and shares that are none."""
    whole = graph(key)
    try:
        left = whole.prune(nodes, edges)
        scores = whole.scores(), left.scores()
    except ValueError as error:
        raise UserError(f"{Path(key.partition(chr(10))[0])} is damaged ({error}): trace the prompt again") from None
    numbers = left.numbers_in(whole)
    return Pruned(whole, left, numbers, *scores, left.influence())
