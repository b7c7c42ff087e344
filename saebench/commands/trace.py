"""`saebench trace RUN`: the attribution graph of a prompt, its scores, and how well it foretells what interventions do."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saebench.circuits.graphs.graph import Graph
    from saebench.circuits.graphs.targets import Target
    from saebench.dictionaries import Dictionary
    from saebench.runs import Run

SHOWN = 12
SCORES = ("replacement", "completeness")
LETTERS = 40  # of a prompt in a file's name


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run with transcoders, and Lorsa if it has them: `saebench train bundled-circuits`"
    )
    parser.add_argument("--prompt", required=True, help="text whose next token is to be explained")
    parser.add_argument("--token", help="the token to explain; default the likeliest ones")
    parser.add_argument("--against", metavar="TOKEN", help="explain by how much the logit of --token is above that of this one")
    parser.add_argument("--dictionary", action="append", metavar="ID", help="only this one (may be given several times)")
    parser.add_argument("--features", type=int, default=2048, help="nodes that are features, at most (default: 2048)")
    parser.add_argument("--keep", type=int, default=512, help="edges kept into each node; the others are summed (default: 512)")
    parser.add_argument(
        "--verify",
        type=int,
        default=50,
        metavar="N",
        help="strongest edges that are checked in the model (default: 50; 0 for none)",
    )
    parser.add_argument("--name", help="of the file in RUN/graphs; default made from the prompt")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.circuits.graphs.graph_file import graph_path
    from saebench.circuits.graphs.tracing import trace
    from saebench.errors import UserError
    from saebench.pipeline import Pipeline
    from saebench.progress import say
    from saebench.recipes import Recipe
    from saebench.runs import Run

    if not args.prompt.strip():
        raise UserError("the prompt is empty: give it some text")
    if args.against is not None and args.token is None:
        raise UserError("--against compares with --token: give both, or neither")
    run = Run.open(args.run)
    dictionaries = chosen(run, args.dictionary)
    path = graph_path(run.path, args.name or slug(args.prompt))
    pipeline = Pipeline(Recipe.parse(run.record["recipe"], str(args.run)))
    pipeline.check_model(run)
    graph = trace(pipeline.lm, dictionaries, args.prompt, targets=_targets(args), max_features=args.features, keep=args.keep)
    pruned = graph.prune()
    scores = {"whole": graph.scores().as_dict(), "pruned": pruned.scores().as_dict()}
    found = pruned.verify(args.verify) if args.verify else None
    spearman = None if found is None or math.isnan(found.spearman) else found.spearman
    if found is not None:
        graph.extra["verification"] = found.as_dict()
    graph.save(path)
    _show(pruned, scores, spearman)
    say(f"graph: {path}")
    return {
        "run": str(args.run),
        "graph": str(path),
        "tokens": len(graph.tokens),
        "targets": {graph.node(int(number)).label: graph.node(int(number)).probability for number in graph.targets},
        "nodes": len(graph),
        "edges": graph.num_edges,
        "nodes_pruned": len(pruned),
        "edges_pruned": pruned.num_edges,
        "replacement_score": scores["whole"]["replacement"],
        "completeness_score": scores["whole"]["completeness"],
        "spearman": spearman,
        "scores": scores,
        "verification": None if found is None else found.as_dict(),
    }


def chosen(run: Run, names: list[str] | None) -> dict[str, Dictionary]:
    """The dictionaries of a run that a graph is made of. Raises UserError for an unknown name, and where none is a transcoder or Lorsa."""
    from saebench.errors import UserError
    from saebench.pipeline import dictionaries

    wanted = dictionaries(run, names)
    if names is None and (writing := {name: d for name, d in wanted.items() if not d.config.rewrites}):
        wanted = writing
    if not any(not dictionary.config.rewrites for dictionary in wanted.values()):
        raise UserError(
            f"{run.path} has no transcoder, cross-layer transcoder or Lorsa, which a circuit is traced through: "
            "train some, such as `saebench train bundled-circuits`"
        )
    return wanted


def slug(prompt: str) -> str:
    """A file name from the beginning of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:LETTERS].strip("-") or "graph"


def _targets(args: argparse.Namespace) -> list[Target] | None:
    from saebench.circuits.graphs.targets import Difference, Logit

    if args.token is None:
        return None
    return [Logit(args.token) if args.against is None else Difference(args.token, args.against)]


def _show(graph: Graph, scores: dict[str, dict[str, float]], spearman: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    influence = graph.influence()
    table = Table(title=f"{len(graph)} nodes and {graph.num_edges} edges after pruning; the {SHOWN} nodes of most influence")
    for head, where in (("node", "left"), ("at", "left"), ("activation", "right"), ("influence", "right")):
        table.add_column(head, justify=where)  # type: ignore[arg-type]
    for number in influence.argsort()[::-1][:SHOWN]:
        node = graph.node(int(number))
        text = node.label or repr(graph.tokens[node.position])
        table.add_row(node.id, text, f"{node.activation:.3g}" if node.kind == "feature" else "", f"{influence[number]:.3f}")
    console.print(table)
    for name, found in scores.items():
        ends = {what: f"{found[what]:.3f} ({found[f'{what}_low']:.3f} to {found[f'{what}_high']:.3f})" for what in SCORES}
        console.print(f"{name}: " + ", ".join(f"{what} {said}" for what, said in ends.items()) + "; bounds: what was dropped")
    if spearman is not None:
        console.print(f"predicted against measured: Spearman {spearman:.3f}")
