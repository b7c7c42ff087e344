"""`saebench evaluate RUN`: measure every dictionary of a run on held-out text, and write its report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--suite", default="core", help="which measurements (default: core)")
    parser.add_argument("--tokens", type=int, help="held-out tokens, at most; default as in the recipe")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.errors import UserError
    from saebench.evaluation import describe
    from saebench.pipeline import Pipeline
    from saebench.progress import say
    from saebench.recipes import Recipe
    from saebench.runs import Run

    run = Run.open(args.run)
    values = dict(run.record["recipe"])
    if args.tokens is not None:
        if args.tokens < 1:
            raise UserError(f"--tokens {args.tokens} must be positive")
        values["evaluation"] = {**values["evaluation"], "num_tokens": args.tokens}
    pipeline = Pipeline(Recipe.parse(values))
    results = pipeline.evaluate(run, args.suite)
    for name, figures in results.items():
        say(f"{name}: {describe(figures)}")
    report, _ = pipeline.report(run, results)
    say(f"report: {report}")
    slim = {name: {key: value for key, value in figures.items() if key != "density"} for name, figures in results.items()}
    return {
        "run": str(args.run),
        "suite": args.suite,
        "written": str(args.run / "evals" / f"{args.suite}.json"),
        "report": str(report),
        "dictionaries": slim,
    }
