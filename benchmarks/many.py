"""Eight dictionaries of equal shape from one pass over the data, beside one: language-model forward included.

    python benchmarks/many.py                       # some minutes
    python benchmarks/many.py --tokens 200000 --rounds 5

In turns within one run; each trains from a stream, so that the model runs every time. The eight differ in their seeds; the first
of them must end with the same bytes as the one trained alone.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import saebench as sb
from benchmarks import machine

SITE = "blocks.2.hook_resid_post"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", type=int, default=100_000)
parser.add_argument("--d-sae", type=int, default=4096)
parser.add_argument("--k", type=int, default=32)
parser.add_argument("--count", type=int, default=8)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")


def main() -> None:
    args = parser.parse_args()
    lm = sb.load_lm("builtin")
    contexts = sb.pack(sb.builtin_text(), lm.tokenizer, context_size=256, num_tokens=args.tokens)
    stream = sb.ActivationStream(lm, contexts, [SITE])
    stream.statistics(SITE)
    training = sb.TrainConfig(num_tokens=args.tokens, batch_size=2048, log_every=10)
    configs = [sb.TopK(d_sae=args.d_sae, k=args.k, seed=seed) for seed in range(args.count)]

    seconds: dict[str, list[float]] = {"one": [], "many": []}
    for number in range(args.rounds):
        started = time.perf_counter()
        alone = sb.train(configs[0], stream, training)
        between = time.perf_counter()
        together = sb.train(configs, stream, training)
        seconds["one"].append(between - started)
        seconds["many"].append(time.perf_counter() - between)
        same = all(torch.equal(a, b) for a, b in zip(alone.parameters(), together[0].parameters(), strict=True))
        print(f"round {number + 1}: one {seconds['one'][-1]:.1f} s, {args.count} {seconds['many'][-1]:.1f} s, same bytes: {same}")
        assert same, "the first of many differs from the one trained alone"
    ratios = [many / one for one, many in zip(seconds["one"], seconds["many"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"{args.count} dictionaries take {ratio:.2f} times the time of one ({min(ratios):.2f} to {max(ratios):.2f})")
    result = {"date": date.today().isoformat(), "machine": machine.describe(), "torch": torch.__version__, "seconds": seconds}
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    path = args.out / f"many-{date.today().isoformat()}.json"
    path.write_text(json.dumps({**result, "settings": settings, "ratio": ratio}, indent=2) + "\n")
    print(f"results: {path}")


if __name__ == "__main__":
    main()
