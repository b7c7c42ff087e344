"""The gradient of a matrix of latent rows: for every latent the weighted sum of the token rows it is active on (methods.md K3).

Serves both the decoder (weights = values, rows = output gradient) and the encoder (weights = value gradient, rows = inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import LatentOrder


def latent_sums(order: LatentOrder, weights: Tensor, rows_BD: Tensor) -> Tensor:
    """sum over entries (token b, latent f) of weight * rows[b], for every f: [F, D]. Never-active latents get exact zeros.

    Entries are summed latent by latent in token order, without a temporary of N rows and without atomics: deterministic,
    and the same for any number of threads.
    """
    return torch.nn.functional.embedding_bag(
        order.sorted_tokens_N,
        rows_BD,
        order.starts_F,
        per_sample_weights=weights.reshape(-1)[order.order_N],
        mode="sum",
    )
