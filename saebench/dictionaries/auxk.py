"""AuxK: dead latents learn to reconstruct what the living ones leave over (Gao et al. 2024; methods.md T2).

How many latents are dead decides how large things are, and on a GPU asking for it would wait for all work before. There an upper bound
takes the place of the number: living latents fill up the list of the dead ones, with scores that are never selected.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `M` dead latents, or as many as may be dead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels import decode_error, encode_topk

if TYPE_CHECKING:
    from saebench.dictionaries.sae import Weights


NEVER = -1e30  # a bias below which nothing is selected; finite, as 0 times it must be 0


MOST_AUX = 32  # of k_aux by default: more entries cost a step several times its time and bring nothing (benchmarks/NOTES.md)


def default_k_aux(d_in: int) -> int:
    """The power of two nearest to half the input width, as published, and 32 at most."""
    return min(MOST_AUX, 2 ** max(0, round(math.log2(d_in / 2))))


def auxk_loss(
    x_BD: Tensor,
    error_BD: Tensor,
    weights: Weights,
    b_in_D: Tensor | None,
    dead_F: Tensor,
    k_aux: int,
    most_dead: int | None = None,
) -> Tensor:
    """||e - e_hat||^2 / ||e - mean(e)||^2 over the batch, where e_hat decodes the k_aux strongest dead latents (without b_dec).

    `error_BD` is y_hat - y = -e, taken as constant; b_in is what the encoder subtracts from x. With `most_dead`, an upper bound of the
    number of dead latents, nothing waits for the device.
    Gradients reach encoder and decoder rows of the dead latents, and no others'.
    0 where no latent is dead or the residual has no spread.
    """
    if most_dead is None:
        latents_M, b_enc_F = dead_F.nonzero()[:, 0], weights.b_enc_F
    else:
        latents_M, b_enc_F = _dead_first(dead_F, most_dead), torch.where(dead_F, weights.b_enc_F, NEVER)
    if len(latents_M) == 0:
        return x_BD.new_zeros(())
    codes = encode_topk(x_BD, weights.W_enc_FD, b_enc_F, b_in_D, k_aux, weights.norm_F, latents_M)
    share = missed_share(missed_squares(weights.unscaled(codes), weights.W_dec_FD, error_BD), error_BD)
    return share if most_dead is None else torch.where(dead_F.any(), share, 0.0)


def missed_squares(codes: SparseCodes, W_dec_FD: Tensor, error_BD: Tensor) -> Tensor:
    """||e - e_hat||^2 of each token, [B], where e_hat decodes the codes without a bias and `error_BD` is -e, taken as constant."""
    nothing_D = torch.zeros_like(error_BD[0])
    return decode_error(codes.replaced(-codes.values), W_dec_FD, nothing_D, error_BD.detach())[1]


def _dead_first(dead_F: Tensor, count: int) -> Tensor:
    """So many latents, ascending, all dead ones among them."""
    return torch.sort(dead_F.to(torch.uint8), descending=True, stable=True).indices[:count].sort().values


def missed_share(missed_B: Tensor, error_BD: Tensor) -> Tensor:
    """||e - e_hat||^2 / ||e - mean(e)||^2 over the batch, the former by token and `error_BD` -e; 0 where the residual has no spread."""
    error_BD = error_BD.detach()
    missed = missed_B.mean() / error_BD.shape[1]
    spread = (error_BD - error_BD.mean(0)).square_().mean()
    defined = spread > 0  # one token alone has no spread: the term is left out, gradient included
    return torch.where(defined, missed / torch.where(defined, spread, 1.0), 0.0)
