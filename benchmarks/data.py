"""The data path against its floors, in turns within one run: harvesting against the forward pass, shuffled against sequential reading.

python benchmarks/data.py                      # the bundled model, 2 M tokens read, 200 k tokens harvested a round
python benchmarks/data.py --storage float32 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import saebench as sb
from benchmarks.machine import describe
from saebench.activations.encoding import STORAGE

SITE = "blocks.2.hook_resid_post"
LAYERS = 3  # blocks up to the site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harvest-tokens", type=int, default=200_000)
    parser.add_argument("--read-tokens", type=int, default=2_000_000)
    parser.add_argument("--storage", default="float16")
    parser.add_argument("--batch-size", type=int, default=2048, help="tokens of a shuffled batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    lm = sb.load_lm("builtin", device="cpu")
    contexts = sb.pack(sb.builtin_text(), lm.tokenizer, 256, args.harvest_tokens)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        harvesting = in_turns(
            {"forward": lambda: plain_forward(lm, contexts), "harvest": lambda: harvested(lm, contexts, work / "one", args.storage)},
            args.rounds, contexts.num_tokens,
        )  # fmt: skip
        store = repeated_store(lm, contexts, work / "large", args)
        batches = sb.Batches(store, [SITE], args.batch_size)
        reading = in_turns(
            {
                "sequential": lambda: read_in_order(store),
                "shuffled": lambda: read_shuffled(batches, store.num_tokens // args.batch_size),
            },
            args.rounds, store.num_tokens,
        )  # fmt: skip

        batches.close()

    result = {
        "date": date.today().isoformat(),
        "machine": describe(),
        "torch": torch.__version__,
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "load_average": os.getloadavg()[0],
        "harvest": harvesting,
        "reading": reading,
        "harvest_over_forward": ratio(harvesting, "forward", "harvest"),
        "shuffled_over_sequential": ratio(reading, "sequential", "shuffled"),
    }
    table = [
        f"# Data path, {result['date']}\n",
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores; storage {args.storage}\n",
    ]
    table += ["| work | tokens/s (median) | least | most |", "|---|--:|--:|--:|"]
    for name, speeds in {**harvesting, **reading}.items():
        table.append(f"| {name} | {median(speeds):,.0f} | {min(speeds):,.0f} | {max(speeds):,.0f} |")
    table.append(
        f"\nharvest / forward: {result['harvest_over_forward']:.2f}   shuffled / sequential: {result['shuffled_over_sequential']:.2f}"
    )
    text = "\n".join(table) + "\n"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"data-{args.storage}-{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)


def in_turns(works: dict[str, Callable[[], Any]], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second of each work in each round; one round before that is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                speeds[name].append(tokens / (time.perf_counter() - started))
    return speeds


def ratio(speeds: dict[str, list[float]], floor: str, ours: str) -> float:
    """Median over the rounds of our speed as a share of the floor's in the same round."""
    return median(b / a for a, b in zip(speeds[floor], speeds[ours], strict=True))


@torch.inference_mode()
def plain_forward(lm: sb.LanguageModel, contexts: Any) -> None:
    """Hugging Face's own modules up to the site, nothing kept."""
    blocks = lm.hf.transformer.h
    lm.hf.transformer.h = blocks[:LAYERS]
    try:
        for ids in contexts.ids_NS.long().split(32):
            lm.hf.transformer(ids, use_cache=False)
    finally:
        lm.hf.transformer.h = blocks


def harvested(lm: sb.LanguageModel, contexts: Any, out: Path, storage: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    sb.harvest(lm, contexts, [SITE], out, storage=storage)


def repeated_store(lm: sb.LanguageModel, contexts: Any, out: Path, args: argparse.Namespace) -> sb.ActivationStore:
    """A store of the wanted size whose model is a stand-in: real activations over and over, so that reading is what is measured."""
    real = lm.read(contexts.ids_NS[:256], [SITE])[SITE]
    times = -(-args.read_tokens // contexts.num_tokens)
    many = type(contexts)(
        *(getattr(contexts, name).repeat(times, 1) for name in ("ids_NS", "documents_NS", "positions_NS")), contexts.names
    )
    read, lm.read = lm.read, lambda ids, sites: {site: real[: len(ids)] for site in sites}  # type: ignore[method-assign]
    try:
        return sb.harvest(lm, many, [SITE], out, storage=args.storage)
    finally:
        lm.read = read  # type: ignore[method-assign]


def read_in_order(store: sb.ActivationStore) -> None:
    """Every shard file from its first byte to its last, as float32 batches: the least that reading without shuffling does."""
    dtype = STORAGE[store.config["storage"]]
    for path in sorted(store.path.glob("shard-*")):
        content = np.fromfile(path, dtype=np.uint8)
        header = 8 + int.from_bytes(content[:8].tobytes(), "little")
        for rows in torch.from_numpy(content[header:]).view(dtype).view(-1, store.widths[SITE]).split(2048):
            rows.float()


def read_shuffled(batches: sb.Batches, count: int) -> None:
    for _ in range(count):
        next(batches)


if __name__ == "__main__":
    main()
