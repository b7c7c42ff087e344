"""Encoder pre-activations, block by block: the scores of all tokens never exist at once.

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `N` kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Scores of one block of tokens. Smaller blocks are still in a cache when they are selected from, but read the encoder more often, and a
# product wants hundreds of rows (benchmarks/NOTES.md).
BLOCK_BYTES = 64 << 20
CACHED_BYTES, ROWS = 16 << 20, 512
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def score_blocks(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, scale_F: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """(x W_enc^T + b_enc) * scale in blocks of tokens: (first token, scores [block, F]). The next block uses the memory again. With a W of
    16 bits, x is rounded to its type and the scores are float32."""
    if W_enc_FD.dtype in SIXTEEN_BITS:
        x_BD = x_BD.to(W_enc_FD.dtype)
        if not x_BD.is_cuda:  # such products with float32 sums are a GPU's; products of the widened numbers are the same
            x_BD, W_enc_FD = x_BD.float(), W_enc_FD.float()
    narrow = x_BD.dtype in SIXTEEN_BITS
    scores_type = torch.float32 if narrow else x_BD.dtype
    row_bytes = max(1, len(W_enc_FD) * scores_type.itemsize)
    block = max(1, min(BLOCK_BYTES, max(CACHED_BYTES, ROWS * row_bytes)) // row_bytes)
    scores = x_BD.new_empty(min(block, len(x_BD)), len(W_enc_FD), dtype=scores_type)
    for start in range(0, len(x_BD), block):
        rows_BD = x_BD[start : start + block]
        out_bF = scores[: len(rows_BD)]
        if narrow:
            z_bF = torch.mm(rows_BD, W_enc_FD.T, out_dtype=torch.float32, out=out_bF).add_(b_enc_F)
        else:
            z_bF = torch.addmm(b_enc_F, rows_BD, W_enc_FD.T, out=out_bF)
        yield start, z_bF if scale_F is None else z_bF.mul_(scale_F)
