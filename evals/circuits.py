"""Do graphs foretell what interventions do, for which kinds of edges, and what does a graph cost?

    saebench train bundled-circuits             # transcoders and Lorsa of every layer, once
    python evals/circuits.py                    # half an hour on two cores; --run DIR for another run
    python evals/circuits.py --prompts 4        # a quick look; results are not kept

Effects: graphs of held-out prompts are pruned as shown, sources are taken out of the model one by one, and the prediction of every edge
from them is compared with what its target did. Cost: memory and processor time of one graph against the edges kept, each in a process of
its own. What was measured is kept as it comes, so a second run goes on where one was stopped. Figures are kept in
evals/results/circuits.json, tables in circuits.md beside it and, by kind, in docs/circuits.md.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import platform
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import saebench as sb
from evals.page import replace
from evals.shared import HERE, pyplot
from saebench.circuits.graphs.edge_effects import (
    BAR,
    ENOUGH,
    EdgeEffects,
    KindAgreement,
    by_kind,
    by_layers,
    edge_effects,
    sample,
)
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.targets import Difference
from saebench.circuits.graphs.tracing import trace
from saebench.features.building import fingerprint
from saebench.pipeline import dictionaries
from saebench.progress import say
from saebench.runs import Run

RESULTS, DOCS = HERE / "results", HERE.parent / "docs" / "circuits.md"
MEASURED = RESULTS / "acts" / "circuits"
PROMPTS, TOKENS, FEATURES, STRONGEST = 24, 32, 2048, 20
SOURCES = 64  # taken out of each graph, beside all that have an edge into a target
OTHERS = 4  # prompts on which other factors are tried
FACTORS = (0.9, 2.0)
LENGTHS, KEEPS, MOST = (128, 256, 512), (64, 512, 2048, 4096, 8192, 16384), 4096
MEGABYTE = 1 << 20

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--run", type=Path, default=Path("runs/bundled-circuits"), help="default: runs/bundled-circuits")
parser.add_argument("--prompts", type=int, default=PROMPTS)


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that processor time is what one core does
    lm, made = sb.load_lm("builtin"), dictionaries(Run.open(args.run))
    try:
        cost = costs(lm, made)  # first, while the process is small
        effects = studied(lm, made, args.prompts)
    except KeyboardInterrupt:
        raise SystemExit("stopped; what was measured is kept, and the same command goes on") from None
    results = {"made": provenance(made), "cost": cost, "effects": summary(effects)}
    for line in page(results).splitlines():
        say(line)
    if args.prompts >= PROMPTS:
        (RESULTS / "circuits.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "circuits.md").write_text(page(results) + "\n")
        tables = results["effects"]["tables"]
        both = (tables["by kind"], next(found for name, found in tables.items() if name.startswith("into the difference")))
        DOCS.write_text(replace(DOCS.read_text(), "circuits", "\n\n".join(map(table, both))))
        draw_effects(effects["whole"], RESULTS / "circuits-effects.svg")
        draw_cost(cost, RESULTS / "circuits-memory.svg")


def provenance(made: dict[str, sb.Dictionary]) -> dict[str, Any]:
    packages = {name: version(name) for name in ("saebench", "torch", "transformers", "numpy", "scipy")}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "packages": packages,
        "dictionaries": {name: fingerprint(dictionary) for name, dictionary in made.items()},
    }


# --- effects ---


def studied(lm: sb.LanguageModel, made: dict[str, sb.Dictionary], count: int) -> dict[str, list[EdgeEffects]]:
    """By what was asked: `whole` graphs, their sources taken out; a `difference` of logits as target; other factors on some prompts."""
    contexts = sb.pack(sb.load_text("builtin:held_out"), lm.tokenizer, TOKENS, TOKENS * 40 * PROMPTS).ids_NS
    prompts = contexts[:: len(contexts) // PROMPTS][:count].tolist()
    asked = [("whole", 0.0, prompts), ("difference", 0.0, prompts), *((f"factor {f:g}", f, prompts[:OTHERS]) for f in FACTORS)]
    found: dict[str, list[EdgeEffects]] = {what: [] for what, *_ in asked}
    for what, factor, some in asked:
        for number, ids in enumerate(some):
            started = time.process_time()
            found[what].append(kept(made, ids, what, partial(effects_of, lm, made, ids, factor, what == "difference")))
            seconds = time.process_time() - started
            say(f"{what}: prompt {number + 1} of {len(some)}, {len(found[what][-1]):,} edges, {seconds:.0f} s of processor")
    return found


def effects_of(
    lm: sb.LanguageModel, made: dict[str, sb.Dictionary], ids: list[int], factor: float, difference: bool
) -> EdgeEffects:
    model = LocalModel(lm, made, ids)
    best, second = model.logits_V.topk(2).indices.tolist()
    targets = [Difference(best, second)] if difference else None
    graph = trace(lm, made, ids, targets=targets, max_features=FEATURES, model=model).prune()
    return edge_effects(graph, model, factor, sources=sample(graph, 0 if difference else SOURCES))


def kept(made: dict[str, sb.Dictionary], ids: list[int], what: str, measure: Callable[[], EdgeEffects]) -> EdgeEffects:
    """Measured once for the same dictionaries and prompt."""
    asked = json.dumps([what, ids, FEATURES, SOURCES, [fingerprint(dictionary) for dictionary in made.values()]])
    path = MEASURED / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        found = measure()
        MEASURED.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, **{f.name: getattr(found, f.name) for f in fields(found)})
        part.replace(path)
    with np.load(path) as stored:
        return EdgeEffects(**{name: stored[name] if name.endswith("_E") else float(stored[name]) for name in stored.files})


def summary(effects: dict[str, list[EdgeEffects]]) -> dict[str, Any]:
    whole = effects["whole"]
    strongest = [prompt.strongest(STRONGEST) for prompt in whole]
    tables = {
        "by kind": {m: plain(by_kind(whole, m)) for m in ("frozen", "measured", "free")},
        "by kind, each edge alone": {
            "held": plain(by_kind(whole, "held", "edge")),
            "measured": plain(by_kind(whole, "measured", "edge")),
        },
        f"by kind, the {STRONGEST} strongest of a kind": {
            m: plain(by_kind(strongest, m)) for m in ("frozen", "measured", "free")
        },
        "by layers spanned": {m: plain(by_layers(whole, m)) for m in ("frozen", "measured", "free")},
        "into the difference of the two likeliest tokens' logits": {
            m: {kinds: row for kinds, row in plain(by_kind(effects["difference"], m)).items() if kinds.endswith("> difference")}
            for m in ("frozen", "measured", "free")
        },
    }
    tables["by factor"] = {
        name: plain(by_kind(effects[name] if name in effects else whole[: len(effects[f"factor {FACTORS[0]:g}"])]))
        for name in ("factor 0", *(f"factor {f:g}" for f in FACTORS))
    }
    return {"prompts": len(whole), "tokens": TOKENS, "edges": sum(map(len, whole)), "tables": tables}


def plain(table: dict[Any, KindAgreement]) -> dict[str, Any]:
    rows = {
        str(name): {"edges": row.edges, "prompts": row.prompts, "spearman": row.spearman.as_list(), "pooled": asdict(row.pooled)}
        for name, row in table.items()
    }
    return json.loads(json.dumps(rows), parse_constant=lambda _: None)


# --- cost ---


def costs(lm: sb.LanguageModel, made: dict[str, sb.Dictionary]) -> list[dict[str, float]]:
    """Of a graph of MOST features by length of the prompt and edges kept into a node, each measured in a process of its own."""
    path = MEASURED / f"cost-{fingerprint(made[min(made)])}.json"
    rows: list[dict[str, float]] = json.loads(path.read_text()) if path.exists() else []
    contexts = {n: sb.pack(sb.load_text("builtin:held_out"), lm.tokenizer, n, 2 * n).ids_NS[0].tolist() for n in LENGTHS}
    lm.read(torch.tensor([contexts[LENGTHS[0]]]), ["blocks.0.hook_resid_pre"])  # what is loaded late is loaded before
    done = {(row["tokens"], row["keep"]) for row in rows}
    for length, keep in itertools.product(LENGTHS, KEEPS):
        if (length, keep) not in done:
            given = (lm, made, contexts[length], keep)
            rows.append(apart(cost, *given) | apart(cost_of_arrays, *given))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
            say(
                "{tokens} tokens, {kept:,} edges kept: {megabytes:.0f} MB, arrays {arrays:.0f} MB, {seconds:.1f} s of processor".format(
                    **rows[-1]
                )
            )
    return [row for row in rows if row["keep"] in KEEPS]


def apart(measure: Callable[..., dict[str, float]], *given: Any) -> dict[str, float]:
    """What is measured in a process of its own, which begins as a copy of this one."""
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(measure(*given)), daemon=True)
    child.start()
    child.join()
    if child.exitcode:
        raise sb.UserError(f"a graph of {len(given[2])} tokens with keep={given[3]} could not be made: see above")
    return results.get()


def cost(lm: sb.LanguageModel, made: dict[str, sb.Dictionary], ids: list[int], keep: int) -> dict[str, float]:
    """Memory of the process at its peak, and processor time."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE  # noqa: E731
    before, started = peak(), time.process_time()
    graph = trace(lm, made, ids, max_features=MOST, keep=keep)
    row = {"tokens": len(ids), "keep": keep, "features": int(graph.is_kind("feature").sum()), "edges": graph.num_edges}
    row["kept"] = graph.settings["edges_held"]
    return row | {"megabytes": peak() - before, "whole": peak(), "seconds": time.process_time() - started}


