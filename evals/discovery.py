"""How well do feature circuits, EAP and discrete codes find a circuit that is known, and what does the model still do with it alone?

    python evals/discovery.py                       # minutes on two cores
    python evals/discovery.py --only planted --again
    python evals/discovery.py --data DIR            # where gpt-nano-sort is, if not in ../shared/data

Ground truth is the planted algorithm where there is one, and everywhere the exhaustive ablation of every head, MLP, edge, latent and edge
between latents: what changes the metric by more than a share of what all of them do belongs to the circuit. Every method is put beside
it under zero, mean and resample ablation. Figures are kept in evals/results/discovery.json, one entry a task and patch; what is there is
not measured again. A table, a figure of the curves and a page of all of them (pages/discovery.html) are written beside it. Seconds are of
processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from evals.page import ROOT
from evals.shared import HERE, pyplot
from evals.tasks import TASKS, Task
from saebench.circuits.discovery.discrete import DiscreteCircuit, discrete_circuit
from saebench.circuits.discovery.edge_circuits import FeatureCircuit, edge_curve, exact_feature_edges, feature_edge_curve
from saebench.circuits.discovery.feature_edges import feature_edges
from saebench.circuits.discovery.model_edges import Components, EdgeEffects
from saebench.circuits.discovery.patching import NodeEffects, Patching
from saebench.circuits.discovery.ranking import Curve, precision_recall, roc_auc
from saebench.errors import UserError
from saebench.figures.discovery import METHODS, agreement_table, write_page
from saebench.progress import say

RESULTS, DATA = HERE / "results" / "discovery.json", ROOT.parent / "shared" / "data"
PATCHES = ("resample", "mean", "zero")
HEAD_SHARE, SHARE = 0.05, 0.02  # of what all components do: above it one belongs to the circuit
NODES = 12  # latents between which edges are ablated one by one
CIRCUIT = 48  # latents between which edges are ranked for the curve
DISCRETE_EXAMPLES = 8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="", help=f"of {', '.join(TASKS)}, separated by commas")
parser.add_argument("--data", type=Path, default=DATA, help="directory that holds gpt-nano-sort (default: ../shared/data)")
parser.add_argument("--again", action="store_true", help="measure what is there already too")
parser.add_argument("--out", type=Path, default=RESULTS, help="file of results")


def main(argv: Sequence[str] | None = None) -> None:
    args = parser.parse_args(argv)
    names = [name for name in args.only.split(",") if name] or list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"task {unknown[0]!r} is unknown: use {', '.join(TASKS)}")
    if "sorting" in names and not args.only and not (args.data / "gpt-nano-sort").is_dir():
        say(f"gpt-nano-sort is not in {args.data}, so sorting is left out")
        names.remove("sorting")
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in names:
        wanted = [patch for patch in PATCHES if args.again or f"{name}/{patch}" not in results]
        if not wanted:
            continue
        started = time.perf_counter()
        task = TASKS[name](args.data)
        codes, seconds = timed(lambda task=task: codes_of(task))  # type: ignore[misc]
        say(f"{name}: discrete codes of {2 * DISCRETE_EXAMPLES} examples in {seconds:.1f} s of processor time")
        for patch in wanted:
            results[f"{name}/{patch}"] = {
                "task": name, "patch": patch, "date": date.today().isoformat(), "examples": len(task.examples),
                "head_share": HEAD_SHARE, "share": SHARE, **measured(task, patch, codes, seconds),
            }  # fmt: skip
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            say(f"{name}/{patch}: {time.perf_counter() - started:.0f} s so far")
    table = "\n".join(agreement_table(results))
    print(table)
    args.out.with_suffix(".md").write_text(table + "\n")
    draw(results, args.out.with_suffix(".svg"))
    write_page(results, args.out.parent / "pages" / f"{args.out.stem}.html")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the seconds of processor time that it took, which do not depend on what else runs."""
    started = time.process_time()
    return work(), time.process_time() - started


def codes_of(task: Task) -> DiscreteCircuit:
    assert task.examples.patch_BS is not None
    some = slice(DISCRETE_EXAMPLES)
    return discrete_circuit(task.lm, task.examples.ids_BS[some], task.examples.patch_BS[some], aligned=True)


def measured(task: Task, patch: str, codes: DiscreteCircuit, seconds: float) -> dict[str, Any]:
    """Rows of figures and curves of all levels under one patch."""
    found = Found()
    heads_and_mlps(task, patch, codes, seconds, found)
    edges(task, patch, codes, found)
    latents(task, patch, found)
    return {"rows": found.rows, "curves": found.curves}


