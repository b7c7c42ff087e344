"""Encode and keep the k * B largest positive pre-activations of a whole batch (methods.md T3). Ragged codes.

Scores pass in blocks. Candidates are those above a running threshold that only rises while at least `count` of them are known to
lie above it; so the result is exact, and a good first guess keeps the candidates few.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.entries import with_gradient
from saebench.kernels.implementations import current_implementation
from saebench.kernels.scores import score_blocks


def encode_batch_topk(
    x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_in_D: Tensor | None, count: int, guess: float = 0.0
) -> SparseCodes:
    """The `count` largest of z = (x - b_in) W_enc^T + b_enc over all tokens and latents, those above zero; of equal ones the first in
    row-major order. `guess` is a value that probably fewer than all and more than `count` scores exceed, such as a little less
    than the smallest score kept last time: it changes the speed, never the result. Differentiable, selection held constant."""
    if current_implementation() == "reference":
        z_BF = ((x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F).relu()
        flat = z_BF.flatten()
        kept = torch.sort(flat.detach(), descending=True, stable=True).indices[:count]
        return SparseCodes.from_dense((flat * torch.zeros_like(flat).index_fill(0, kept, 1.0)).view_as(z_BF))
    with torch.no_grad():
        centred_BD = x_BD if b_in_D is None else x_BD - b_in_D
        flat_N, values_N = _candidates(centred_BD, W_enc_FD, b_enc_F, count, max(0.0, guess))
        if len(values_N) < count and guess > 0:
            flat_N, values_N = _candidates(centred_BD, W_enc_FD, b_enc_F, count, 0.0)
        kept_N = largest(values_N, count)
        flat_N, values_N = flat_N[kept_N], values_N[kept_N]
        d_sae = len(W_enc_FD)
        codes = SparseCodes.ragged(flat_N // d_sae, flat_N % d_sae, values_N, len(x_BD), d_sae)
    return with_gradient(codes, x_BD, W_enc_FD, b_enc_F, b_in_D)


def largest(values_N: Tensor, count: int) -> Tensor:
    """Positions, ascending, of the `count` largest values; of equal ones the first. All of them where there are fewer."""
    if len(values_N) <= count:
        return torch.arange(len(values_N), device=values_N.device)
    border = torch.topk(values_N, count).values[-1]
    above = values_N > border
    tied_N = (values_N == border).nonzero()[:, 0][: count - int(above.sum())]
    above[tied_N] = True
    return above.nonzero()[:, 0]


def _candidates(x_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, count: int, lowest: float) -> tuple[Tensor, Tensor]:
    """Row-major positions and values of scores above `lowest`, all of the `count` largest among them."""
    flats: list[Tensor] = []
    values: list[Tensor] = []
    for start, z_bF in score_blocks(x_BD, W_enc_FD, b_enc_F):
        flat_N = (z_bF > lowest).flatten().nonzero()[:, 0]
        values.append(z_bF.flatten()[flat_N])
        flats.append(flat_N + start * z_bF.shape[1])
        if sum(map(len, values)) > 4 * count:
            flat_N, values_N = torch.cat(flats), torch.cat(values)
            kept_N = largest(values_N, count)
            flats, values = [flat_N[kept_N]], [values_N[kept_N]]
            lowest = max(lowest, float(values[0].min()))  # a later equal one loses the tie, so strictly above is enough
    return torch.cat(flats), torch.cat(values)
