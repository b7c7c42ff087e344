"""The gradient of a matrix of latent rows: for every latent the weighted sum of the token rows it is active on (methods.md K3).

Serves both the decoder (weights = values, rows = output gradient) and the encoder (weights = value gradient, rows = inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes


def latent_sums(codes: SparseCodes, rows_BD: Tensor) -> Tensor:
    """sum over entries (token b, latent f) of value * rows[b], for every f: [F, D]. Never-active latents get exact zeros.

    Entries are summed latent by latent in token order, without a temporary of N rows and without atomics: deterministic,
    and the same for any number of threads. Codes that are crowded go through dense blocks of tokens instead.
    """
    if codes.crowded:
        total_FD = rows_BD.new_zeros(codes.d_sae, rows_BD.shape[1])
        for start, dense_bF in codes.dense_blocks():
            total_FD.addmm_(dense_bF.T, rows_BD[start : start + len(dense_bF)])
        return total_FD
    order = codes.order
    return torch.nn.functional.embedding_bag(
        order.sorted_tokens_N,
        rows_BD,
        order.starts_F,
        per_sample_weights=codes.values.reshape(-1)[order.order_N],
        mode="sum",
    )
