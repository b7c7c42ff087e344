"""`saebench plan RECIPE`: what a recipe will need, from its sizes and a few seconds of measurement on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from saebench.commands.options import recipe_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    recipe_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.pipeline import Pipeline
    from saebench.planning import plan
    from saebench.progress import say
    from saebench.recipes import load_recipe

    pipeline = Pipeline(load_recipe(args.recipe, args.settings))
    pipeline.check()
    result = plan(pipeline)
    minutes = {name: seconds / 60 for name, seconds in result["seconds"].items()}
    say(
        f"tokens     {result['tokens']['harvest']:,} to harvest, {result['tokens']['train']:,} to train on ({result['epochs']:.1f} epochs)"
    )
    say(
        f"disk       {result['bytes']['store'] / 1e9:.2f} GB of activations, {result['bytes']['checkpoints'] / 1e9:.2f} GB of checkpoints"
    )
    say(
        f"memory     {result['bytes']['memory'] / 1e9:.2f} GB at the peak: "
        + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in result["bytes"]["memory_parts"].items())
    )
    say("time       " + ", ".join(f"{name} {value:.1f} min" for name, value in minutes.items()) + " (measured here just now)")
    return result
