"""Encode and keep the k largest pre-activations of every token (methods.md 0.7, T2, K5).

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `K` k. The encoder is handled by its rows, `W_enc_FD`, one per latent, because
the backward pass gathers and sums rows; dictionaries show it transposed.

Selection: the k largest z in float32, ties to the lowest index, then ReLU. An entry that is not positive becomes padding: value
0, and no gradient. The scores never exist as a whole: tokens pass in blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.entries import with_gradient
from saebench.kernels.implementations import current_implementation
from saebench.kernels.scores import score_blocks


def encode_topk(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor | None, k: int) -> SparseCodes:
    """z = (x - b_in) W_enc^T + b_enc; the k largest of each row, those above zero. Returns fixed-k codes, differentiable in
    every tensor argument, selection held constant. NaN in the input gives NaN values."""
    if current_implementation() == "reference":
        return _reference(x_BD, W_enc_FD, b_enc_F, b_in_D, k)
    k = min(k, len(W_enc_FD))
    with torch.no_grad():
        values_BK = x_BD.new_empty(len(x_BD), k)
        indices_BK = torch.empty(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
        for start, z_bF in score_blocks(x_BD if b_in_D is None else x_BD - b_in_D, W_enc_FD, b_enc_F):
            stop = start + len(z_bF)
            values_BK[start:stop], indices_BK[start:stop] = select_topk(z_bF, k)
        codes = SparseCodes(indices_BK, values_BK.relu_(), len(W_enc_FD))
    return with_gradient(codes, x_BD, W_enc_FD, b_enc_F, b_in_D)


def _reference(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor | None, k: int) -> SparseCodes:
    z_BF = (x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
    indices_BK = torch.sort(z_BF.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    return SparseCodes(indices_BK, z_BF.gather(1, indices_BK).relu(), len(W_enc_FD))


def select_topk(z_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest entries of each row; of equal ones the lowest index wins."""
    width = z_BF.shape[1]
    if k >= width:
        indices = torch.arange(width, device=z_BF.device).expand(len(z_BF), width)
        return z_BF.clone(), indices.clone()
    values, indices = torch.topk(z_BF, k + 1, dim=1)
    # torch.topk breaks ties as it likes. Only a tie across the border changes the set, and only above zero does it matter.
    tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
    values, indices = values[:, :k], indices[:, :k]
    if tied.any():
        rows = tied.nonzero()[:, 0]
        ranked = torch.sort(z_BF[rows], dim=1, descending=True, stable=True)
        values, indices = values.clone(), indices.clone()
        values[rows], indices[rows] = ranked.values[:, :k], ranked.indices[:, :k]
    return values, indices
