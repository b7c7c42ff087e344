"""What a graph is made of, for saebench and circuit-tracer alike: models, transcoders of all their layers, and prompts.

    python -m benchmarks.workers.circuit_inputs FOLDER SETTINGS THREADS

SETTINGS are lengths (of prompts), d_sae, l0 and seed as JSON. Models are the bundled one and a Llama with random weights, the bundled one's
tokenizer, and gains of norms that are not 1. For each FOLDER gets `NAME/model`, `NAME/mlp-N` (our format), `NAME/layer_N.safetensors`
(circuit-tracer's: W_enc and W_dec [F, D], biases, JumpReLU's thresholds), and for all `prompts.json`: token ids by length, BOS first.
Transcoders are JumpReLU ones as they are before training, their thresholds set by the text: edges must be exact for any weights.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import saebench as sb
from benchmarks.workers.contexts import MODEL
from saebench.dictionaries import Scaling, parse_dictionary

SAMPLE, CONTEXT_SIZE = 16, 256  # contexts that thresholds are set by
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write(folder: Path, *, lengths: list[int], d_sae: int, l0: int, seed: int) -> dict:
    """Everything that FOLDER gets; returns what the table says about it."""
    torch.manual_seed(seed)
    folders = {"bundled": folder / "bundled", "llama": folder / "llama"}
    shutil.copytree(MODEL, folders["bundled"] / "model", ignore=shutil.ignore_patterns("*.svg", "*.jsonl", "*.md"))
    write_llama(folders["llama"] / "model")
    for place in folders.values():  # circuit-tracer wants a transformers from before the tokenizers' class was renamed
        settings = json.loads((MODEL / TOKENIZER[1]).read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (place / "model" / TOKENIZER[1]).write_text(json.dumps(settings))
    contexts = None
    for place in folders.values():
        lm = sb.load_lm(str(place / "model"), device="cpu")
        contexts = contexts or sb.pack(sb.builtin_text(), lm.tokenizer, CONTEXT_SIZE, num_tokens=64 * CONTEXT_SIZE)
        for layer in range(lm.site_table.num_layers):
            write_transcoder(lm, contexts.ids_NS[:SAMPLE].long(), layer, place, d_sae=d_sae, l0=l0, seed=seed)
    text = contexts.ids_NS[SAMPLE:, 1:].flatten().tolist()
    (folder / "prompts.json").write_text(
        json.dumps({length: [lm.tokenizer.bos_token_id, *text[: length - 1]] for length in lengths})
    )
    return {"models": list(folders)}


def write_llama(place: Path) -> None:
    """4 layers of width 256 with 8 heads."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=2048, initializer_range=0.1, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight += 0.3 * torch.randn(weight.shape)
    model.save_pretrained(place)
    shutil.copy(MODEL / TOKENIZER[0], place)


@torch.no_grad()
def write_transcoder(
    lm: sb.LanguageModel, ids_CS: torch.Tensor, layer: int, place: Path, *, d_sae: int, l0: int, seed: int
) -> None:
    """Of one layer, in both formats."""
    site, target = f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"
    asked = {"architecture": "jumprelu", "d_sae": d_sae, "target_l0": l0, "site": site, "target": target}
    config = parse_dictionary(asked, "inputs").for_sites({name: lm.width(name) for name in (site, target)}).for_lm(lm)
    x_BD, y_BD = (
        value[:, 1:].flatten(0, 1).clone() for value in (lm.read(ids_CS, [site, target])[name] for name in (site, target))
    )
    dictionary = config.build()
    dictionary.initialise(x_BD, y_BD, torch.Generator().manual_seed(seed + layer), lm)
    dictionary.fold(Scaling.identity(x_BD.shape[1]), Scaling.identity(y_BD.shape[1]))
    dictionary = dictionary.eval().requires_grad_(False)
    dictionary.save(place / f"mlp-{layer}")
    folded = dictionary.weights().folded()
    theirs = {
        "W_enc": folded.W_enc_FD, "b_enc": folded.b_enc_F, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec,
        "activation_function.threshold": dictionary.threshold.expand(d_sae),
    }  # fmt: skip
    if dictionary.b_in is not None:
        theirs["b_enc"] = folded.b_enc_F - folded.W_enc_FD @ dictionary.b_in
    save_file(
        {name: weight.detach().clone().contiguous() for name, weight in theirs.items()}, place / f"layer_{layer}.safetensors"
    )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(write(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
