"""The bundled language model is what its card says."""

import math

import torch

from saebench.lm import builtin_text, pack
from saebench.lm.model import BUILTIN


def test_fits_into_its_sixteen_megabytes():
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) <= 16_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in BUILTIN.iterdir()}


def test_predicts_held_out_modules_below_one_and_a_half_bits_per_byte(builtin_lm):
    """On a sample of the held-out text; the whole set is measured by training/train_lm.py and stands in the model card."""
    contexts = pack(builtin_text("held_out"), builtin_lm.tokenizer, 512)[::6]
    nats = tokens = 0
    num_bytes = 0
    for ids in contexts.ids_NS.long().split(8):
        logits = builtin_lm.logits(ids)[:, 255:-1]
        targets = ids[:, 256:]
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
        tokens += targets.numel()
        num_bytes += sum(len(builtin_lm.tokenizer.decode(row, skip_special_tokens=True).encode()) for row in targets)
    assert tokens > 5_000
    assert nats / math.log(2) / num_bytes < 1.5


def test_has_an_induction_head(builtin_lm):
    """Attention from the second copy of random tokens to the token behind the first copy (Olsson et al. 2022)."""
    length = 60
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(1, len(builtin_lm.tokenizer), (8, length), generator=generator)
    ids = torch.cat([torch.full((8, 1), builtin_lm.tokenizer.bos_token_id), half, half], dim=1)
    with torch.inference_mode():
        _, cache = builtin_lm.bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
    rows = torch.arange(length + 1, 2 * length + 1)
    scores = torch.stack(
        [
            cache[f"blocks.{layer}.attn.hook_pattern"][:, :, rows, rows - length + 1].mean((0, 2))
            for layer in range(builtin_lm.hf.config.n_layer)
        ]
    )
    assert scores.max() > 0.5, scores
