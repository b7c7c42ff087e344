"""Every architecture at matched L0 on planted and on real activations: the tables and the figure of docs/architectures.md.

    python evals/architectures.py                        # all; about an hour on two cores; goes on where it was stopped
    python evals/architectures.py --data planted --seeds 1
    python evals/architectures.py --only TopK,Gated      # some; others keep the results they have

One pass over the data trains all dictionaries of a seed side by side. A seed draws both the data's order and the initialisation.
Every finished measurement is kept in evals/results/architectures.json; the page is written from that file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import saebench as sb
from evals.page import write_page
from saebench.dictionaries import Dictionary, DictionaryConfig, parse_dictionary
from saebench.evaluation.metrics import Reconstruction, max_decoder_cosine
from saebench.evaluation.recovery import absorption_rate, composition_rate, firing_scores, matched_cosine
from saebench.progress import say

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "architectures.json"
HELD_OUT_SEED = 999
TEXT = 1_000_000  # tokens from which contexts of the bundled model are drawn
PART = 4096

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=["planted", "builtin"], action="append", help="default both")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--only", default="", help="ids, separated by commas")
parser.add_argument("--tokens", type=int, help="training tokens, for a quick look; results are not kept")
parser.add_argument("--page-only", action="store_true", help="write the page from the results there are")


def main() -> None:
    args = parser.parse_args()
    plan = tomllib.loads((HERE / "architectures.toml").read_text())
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.page_only:
        only = {name.strip() for name in args.only.split(",") if name.strip()}
        if unknown := only - {entry["id"] for entry in plan["dictionaries"]}:
            raise sb.UserError(f"--only {sorted(unknown)[0]!r} is not in evals/architectures.toml")
        for data in args.data or ["planted", "builtin"]:
            for seed in range(args.seeds):
                run(data, seed, plan, only, results, args.tokens)
    if args.tokens is None:
        write_page(plan, results)


def run(data: str, seed: int, plan: dict[str, Any], only: set[str], results: dict[str, Any], tokens: int | None) -> None:
    """Train what is missing of one seed, measure it, and keep the figures."""
    settings = plan[data]
    wanted: dict[str, DictionaryConfig] = {}
    for entry in plan["dictionaries"]:
        if only and entry["id"] not in only:
            continue
        for l0 in settings["l0s"] + (settings["pareto"] if seed == 0 and "sparsity" in entry else []):
            key = f"{data}/{entry['id']}/l0={l0}/seed={seed}"
            if key not in results or only:
                wanted[key] = configuration(entry, settings, l0, seed)
    if not wanted:
        return
    say(f"{data}, seed {seed}: {len(wanted)} dictionaries")
    measure = planted(settings) if data == "planted" else builtin(settings)
    training = sb.TrainConfig(
        num_tokens=tokens or settings["num_tokens"], batch_size=settings["batch_size"], lr=settings.get("lr"), seed=seed
    )
    source = measure.source(seed, training.num_tokens)
    started = time.perf_counter()
    names = {f"d{number}": key for number, key in enumerate(wanted)}
    trained = sb.train({name: wanted[key] for name, key in names.items()}, source, training)
    seconds = time.perf_counter() - started
    assert isinstance(trained, list)
    for key, dictionary in zip(names.values(), trained, strict=True):
        results[key] = {**measure(dictionary), "seconds_of_all": round(seconds), "tokens": training.num_tokens}
        say(f"{key}: " + ", ".join(f"{name} {value:.4g}" for name, value in results[key].items() if isinstance(value, float)))
        if tokens is None:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def configuration(entry: dict[str, Any], settings: dict[str, Any], l0: int, seed: int) -> DictionaryConfig:
    """The dictionary of an entry of the plan at an L0."""
    values = {key: value for key, value in entry.items() if key not in ("id", "sparsity")}
    if "sparsity" in entry:
        values[entry["sparsity"]] = l0
    return parse_dictionary({"d_sae": settings["d_sae"], "seed": seed, **values}, f"architectures.toml, {entry['id']}")


class planted:
    """Data and figures where the truth is known."""

    def __init__(self, settings: dict[str, Any]):
        keys = ("num_features", "width", "l0", "correlation", "tree_share", "branching", "depth")
        self.truth = sb.PlantedDictionary(**{key: settings[key] for key in keys})
        self.held_out, self.codes = self.truth.sample(settings["held_out"], seed=HELD_OUT_SEED)

    def source(self, seed: int, num_tokens: int) -> sb.TensorSource:
        return sb.TensorSource({"planted": self.truth.sample(num_tokens, seed=seed)[0]})

    @torch.inference_mode()
    def __call__(self, dictionary: Dictionary) -> dict[str, Any]:
        quality = Reconstruction(self.truth.width, dictionary.config.d_sae)
        for x_BD in self.held_out.split(PART):
            codes = dictionary.encode(x_BD)
            quality.update(x_BD, dictionary.reconstruct(x_BD, codes), codes)
        figures = {name: quality.figures()[name] for name in ("fvu", "l0", "dead", "relative_reconstruction_bias")}
        alive_F = quality.density_F > 0
        W_dec: torch.Tensor = dictionary.W_dec  # type: ignore[assignment]
        truth_GD = self.truth.directions_FD
        matching = matched_cosine(W_dec.detach() * alive_F[:, None], truth_GD)
        codes = join_codes([dictionary.encode(x_BD) for x_BD in self.held_out.split(PART)])
        firing = firing_scores(codes, self.codes, matching)
        absorbed = absorption_rate(codes, self.codes, matching, self.truth.parents_F, W_dec.detach(), truth_GD)
        return {
            **figures,
            "matched_cosine": matching.mean_matched_cosine,
            "recovered": matching.recovered,
            "f1": firing.f1,
            "absorption": absorbed.rate,
            "composition": composition_rate(W_dec.detach()[alive_F], truth_GD).rate,
            "max_decoder_cosine": float(max_decoder_cosine(W_dec.detach()[alive_F]).mean()),
        }


class builtin:
    """Data and figures of the bundled language model: contexts drawn at random for training, others of the same text held out, because
    an L0 that was stated for one kind of text is another one for another kind."""

    def __init__(self, settings: dict[str, Any]):
        self.site = settings["site"]
        self.lm = sb.load_lm("builtin")
        contexts = sb.pack(sb.builtin_text(), self.lm.tokenizer, context_size=256, num_tokens=TEXT)
        contexts = contexts[torch.randperm(len(contexts), generator=torch.Generator().manual_seed(HELD_OUT_SEED))]
        self.contexts = contexts[: settings["num_tokens"] // 255 + 1]  # position 0 is left out
        self.held_out = contexts[-(settings["held_out"] // 256) :]

    def source(self, seed: int, num_tokens: int) -> Any:
        return sb.harvest(self.lm, self.contexts, [self.site], HERE / "results" / "acts")

    def __call__(self, dictionary: Dictionary) -> dict[str, Any]:
        figures = sb.evaluate(dictionary, self.lm, self.held_out)
        kept = (
            "fvu",
            "l0",
            "dead",
            "ce_recovered_zero",
            "kl_recovered_zero",
            "relative_reconstruction_bias",
            "mean_max_decoder_cosine",
        )
        return {name: figures[name] for name in kept if name in figures}


def join_codes(parts: list[sb.SparseCodes]) -> sb.SparseCodes:
    """Codes of consecutive tokens as one, without padding."""
    tokens, latents, values, first = [], [], [], 0
    for part in parts:
        token_N, latent_N, value_N = part.nonzero()
        tokens.append(token_N + first)
        latents.append(latent_N)
        values.append(value_N)
        first += len(part)
    return sb.SparseCodes.ragged(torch.cat(tokens), torch.cat(latents), torch.cat(values), first, parts[0].d_sae)


if __name__ == "__main__":
    try:
        main()
    except sb.UserError as error:
        raise SystemExit(f"error: {error}") from None
