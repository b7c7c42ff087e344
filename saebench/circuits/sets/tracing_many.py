"""Many prompts traced one after the other, each graph in the run's graphs/ as soon as it is made.

What is there already is not made again: a graph of the same model, dictionaries, tokens, targets and settings is read, so that a stopped
job loses one graph at most and goes on where it was. Files are named after the beginning of the prompt, and where that name holds another
graph, with a number behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.graphs.graph_file import graph_path, load_graph, save_graph
from saebench.circuits.graphs.replacement import Dictionaries, LocalModel, prompt_ids
from saebench.circuits.graphs.targets import Row, Target, rows_of
from saebench.circuits.graphs.tracing import KEEP, MAX_FEATURES, trace
from saebench.errors import UserError
from saebench.features.building import fingerprint
from saebench.lm import LanguageModel

Settings = dict[str, int | float]
LETTERS = 40  # of a prompt in a file's name


@dataclass(frozen=True)
class Traced:
    """One graph, its file, and whether it was there already."""

    graph: Graph
    path: Path
    loaded: bool


def trace_many(
    lm: LanguageModel,
    dictionaries: Dictionaries,
    prompts: Sequence[str | Sequence[int]],
    run: str | Path,
    *,
    targets: Sequence[Target] | None = None,
    max_features: int = MAX_FEATURES,
    keep: int | float = KEEP,
) -> Iterator[Traced]:
    """The graphs of several prompts in order, with the same targets and settings as `trace` takes, kept in the folder of a run.

    Each can be verified until the next is asked for: then it lets go of the model it was made from (`origin`), which would take far more
    memory than the graph. Raises UserError as `trace` does, for no prompt, and for a prompt that is there twice; all prompts are looked at
    before the first is traced.
    """
    wanted = [prompt_ids(lm, prompt)[0] for prompt in prompts]
    if not wanted:
        raise UserError("there is no prompt: give at least one")
    for number, ids in enumerate(wanted):
        if ids in wanted[:number]:
            raise UserError(f"prompt {number + 1} is the same as prompt {wanted.index(ids) + 1}: give each once")
    listed = list(dictionaries.values()) if isinstance(dictionaries, Mapping) else list(dictionaries)
    marks = [fingerprint(dictionary) for dictionary in listed]
    taken: set[Path] = set()
    for prompt in prompts:
        model = LocalModel(lm, dictionaries, prompt)
        rows = rows_of(model, targets)
        path, graph = _kept(run, model, rows, {"max_features": max_features, "keep": keep}, marks, taken)
        taken.add(path)
        loaded = graph is not None
        if graph is None:
            graph = trace(lm, dictionaries, prompt, targets=targets, max_features=max_features, keep=keep, model=model)
            save_graph(graph, path)
        graph.origin = model
        yield Traced(graph, path, loaded)
        graph.origin = None


def slug(prompt: str) -> str:
    """A file name from the beginning of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:LETTERS].strip("-") or "graph"


def _kept(
    run: str | Path, model: LocalModel, rows: Sequence[Row], settings: Settings, marks: list[str], taken: set[Path]
) -> tuple[Path, Graph | None]:
    """The file of a graph, and the graph where it is there."""
    name, number = slug(model.prompt), 1
    while True:
        path = graph_path(run, name if number == 1 else f"{name}-{number}")
        if not path.exists():
            return path, None
        if path not in taken:
            try:
                found = load_graph(path)
            except UserError:  # another's file, or a damaged one: left as it is
                found = None
            if found is not None and _same(found, model, rows, settings, marks):
                return path, found
        number += 1


def _same(graph: Graph, model: LocalModel, rows: Sequence[Row], settings: Settings, marks: list[str]) -> bool:
    """Whether a graph is what tracing would make."""
    nodes = graph.nodes
    there = {
        _mark(
            KINDS[nodes.kind_N[n]], nodes.position_N[n], nodes.dictionary_N[n], nodes.latent_N[n], nodes.token_N[n],
            graph.vectors.get(n), graph.labels.get(n, ""),
        )
        for n in graph.targets.tolist()
    }  # fmt: skip
    made = {name: graph.settings.get(name) for name in settings}
    return (
        graph.model["fingerprint"] == model.lm.fingerprint
        and [(each["name"], each["fingerprint"]) for each in graph.dictionaries] == list(zip(model.names, marks, strict=True))
        and graph.ids == model.ids
        and {name: (type(value), value) for name, value in made.items()} == {n: (type(v), v) for n, v in settings.items()}
        and "node_share" not in graph.settings  # of pruned graphs
        and there == {_of_row(row, model) for row in rows}
    )


def _of_row(row: Row, model: LocalModel) -> tuple:
    part = model.parts[row.part] if row.part >= 0 else None
    dictionary, latent = (part.number, part.first + row.latent) if part else (-1, -1)
    vector = None if row.vector_D is None else [*row.vector_D.tolist(), row.bias]
    return _mark(row.kind, row.position, dictionary, latent, row.token, vector, row.label)


def _mark(kind: str, position: int, dictionary: int, latent: int, token: int, vector: list[float] | None, label: str) -> tuple:
    """What makes a target of a graph what it is."""
    own = (int(dictionary), int(latent)) if kind == "feature" else (int(token),) if kind == "logit" else (label, *(vector or ()))
    return kind, int(position), *own
