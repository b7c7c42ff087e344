"""The bundled model's training text as token contexts for every contestant, and what the model makes of some of them.

    python -m benchmarks.workers.contexts FILE TOKENS

The file holds `train` [N, S], in a random order, `held_out` [M, S], and for the first held-out contexts `logits` [P, S, V] as the
Hugging Face model gives them: a converted model must give the same before its speed means anything.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CONTEXT_SIZE, SKIP = 256, 1  # the first position is the BOS token, which nobody trains on here
SITE, LAYERS = "blocks.2.hook_resid_post", 3  # blocks up to the site
FORWARD_BATCH = 32  # contexts in a forward pass, the default of ours and of sae-lens
HELD_OUT, PROBES = 33, 4  # contexts
LOGIT_TOLERANCE = 1e-4
MODEL = Path(__file__).parents[2] / "saebench" / "lm" / "builtin"


@dataclass(frozen=True)
class Tokens:
    """What the file holds."""

    train_NS: Tensor
    held_out_MS: Tensor
    logits_PSV: Tensor

    @classmethod
    def read(cls, path: str) -> "Tokens":
        found = torch.load(path, weights_only=True)
        return cls(found["train"], found["held_out"], found["logits"])

    def check_logits(self, logits_PSV: Tensor) -> float:
        """The largest difference from the bundled model's logits. Raises ValueError where that is another model."""
        difference = (logits_PSV - self.logits_PSV).abs().max().item()
        if not difference <= LOGIT_TOLERANCE:
            raise ValueError(f"this model's logits differ from the bundled model's by up to {difference:.2g}")
        return difference


class HeldOutRows:
    """Held-out activations in the form that `planted.quality` asks for."""

    directions_GD = None  # nobody knows them

    def __init__(self, rows_RD: Tensor, first: int):
        self.rows_RD, self.first = rows_RD, first

    def batch_BD(self, number: int, batch_size: int) -> Tensor:
        start = (number - self.first) * batch_size
        return self.rows_RD[start : start + batch_size]


def write(path: Path, tokens: int) -> None:
    """Pack the bundled text into `tokens` tokens for training, and the held-out contexts on top."""
    import saebench as sb

    lm = sb.load_lm("builtin", device="cpu")
    ids_NS = sb.pack(sb.builtin_text(), lm.tokenizer, CONTEXT_SIZE).ids_NS
    ids_NS = ids_NS[torch.randperm(len(ids_NS), generator=torch.Generator().manual_seed(0))]
    held_out_MS, train_NS = ids_NS[:HELD_OUT], ids_NS[HELD_OUT:]
    kept = -(-tokens // (CONTEXT_SIZE - SKIP))
    if len(train_NS) < kept:
        raise SystemExit(
            f"the bundled text gives {len(train_NS)} contexts, fewer than {kept}: take fewer rounds, or shorter turns"
        )
    logits_PSV = lm.logits(held_out_MS[:PROBES])
    torch.save({"train": train_NS[:kept].long(), "held_out": held_out_MS.long(), "logits": logits_PSV.clone()}, path)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
