"""MONA: choose texts that fire the same features as examples of a task do (methods.md I5).

A text is the mean of its codes over tokens, a task the mean of its texts; texts are ranked by the generalised Jaccard similarity

    s(a, p) = sum_i min(a_i, p_i) / sum_i max(a_i, p_i)

which is 1 for equal codes and 0 where nothing is shared, and for two codes that are all zero. Codes are not below zero in most
dictionaries; where they are, the part above zero and the part below count as coordinates of their own, so that values of opposite sign
share nothing and s stays between 0 and 1. Length of codes counts: s(a, 2a) = 1/2.
Shape suffixes: `U` texts, `F` d_sae.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from saebench.dictionaries import Dictionary
from saebench.dictionaries.fit import check_model
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.steering.activity import Activity, activity

TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Ranked:
    """Texts that were chosen, best first."""

    indices: tuple[int, ...]
    """Their places among the candidates, counted from 0."""
    scores: tuple[float, ...]
    """Similarity to the task, 0 to 1."""


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Generalised Jaccard similarity of two codes [F]. Raises ValueError where they differ in shape."""
    a_F, b_F = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_F.ndim != 1 or a_F.shape != b_F.shape:
        raise ValueError(f"codes of shapes {a_F.shape} and {b_F.shape} are not two of one length")
    return float(similarities(sp.csr_array(a_F[None]), b_F)[0])


def similarities(rows_UF: sp.csr_array, to_F: np.ndarray) -> np.ndarray:
    """The same of every row with one code, from the entries of the rows alone: [U]."""
    others_N = to_F[rows_UF.indices]
    shared_N = np.where(rows_UF.data * others_N > 0, np.minimum(np.abs(rows_UF.data), np.abs(others_N)), 0.0)
    texts_N = np.repeat(np.arange(rows_UF.shape[0]), np.diff(rows_UF.indptr))
    shared_U = np.bincount(texts_N, weights=shared_N, minlength=rows_UF.shape[0])
    sizes_U = np.bincount(texts_N, weights=np.abs(rows_UF.data), minlength=rows_UF.shape[0])
    union_U = sizes_U + np.abs(to_F).sum() - shared_U  # max = a + p - min
    return np.divide(shared_U, union_U, out=np.zeros(len(union_U)), where=union_U > 0)


def prototype(activity: Activity) -> np.ndarray:
    """The mean over texts with tokens of their mean codes, each text alike: [F]."""
    return np.asarray(activity.means_UF.sum(0)).ravel() / (activity.tokens_U > 0).sum()


def mona(
    lm: LanguageModel,
    dictionary: Dictionary,
    targets: Sequence[str],
    candidates: Sequence[str],
    *,
    share: float = 0.05,
    deduplicate: bool = False,
) -> Ranked:
    """The share of the candidates that is most like the targets, rounded up to whole texts.

    `deduplicate` leaves out candidates whose text has come before, spaces aside; the share is of those that are left. A candidate without
    tokens is like nothing. Raises UserError where a side has no tokens, for a share outside (0, 1], and for a dictionary of another model.
    """
    if not 0 < share <= 1:
        raise UserError(f"share={share} of the candidates: give one above 0, and 1 at most")
    check_model(dictionary, lm)
    first = {" ".join(text.split()): place for place, text in reversed(list(enumerate(candidates)))}
    kept = sorted(first.values()) if deduplicate else list(range(len(candidates)))
    if not any(candidates):
        raise UserError("the candidates have no text: give texts to choose from")
    target_F = prototype(activity(lm, dictionary, targets))
    scores = np.zeros(len(candidates))
    written = [place for place in kept if candidates[place]]
    for start in range(0, len(written), TEXTS_AT_ONCE):
        some = written[start : start + TEXTS_AT_ONCE]
        scores[some] = similarities(activity(lm, dictionary, [candidates[place] for place in some]).means_UF, target_F)
    places = np.array(kept)
    chosen = places[np.argsort(-scores[places], kind="stable")[: math.ceil(share * len(places) - 1e-9)]]
    return Ranked(tuple(chosen.tolist()), tuple(scores[chosen].tolist()))
