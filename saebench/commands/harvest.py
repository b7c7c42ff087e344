"""`saebench harvest`: run a model over text and store the activations of some sites."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin", help="builtin, a checkpoint directory, or a hub name")
    parser.add_argument("--text", default="builtin", help="builtin, a file, a directory, or hf:NAME")
    parser.add_argument(
        "--sites", required=True, nargs="+", metavar="SITE", help="TransformerLens names, such as blocks.2.hook_resid_post"
    )
    parser.add_argument("--tokens", type=int, help="tokens of text; default all")
    parser.add_argument("--context-size", type=int, default=256)
    parser.add_argument("--storage", default="float16", help="float32, bfloat16, float16 or int8")
    parser.add_argument("--batch-size", type=int, default=32, help="contexts in a forward pass")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="directory of the store")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from saebench.activations import harvest
    from saebench.activations.encoding import check_storage
    from saebench.errors import UserError
    from saebench.lm import load_lm, load_text
    from saebench.progress import say

    for name in ("tokens", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be positive")
    check_storage(args.storage)
    text = load_text(args.text)
    store = harvest(
        load_lm(args.model, device=args.device), text, args.sites, args.out,
        num_tokens=args.tokens, context_size=args.context_size, storage=args.storage, batch_size=args.batch_size,
    )  # fmt: skip
    for site, fvu in store.manifest["storage_fvu"].items():
        say(f"{site}: mean norm {store.statistics(site).mean_norm:.3f}; {args.storage} costs {fvu:.2e} of the variance")
    return {
        "store": str(args.out),
        "identity": store.identity,
        "tokens": store.num_tokens,
        "widths": store.widths,
        "storage_fvu": store.manifest["storage_fvu"],
    }