def cost_of_arrays(lm: sb.LanguageModel, made: dict[str, sb.Dictionary], ids: list[int], keep: int) -> dict[str, float]:
    """NumPy's arrays at their peak, which edges are kept in; PyTorch's are the workspace, which does not depend on them."""
    tracemalloc.start()
    trace(lm, made, ids, max_features=MOST, keep=keep)
    return {"arrays": tracemalloc.get_traced_memory()[1] / MEGABYTE}


def line(rows: Sequence[dict[str, float]], what: str) -> tuple[float, float, float]:
    """Megabytes = a + b edges kept: a, b, and the share of the variance that is on the line."""
    x, y = (np.array([row[key] for row in rows], dtype=np.float64) for key in ("kept", what))
    b, a = np.polyfit(x, y, 1)
    rest = float(((y - a - b * x) ** 2).sum())
    return float(a), float(b), 1 - rest / float(((y - y.mean()) ** 2).sum())


# --- what is written ---


def page(results: dict[str, Any]) -> str:
    made, effects = results["made"], results["effects"]
    packages = ", ".join(f"{name} {number}" for name, number in made["packages"].items())
    parts = [
        "# Circuits: measured",
        f"{made['date']}, Python {made['python']}, {packages}. Written by `python evals/circuits.py`.",
        f"## Predicted against measured\n\n{effects['prompts']} held-out prompts of {effects['tokens']} tokens, their graphs pruned as "
        f"shown, {effects['edges']:,} edges, their sources taken out one by one: all with an edge into a target, and {SOURCES} others of "
        "each graph. Spearman of effects along all paths of the graph with what the model does: *measured* with attention patterns held "
        "(as published), *frozen* with the scales of norms held too, *free* with nothing held. Mean over prompts with at least "
        f"{ENOUGH} edges of the kind, with its 95 % interval over prompts. Slope (measured per predicted) and agreement in sign are of "
        "all edges together, of *measured*.",
        verdict(effects["tables"]),
        *(f"### {name[0].upper()}{name[1:]}\n\n{table(found)}" for name, found in effects["tables"].items()),
        f"![predicted against measured](circuits-effects.svg)\n\n## Cost\n\nGraphs of at most {MOST:,} features, one thread; megabytes are "
        "what tracing adds to the process at its peak, *arrays* the part of it that NumPy holds, edges above all, *whole* is the process "
        "with Python, PyTorch and the model. The rest is a workspace of a size that edges have no part in. *kept* counts edges while "
        "tracing, *edges* those of the graph, without the ones from features that became no nodes.",
        costs_table(results["cost"]),
        "\n".join(
            f"- {n} tokens: arrays of {a:.0f} MB + {b * MEGABYTE:.0f} bytes an edge kept, {r:.1%} of their variance on this line"
            for n in LENGTHS
            for a, b, r in [line([row for row in results["cost"] if row["tokens"] == n], "arrays")]
        ),
        "![memory against edges](circuits-memory.svg)",
    ]
    return "\n\n".join(parts)


