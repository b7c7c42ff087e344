"""Does steering by features work, and does it beat what is simpler? All methods on concepts of the bundled model, and of a second one.

    python evals/steering.py                       # the bundled model; half an hour on two cores
    python evals/steering.py --stories DIR         # and a model of stories with its text, such as TinyStories': DIR/*.jsonl
    python evals/steering.py --only imports

Features, DiffMean and the other directions are found on training text; prompts and neutral text are of held-out documents. Figures are kept
in evals/results/steering.json; the measured part of docs/steering.md and its figures are written from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import saebench as sb
from evals.concepts import Concept, of_python, of_stories
from evals.page import ROOT, replace
from evals.shared import HERE, pyplot
from saebench.figures.steering import dose_table, reading, write_page
from saebench.lm import Text
from saebench.progress import say
from saebench.steering.comparison import compare
from saebench.steering.effect import Effects
from saebench.steering.measures import prompts_of, spread

RESULTS, PAGE = HERE / "results" / "steering.json", ROOT / "docs" / "steering.md"
STRENGTHS, SEEDS, PROMPTS, NEW_TOKENS, EXAMPLES = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0), 2, 32, 32, 120
PANELS = {"target": "{}", "perplexity": "perplexity", "kl": "KL on neutral text, nats"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="", help="names of concepts, separated by commas")
parser.add_argument("--stories", type=Path, help="a checkpoint directory with stories as .jsonl beside it")


def main() -> None:
    args = parser.parse_args()
    only = {name for name in args.only.split(",") if name}
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    suites: list[tuple[str, Callable[[], tuple[sb.LanguageModel, Any, Any]], Callable[..., list[Concept]]]] = [
        ("bundled model", lambda: (sb.load_lm("builtin"), sb.builtin_text(), sb.load_text("builtin:held_out")), of_python)
    ]
    if args.stories is not None:
        suites.append(("stories", lambda: stories(args.stories), of_stories))
    for model, opened, concepts_of in suites:
        lm, training, held_out = opened()
        sae = dictionary(lm, training, model)
        contexts = sb.pack(held_out, lm.tokenizer, 128)
        for concept in concepts_of(training):
            if only and concept.name not in only:
                continue
            say(f"{model}: {concept.name}, {len(concept.positives)} examples with it, {len(concept.negatives)} without")
            started = time.perf_counter()
            effects = compare(
                lm, sae, concept.positives[:EXAMPLES], concept.negatives[:EXAMPLES], prompts_of(lm, contexts.ids_NS, PROMPTS),
                neutral=spread(contexts.ids_NS, 16), target=concept.target, strengths=STRENGTHS, seeds=SEEDS, max_new_tokens=NEW_TOKENS,
            )  # fmt: skip
            say(f"{concept.name}: {time.perf_counter() - started:.0f} s. {reading(effects)}")
            write_page(effects, HERE / "results" / "pages" / f"{concept.name}.html", f"Steering towards {concept.name}")
            draw(effects, ROOT / "docs" / "images" / f"steering-{concept.name}.svg")
            results[concept.name] = {
                "model": model, "target": effects.target, "reading": reading(effects),
                "table": dose_table(effects), "doses": effects.rows(),
            }  # fmt: skip
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(replace(PAGE.read_text(), "measured", page(results)))


def stories(directory: Path) -> tuple[sb.LanguageModel, Any, Any]:
    """A model and its text, one story in ten held out."""
    (path,) = sorted(directory.glob("*.jsonl"))
    documents = list(sb.load_text(str(path)))
    split = {
        name: Text(name, lambda kept=kept: (d for i, d in enumerate(documents) if (i % 10 == 0) == kept))
        for name, kept in (("training", False), ("held out", True))
    }
    return sb.load_lm(directory), split["training"], split["held out"]


def dictionary(lm: sb.LanguageModel, text: Any, model: str) -> sb.Dictionary:
    """A TopK dictionary of the middle layer, trained once and kept."""
    path = HERE / "results" / "acts" / f"steering-{model.replace(' ', '-')}"
    if not path.exists():
        site = f"blocks.{lm.site_table.num_layers // 2}.hook_resid_post"
        contexts = sb.pack(text, lm.tokenizer, 128, 400_000)
        source = sb.ActivationStream(lm, contexts, [site])
        sb.train(sb.TopK(d_sae=2048, k=32), source, sb.TrainConfig(num_tokens=600_000, batch_size=1024)).save(path)
    return sb.load(path)


def page(results: dict[str, Any]) -> str:
    parts = []
    for name, found in results.items():
        rows = best_controls(found["table"], found["target"])
        heads = list(rows[0])
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
        lines += ["| " + " | ".join(row[head] for head in heads) + " |" for row in rows]
        parts.append(
            f"### {name.capitalize()} ({found['model']})\n\n{found['reading']}\n\n![dose-response](images/steering-{name}.svg)\n\n"
            + "\n".join(lines)
        )
    return "\n\n".join(parts)


def best_controls(rows: list[dict[str, str]], target: str) -> list[dict[str, str]]:
    """The rows of a table, of every kind of control only the one with the largest target."""
    shown: dict[str, dict[str, str]] = {}
    for row in rows:
        kind, _, number = row["method"].rpartition(" ")
        alike = kind if number.isdigit() else row["method"]
        value = float((row.get(target) or "-inf").split(" ")[0])
        if alike not in shown or value > float((shown[alike].get(target) or "-inf").split(" ")[0]):
            shown[alike] = row
    return [
        row | {"method": f"{row['method'].rpartition(' ')[0]}, best of its kind"}
        if name.startswith("random ") and name != row["method"]
        else row
        for name, row in shown.items()
    ]


def draw(effects: Effects, path: Path) -> None:
    """Target, perplexity and KL over strength: selections in colour, baselines dashed, controls grey."""
    from saebench.figures.plots import PALETTE

    plt = pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4.2), layout="constrained")
    colours: dict[str, str] = {}
    for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
        for method in effects.methods:
            doses = effects.of(method)
            kind, group = doses[0].kind, doses[0].group
            estimates = [dose.estimate(panel) for dose in doses]
            if kind != "control" and group not in colours:
                colours[group] = PALETTE[len(colours) % len(PALETTE)]
            colour = colours.get(group, "#b0b0b0")
            if len(doses) == 1:
                axis.axhline(estimates[0].mean, color=colour, ls="--", lw=1.2, label=group)
                continue
            x, y = [dose.strength for dose in doses], [e.mean for e in estimates]
            named = kind != "control" or method.endswith("1") or method == group
            style = {"features": "-", "baseline": "--", "control": ":"}[kind]
            axis.plot(
                x, y, style, color=colour, lw=1.0 if kind == "control" else 1.8, marker="o", ms=3, label=group if named else None
            )
            axis.fill_between(x, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.08, lw=0)
        axis.axhline(effects.untouched.estimate(panel).mean, color="#707070", lw=0.8, ls=(0, (1, 3)))
        axis.set_title(title.format(effects.target), fontsize=10)
        axis.set_xlabel("strength")
        axis.set_xscale("log", base=2)
        axis.set_xticks(STRENGTHS, [f"{s:g}" for s in STRENGTHS])
        axis.grid(alpha=0.2)
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
