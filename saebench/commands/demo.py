"""`saebench demo`: harvest, train, evaluate and look, on the bundled model and text."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from saebench.commands.options import setting_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    setting_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run directory (default: runs/demo)")
    parser.add_argument("--overwrite", action="store_true", help="start over instead of continuing or showing what is there")
    parser.add_argument(
        "--no-browse",
        action="store_true",
        help="end without serving the feature browser; so does --json, and a terminal that nobody watches",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.commands.browse import browse
    from saebench.evaluation import describe
    from saebench.features.labelling.labels import label_offline
    from saebench.pipeline import Pipeline, feature_stores
    from saebench.progress import say
    from saebench.recipes import load_recipe
    from saebench.runs import Run

    started = time.perf_counter()
    recipe = load_recipe("builtin", args.settings)
    run = Run.begin(args.out, recipe.model_dump(mode="json"), overwrite=args.overwrite)
    pipeline = Pipeline(recipe)
    pipeline.check()
    pipeline.train(run)
    evaluation = run.evaluation("core") or pipeline.evaluate(run)

    report, features = pipeline.report(run, evaluation)
    for store in feature_stores(run).values():
        label_offline(store)
    for name, shown in features.items():
        _show(name, shown, pipeline.lm.token_strings.__getitem__)
        say(f"{name}: {describe(evaluation[name])}")
    say(f"run: {run.path}   report: {report}   {time.perf_counter() - started:.0f} s")
    slim = {
        name: {key: value for key, value in figures.items() if key not in ("density", "intervals_95")}
        for name, figures in evaluation.items()
    }
    watched = not (args.no_browse or args.json) and sys.stderr.isatty()
    if watched and importlib.util.find_spec("streamlit"):
        browse([run.path])
    else:
        say(f"look at the features: saebench browse {run.path}")
    return {
        "run": str(run.path),
        "report": str(report),
        "seconds": {**run.record["seconds"], "this_call": round(time.perf_counter() - started, 1)},
        "dictionaries": slim,
        "features": {name: [feature.latent for feature in shown] for name, shown in features.items()},
    }


def _show(name: str, features: list, text_of: Any) -> None:
    from rich.console import Console

    from saebench.figures.tokens import headline, terminal_line

    console = Console(stderr=True, highlight=False)
    console.print(f"\n[bold]{len(features)} characteristic features of {name}[/bold]")
    for feature in features:
        console.print(f"\n[bold]feature {feature.latent}[/bold]  fires on {feature.density:.3%} of tokens  ", end="")
        console.print(headline(feature, text_of), markup=False, style="dim")
        for example in feature.examples[:3]:
            console.print(
                "  ", terminal_line(example, feature.max_value, text_of), sep="", no_wrap=True, overflow="ellipsis", crop=True
            )
    console.print()
