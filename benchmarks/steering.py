"""What steering costs while a text is written: seconds a token under a key-value cache, untouched and with edits, in turns.

    python -m benchmarks.steering                       # the bundled model: a few minutes
    python -m benchmarks.steering --model DIR

Rounds of one text each, untouched and with every edit in turn; the ratio is taken round by round. README.md says how to read the table.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that `python benchmarks/steering.py` works too

import saebench as sb
from benchmarks import report
from benchmarks.options import RESULTS, at_least, free_stem, new_result, run_command, say
from saebench.steering.edits import Edit, add, clamp
from saebench.steering.hooks import steer

PROMPT = "def "
HEAD = ("edit", "ms a token", "x untouched (range)", "added us a token")
PUBLISHED_US = 920.0  # added per token, of topic alignment on GPT-2 (its paper)


def main() -> int:
    arguments = parse(sys.argv[1:])
    stem = free_stem(arguments.out, "steering")
    return run_command(lambda: run(arguments, new_result(arguments), stem), stem)


def run(arguments: argparse.Namespace, result: dict, stem: Path) -> None:
    torch.set_num_threads(arguments.threads)
    lm = sb.load_lm(arguments.model)
    site = f"blocks.{lm.site_table.num_layers // 2}.hook_resid_post"
    config = sb.TopK(d_sae=arguments.d_sae, k=32, site=site).for_sites({site: lm.width(site)})
    sae = config.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what a latent fires on does not matter to the time that it takes
        sae.W_enc_FD.copy_(torch.randn(sae.W_enc_FD.shape, generator=generator))
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_enc_FD, dim=1))
    sae = sae.settled().eval().requires_grad_(False)
    edits: dict[str, list[Edit]] = {
        "untouched": [],
        "add, one latent": [add(sae, 3, 0.01)],
        "add, four latents in turn": [add(sae, latent, 0.01) for latent in range(4)],
        "clamp, one latent": [clamp(sae, 3, 0.01, strength=0.01)],
    }
    ids_BS = torch.tensor([lm.prompt_ids(PROMPT)])
    rounds: dict[str, list[float]] = {name: [] for name in edits}
    for number in range(arguments.rounds + 1):
        for name in edits if number % 2 == 0 else reversed(edits):
            with steer(lm, edits[name]):
                began = time.perf_counter()
                lm.generate_ids(ids_BS, arguments.tokens, whole=True)
                seconds = time.perf_counter() - began
            if number:  # the first round warms up
                rounds[name].append(seconds / arguments.tokens)
        say(f"round {number}: {1e3 * rounds['untouched'][-1]:.3f} ms a token untouched" if number else "warm")
        result["seconds_per_token"] = rounds
    print("\n" + write(result, stem))


def write(result: dict, stem: Path) -> str:
    rounds = result["seconds_per_token"]
    rows = []
    for name, seconds in rounds.items():
        ratios = [mine / clean for mine, clean in zip(seconds, rounds["untouched"], strict=True)]
        added = median(mine - clean for mine, clean in zip(seconds, rounds["untouched"], strict=True))
        low, high = sorted(ratios)[len(ratios) // 4], sorted(ratios)[-1 - len(ratios) // 4]
        rows.append([name, f"{1e3 * median(seconds):.3f}", f"{median(ratios):.4f} ({low:.4f}-{high:.4f})", f"{1e6 * added:.0f}"])
    tables = [report.format_table(list(HEAD), rows)]
    about = (
        "Model {model}, {tokens} tokens a text, {rounds} rounds; ranges are quartiles. ".format_map(result["arguments"])
        + f"Published for topic alignment: {PUBLISHED_US:.0f} us added a token.\n\n"
    )
    report.write(result, "Steering under cached decoding", tables, stem, about)
    return "\n\n".join(tables)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="builtin", help="builtin, a checkpoint directory, or a hub name")
    parser.add_argument("--d-sae", type=at_least(64), default=4096)
    parser.add_argument("--tokens", type=at_least(2), default=64, help="of a text")
    parser.add_argument("--rounds", type=at_least(2), default=160)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
