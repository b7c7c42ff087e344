"""Features of two models: pairs whose activations correlate over the same tokens, and whether the spaces of paired decoder rows are alike
(Lan et al. 2024; methods.md A6).

    r_ij = (mean of a_i b_j - mean a_i mean b_j) / (std a_i std b_j)        over all tokens, most of which are 0 for both

Each latent of B is paired with the latent of A of the largest r (many to one), or pairs are taken greedily one to one. Pairs at or below
the floor are dropped, and, where asked for, those that do not share one of their top tokens. On the rows of the pairs left, SVCCA
compares the subspaces and RSA the arrangement; both are held against the same rows paired at random, because neither is 0 by chance.
Shape suffixes: `F` latents, `T` tokens, `N` pairs, `D` width of A's rows, `E` of B's, `K` top tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from saebench.circuits.matching.assignment import NONE
from saebench.codes import SparseCodes
from saebench.errors import UserError
from saebench.features.matching import check_tokens
from saebench.features.store import FeatureStore

FLOOR = 0.1
DRAWS = 100
VARIANCE = 0.99
TOP_TOKENS = 5
LATENTS = 1024  # of B whose correlations with all of A are held at once
CHUNK = 1 << 16  # tokens
ROWS = 2000  # pairs that RSA compares with each other, at most: beyond, so many are drawn


@dataclass(frozen=True)
class SameTokens:
    """Codes of two dictionaries over the same tokens, which may be gone through several times."""

    num_tokens: int
    sizes: tuple[int, int]
    """d_sae of A and of B."""
    chunks: Callable[[], Iterator[tuple[sp.csr_array, sp.csr_array]]]
    """Consecutive tokens as matrices [tokens, F] of A and of B."""
    ids_T: np.ndarray
    """Token ids of all rows of the chunks, one after the other; empty where unknown."""

    @classmethod
    def of_codes(cls, parts: Sequence[tuple[SparseCodes, SparseCodes]], ids_T: np.ndarray | None = None) -> SameTokens:
        """From codes in memory. Raises UserError where two codes are not of as many tokens, or there are none."""
        if not parts or any(len(a) != len(b) for a, b in parts):
            raise UserError("codes of A and B must be of the same tokens, at least one")
        count = sum(len(a) for a, _ in parts)
        if ids_T is not None and len(ids_T) != count:
            raise UserError(f"{len(ids_T)} token ids are not those of {count} tokens")
        ids_T = np.empty(0, dtype=np.int64) if ids_T is None else np.asarray(ids_T)
        return cls(count, (parts[0][0].d_sae, parts[0][1].d_sae), lambda: ((_matrix(a), _matrix(b)) for a, b in parts), ids_T)

    @classmethod
    def of_stores(cls, a: FeatureStore, b: FeatureStore) -> SameTokens:
        """From feature stores. Raises UserError for stores over different tokens."""
        check_tokens(a, b)

        def chunks() -> Iterator[tuple[sp.csr_array, sp.csr_array]]:
            for first in range(0, len(a.ids_T), CHUNK):
                last = min(first + CHUNK, len(a.ids_T))
                parts = []
                for store in (a, b):
                    starts, latents, values = store.codes(first, last)
                    parts.append(sp.csr_array((values, latents, starts), shape=(last - first, store.d_sae)))
                yield parts[0], parts[1]

        return cls(a.num_tokens, (a.d_sae, b.d_sae), chunks, a.ids_T)


def _matrix(codes: SparseCodes) -> sp.csr_array:
    tokens_N, latents_N, values_N = (part.detach().cpu().numpy() for part in codes.nonzero())
    return sp.csr_array((values_N, (tokens_N, latents_N)), shape=(len(codes), codes.d_sae))


@dataclass(frozen=True)
class Correlated:
    """All pairs of latents whose correlation is above the floor."""

    a_N: np.ndarray
    b_N: np.ndarray
    r_N: np.ndarray
    """Most correlated first."""
    num_a: int
    """Latents of A that vary at all over these tokens: only they can have pairs."""
    num_b: int

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each latent of B with any, the latent of A that correlates most: latents of A, of B, r."""
        _, first = np.unique(self.b_N, return_index=True)
        return self.a_N[first], self.b_N[first], self.r_N[first]

    def one_to_one(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Greedily, the most correlated first, each latent in one pair at most: latents of A, of B, r."""
        taken_a, taken_b, kept = set(), set(), []
        for number, (a, b) in enumerate(zip(self.a_N.tolist(), self.b_N.tolist(), strict=True)):
            if a not in taken_a and b not in taken_b:
                taken_a.add(a)
                taken_b.add(b)
                kept.append(number)
        return self.a_N[kept], self.b_N[kept], self.r_N[kept]


def correlate(same: SameTokens, floor: float = FLOOR) -> Correlated:
    """Correlations of all latents of A with all of B, of which those above `floor` are kept; pairs that never fire together have none.
    Memory is a chunk of codes and, at most, F_A * 1024 products. Raises UserError for a negative floor."""
    if floor < 0:
        raise UserError(f"floor={floor:g} is below 0: latents that never fire together would be pairs")
    sums, squares = [[np.zeros(size) for size in same.sizes] for _ in range(2)]
    for pair in same.chunks():
        for side, part in enumerate(pair):
            sums[side] += part.sum(0, dtype=np.float64)
            squares[side] += part.multiply(part).sum(0, dtype=np.float64)
    n = same.num_tokens
    means = [total / n for total in sums]
    stds = [np.sqrt(np.maximum(0, square / n - mean**2)) for square, mean in zip(squares, means, strict=True)]
    varies = [std > 1e-7 * np.sqrt(square / n) for std, square in zip(stds, squares, strict=True)]
    inverse = [np.divide(1, std, out=np.zeros_like(std), where=mask) for std, mask in zip(stds, varies, strict=True)]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, same.sizes[1], LATENTS):
        part = slice(start, min(start + LATENTS, same.sizes[1]))
        products = sp.csr_array((same.sizes[0], part.stop - part.start))
        for a, b in same.chunks():
            products = products + a.T.astype(np.float64).tocsr() @ b.tocsc()[:, part].tocsr()
        both = products.tocoo()
        rows, columns = both.row.astype(np.int64), both.col.astype(np.int64) + start
        r = (both.data / n - means[0][rows] * means[1][columns]) * inverse[0][rows] * inverse[1][columns]
        kept = r > floor
        found.append((rows[kept], columns[kept], r[kept]))
    a_N, b_N, r_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((a_N, b_N, -r_N))
    return Correlated(a_N[order], b_N[order], r_N[order], int(varies[0].sum()), int(varies[1].sum()))


def top_tokens(same: SameTokens, count: int = TOP_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """The token ids on which the values of each latent sum to most, for A and B: [F, K], -1 where there are fewer. Raises UserError where
    the ids are not known."""
    if not len(same.ids_T):
        raise UserError("the token ids are not known: give ids_T to SameTokens.of_codes")
    vocabulary, first = int(same.ids_T.max()) + 1, 0
    sums = [sp.csr_array((size, vocabulary)) for size in same.sizes]
    for pair in same.chunks():
        rows = np.arange(pair[0].shape[0])
        ids = sp.csr_array((np.ones(len(rows)), (rows, same.ids_T[first : first + len(rows)])), shape=(len(rows), vocabulary))
        sums = [total + part.T @ ids for total, part in zip(sums, pair, strict=True)]
        first += len(rows)
    return _top(sums[0], count), _top(sums[1], count)


def _top(sums_FV: sp.csr_array, count: int) -> np.ndarray:
    sums_FV = sp.csr_array(sums_FV)
    rows_N = np.repeat(np.arange(sums_FV.shape[0]), np.diff(sums_FV.indptr))
    order = np.lexsort((sums_FV.indices, -sums_FV.data, rows_N))
    rank_N = np.arange(len(rows_N)) - sums_FV.indptr[rows_N]
    kept = rank_N < count
    top_FK = np.full((sums_FV.shape[0], count), NONE, dtype=np.int64)
    top_FK[rows_N[kept], rank_N[kept]] = sums_FV.indices[order][kept]
    return top_FK


def share_tokens(top_NK: np.ndarray, others_NK: np.ndarray, token_strings: Sequence[str] | None = None) -> np.ndarray:
    """Which pairs have a top token in common, with `token_strings` one with a letter or digit in it: [N] bool."""
    shared_NKK = (top_NK[:, :, None] == others_NK[:, None]) & (top_NK != NONE)[:, :, None]
    if token_strings is not None:
        speaks_V = np.array([any(sign.isalnum() for sign in text) for text in token_strings])
        shared_NKK &= speaks_V[top_NK][:, :, None]
    return shared_NKK.any((1, 2))


# --- whether spaces are alike ---


@dataclass(frozen=True)
class Similarity:
    """Of paired rows, beside the same rows paired at random. `p` is the share of random pairings that are at least as alike, so 0 stands
    for below 1 / draws."""

    svcca: float
    svcca_null: np.ndarray
    rsa: float
    rsa_null: np.ndarray
    pairs: int

    @property
    def svcca_p(self) -> float:
        return float((self.svcca_null >= self.svcca).mean())

    @property
    def rsa_p(self) -> float:
        return float((self.rsa_null >= self.rsa).mean())


def svcca(x_ND: np.ndarray, y_NE: np.ndarray, share: float = VARIANCE) -> float:
    """Mean canonical correlation of the directions of each that hold `share` of its variance. Raises UserError where there are not more
    rows than directions of both together, in which case some correlations are 1 whatever the rows are."""
    return _cca(_subspace(x_ND, share), _subspace(y_NE, share))


def _subspace(x_ND: np.ndarray, share: float) -> np.ndarray:
    """An orthonormal basis [N, d] of the centred columns' main directions."""
    left, lengths, _ = np.linalg.svd(x_ND - x_ND.mean(0), full_matrices=False)
    held = np.cumsum(lengths**2) / np.maximum((lengths**2).sum(), 1e-300)
    return left[:, : int(np.searchsorted(held, share - 1e-12)) + 1]


def _cca(x_Nd: np.ndarray, y_Ne: np.ndarray) -> float:
    if len(x_Nd) <= x_Nd.shape[1] + y_Ne.shape[1]:
        raise UserError(
            f"{len(x_Nd)} pairs are too few for SVCCA over {x_Nd.shape[1]} and {y_Ne.shape[1]} directions: it needs more pairs than "
            "directions together; match more latents or keep a smaller share of the variance"
        )
    return float(np.linalg.svd(x_Nd.T @ y_Ne, compute_uv=False).clip(0, 1).mean())


def rsa(x_ND: np.ndarray, y_NE: np.ndarray) -> float:
    """Spearman correlation of the similarities of rows in one space with those in the other; similarity is the cosine of rows less their
    mean. Memory is N^2 numbers, twice."""
    return _on_triangle(_ranks(x_ND), _ranks(y_NE))


def _ranks(x_ND: np.ndarray) -> np.ndarray:
    """Ranks of the similarities of all pairs of rows, centred and scaled to length 1 over the upper triangle: [N, N]."""
    centred = x_ND - x_ND.mean(1, keepdims=True)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-30)
    upper = np.triu_indices(len(unit), 1)
    ranks = rankdata((unit @ unit.T)[upper])
    ranks -= ranks.mean()
    ranks /= max(float(np.linalg.norm(ranks)), 1e-300)
    table_NN = np.zeros((len(unit), len(unit)))
    table_NN[upper] = ranks
    return table_NN + table_NN.T


