"""A run directory for measuring the browser: a dictionary with a big store, and one that reads prompts.

    python -m benchmarks.browse_run FOLDER            # 131,072 latents over 10 million tokens: some ten minutes, 5 GiB

`drawn` is `drawn_store.py`'s dictionary with its store, saved as the plain TopK that it is to everyone who does not index it; `prompt` is
a TopK trained for a moment, with a store of its own, so that what fires on a prompt is what a model's activations make of it. A second
call, or one after a stop, makes what is missing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

import saebench as sb
from benchmarks.drawn_store import CONTEXT_SIZE, SITE, RepeatedText, drawn_dictionary
from benchmarks.options import UsageError, say
from saebench.activations import ActivationStream
from saebench.features import FeatureStore, index
from saebench.features.labelling.labels import label_offline
from saebench.lm import LanguageModel, builtin_text, pack
from saebench.recipes import Recipe
from saebench.runs import Run

DRAWN, PROMPT = "drawn", "prompt"
D_SAE, TOKENS, K = 131_072, 10_000_000, 32
PROMPT_D_SAE, PROMPT_TOKENS = 16_384, 100_000
BYTES_A_TOKEN = 1200  # of disk while a store of 32 firings a token is built


def make(path: Path, *, d_sae: int = D_SAE, tokens: int = TOKENS, prompt_d_sae: int = PROMPT_D_SAE) -> Run:
    """The run in a directory, made as far as it is missing. Raises UsageError where the disk has no room, UserError where another
    run is."""
    path.mkdir(parents=True, exist_ok=True)
    run = Run.begin(path, recipe(d_sae, tokens, prompt_d_sae).model_dump(mode="json"))
    if run.finished:
        return run
    if shutil.disk_usage(path).free < tokens * BYTES_A_TOKEN:
        raise UsageError(f"{path} has less than {tokens * BYTES_A_TOKEN >> 30} GiB free: name another place with --store")
    run.save()
    lm = sb.load_lm("builtin", device="cpu")
    for name, build in ((DRAWN, _drawn), (PROMPT, _prompt)):
        store = build(run, lm, d_sae if name == DRAWN else prompt_d_sae, tokens if name == DRAWN else PROMPT_TOKENS)
        say(f"{name}: {store.num_entries:,} firings of {store.d_sae:,} latents on {store.num_tokens:,} tokens")
    (path / "metrics.jsonl").touch()
    run.write_evaluation("core", {})
    run.record["model"] = {"name": lm.name, "fingerprint": lm.fingerprint}
    run.record["activations"] = {"identity": store.config["activations"], "tokens": store.num_tokens, "path": ""}
    run.record["finished"] = True
    run.save()
    return run


def recipe(d_sae: int, tokens: int, prompt_d_sae: int) -> Recipe:
    """What run.json says that the run was made from."""
    dictionaries = [
        {"architecture": "topk", "id": DRAWN, "d_sae": d_sae, "k": K},
        {"architecture": "topk", "id": PROMPT, "d_sae": prompt_d_sae, "k": K},
    ]
    return Recipe.parse({
        "name": "browse",
        "activations": {"sites": [SITE], "num_tokens": tokens, "context_size": CONTEXT_SIZE, "mode": "stream"},
        "dictionaries": dictionaries,
        "training": {"num_tokens": PROMPT_TOKENS, "batch_size": 2048},
    })  # fmt: skip


def _drawn(run: Run, lm: LanguageModel, d_sae: int, tokens: int) -> FeatureStore:
    dictionary = drawn_dictionary(lm, d_sae, K)
    if not (run.path / "dictionaries" / DRAWN).exists():
        dictionary.save(run.path / "dictionaries" / DRAWN)
    return index(dictionary, RepeatedText(lm, tokens), run.features(DRAWN), lm=lm)


def _prompt(run: Run, lm: LanguageModel, d_sae: int, tokens: int) -> FeatureStore:
    source = ActivationStream(lm, pack(builtin_text(), lm.tokenizer, CONTEXT_SIZE, num_tokens=tokens), [SITE])
    place = run.path / "dictionaries" / PROMPT
    if not place.exists():
        training = sb.TrainConfig(num_tokens=tokens, batch_size=2048)
        sb.train(sb.TopK(d_sae=d_sae, k=K, site=SITE, decoder="unit"), source, training).save(place)
    store = index(sb.load(place), source, run.features(PROMPT), lm=lm)
    label_offline(store)
    return store


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.browse_run", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--d-sae", type=int, default=D_SAE)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--prompt-d-sae", type=int, default=PROMPT_D_SAE)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    make(arguments.folder, d_sae=arguments.d_sae, tokens=arguments.tokens, prompt_d_sae=arguments.prompt_d_sae)
    return 0


if __name__ == "__main__":
    sys.exit(main())