def verdict(tables: dict[str, Any]) -> str:
    """Which kinds reach the published bar."""
    kinds, spans = tables["by kind"]["measured"], tables["by layers spanned"]["measured"]
    named = kinds | {f"features over {span} layers": row for span, row in spans.items()}
    low = [f"{name} ({value:.2f})" for name, row in named.items() if (value := row["spearman"][0]) is not None and value < BAR]
    whole, inside = kinds["all"]["spearman"][0], kinds["feature > feature"]["spearman"][0]
    text = f"All edges: {whole:.2f}; features on features: {inside:.2f}; the published figure for the latter is {BAR}."
    return f"{text} Below it: {'; '.join(low)}." if low else f"{text} No kind is below it."


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| | edges | prompts | " + " | ".join(found) + " | slope | same sign |", "|---|" + "--:|" * (len(found) + 4)]
    last = list(found.values())[min(1, len(found) - 1)]  # measured, where there are several
    for name, row in last.items():
        cells = [shown(rows[name]["spearman"]) if name in rows else "-" for rows in found.values()]
        pooled = row["pooled"]
        slope, sign = (NONE if pooled[key] is None else pooled[key] for key in ("slope", "same_sign"))
        tail = [slope if slope == NONE else f"{slope:.2f}", sign if sign == NONE else f"{sign:.0%}"]
        lines.append("| " + " | ".join([name, f"{row['edges']:,}", str(row["prompts"]), *cells, *tail]) + " |")
    return "\n".join(lines)


