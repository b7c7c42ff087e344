"""Encoder pre-activations, block by block: the scores of all tokens never exist at once.

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `N` kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = (
    64 << 20
)  # scores of one block of tokens: smaller blocks read the encoder more often than they save (benchmarks/NOTES.md)


def score_blocks(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, scale_F: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """(x W_enc^T + b_enc) * scale in blocks of tokens: (first token, scores [block, F]). The next block uses the memory again."""
    block = max(1, BLOCK_BYTES // max(1, len(W_enc_FD) * x_BD.element_size()))
    scores = x_BD.new_empty(min(block, len(x_BD)), len(W_enc_FD))
    for start in range(0, len(x_BD), block):
        rows_BD = x_BD[start : start + block]
        z_bF = torch.addmm(b_enc_F, rows_BD, W_enc_FD.T, out=scores[: len(rows_BD)])
        yield start, z_bF if scale_F is None else z_bF.mul_(scale_F)
