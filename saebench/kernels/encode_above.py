"""Encode and keep the pre-activations above a threshold: ReLU, JumpReLU, and BatchTopK at inference. Ragged codes.

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.entries import centred, with_gradient
from saebench.kernels.implementations import current_implementation, primitives_for


def encode_above(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    threshold: Tensor | float = 0.0,
    scale_F: Tensor | None = None,
) -> SparseCodes:
    """z = ((x - b_in) W_enc^T + b_enc) * scale where z > threshold (strictly; a number or one per latent [F], not negative). Ragged codes,
    latents in ascending order in each row, differentiable in x, W_enc, b_enc, b_in and scale, selection held constant."""
    if current_implementation() == "reference":
        z_BF = (x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
        z_BF = z_BF if scale_F is None else z_BF * scale_F
        return SparseCodes.from_dense(z_BF * (z_BF > threshold))
    with torch.no_grad():
        centred_BD = centred(x_BD, b_in_D)
        threshold_F = (torch.zeros_like(b_enc_F) + threshold).to(x_BD.dtype)
        primitives = primitives_for(centred_BD, W_enc_FD)
        offsets_B, indices_N, values_N = primitives.above(centred_BD, W_enc_FD, b_enc_F, scale_F, threshold_F)
        codes = SparseCodes(indices_N, values_N, len(W_enc_FD), offsets_B)
    return with_gradient(codes, x_BD, W_enc_FD, b_enc_F, b_in_D, scale_F, centred_BD)
