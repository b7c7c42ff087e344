"""Eight dictionaries of equal shape from one pass over the data, beside one: language-model forward included; and in a stack, beside
one by one.

    python benchmarks/many.py                       # some minutes
    python benchmarks/many.py --tokens 200000 --rounds 5
    python benchmarks/many.py --part stack          # less than a minute

In turns within one run. `stream`: each trains from a stream, so that the model runs every time. The eight differ in their seeds; the first
of them must end with the same bytes as the one trained alone. `stack`: steps alone, on sums of a few of many directions, in processor
time of one thread, the least of many turns; the eight differ in seed and learning rate.
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
from saebench.trainer import Member
from saebench.trainer.stack import Stack

SITE = "blocks.2.hook_resid_post"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", type=int, default=100_000)
parser.add_argument("--d-sae", type=int, default=4096)
parser.add_argument("--k", type=int, default=32)
parser.add_argument("--count", type=int, default=8)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--part", choices=("stream", "stack", "both"), default="both")
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")


SHAPES = ((64, 512, 8, 512), (256, 2048, 32, 256), (256, 4096, 32, 2048))
"""d_in, d_sae, k, batch."""


def main() -> None:
    args = parser.parse_args()
    result = {"date": date.today().isoformat(), "machine": machine.describe(), "torch": torch.__version__}
    result["settings"] = {key: value for key, value in vars(args).items() if key != "out"}
    if args.part != "stack":
        result |= from_a_stream(args)
    if args.part != "stream":
        result["stacked"] = [in_a_stack(shape, args.count) for shape in SHAPES]
    path = args.out / f"{'many-stack' if args.part == 'stack' else 'many'}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"results: {path}")


def from_a_stream(args: argparse.Namespace) -> dict:
    lm = sb.load_lm("builtin")
    contexts = sb.pack(sb.builtin_text(), lm.tokenizer, context_size=256, num_tokens=args.tokens)
    stream = sb.ActivationStream(lm, contexts, [SITE])
    stream.statistics(SITE)
    training = sb.TrainConfig(num_tokens=args.tokens, batch_size=2048, log_every=10, stack=False)
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
    return {"seconds": seconds, "ratio": ratio}


def in_a_stack(shape: tuple[int, int, int, int], count: int, turns: int = 12) -> dict:
    """Milliseconds of processor time that a step of all members takes, one by one and in a stack."""
    d_in, d_sae, k, batch = shape
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    batches = [(torch.rand(batch, 4 * d_in, generator=generator) < 2 / d_in).float() @ directions for _ in range(4)]
    training = sb.TrainConfig(num_tokens=1000 * batch, batch_size=batch, dead_after=1000 * batch)
    configs = [sb.TopK(d_sae=d_sae, k=k, site="x", seed=i, lr=1e-4 * (i + 1), initial_bias="mean") for i in range(count)]
    one_by_one, stacked = ([Member.create(config, training, torch.cat(batches)) for config in configs] for _ in range(2))
    stack = Stack({str(number): member for number, member in enumerate(stacked)})

    def each(step: int) -> None:
        for member in one_by_one:
            member.step(batches[step % 4], step)

    least = {"one_by_one": float("inf"), "stacked": float("inf")}
    for turn in range(turns):
        for name, take in (("one_by_one", each), ("stacked", lambda step: stack.step({"x": batches[step % 4]}, step))):
            take(3 * turn)
            started = time.process_time()
            take(3 * turn + 1)
            take(3 * turn + 2)
            least[name] = min(least[name], (time.process_time() - started) / 2)
    milliseconds = {name: 1000 * seconds for name, seconds in least.items()}
    gain = milliseconds["one_by_one"] / milliseconds["stacked"]
    print(
        f"{count} of {d_in}, {d_sae}, {k}, {batch}: "
        + ", ".join(f"{k} {v:.1f} ms" for k, v in milliseconds.items())
        + f", {gain:.2f} times"
    )
    return {"shape": shape, "milliseconds": milliseconds, "gain": gain}


if __name__ == "__main__":
    main()
