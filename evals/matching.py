"""Do features persist through the depth of the bundled model, and are they the same under another seed?

    python evals/matching.py                    # a few minutes on two cores
    python evals/matching.py --tokens 30000     # a quick look; results are not kept

Course: a TopK dictionary for the residual stream behind every layer, matched layer by layer (SAE Match). Seeds: TopK and ReLU dictionaries
of one layer at the same L0, each pair of seeds compared. Figures are kept in evals/results/matching.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import saebench as sb
from evals.shared import HERE, SEEDS, TOKENS, activations, held_out, lm, trained
from saebench.circuits.matching.carried import carried, fire_together
from saebench.circuits.matching.course import composition, course, mean_where_active
from saebench.circuits.matching.seeds import seed_stability
from saebench.codes import SparseCodes
from saebench.progress import say

RESULTS = HERE / "results" / "matching.json"
D_SAE, L0 = 1024, 16

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", type=int, default=TOKENS)


def main() -> None:
    args = parser.parse_args()
    started = time.perf_counter()
    results = {"course": through_the_depth(args.tokens), "seeds": under_other_seeds(args.tokens)}
    say(f"{time.perf_counter() - started:.0f} s")
    if args.tokens == TOKENS:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


@torch.inference_mode()
def codes_of(sae: sb.Dictionary, ids_CS: torch.Tensor) -> SparseCodes:
    site = sae.config.reads[0]
    return sae.encode_contexts(lm().read(ids_CS, [site])[site].float())


def through_the_depth(tokens: int) -> dict[str, Any]:
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(lm().site_table.num_layers)]
    saes = list(
        trained(
            {site: sb.TopK(d_sae=D_SAE, k=L0, site=site) for site in sites},
            activations(*sites, tokens=tokens),
            0,
            num_tokens=tokens,
        ).values()
    )
    ids_CS = held_out().ids_NS
    codes = [codes_of(sae, ids_CS) for sae in saes]
    found = course(saes, [mean_where_active(part) for part in codes])
    rows = found.figures()
    for number, (row, step) in enumerate(zip(rows, found.steps, strict=True)):
        believed = fire_together(codes[number], codes[number + 1], step.believed(found.alpha))
        scales = (found.folded[number].scale_F, found.folded[number + 1].scale_F)
        written = carried(lm(), ids_CS[:8], saes[number], saes[number + 1], step.partner_F, *scales)
        row |= {"score": believed.score, "explained": written.explained, "loss": written.loss}  # type: ignore[dict-item]
        say(
            f"{row['from']} -> {row['to']}: {row['continued']:.0%} go on, matching score {believed.score:.2f}, explained variance "
            + ", ".join(f"{name} {value:.2f}" for name, value in written.explained.items())
            + "; loss "
            + ", ".join(f"{name} {value:.2f}" for name, value in written.loss.items())
        )
    whole = composition(found)
    lengths = np.bincount(found.lengths_P, minlength=len(sites) + 1)[1:].tolist()
    say(
        f"courses by length {lengths}; first to last layer: steps and direct match agree for {whole.agreement:.0%}, of whole courses "
        f"{whole.agreement_on_courses:.0%}"
    )
    return {"steps": rows, "lengths": lengths, "composition": vars(whole)}


def under_other_seeds(tokens: int) -> dict[str, Any]:
    site = "blocks.2.hook_resid_post"
    source, ids_CS = activations(site, tokens=tokens), held_out().ids_NS
    configs = {"topk": sb.TopK(d_sae=D_SAE, k=L0, site=site), "relu": sb.ReLU(d_sae=D_SAE, target_l0=L0, site=site)}
    by_seed = [trained(configs, source, seed, num_tokens=tokens) for seed in range(SEEDS)]
    results = {}
    for name in configs:
        saes = [part[name] for part in by_seed]
        codes = [codes_of(sae, ids_CS) for sae in saes]
        alive = [part.firings().numpy() > 0 for part in codes]
        pairs = [
            seed_stability(saes[i], saes[j], alive[i], alive[j]).figures() for i, j in itertools.combinations(range(SEEDS), 2)
        ]
        means = {key: float(np.mean([pair[key] for pair in pairs])) for key in pairs[0]}
        results[name] = {"pairs": pairs, "l0": [float(part.l0().float().mean()) for part in codes]}
        say(
            f"{name}: {means['shared']:.0%} shared, {means['shared_of_alive']:.0%} of pairs that are alive, strictly "
            f"{means['shared_strictly']:.0%}, largest cosine {means['mean_largest_cosine']:.2f}, dead {means['dead_a']:.0f}, "
            f"L0 {np.mean(results[name]['l0']):.1f}"
        )
    return results


if __name__ == "__main__":
    main()
