"""One-to-one assignment of two sets of vectors: the largest sum of products, or the least sum of squared distances.

Up to a stated size all pairs are weighed (`scipy.optimize.linear_sum_assignment`). Beyond, only candidates are: the rows nearest to each
from either side, among which the best assignment is found exactly. Prices p of the columns then say what was lost by it. Whatever p >= 0,

    sum_i score[i, m(i)]  <=  sum_i max_j (score[i, j] - p_j) + sum_j p_j        for every one-to-one m

and the right side is computed over all pairs, block by block. Pairs that push it above what was reached become candidates, and the
assignment is made anew, until nothing is left to gain or the rounds are used up; the difference that remains is the `gap`. So memory grows
with rows times candidates, and a result without a gap is the exact one.
Shape suffixes: `M` rows of the smaller set, `N` of the larger, `D` width, `E` candidate pairs, `b` rows of a block, `u` those of
them that would rather have another, `K` candidates of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saebench.errors import UserError

NONE = -1
EXACT_UP_TO = 1024  # rows of the larger set for which all pairs are weighed
CANDIDATES = 64
NEW = 16  # candidates that a row gets in a round, at most
ROUNDS = 8
SWEEPS = 2000  # over all candidates, until prices are settled
TOLERANCE = 1e-6  # of the size of the sum: what float32 products leave open
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Assignment:
    """Which row of b belongs to each row of a, and how sure it is that no other assignment is better."""

    partner_M: np.ndarray
    """For each row of a its row of b, -1 where a has more rows and this one is left over: int64."""
    total: float
    """The sum that was reached: of products, or of squared distances."""
    gap: float
    """By how much another assignment can be better at most."""
    candidates: int
    """Pairs that were weighed against each other; all others were only shown to gain no more than `gap`."""
    pairs: int
    """Pairs there are."""

    @property
    def exact(self) -> bool:
        """Whether it is certain that none is better, but for rounding."""
        return self.gap == 0

    @property
    def pruned(self) -> float:
        """Share of the pairs that were no candidates."""
        return 1 - self.candidates / max(1, self.pairs)


def assign(a: Tensor, b: Tensor, *, candidates: int = CANDIDATES, exact_up_to: int = EXACT_UP_TO) -> Assignment:
    """The one-to-one assignment of rows of `a` to rows of `b` (of one width) with the largest sum of products. Where both have the same
    number of rows, it is never worse than row i to row i. Raises UserError for other widths and for empty sets."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise UserError(f"rows of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be assigned: give two sets of one width")
    swapped = len(a) > len(b)
    a_MD, b_ND = (t.detach().float().cpu() for t in ((b, a) if swapped else (a, b)))
    if not (a_MD.isfinite().all() and b_ND.isfinite().all()):
        raise UserError("rows that are not finite cannot be assigned: is one of the dictionaries damaged?")
    kept = len(a_MD) * len(b_ND)
    if len(b_ND) <= exact_up_to:
        columns_M, total, gap = *_dense(a_MD, b_ND), 0.0
    else:
        columns_M, total, gap, kept = _sparse(a_MD, b_ND, min(candidates, len(b_ND)))
    partner = columns_M
    if swapped:
        partner = np.full(len(b_ND), NONE, dtype=np.int64)
        partner[columns_M] = np.arange(len(a_MD))
    return Assignment(partner, total, gap, kept, len(a_MD) * len(b_ND))


def assign_nearest(a: Tensor, b: Tensor, *, candidates: int = CANDIDATES, exact_up_to: int = EXACT_UP_TO) -> Assignment:
    """As `assign`, with the least sum of squared distances."""
    squares = [t.detach().float().square().sum(1, keepdim=True) / 2 for t in (a, b)]
    ones = [torch.ones_like(square) for square in squares]
    halved = assign(
        torch.cat([a.detach().float(), ones[0], -squares[0]], 1),
        torch.cat([b.detach().float(), -squares[1], ones[1]], 1),
        candidates=candidates,
        exact_up_to=exact_up_to,
    )
    return Assignment(halved.partner_M, max(0.0, -2 * halved.total), 2 * halved.gap, halved.candidates, halved.pairs)


def _dense(a_MD: Tensor, b_ND: Tensor) -> tuple[np.ndarray, float]:
    from scipy.optimize import linear_sum_assignment

    score_MN = (a_MD.double() @ b_ND.double().T).numpy()
    rows_M, columns_M = linear_sum_assignment(score_MN, maximize=True)
    return columns_M.astype(np.int64), float(score_MN[rows_M, columns_M].sum())


