"""Indirect objects, greater-than and agreement: which heads, edges and features of a model they need.

    python evals/behaviours.py --lm gpt2                      # GPT-2 small, from the hub or a local directory
    python evals/behaviours.py --lm gpt2 --only ioi --prompts 32 --run RUN   # with the dictionaries of a run
    python evals/behaviours.py                                # the bundled model, which can be asked agreement

Of each behaviour: heads by exhaustive ablation, EAP and EAP-IG side by side, and by discrete codes; the strongest edges and what they do
alone; with dictionaries, the strongest features and an attribution graph of the first prompt. Of GPT-2 small the published heads are
named beside what is found, as a reference. Pairs of prompts that a model's tokens do not allow are counted and said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

import saebench as sb
from evals.page import ROOT
from evals.shared import HERE
from saebench.circuits.discovery.behaviours import FILES, Behaviour, behaviour, published_heads, read_pairs
from saebench.circuits.discovery.discrete import discrete_circuit
from saebench.circuits.discovery.edge_circuits import edge_curve
from saebench.circuits.discovery.model_edges import Components
from saebench.circuits.discovery.patching import Patching
from saebench.circuits.discovery.ranking import precision_recall, roc_auc
from saebench.circuits.graphs.targets import Difference, Logit
from saebench.circuits.graphs.tracing import trace
from saebench.errors import UserError
from saebench.pipeline import dictionaries
from saebench.progress import say
from saebench.runs import Run

RESULTS, DATA = HERE / "results" / "behaviours.json", ROOT.parent / "shared" / "data" / "circuits"
HEAD_SHARE = 0.05  # of what all heads and MLPs do: above it a head belongs to the circuit
SHOWN, CODES, VERIFIED = 12, 10, 20
EDGES = [0, 10, 30, 100, 300, 1000]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--lm", default="builtin", help="builtin, a checkpoint directory, or a name on the hub such as gpt2")
parser.add_argument(
    "--data", type=Path, default=DATA, help="directory of the files of prompts (default: ../shared/data/circuits)"
)
parser.add_argument("--only", default="", help=f"of {', '.join(FILES)}, separated by commas")
parser.add_argument("--prompts", type=int, default=32, help="of each behaviour, at most (default: 32)")
parser.add_argument("--batch", type=int, default=8, help="prompts run together (default: 8)")
parser.add_argument("--run", type=Path, help="a run whose dictionaries make feature circuits and graphs")
parser.add_argument("--out", type=Path, default=RESULTS, help="file of results (default: evals/results/behaviours.json)")


def main(argv: Sequence[str] | None = None) -> None:
    args = parser.parse_args(argv)
    named = [name for name in args.only.split(",") if name]
    for name in named or FILES:
        read_pairs(args.data, name)  # before a model is loaded
    lm = sb.load_lm(args.lm)
    found = {} if args.run is None else dictionaries(Run.open(args.run))
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    done = 0
    for name in named or FILES:
        try:
            task = behaviour(lm, args.data, name, limit=args.prompts)
        except UserError as error:
            if named:
                raise
            say(f"{name} is left out: {error}")
            continue
        left_out = "".join(f", {count} left out {reason}" for reason, count in task.unusable.items())
        say(f"{name}: {len(task.pairs)} prompts{left_out}")
        results[f"{lm.name}/{name}"] = {
            "model": lm.name, "fingerprint": lm.fingerprint, "behaviour": name, "date": date.today().isoformat(),
            "prompts": len(task.pairs), "left_out": task.unusable, **measured(lm, task, found, args.batch),
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        show(results[f"{lm.name}/{name}"])
        done += 1
    if not done:
        raise UserError(f"model {lm.name!r} can be asked none of {', '.join(FILES)}: use a model such as gpt2")


@torch.no_grad()
def answered(lm: sb.LanguageModel, task: Behaviour, batch: int) -> dict[str, float]:
    """The metric on prompts and on counterfactuals, and how often it is above 0."""
    values = {"clean": [], "counterfactual": []}  # type: ignore[var-annotated]
    for some in task.examples.batches(batch):
        values["clean"].append(task.metric(lm.logits(some.ids_BS), some))
        values["counterfactual"].append(task.metric(lm.logits(some.patch_BS), some))
    clean, patch = (torch.cat(part) for part in values.values())
    return {"clean": float(clean.mean()), "counterfactual": float(patch.mean()), "right": float((clean > 0).float().mean())}


def measured(lm: sb.LanguageModel, task: Behaviour, found: dict[str, sb.Dictionary], batch: int) -> dict[str, Any]:
    components = Components(lm, task.examples, metric=task.metric, batch_size=batch)
    effects = {method: components.effects(method) for method in ("exact", "eap", "eap_ig")}
    every = torch.ones(len(effects["exact"].effect_N), dtype=torch.bool)
    done = abs(components.metric_of(every) - components.metric_of(~every))
    heads = effects["exact"].heads_LH
    scores = {method: effect.heads_LH for method, effect in effects.items()}
    scores["discrete codes"] = discrete_circuit(
        lm, [pair.prompt for pair in task.pairs[:CODES]], [pair.counterfactual for pair in task.pairs[:CODES]]
    ).scores_LH
    published = published_heads(lm, task.name)
    role = {head: name for name, some in published.items() for head in some}
    order = heads.flatten().abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
    ranks = {method: rank_of(score) for method, score in scores.items()}
    rows = [
        {
            "head": f"{i // heads.shape[1]}.{i % heads.shape[1]}",
            "effect": float(heads.flatten()[i]),
            **{f"rank {method}": rank[i] for method, rank in ranks.items()},
            **({"published": role.get(divmod(i, heads.shape[1]), "")} if published else {}),
        }
        for i in order
    ]
    truths = {"exhaustive ablation": heads.abs() > HEAD_SHARE * done}
    if published:
        truths["published"] = torch.zeros_like(heads, dtype=torch.bool)
        for layer, head in role:
            truths["published"][layer, head] = True
    agreement = [
        {"method": method, "truth": truth, **agrees(score, true)}
        for truth, true in truths.items()
        for method, score in scores.items()
        if (method, truth) != ("exact", "exhaustive ablation")
    ]
    result = {"metric": answered(lm, task, batch), "heads": rows, "agreement": agreement}
    try:
        edges = components.edges("eap_ig")
        count = int((~edges.effect_UT.isnan()).sum())
        curve = edge_curve(components, edges, [size for size in EDGES if size < count] + [count])
        result |= {"edges": edges.ranked()[:SHOWN], "edge_curve": vars(curve)}
    except UserError as error:
        say(f"edges are left out: {error}")
    return result | (features(lm, task, found, batch) if found else {})


def rank_of(score_LH: Tensor) -> list[int]:
    """Of every head, counted from 1; equal scores share the best."""
    flat = score_LH.flatten().abs()
    return [1 + int((flat > value).sum()) for value in flat]


def agrees(score_LH: Tensor, true_LH: Tensor) -> dict[str, Any]:
    inside = int(true_LH.sum())
    if not 0 < inside < true_LH.numel():
        return {"inside": inside}
    at = precision_recall(score_LH.abs(), true_LH)
    return {"inside": inside, "auc": roc_auc(score_LH.abs(), true_LH), "precision": at.precision, "recall": at.recall}


def features(lm: sb.LanguageModel, task: Behaviour, found: dict[str, sb.Dictionary], batch: int) -> dict[str, Any]:
    """The strongest features by integrated gradients, what they do alone, and the graph of the first prompt. What dictionaries do not allow
    is said and left out."""
    result: dict[str, Any] = {}
    try:
        single = [dictionary for dictionary in found.values() if len(dictionary.config.writes) == 1]
        patching = Patching(lm, single, task.examples, metric=task.metric, batch_size=batch)
        effects = patching.effects("integrated", steps=5)
        best = effects.order()[:SHOWN].tolist()
        result["features"] = [(effects.name(node), float(effects.effect_N[node])) for node in best]
        result["feature_curve"] = vars(patching.curve(effects))
    except UserError as error:
        say(f"feature circuits are left out: {error}")
    try:
        pair = task.pairs[0]
        target = Logit(pair.answer) if pair.other is None else Difference(pair.answer, pair.other)
        graph = trace(lm, {name: d for name, d in found.items() if not d.config.rewrites} or found, pair.prompt, targets=[target])
        pruned = graph.prune()
        result["graph"] = {
            "prompt": pair.prompt, "nodes": len(graph), "edges": graph.num_edges, "nodes_pruned": len(pruned),
            "scores": graph.scores().as_dict(), "spearman": pruned.verify(VERIFIED).spearman,
        }  # fmt: skip
    except UserError as error:
        say(f"the graph is left out: {error}")
    return result


def show(result: dict[str, Any]) -> None:
    """The table of one behaviour, for people."""
    from rich.console import Console
    from rich.table import Table

    console, metric = Console(highlight=False), result["metric"]
    table = Table(
        title=f"{result['behaviour']} of {result['model']}: {metric['clean']:.3f}, counterfactual {metric['counterfactual']:.3f}, "
        f"above 0 on {metric['right']:.0%} of {result['prompts']} prompts"
    )
    for head in result["heads"][0]:
        table.add_column(head, justify="left" if head in ("head", "published") else "right")
    for row in result["heads"]:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for row in result["agreement"]:
        if "auc" in row:
            console.print(
                f"{row['method']} against {row['truth']} ({row['inside']} heads): AUC {row['auc']:.2f}, "
                f"precision and recall {row['precision']:.2f}"
            )
    for name in ("edges", "features"):
        if name in result:
            console.print(f"{name}: " + "; ".join(f"{' -> '.join(row[:-1])} {row[-1]:.3f}" for row in result[name]), markup=False)
    if "graph" in result:
        graph = result["graph"]
        console.print(
            f"graph of {graph['prompt']!r}: {graph['nodes']} nodes, {graph['nodes_pruned']} after pruning", markup=False
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
