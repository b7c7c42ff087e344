"""Train a sparse autoencoder on one layer of a language model: the whole story, to read and to edit.

    python training/train_sae.py                          # the bundled model and text
    python training/train_sae.py --model ./my-gpt2 --text novels/ --site blocks.3.hook_resid_post

The same as `saebench train` does from a recipe, without the recipe. Stop it with Ctrl-C and start it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import saebench as sb
from saebench.evaluation import describe
from saebench.features import characteristic_features
from saebench.figures.tokens import headline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="builtin", help="builtin, a checkpoint directory, or a hub name")
parser.add_argument("--text", default="builtin", help="builtin, a file, a directory, or hf:NAME")
parser.add_argument("--site", default="blocks.2.hook_resid_post", help="TransformerLens name of the layer")
parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to harvest and train on")
parser.add_argument("--d-sae", type=int, default=4096, help="latents")
parser.add_argument("--k", type=int, default=32, help="active latents per token")
parser.add_argument("--lr", type=float, help="peak learning rate; default by size and length of the run")
parser.add_argument("--out", type=Path, default=Path("runs/train_sae"))


def main() -> None:
    args = parser.parse_args()

    # 1. A language model, and text cut into contexts. One context in twenty is kept back to measure on.
    lm = sb.load_lm(args.model)
    contexts = sb.pack(sb.load_text(args.text), lm.tokenizer, context_size=256, num_tokens=args.tokens)
    kept_back = max(1, len(contexts) // 20)
    training_contexts, held_out = contexts[:-kept_back], contexts[-kept_back:]

    # 2. What the layer holds on every token, on disk.
    store = sb.harvest(lm, training_contexts, [args.site], args.out / "activations")

    # 3. The dictionary.
    training = sb.TrainConfig(num_tokens=args.tokens, lr=args.lr)
    sae = sb.train(sb.TopK(d_sae=args.d_sae, k=args.k), store, training, out=args.out)

    # 4. How good is it? Spliced into the model, on text it has not seen.
    figures = sb.evaluate(sae, lm, held_out)
    print(describe(figures))
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2))

    # 5. What did it learn?
    evidence = sb.index(sae, store, args.out / "features" / "sae", lm=lm, limit=512)
    for feature in characteristic_features(sae, evidence, count=12):
        print(f"feature {feature.latent:>6}  {feature.density:.3%} of tokens  {headline(feature, lm.token_strings.__getitem__)}")
    print(f"saved to {args.out}/dictionaries; load it with saebench.load(...)")


if __name__ == "__main__":
    try:
        main()
    except sb.UserError as error:
        raise SystemExit(f"error: {error}") from None
