"""`saebench index RUN`: build the feature store of every dictionary of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DEFAULT_TOKENS = 1_000_000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--dictionary", action="append", metavar="ID", help="only this one (may be given several times)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        help=f"tokens of the run's text to index, at most (default {DEFAULT_TOKENS:,})",
    )
    parser.add_argument("--no-labels", action="store_true", help="leave labels to `saebench label`")
    parser.add_argument("--overwrite", action="store_true", help="replace feature stores of other tokens or an earlier training")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.errors import UserError
    from saebench.features.labelling.labels import label_offline
    from saebench.pipeline import Pipeline
    from saebench.progress import say
    from saebench.recipes import Recipe
    from saebench.runs import Run

    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens} must be positive")
    run = Run.open(args.run)
    pipeline = Pipeline(Recipe.parse(dict(run.record["recipe"])))
    stores = pipeline.index(run, args.dictionary, tokens=args.tokens, overwrite=args.overwrite)
    for name, store in stores.items():
        alive = int((store.counts_F > 0).sum())
        say(f"{name}: {store.num_entries:,} firings of {alive:,} latents on {store.num_tokens:,} tokens in {store.path}")
        if not args.no_labels:
            label_offline(store)
    say(f"look at them: saebench browse {args.run}")
    return {
        "run": str(args.run),
        "stores": {
            name: {
                "path": str(store.path),
                "identity": store.identity,
                "tokens": store.num_tokens,
                "firings": store.num_entries,
                "rounding_error": store.rounding_error,
            }
            for name, store in stores.items()
        },
    }