def _on_triangle(x_NN: np.ndarray, y_NN: np.ndarray) -> float:
    return float((x_NN * y_NN).sum() / 2)


def similarity(
    x_ND: np.ndarray, y_NE: np.ndarray, *, share: float = VARIANCE, draws: int = DRAWS, rows: int = ROWS, seed: int = 0
) -> Similarity:
    """SVCCA and RSA of paired rows, and of `draws` random pairings of them. Raises UserError as `svcca` does."""
    generator = np.random.default_rng(seed)
    x_ND, y_NE = (np.asarray(rows_, dtype=np.float64) for rows_ in (x_ND, y_NE))
    x_Nd, y_Ne = _subspace(x_ND, share), _subspace(y_NE, share)
    of_pairs = _cca(x_Nd, y_Ne)
    drawn = np.sort(generator.choice(len(x_ND), min(rows, len(x_ND)), replace=False))
    x_NN, y_NN = _ranks(x_ND[drawn]), _ranks(y_NE[drawn])
    cca_null, rsa_null = [], []
    for _ in range(draws):
        cca_null.append(_cca(x_Nd, y_Ne[generator.permutation(len(y_Ne))]))
        order = generator.permutation(len(drawn))
        rsa_null.append(_on_triangle(x_NN, y_NN[np.ix_(order, order)]))
    return Similarity(of_pairs, np.array(cca_null), _on_triangle(x_NN, y_NN), np.array(rsa_null), len(x_ND))
