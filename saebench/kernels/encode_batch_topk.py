"""Encode and keep the k * B largest positive pre-activations of a whole batch (methods.md T3). Ragged codes.

Candidates are the scores above a lower bound of the smallest that is kept; with a good guess of it they are few, and a guess that was too
high is noticed by their number. So the result is exact and the guess decides the speed alone.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `N` entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.entries import centred, with_gradient
from saebench.kernels.implementations import current_implementation, primitives_for
from saebench.kernels.primitives import Primitives

SAMPLE = 64  # tokens from which a first guess is made,
FEWER = 0.5  # at the level that twice as many scores exceed as are kept
LOWER = 0.8  # what a guess that was too high is multiplied by


def encode_batch_topk(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    count: int,
    guess: Tensor | float = 0.0,
    scale_F: Tensor | None = None,
) -> SparseCodes:
    """The `count` largest of z = ((x - b_in) W_enc^T + b_enc) * scale over all tokens and latents, those above zero; of equal ones the
    first in row-major order. `guess` is a value that probably fewer than all and more than `count` scores exceed, such as a little less
    than the smallest score kept last time: it changes the speed, never the result; 0 for none. Differentiable, selection held constant."""
    if current_implementation() == "reference":
        z_BF = (x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
        z_BF = (z_BF if scale_F is None else z_BF * scale_F).relu()
        flat = z_BF.flatten()
        kept = torch.sort(flat.detach(), descending=True, stable=True).indices[:count]
        return SparseCodes.from_dense((flat * torch.zeros_like(flat).index_fill(0, kept, 1.0)).view_as(z_BF))
    with torch.no_grad():
        centred_BD = centred(x_BD, b_in_D)
        encoder = (W_enc_FD, b_enc_F, scale_F)
        primitives = primitives_for(centred_BD, W_enc_FD)
        offsets_B, indices_N, values_N = _candidates(primitives, centred_BD, encoder, count, guess)
        codes = SparseCodes(indices_N, values_N, len(W_enc_FD), offsets_B)
        if len(values_N) > count:
            kept_N = largest(values_N, count)
            tokens_N = codes.tokens[kept_N]
            codes = SparseCodes.ragged(tokens_N, indices_N[kept_N], values_N[kept_N], len(x_BD), len(W_enc_FD))
    return with_gradient(codes, x_BD, W_enc_FD, b_enc_F, b_in_D, scale_F, centred_BD)


def largest(values_N: Tensor, count: int) -> Tensor:
    """Positions, ascending, of the `count` largest values; of equal ones the first. All of them where there are fewer."""
    if len(values_N) <= count:
        return torch.arange(len(values_N), device=values_N.device)
    border = values_N.kthvalue(len(values_N) - count + 1).values
    above_N, tied_N = values_N > border, values_N == border
    kept_N = above_N | (tied_N & (tied_N.cumsum(0, dtype=torch.int32) <= count - above_N.sum()))
    return positions(kept_N, count)


def positions(kept_N: Tensor, count: int) -> Tensor:
    """Where a mask with so many ones has them, ascending."""
    if kept_N.device.type == "cpu":
        return kept_N.nonzero()[:, 0]
    return torch.nonzero_static(kept_N, size=count)[:, 0]  # nonzero would wait for the device, to learn the number


def _candidates(
    primitives: Primitives, x_BD: Tensor, encoder: tuple[Tensor, Tensor, Tensor | None], count: int, guess: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries above the guess, or a first one, if all of the `count` largest positive ones are among them; else those above a lower one,
    and at last those above 0."""
    if not isinstance(guess, Tensor):
        guess = max(0.0, guess) or _first_guess(primitives, x_BD, encoder, count)
    for level in dict.fromkeys((guess, LOWER * guess, 0.0)):
        found = primitives.above(x_BD, *encoder, torch.zeros_like(encoder[1]).add_(level))
        if len(found[2]) >= count:
            return found
    return found


def _first_guess(primitives: Primitives, x_BD: Tensor, encoder: tuple[Tensor, Tensor, Tensor | None], count: int) -> float:
    """A level that about twice as many scores exceed as are wanted, by a sample of tokens spread evenly."""
    if len(x_BD) < 4 * SAMPLE:
        return 0.0
    sample_BD = x_BD[:: len(x_BD) // SAMPLE].contiguous()
    wanted = round(count * len(sample_BD) / len(x_BD) / FEWER)
    values_N = primitives.topk(sample_BD, *encoder, -(-2 * wanted // len(sample_BD)), None)[1].flatten()
    return float(values_N.kthvalue(len(values_N) - wanted).values) if 0 < wanted < len(values_N) else 0.0
