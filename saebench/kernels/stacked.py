"""Several dictionaries of one shape as one: what operations do with a stack of n.

The rows of n matrices [F, D] lie below each other in one of [n F, D]. Every dictionary has B tokens, x_nBD; together they are n B, and the
codes of dictionary i name latents from i F to (i + 1) F. So whatever works token by token, entry by entry or latent by latent works on a
stack as it stands. `encode_topk` and `decode_error` take biases of a stack as [n, D]; the first selects among a dictionary's own latents.
Shape suffixes: `n` dictionaries, `B` tokens, `E` entries of a dictionary, `D` width, `F` d_sae of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saebench.codes import LatentOrder, SparseCodes
from saebench.kernels.implementations import primitives_for
from saebench.kernels.latent_order import latent_order
from saebench.kernels.primitives import Primitives, Term


def stack_size(b_D: Tensor | None) -> int | None:
    """How many dictionaries a bias belongs to, where they are a stack."""
    return None if b_D is None or b_D.ndim == 1 else len(b_D)


def minus(x_BD: Tensor, b_D: Tensor) -> Tensor:
    """x - b, [B, D]; of a stack x_nBD - b_nD, [n B, D]."""
    return x_BD - b_D if b_D.ndim == 1 else (x_BD - b_D[:, None]).flatten(0, 1)


def weighted_sum(weights_B: Tensor, rows_BD: Tensor, num: int | None) -> Tensor:
    """sum of weights[b] * rows[b], [D]; of a stack of `num` one for each dictionary, [n, D]."""
    own = getattr(primitives_for(rows_BD, weights_B), "weighted_sum", torch.matmul)
    if num is None:
        return own(weights_B, rows_BD)
    return torch.stack([own(*pair) for pair in zip(weights_B.chunk(num), rows_BD.chunk(num), strict=True)])


def select_topk(
    primitives: Primitives, x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, ks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The primitive `topk` for each dictionary of a stack with its own k: indices and values [n B, largest k], filled up by zeros."""
    num, k = len(ks), max(ks)
    tokens, d_sae = len(x_BD) // num, len(W_FD) // num
    indices_BK = torch.empty(len(x_BD), k, dtype=torch.int32, device=x_BD.device)
    values_BK = torch.empty(len(x_BD), k, dtype=torch.promote_types(x_BD.dtype, torch.float32), device=x_BD.device)
    for i, own in enumerate(ks):
        rows, latents = slice(i * tokens, (i + 1) * tokens), slice(i * d_sae, (i + 1) * d_sae)
        scale = None if scale_F is None else scale_F[latents]
        indices, values = primitives.topk(x_BD[rows], W_FD[latents], b_F[latents], scale, own, None)
        torch.add(indices, i * d_sae, out=indices_BK[rows, :own])
        values_BK[rows, :own] = values
        if own < k:
            indices_BK[rows, own:], values_BK[rows, own:] = i * d_sae, 0.0
    return indices_BK, values_BK


def decode_errors(
    primitives: Primitives, codes: SparseCodes, W_FD: Tensor, b_nD: Tensor, y_nBD: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the primitive `decode_error` gives, of a stack: errors [n B, D], their squared lengths, and perhaps their products."""
    if not hasattr(primitives, "decode_error"):
        error_BD = primitives.decode(codes, W_FD).view(y_nBD.shape).add_(b_nD[:, None]).sub_(y_nBD).flatten(0, 1)
        return error_BD, error_BD.square().sum(1), None
    tokens = y_nBD.shape[1]
    rows = [slice(i * tokens, (i + 1) * tokens) for i in range(len(b_nD))]
    parts = [primitives.decode_error(codes[at], W_FD, b_D, y_BD) for at, b_D, y_BD in zip(rows, b_nD, y_nBD, strict=True)]
    errors, squares, dots = zip(*parts, strict=True)
    return torch.cat(errors), torch.cat(squares), None if any(each is None for each in dots) else torch.cat(dots)


def unstacked(terms: Sequence[Term], num: int) -> list[list[Term]]:
    """For each term of a stack's gradients, the terms of the dictionaries' own, one after the other."""
    orders: dict[int, list[LatentOrder]] = {}  # terms with the same entries share them
    found = []
    for term in terms:
        order = latent_order(term.codes)
        parts = orders.get(id(order)) or orders.setdefault(id(order), _parts(order, num, len(term.codes)))
        shape = (num, -1, term.codes.values.shape[1])
        rows = zip(parts, term.codes.values.view(shape), term.rows_BD.chunk(num), strict=True)
        found.append(
            [
                Term(SparseCodes(part.indices_N.view(values_BK.shape), values_BK, part.d_sae, None, part), rows_BD)
                for part, values_BK, rows_BD in rows
            ]
        )
    return found


def _parts(order: LatentOrder, num: int, tokens: int) -> list[LatentOrder]:
    """The orders of each dictionary's own entries: all have as many, so that each begins at a place that is known."""
    assert order.by_latent is not None
    positions_N, starts_F = order.by_latent
    d_sae, before = order.d_sae // num, torch.arange(num, dtype=torch.int32, device=positions_N.device)[:, None]
    entries = len(positions_N) // num
    positions_nE = positions_N.view(num, -1) - before * entries
    starts_nF = starts_F.unfold(0, d_sae + 1, d_sae) - before * entries
    indices_nE = order.indices_N.view(num, -1) - before * d_sae
    by_latent_nE = order.tokens_by_latent_N.view(num, -1) - before * (tokens // num)
    parts = []
    for positions_E, starts_F, indices_E, by_latent_E in zip(positions_nE, starts_nF, indices_nE, by_latent_nE, strict=True):
        part = LatentOrder(indices_E, order.tokens_N[:entries], d_sae, (positions_E, starts_F))
        part.tokens_by_latent_N = by_latent_E
        parts.append(part)
    return parts
