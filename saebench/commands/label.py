"""`saebench label RUN`: labels of latents, from their firings alone or by a language model behind an endpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saebench.features import FeatureStore


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory with feature stores (`saebench index`)")
    parser.add_argument("--dictionary", action="append", metavar="ID", help="only this one (may be given several times)")
    parser.add_argument(
        "--latents", metavar="LIST", help="such as 3,17,100-199; default all, or with --endpoint the 100 that fire most"
    )
    parser.add_argument("--overwrite", action="store_true", help="make labels again that are there")
    endpoint = parser.add_argument_group("by a language model")
    endpoint.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible one, such as http://127.0.0.1:8000/v1")
    endpoint.add_argument("--model", help="its name there; the key, if it needs one, is read from OPENAI_API_KEY")
    endpoint.add_argument(
        "--prices", metavar="IN,OUT", help="for a million tokens of prompts and of answers, to say what it will cost"
    )
    endpoint.add_argument("--yes", action="store_true", help="send without asking, once the estimate is shown")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.errors import UserError
    from saebench.pipeline import feature_stores
    from saebench.runs import Run

    if (args.endpoint is None) != (args.model is None):
        raise UserError("--endpoint and --model go together: give both, or neither for labels without a model")
    stores = feature_stores(Run.open(args.run), args.dictionary)
    chosen = {name: _latents(args.latents, store) for name, store in stores.items()}
    label = _offline if args.endpoint is None else _by_endpoint
    return {"run": str(args.run), "labels": {name: label(args, name, store, chosen[name]) for name, store in stores.items()}}


def _latents(text: str | None, store: FeatureStore) -> list[int] | None:
    from saebench.errors import UserError

    if text is None:
        return None
    chosen: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            chosen += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise UserError(f"--latents {text!r} is no list of latents: write one such as 3,17,100-199") from None
    for latent in chosen:
        store.check_latent(latent)
    return chosen


def _offline(args: argparse.Namespace, name: str, store: FeatureStore, latents: Sequence[int] | None) -> dict[str, Any]:
    from saebench.features.labelling.labels import label_offline, labels_path
    from saebench.progress import say

    labels = label_offline(store, latents, overwrite=args.overwrite)
    say(f"{name}: {len(labels):,} labels in {labels_path(store)}")
    return {"path": str(labels_path(store)), "count": len(labels)}


def _by_endpoint(args: argparse.Namespace, name: str, store: FeatureStore, latents: Sequence[int] | None) -> dict[str, Any]:
    from saebench.errors import UserError
    from saebench.features.labelling.endpoint import Endpoint, estimate, label_by_endpoint
    from saebench.features.labelling.labels import kept_labels
    from saebench.progress import say

    if latents is None:
        latents = [int(latent) for latent in (-store.counts_F).argsort(kind="stable")[:100] if store.counts_F[latent]]
    endpoint = Endpoint.given(args.endpoint, args.model)
    prompt_price, answer_price = _prices(args.prices)
    expected = estimate(
        store, latents, model="" if args.overwrite else args.model, prompt_price=prompt_price, answer_price=answer_price
    )
    say(f"{name}: {expected}")
    if expected.calls and not args.yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was sent: add --yes to send what was said above")
        if input(f"Send them to {args.endpoint}? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("nothing was sent")
    labels = label_by_endpoint(store, endpoint, latents, again=args.overwrite)
    path = kept_labels(store).path
    say(f"{name}: {len(labels):,} labels of {args.model} in {path}")
    return {"path": str(path), "count": len(labels), "calls": expected.calls}


def _prices(text: str | None) -> tuple[float | None, float | None]:
    from saebench.errors import UserError

    if text is None:
        return None, None
    try:
        prompt, answer = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--prices {text!r} are not two numbers: write them such as 0.15,0.60") from None
    return prompt, answer