NONE = "-"


def shown(estimate: list[float | None]) -> str:
    value, low, high = estimate
    if value is None:
        return NONE
    return f"{value:.2f}" if low is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def costs_table(rows: Sequence[dict[str, float]]) -> str:
    heads = {
        "tokens": ".0f",
        "keep": ".0f",
        "features": ",.0f",
        "kept": ",.0f",
        "edges": ",.0f",
        "arrays": ",.0f",
        "megabytes": ",.0f",
        "whole": ",.0f",
        "seconds": ".1f",
    }
    lines = ["| " + " | ".join(heads) + " |", "|" + "--:|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(f"{row[key]:{form}}" for key, form in heads.items()) + " |" for row in rows)])


def figure(columns: int) -> Any:
    return pyplot().subplots(1, columns, figsize=(4.6 * columns, 4.2), layout="constrained", squeeze=False)


def draw_effects(prompts: list[EdgeEffects], path: Path) -> None:
    """Predicted against measured, of a sample of the strongest edges of some groups of kinds."""
    from saebench.figures.plots import PALETTE

    groups = {
        "features on features": ("feature", "feature"),
        "features on logits": ("feature", "logit"),
        "errors on logits": ("error", "logit"),
    }
    drawn, axes = figure(len(groups))
    for axis, (title, (source, target)) in zip(axes[0], groups.items(), strict=True):
        x, y = [], []
        for p in (prompt.strongest(STRONGEST) for prompt in prompts):
            rows = [k.split(" > ")[0].endswith(source) and k.endswith(target) for k in p.kinds_E.tolist()]
            x += p.total_E[rows].tolist()
            y += p.measured_E[rows].tolist()
        bound = max(map(abs, [*x, *y]), default=1.0)
        axis.plot([-bound, bound], [-bound, bound], color="#707070", lw=0.8, ls=":")
        axis.scatter(x, y, s=6, alpha=0.5, color=PALETTE[0], lw=0, rasterized=True)
        axis.set_title(f"{title}, {len(x):,} edges", fontsize=10)
        axis.set_xlabel("predicted")
        axis.grid(alpha=0.2)
    axes[0, 0].set_ylabel("measured, attention patterns held")
    drawn.savefig(path, metadata={"Date": None}, dpi=150)


def draw_cost(rows: list[dict[str, float]], path: Path) -> None:
    from saebench.figures.plots import PALETTE

    drawn, axes = figure(2)
    for axis, what in zip(axes[0], ("arrays", "megabytes"), strict=True):
        for number, length in enumerate(LENGTHS):
            mine = [row for row in rows if row["tokens"] == length]
            x, y = (np.array([row[key] for row in mine]) for key in ("kept", what))
            axis.plot(x / 1e6, y, "o", color=PALETTE[number], label=f"{length} tokens")
            if what == "arrays":
                a, b, _ = line(mine, what)
                ends = np.array([0.0, x.max()])
                axis.plot(
                    ends / 1e6, a + b * ends, color=PALETTE[number], lw=1, label=f"{a:.0f} MB + {b * MEGABYTE:.0f} bytes an edge"
                )
        axis.set(xlabel="edges kept while tracing, millions", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("arrays at their peak, MB")
    axes[0, 1].set_ylabel("what tracing adds to the process at its peak, MB")
    drawn.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