class Found:
    """Figures as they come in."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.curves: list[dict[str, Any]] = []

    def ranking(self, level: str, method: str, scores_N: Tensor, true_N: Tensor, truth: str, seconds: float) -> None:
        """One row; without AUC where nothing, or everything, is in the circuit."""
        inside, row = int(true_N.sum()), {"level": level, "method": method, "truth": truth, "seconds": round(seconds, 3)}
        row |= {"inside": inside, "components": len(true_N)}
        if 0 < inside < len(true_N):
            agreed = precision_recall(scores_N.abs(), true_N)
            row |= {"auc": roc_auc(scores_N.abs(), true_N), "precision": agreed.precision, "recall": agreed.recall}
        self.rows.append(row)

    def curve(self, level: str, method: str, curve: Curve) -> None:
        self.curves.append({"level": level, "method": method, **vars(curve), "smallest": curve.smallest()})


# --- heads, MLPs and edges between them ---


def heads_and_mlps(task: Task, patch: str, codes: DiscreteCircuit, seconds: float, found: Found) -> None:
    components = Components(task.lm, task.examples, patch=patch)  # type: ignore[arg-type]
    effects = {method: timed(lambda m=method: components.effects(m)) for method in ("exact", "eap", "eap_ig")}  # type: ignore[misc]
    every = torch.ones(len(effects["exact"][0].effect_N), dtype=torch.bool)
    done = abs(components.metric_of(every) - components.metric_of(~every))
    heads = effects["exact"][0].heads_LH.numel()
    exact_N = effects["exact"][0].effect_N.abs() > HEAD_SHARE * done
    truths = {"exact": exact_N[:heads]} | ({} if task.heads_LH is None else {"planted": task.heads_LH.flatten()})
    for method, (effect, took) in effects.items():
        for truth, true_N in truths.items():
            if (method, truth) != ("exact", "exact"):
                found.ranking("heads", method, effect.heads_LH.flatten(), true_N, truth, took)
        if method != "exact":
            found.ranking("heads and MLPs", method, effect.effect_N, exact_N, "exact", took)
        found.curve("heads and MLPs", method, components.curve(effect))
    for truth, true_N in truths.items():
        found.ranking("heads", "discrete codes", codes.scores_LH.flatten(), true_N, truth, seconds)


def edges(task: Task, patch: str, codes: DiscreteCircuit, found: Found) -> None:
    components = Components(task.lm, task.examples, patch=patch)  # type: ignore[arg-type]
    effects = {method: timed(lambda m=method: components.edges(m)) for method in ("exact", "eap", "eap_ig")}  # type: ignore[misc]
    exact: EdgeEffects = effects["exact"][0]
    there_UT = ~exact.effect_UT.isnan()
    curves = {method: edge_curve(components, effect) for method, (effect, _) in effects.items()}
    done = abs(curves["exact"].full - curves["exact"].none)
    exact_UT = exact.effect_UT.abs().nan_to_num(0.0) > SHARE * done
    truths = {"exact": exact_UT}
    if task.edges is not None and patch == "resample":
        truths["planted"] = torch.tensor([[(u, t) in task.edges for t in exact.targets] for u in exact.sources])
    for method, (effect, took) in effects.items():
        for truth, true_UT in truths.items():
            if (method, truth) != ("exact", "exact"):
                found.ranking("edges", method, effect.effect_UT[there_UT], true_UT[there_UT], truth, took)
        found.curve("edges", method, curves[method])
    # Pairs of heads: an edge into queries, keys or values. Codes know no more of an edge.
    names = [name for name in exact.sources if name.startswith("a")]
    rows = [exact.sources.index(name) for name in names]
    into_UG = torch.stack([
        exact_UT[:, [i for i, target in enumerate(exact.targets) if target.startswith(f"{name}<")]].any(1) for name in names
    ], 1)  # fmt: skip
    layer_G = torch.tensor([int(name[1:].split(".")[0]) for name in names])
    pairs_GG = layer_G[:, None] < layer_G[None]
    found.ranking("pairs of heads", "discrete codes", codes.edges_GG[pairs_GG], into_UG[rows][pairs_GG], "exact", 0.0)
    for method in ("eap", "eap_ig"):
        size_UT = effects[method][0].effect_UT.abs().nan_to_num(0.0)
        best_UG = torch.stack([
            size_UT[:, [i for i, target in enumerate(exact.targets) if target.startswith(f"{name}<")]].amax(1) for name in names
        ], 1)  # fmt: skip
        found.ranking("pairs of heads", method, best_UG[rows][pairs_GG], into_UG[rows][pairs_GG], "exact", effects[method][1])


# --- latents and edges between them ---


def latents(task: Task, patch: str, found: Found) -> None:
    examples = task.examples.take(slice(task.few))
    patching = Patching(
        task.lm, task.dictionaries, examples, patch=patch, keep_positions=task.keep_positions, skip=task.skip, batch_size=32  # type: ignore[arg-type]
    )  # fmt: skip
    methods = ("exact", "first_order", "latents_only", "integrated")
    effects = {method: timed(lambda m=method: patching.effects(m)) for method in methods}  # type: ignore[misc]
    exact: NodeEffects = effects["exact"][0]
    curves = {method: patching.curve(effects[method][0]) for method in ("exact", "first_order", "integrated")}
    done = abs(curves["exact"].full - curves["exact"].none)
    truths = {"exact": exact.effect_N.abs() > SHARE * done}
    if task.nodes is not None:
        keys = zip(exact.site_N.tolist(), exact.position_N.tolist(), exact.latent_N.tolist(), strict=True)
        truths["planted"] = torch.tensor([key in task.nodes for key in keys])
    for method, (effect, took) in effects.items():
        for truth, true_N in truths.items():
            if (method, truth) != ("exact", "exact"):
                found.ranking("latents", method, effect.effect_N, true_N, truth, took)
        if method in curves:
            found.curve("latents", method, curves[method])
    edges_of_latents(task, patching, effects, done, found)


def edges_of_latents(
    task: Task, patching: Patching, effects: dict[str, tuple[NodeEffects, float]], done: float, found: Found
) -> None:
    """Between the strongest nodes of the two submodules that have most of these, so that there are edges; of a planted circuit enough for
    all of it."""
    table = effects["exact"][0]
    order = table.order()
    most = table.site_N[order[: 4 * NODES]].bincount(minlength=len(patching.subs)).argsort(descending=True, stable=True)[:2]
    each = NODES if task.nodes is not None else NODES // 2
    nodes_M = torch.cat([order[table.site_N[order] == site][:each] for site in sorted(most.tolist())])
    exact, took = timed(lambda: exact_feature_edges(patching, table, nodes_M))
    guess, guessed = timed(lambda: feature_edges(patching, table, nodes_M))
    before_MM = FeatureCircuit(patching, table, nodes_M).before_MM
    flat = lambda found: torch.cat([found.weight_MM[before_MM], found.direct_M])  # noqa: E731
    truths = {"exact": flat(exact).abs() > SHARE * done}
    if task.latent_edges is not None and task.nodes is not None:
        node = [(int(table.site_N[n]), int(table.position_N[n]), int(table.latent_N[n])) for n in nodes_M]
        lead_MM = torch.tensor([
            [u in task.nodes and d in task.nodes and (u[2], d[2]) in task.latent_edges and u[0] < d[0] for d in node] for u in node
        ])  # fmt: skip
        truths["planted"] = torch.cat([lead_MM[before_MM], torch.tensor([n in task.nodes and n[0] == 1 for n in node])])
    for method, weights, seconds in (("exact", exact, took), ("first_order", guess, guessed)):
        for truth, true_N in truths.items():
            if (method, truth) != ("exact", "exact"):
                found.ranking("edges of latents", method, flat(weights), true_N, truth, seconds)
    whole = effects["integrated"][0]
    between = feature_edges(patching, whole, whole.order()[:CIRCUIT])
    found.curve("edges of latents", "first_order", feature_edge_curve(patching, whole, between, points=8))


# --- the figure ---


def draw(results: dict[str, Any], path: Path) -> None:
    """Curves under resample ablation, a row a task and a column a level: the circuit alone solid, everything else dashed."""
    from saebench.figures.plots import PALETTE

    plt = pyplot()
    shown = [found for found in results.values() if found["patch"] == "resample"]
    levels = list(dict.fromkeys(curve["level"] for found in shown for curve in found["curves"]))
    if not shown:
        return
    figure, axes = plt.subplots(
        len(shown), len(levels), figsize=(3.4 * len(levels), 2.7 * len(shown)), squeeze=False, layout="constrained"
    )
    lines: dict[str, Any] = {}
    for row, found in zip(axes, shown, strict=True):
        for curve in found["curves"]:
            axis, method = row[levels.index(curve["level"])], curve["method"]
            colour = PALETTE[list(METHODS).index(method) % len(PALETTE)]
            x = [size + 1 for size in curve["sizes_K"]]
            (lines[METHODS[method]],) = axis.plot(x, curve["faithfulness_K"], color=colour, marker="o", ms=3)
            axis.plot(x, curve["completeness_K"], color=colour, ls="--", lw=1)
        for axis, level in zip(row, levels, strict=True):
            axis.set(xscale="log", ylim=(-0.25, 1.25), title=f"{found['task']}: {level}", xlabel="size + 1")
            axis.title.set_fontsize(10)
            axis.grid(alpha=0.2)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
