"""`saebench trace RUN`: the attribution graph of a prompt, its scores, and how well it foretells what interventions do; of several prompts
each, and what they have in common."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saebench.circuits.graphs.graph import Graph
    from saebench.circuits.graphs.targets import Target
    from saebench.circuits.sets.graph_sets import GraphSet, Of
    from saebench.circuits.sets.stability import Stability
    from saebench.dictionaries import Dictionary
    from saebench.lm import LanguageModel
    from saebench.runs import Run

SHOWN = 12
SCORES = ("replacement", "completeness")
OF: tuple[Of, ...] = ("features", "nodes", "edges")
FEATURES, KEEP, VERIFIED = 2048, 512, 50  # defaults, of the Circuit page too
COMMON = 100  # nodes and edges of a set that --json lists


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run with transcoders, and Lorsa if it has them: `saebench train bundled-circuits`"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text whose next token is to be explained (given several times: a graph of each, and what they have in common)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="more prompts, one a line; in a .jsonl file each a JSON string, for prompts of several lines",
    )
    parser.add_argument(
        "--positions",
        choices=("dropped", "from_end"),
        default="dropped",
        help="what of several prompts is the same node: a feature wherever it stands (default), or at the same place from the end",
    )
    parser.add_argument("--token", help="the token to explain; default the likeliest ones")
    parser.add_argument("--against", metavar="TOKEN", help="explain by how much the logit of --token is above that of this one")
    parser.add_argument("--dictionary", action="append", metavar="ID", help="only this one (may be given several times)")
    parser.add_argument("--features", type=int, default=FEATURES, help=f"nodes that are features, at most (default: {FEATURES})")
    parser.add_argument(
        "--keep", type=int, default=KEEP, help=f"edges kept into each node; the others are summed (default: {KEEP})"
    )
    parser.add_argument(
        "--verify",
        type=int,
        default=VERIFIED,
        metavar="N",
        help=f"strongest edges that are checked in the model (default: {VERIFIED}; 0 for none)",
    )
    parser.add_argument("--name", help="of the file in RUN/graphs; default made from the prompt")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="also write the pruned graph as circuit-tracer's JSON, which Neuronpedia takes",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.errors import UserError
    from saebench.pipeline import Pipeline
    from saebench.recipes import Recipe
    from saebench.runs import Run

    prompts = _prompts(args)
    if args.against is not None and args.token is None:
        raise UserError("--against compares with --token: give both, or neither")
    run = Run.open(args.run)
    dictionaries = chosen(run, args.dictionary)
    pipeline = Pipeline(Recipe.parse(run.record["recipe"], str(args.run)))
    pipeline.check_model(run)
    if len(prompts) > 1:
        return _many(args, run, pipeline.lm, dictionaries, prompts)
    return {"run": str(args.run), **_one(args, run, pipeline.lm, dictionaries, prompts[0])}


def _one(
    args: argparse.Namespace, run: Run, lm: LanguageModel, dictionaries: dict[str, Dictionary], prompt: str
) -> dict[str, Any]:
    from saebench.circuits.graphs.graph_file import graph_path
    from saebench.circuits.graphs.tracing import trace
    from saebench.circuits.sets.tracing_many import slug
    from saebench.progress import say

    path = graph_path(run.path, args.name or slug(prompt))
    graph = trace(lm, dictionaries, prompt, targets=_targets(args), max_features=args.features, keep=args.keep)
    pruned = graph.prune()
    found = pruned.verify(args.verify) if args.verify else None
    if found is not None:
        graph.extra["verification"] = found.as_dict(pruned.numbers_in(graph))
    graph.save(path)
    result = _result(graph, pruned, path)
    _show(pruned, result["scores"], result["verification"])
    say(f"graph: {path}")
    if args.export is not None:
        from saebench.interop import write_circuit_tracer

        write_circuit_tracer(pruned, args.export)
        say(f"for circuit-tracer and Neuronpedia: {args.export}")
    return result


def _many(
    args: argparse.Namespace, run: Run, lm: LanguageModel, dictionaries: dict[str, Dictionary], prompts: list[str]
) -> dict[str, Any]:
    """A graph of each prompt, those that are there already as they are, and what the pruned ones have in common."""
    from saebench.circuits.sets.graph_sets import GraphSet
    from saebench.circuits.sets.tracing_many import trace_many
    from saebench.errors import UserError
    from saebench.progress import say

    if args.export is not None:
        raise UserError("--export is for the graph of one prompt: give one")
    if args.name is not None:
        raise UserError("--name is for the graph of one prompt: leave it out, files are named after their prompts")
    results, kept = [], []
    options = {"targets": _targets(args), "max_features": args.features, "keep": args.keep}
    for made in trace_many(lm, dictionaries, prompts, run.path, **options):
        graph, pruned = made.graph, made.graph.prune()
        checked = _checked(graph)
        if args.verify and (checked is None or len(checked["edges"]) != min(args.verify, pruned.num_edges)):
            graph.extra["verification"] = pruned.verify(args.verify).as_dict(pruned.numbers_in(graph))
            graph.save(made.path)
        pruned.origin = None  # the linear model takes far more memory than the graph
        results.append({"prompt": graph.prompt, "loaded": made.loaded, **_result(graph, pruned, made.path)})
        kept.append(pruned)
        say(f"{len(kept)} of {len(prompts)}: {made.path}{' (there already)' if made.loaded else ''}")
    graphs = GraphSet(kept, positions=args.positions)
    stability = {of: graphs.stability(of) for of in OF}
    nodes, edges = graphs.nodes(top=COMMON), graphs.edges(top=COMMON)
    _show_common(graphs, results, stability)
    return {
        "run": str(args.run),
        "positions": args.positions,
        "prompts": results,
        "stability": {of: found.as_dict() for of, found in stability.items()},
        "nodes_in_all": len(graphs.nodes(1.0)),
        "nodes": [node.as_dict() for node in nodes],
        "edges": [edge.as_dict() for edge in edges],
    }


def _result(graph: Graph, pruned: Graph, path: Path) -> dict[str, Any]:
    scores = {"whole": graph.scores().as_dict(), "pruned": pruned.scores().as_dict()}
    verification = _checked(graph)
    return {
        "graph": str(path),
        "tokens": len(graph.tokens),
        "targets": {graph.node(int(number)).label: graph.node(int(number)).probability for number in graph.targets},
        "nodes": len(graph),
        "edges": graph.num_edges,
        "nodes_pruned": len(pruned),
        "edges_pruned": pruned.num_edges,
        "replacement_score": scores["whole"]["replacement"],
        "completeness_score": scores["whole"]["completeness"],
        "spearman": None if verification is None else verification["total"]["spearman"],
        "scores": scores,
        "verification": verification,
    }


def _checked(graph: Graph) -> dict[str, Any] | None:
    """What an earlier check found; None where there was none, or the file has something else there."""
    found: Any = graph.extra.get("verification")
    whole = isinstance(found, dict) and isinstance(found.get("edges"), list) and isinstance(found.get("total"), dict)
    return found if whole and "spearman" in found["total"] else None


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


def _prompts(args: argparse.Namespace) -> list[str]:
    """Raises UserError for no prompt, an empty one, and a file that cannot be read as prompts."""
    from saebench.errors import UserError

    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += _lines(args.prompts)
    if not prompts:
        raise UserError("there is no prompt: give --prompt TEXT, or --prompts FILE")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("the prompt is empty: give it some text")
    return prompts


def _lines(path: Path) -> list[str]:
    """The prompts of a file; empty lines are none."""
    from saebench.errors import UserError

    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: name one with a prompt on each line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: give one prompt a line") from None
    if not lines:
        raise UserError(f"{path} has no prompt: give one a line")
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for line in lines]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            found.append(None)
        if not isinstance(found[-1], str):
            raise UserError(f'line {number} of {path} is no JSON string: write prompts such as "import os\\n"')
    return found


def _targets(args: argparse.Namespace) -> list[Target] | None:
    from saebench.circuits.graphs.targets import Difference, Logit

    if args.token is None:
        return None
    return [Logit(args.token) if args.against is None else Difference(args.token, args.against)]


def _show(graph: Graph, scores: dict[str, dict[str, float]], verification: dict[str, Any] | None) -> None:
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
    if verification is not None:
        console.print(
            f"predicted against measured, {len(verification['edges'])} strongest edges: {_agreement(verification['total'])}"
        )
        for kinds, found in verification["by_kind"].items():
            console.print(f"  {kinds.replace('>', ' > ')} ({found['count']}): {_agreement(found)}")


def _agreement(found: dict[str, float | None]) -> str:
    spearman, slope = (None if found[key] is None else f"{found[key]:.2f}" for key in ("spearman", "slope"))
    return f"Spearman {spearman or '-'}, measured per predicted {slope or '-'}"


def _show_common(graphs: GraphSet, results: list[dict[str, Any]], stability: dict[Of, Stability]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    table = Table(title=f"graphs of {len(graphs)} prompts")
    for head, where in (("prompt", "left"), ("replacement", "right"), ("completeness", "right"), ("Spearman", "right")):
        table.add_column(head, justify=where)  # type: ignore[arg-type]
    for result in results:
        figures = (result["replacement_score"], result["completeness_score"], result["spearman"])
        table.add_row(repr(result["prompt"])[:60], *("" if figure is None else f"{figure:.3f}" for figure in figures))
    console.print(table)
    table = Table(title=f"after pruning: the {SHOWN} nodes of most influence in the mean, with 95 % intervals over prompts")
    for head, where in (("node", "left"), ("at", "left"), ("in", "right"), ("influence", "right")):
        table.add_column(head, justify=where)  # type: ignore[arg-type]
    for node in graphs.nodes(top=SHOWN):
        share = f"{sum(node.present)} of {len(graphs)} ({node.frequency.low:.2f} to {node.frequency.high:.2f})"
        table.add_row(node.key, repr(node.label) if node.label else "", share, _interval(node.influence.as_list()))
    console.print(table)
    for of, found in stability.items():
        said = f"stability of {of}: {_interval(found.weighted.as_list())}, by chance {found.chance.value:.3f}"
        console.print(f"{said}; in common to two prompts {found.plain.value:.1%} of what either has")


def _interval(ends: list[float | None]) -> str:
    value, low, high = ends
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
