"""`saebench train RECIPE`: harvest or stream activations and train the recipe's dictionaries into a run directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saebench.commands.options import recipe_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)
    parser.add_argument("--out", type=Path, help="run directory; default runs/NAME of the recipe")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run left there and start over")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.pipeline import Pipeline
    from saebench.progress import say
    from saebench.recipes import load_recipe
    from saebench.runs import Run
    from saebench.trainer.logs import read_metrics

    recipe = load_recipe(args.recipe, args.settings)
    out = args.out or Path("runs") / recipe.name
    run = Run.begin(out, recipe.model_dump(mode="json"), overwrite=args.overwrite)
    if run.finished:
        say(f"{out} is finished already; --overwrite trains it again")
    else:
        pipeline = Pipeline(recipe)
        pipeline.check()
        pipeline.train(run)
        say(f"trained {', '.join(run.dictionaries())} into {out}; measure with: saebench evaluate {out}")
    rows = read_metrics(out / "metrics.jsonl")
    last = {row["dictionary"]: row for row in rows}
    return {
        "run": str(out),
        "dictionaries": {name: str(path) for name, path in run.dictionaries().items()},
        "training": last,
        "seconds": run.record["seconds"],
    }
