"""Activations of the bundled language model as a data set for every peer: recorded once into a file, read by the workers.

    python -m benchmarks.workers.recorded FILE ROWS

The file is a tensor [R, D] of rows in a random order, scaled to a mean squared norm of D, which is what most trainers ask for.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.workers.planted import CALIBRATION_TOKENS, HELD_OUT, HELD_OUT_BATCHES, HELD_OUT_TOKENS

KEPT_ROWS = HELD_OUT_BATCHES * HELD_OUT_TOKENS + CALIBRATION_TOKENS
SITE = "blocks.2.hook_resid_post"


class RecordedData:
    """A stream of batches that depends on the file, the seed and the batch number only. What a seed changes is the order."""

    directions_GD = None  # nobody knows them

    def __init__(self, path: Path, seed: int):
        self.rows_RD = torch.load(path, mmap=True, weights_only=True)
        self.n_training = len(self.rows_RD) - KEPT_ROWS
        self.order_R = torch.randperm(self.n_training, generator=torch.Generator().manual_seed(seed))

    def batch_BD(self, number: int, batch_size: int) -> Tensor:
        """Batch `number` of the stream; those from HELD_OUT on are rows that are never trained on."""
        if number < HELD_OUT:
            rows_B = self.order_R[number * batch_size : (number + 1) * batch_size]
            if len(rows_B) < batch_size:
                raise ValueError(f"the recorded activations end before batch {number}: record more rows")
            return self.rows_RD[rows_B]
        start = self.n_training + (number - HELD_OUT) * HELD_OUT_TOKENS
        return self.rows_RD[start : start + batch_size].clone()


def record(path: Path, rows: int) -> None:
    """Run the bundled model over random contexts of its training text; `rows` are for training, those kept out come on top."""
    import saebench as sb

    lm = sb.load_lm("builtin")
    ids_NS = sb.pack(sb.builtin_text(), lm.tokenizer, context_size=256).ids_NS
    ids_NS = ids_NS[torch.randperm(len(ids_NS), generator=torch.Generator().manual_seed(0))]
    parts, found, rows = [], 0, rows + KEPT_ROWS
    with torch.inference_mode():
        for chunk_NS in ids_NS.split(32):
            parts.append(lm.read(chunk_NS, [SITE])[SITE][:, 1:].flatten(0, 1).float())
            found += len(parts[-1])
            if found >= rows:
                break
    rows_RD = torch.cat(parts)
    if len(rows_RD) < rows:
        raise SystemExit(f"the bundled text gives {len(rows_RD)} activations, fewer than {rows}: take fewer steps")
    rows_RD = rows_RD[torch.randperm(len(rows_RD), generator=torch.Generator().manual_seed(1))[:rows]]
    rows_RD *= (rows_RD.shape[1] / rows_RD.square().sum(1).mean()) ** 0.5
    torch.save(rows_RD, path)


if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]))