def _sparse(a_MD: Tensor, b_ND: Tensor, count: int) -> tuple[np.ndarray, float, float, int]:
    """Column of each row, sum, gap, candidates."""
    pairs = _Pairs(len(b_ND))
    for rows, score_bN in _blocks(a_MD, b_ND):
        pairs.add(rows, *score_bN.topk(count, dim=1))
    for rows, score_bM in _blocks(b_ND, a_MD):
        score_bK, found_bK = score_bM.topk(min(max(1, count // 4), len(a_MD)), dim=1)
        pairs.add_columns(rows, score_bK, found_bK)
    itself_M = torch.arange(len(a_MD))[:, None]  # makes sure that there is an assignment among the candidates
    pairs.add(itself_M[:, 0], (a_MD * b_ND[: len(a_MD)]).sum(1, keepdim=True), itself_M)
    for _ in range(ROUNDS):
        score_E, rows_E, columns_E = pairs.settle()
        columns_M = _on_candidates(score_E, rows_E, columns_E, (len(a_MD), len(b_ND)))
        reached_M, price_N = _prices(score_E, rows_E, columns_E, columns_M, len(b_ND))
        tolerance = TOLERANCE * float(np.abs(reached_M).mean())
        price, worth_M = torch.from_numpy(price_N), torch.from_numpy(reached_M - price_N[columns_M])
        gap = 0.0  # as no row would rather have another candidate, only what it would rather have of the others is in the bound
        for rows, score_bN in _blocks(a_MD, b_ND):
            net_bN = score_bN - price.float()
            unhappy = (net_bN.amax(1) > (worth_M[rows] + tolerance / 2).float()).nonzero()[:, 0]
            found_uK = net_bN[unhappy].topk(min(NEW, len(b_ND)), dim=1).indices
            score_uK = score_bN[unhappy].gather(1, found_uK)
            gain_u = (score_uK.double() - price[found_uK]).amax(1) - worth_M[rows[unhappy]]
            gap += float(gain_u.clamp_min(0).sum())
            better = gain_u > tolerance
            pairs.add(rows[unhappy[better]], score_uK[better], found_uK[better])
        if gap <= tolerance * len(a_MD):
            gap = 0.0
            break
    total = float((a_MD.double() * b_ND[torch.from_numpy(columns_M)].double()).sum())
    return columns_M, total, gap, len(score_E)


class _Pairs:
    """Candidate pairs, each once."""

    def __init__(self, columns: int):
        self.columns = columns
        self.keys_E, self.score_E = np.empty(0, dtype=np.int64), np.empty(0)
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, rows_b: Tensor, score_bK: Tensor, columns_bK: Tensor) -> None:
        self.waiting.append(((rows_b[:, None] * self.columns + columns_bK).flatten(), score_bK.flatten()))

    def add_columns(self, columns_b: Tensor, score_bK: Tensor, rows_bK: Tensor) -> None:
        self.waiting.append(((rows_bK * self.columns + columns_b[:, None]).flatten(), score_bK.flatten()))

    def settle(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, rows and columns of all so far, by row."""
        keys = np.concatenate([self.keys_E, *(keys.numpy() for keys, _ in self.waiting)])
        score = np.concatenate([self.score_E, *(score.double().numpy() for _, score in self.waiting)])
        self.waiting = []
        self.keys_E, first_E = np.unique(keys, return_index=True)
        self.score_E = score[first_E]
        return self.score_E, self.keys_E // self.columns, self.keys_E % self.columns


def _on_candidates(score_E: np.ndarray, rows_E: np.ndarray, columns_E: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The column of each row in the best assignment among the candidates: [M]."""
    import scipy.sparse as sp
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    cost_E = 1 + score_E.max() - score_E  # above zero: what is zero counts as no pair
    rows_M, columns_M = min_weight_full_bipartite_matching(sp.csr_array((cost_E, (rows_E, columns_E)), shape=shape))
    return columns_M[np.argsort(rows_M)].astype(np.int64)


def _prices(
    score_E: np.ndarray, rows_E: np.ndarray, columns_E: np.ndarray, columns_M: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """What each row got [M], and prices of columns [N] at which no row would rather have another candidate: the least there are."""
    mine_E = columns_M[rows_E]
    reached_M = np.zeros(len(columns_M))
    reached_M[rows_E[columns_E == mine_E]] = score_E[columns_E == mine_E]
    order_E = np.argsort(columns_E, kind="stable")
    columns_E, mine_E, gain_E = columns_E[order_E], mine_E[order_E], (score_E - reached_M[rows_E])[order_E]
    starts = np.flatnonzero(np.diff(columns_E, prepend=-1))
    price_N, there = np.zeros(width), columns_E[starts]
    for _ in range(SWEEPS):
        wanted = np.maximum(price_N[there], np.maximum.reduceat(gain_E + price_N[mine_E], starts))
        moved = float((wanted - price_N[there]).max())
        price_N[there] = wanted
        if moved <= 1e-12:
            break
    return reached_M, price_N


def _blocks(a_MD: Tensor, b_ND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Products of all pairs, some rows at a time: their numbers [b], and [b, N]."""
    for rows in torch.arange(len(a_MD)).split(max(1, BLOCK_BYTES // (4 * len(b_ND)))):
        yield rows, a_MD[rows] @ b_ND.T
