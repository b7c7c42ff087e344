"""What everyone who makes an index is given, and what must come out: contexts, a dictionary, and its codes by brute force.

    python -m benchmarks.workers.index_inputs FOLDER SETTINGS THREADS

SETTINGS are tokens, d_sae, k, train_tokens and seed as JSON. FOLDER gets `tokens.safetensors` (`ids`, `documents`, `positions` [N, S])
with `documents.json`, `dictionary/` in our format, and `exact.safetensors`: every code of every token, from Hugging Face's own forward
pass and dense algebra, sorted by latent and within a latent from the largest value down, as `latents`, `tokens` (row by row through the
contexts), `values`. The dictionary is a TopK trained for a moment, with decoder rows of length 1: with free ones, which grow by and by,
half the latents are silent after so short a training, and silent ones cost less.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import saebench as sb
from benchmarks.workers.contexts import CONTEXT_SIZE, FORWARD_BATCH, LAYERS, MODEL, SITE

TRAIN_BATCH = 2048
EXACT_BATCH = 8  # contexts whose dense pre-activations are held at a time


def write(folder: Path, *, tokens: int, d_sae: int, k: int, train_tokens: int, seed: int) -> dict:
    """Everything that FOLDER gets; returns what the table says about the dictionary."""
    lm = sb.load_lm("builtin", device="cpu")
    contexts = sb.pack(sb.builtin_text(), lm.tokenizer, CONTEXT_SIZE, num_tokens=tokens)
    if contexts.num_tokens < tokens // CONTEXT_SIZE * CONTEXT_SIZE:
        raise SystemExit(f"the bundled text gives {contexts.num_tokens} tokens: ask for no more with --tokens")
    if len(contexts.ids_NS.unique(dim=0)) < len(contexts):
        raise SystemExit("the bundled text repeats a context, which SAEDashboard refuses: ask for fewer with --tokens")
    columns = {"ids": contexts.ids_NS, "documents": contexts.documents_NS, "positions": contexts.positions_NS}
    save_file({name: column.contiguous() for name, column in columns.items()}, folder / "tokens.safetensors")
    (folder / "documents.json").write_text(json.dumps(contexts.names))

    training = sb.TrainConfig(num_tokens=train_tokens, batch_size=TRAIN_BATCH, seed=seed)
    dictionary = sb.train(sb.TopK(d_sae=d_sae, k=k, decoder="unit"), sb.ActivationStream(lm, contexts, [SITE]), training)
    dictionary.save(folder / "dictionary")

    latents_N, tokens_N, values_N = brute_force(dictionary, contexts.ids_NS)
    save_file({"latents": latents_N, "tokens": tokens_N, "values": values_N}, folder / "exact.safetensors")
    sizes = {"site": SITE, "contexts": len(contexts), "context_size": CONTEXT_SIZE}
    return sizes | {"silent": d_sae - len(latents_N.unique()), "l0": len(latents_N) / contexts.num_tokens}


@torch.inference_mode()
def brute_force(dictionary: sb.Dictionary, ids_NS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """latents, tokens and values of all codes, positions 0 included: none of our model hooks, kernels or sparse codes is used."""
    model = AutoModelForCausalLM.from_pretrained(str(MODEL), local_files_only=True).eval()
    W_enc_DF, b_dec_D, k = dictionary.W_enc.detach(), dictionary.b_dec.detach(), dictionary.config.k
    latents, tokens, values = [], [], []
    for start in range(0, len(ids_NS), FORWARD_BATCH):
        batch_BS = ids_NS[start : start + FORWARD_BATCH].long()
        x_BSD = model(batch_BS, output_hidden_states=True).hidden_states[LAYERS]
        for first, part_bSD in enumerate(x_BSD.split(EXACT_BATCH)):
            z_TF = (part_bSD.flatten(0, 1) - b_dec_D) @ W_enc_DF + dictionary.b_enc.detach()
            values_TK, latents_TK = z_TF.topk(k, dim=1)
            token_T1 = torch.arange(len(z_TF))[:, None] + (start + first * EXACT_BATCH) * ids_NS.shape[1]
            kept = values_TK > 0
            latents.append(latents_TK[kept].int())
            tokens.append(token_T1.expand_as(latents_TK)[kept].int())
            values.append(values_TK[kept])
    latents_N, tokens_N, values_N = torch.cat(latents), torch.cat(tokens), torch.cat(values)
    order_N = values_N.argsort(descending=True, stable=True)
    order_N = order_N[latents_N[order_N].argsort(stable=True)]
    return latents_N[order_N], tokens_N[order_N], values_N[order_N]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(write(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
