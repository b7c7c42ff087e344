"""Encode and keep the pre-activations above a threshold: ReLU, JumpReLU, and BatchTopK at inference. Ragged codes.

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.entries import with_gradient
from saebench.kernels.implementations import current_implementation
from saebench.kernels.scores import score_blocks


def encode_above(
    x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor | None, threshold: Tensor | float = 0.0
) -> SparseCodes:
    """z = (x - b_in) W_enc^T + b_enc where z > threshold (strictly; a number or one per latent [F], not negative). Ragged codes,
    latents in ascending order in each row, differentiable in x, W_enc, b_enc and b_in, selection held constant."""
    if current_implementation() == "reference":
        z_BF = (x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
        return SparseCodes.from_dense(z_BF * (z_BF > threshold))
    with torch.no_grad():
        rows, latents, values = [], [], []
        for start, z_bF in score_blocks(x_BD if b_in_D is None else x_BD - b_in_D, W_enc_FD, b_enc_F):
            row_N, latent_N = (z_bF > threshold).nonzero(as_tuple=True)
            rows.append(row_N + start)
            latents.append(latent_N)
            values.append(z_bF[row_N, latent_N])
        codes = SparseCodes.ragged(torch.cat(rows), torch.cat(latents), torch.cat(values), len(x_BD), len(W_enc_FD))
    return with_gradient(codes, x_BD, W_enc_FD, b_enc_F, b_in_D)
