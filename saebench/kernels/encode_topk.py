"""Encode and keep the k largest pre-activations of every token (methods.md 0.7, T2, K5).

Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `K` k, `M` a part of the latents. The encoder is handled by its rows, `W_enc_FD`, one per
latent, because the backward pass gathers and sums rows; dictionaries show it transposed.

Selection: the k largest z in float32, ties to the lowest index, then ReLU. An entry that is not positive becomes padding: value
0, and no gradient. The scores never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.entries import centred, with_gradient
from saebench.kernels.implementations import current_implementation, primitives_for
from saebench.kernels.stacked import select_topk


def encode_topk(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    k: int | Sequence[int],
    scale_F: Tensor | None = None,
    latents_M: Tensor | None = None,
) -> SparseCodes:
    """z = ((x - b_in) W_enc^T + b_enc) * scale; the k largest of each row, among the given latents (ascending) or all, those above zero.
    Returns fixed-k codes over all latents, differentiable in every tensor argument, selection held constant.
    One k for each makes it those of a stack of dictionaries (stacked.py): x_nBD, without gradient, and b_in_nD; codes of n B tokens."""
    if current_implementation() == "reference":
        assert isinstance(k, int)
        return _reference(x_BD, W_enc_FD, b_enc_F, b_in_D, k, scale_F, latents_M)
    with torch.no_grad():
        centred_BD = centred(x_BD, b_in_D)
        primitives = primitives_for(centred_BD, W_enc_FD)
        if isinstance(k, int):
            indices_BK, values_BK = primitives.topk(centred_BD, W_enc_FD, b_enc_F, scale_F, k, latents_M)
        else:
            indices_BK, values_BK = select_topk(primitives, centred_BD, W_enc_FD, b_enc_F, scale_F, k)
        codes = SparseCodes(indices_BK, values_BK, len(W_enc_FD))
    return with_gradient(codes, x_BD, W_enc_FD, b_enc_F, b_in_D, scale_F, centred_BD)


def _reference(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    k: int,
    scale_F: Tensor | None,
    latents_M: Tensor | None,
) -> SparseCodes:
    z_BF = (x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
    z_BF = z_BF if scale_F is None else z_BF * scale_F
    ranked_BF = z_BF.detach()
    if latents_M is not None:
        left_out_F = torch.ones(len(W_enc_FD), dtype=torch.bool, device=x_BD.device)
        left_out_F[latents_M.long()] = False
        ranked_BF = ranked_BF.masked_fill(left_out_F, -torch.inf)
        k = min(k, len(latents_M))
    indices_BK = torch.sort(ranked_BF, dim=1, descending=True, stable=True).indices[:, :k]
    return SparseCodes(indices_BK, z_BF.gather(1, indices_BK).relu(), len(W_enc_FD))
