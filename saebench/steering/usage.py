"""Latents that a subject uses and other text does not: the score of sparse memory finetuning (Lin et al. 2025),
which is that of tf-idf.

    score_i = (n_i / sum_j n_j) log((U + 1) / (u_i + 1))

with n_i the firings of latent i on the target texts, U the background texts that have tokens, and u_i those of them in which i fires. A
latent that fires in every background text scores 0, however often the target uses it.
Shape suffixes: `F` d_sae.
"""

from __future__ import annotations

import numpy as np

from saebench.errors import UserError
from saebench.steering.activity import Activity
from saebench.steering.chosen import Chosen


def usage_scores(target: Activity, background: Activity) -> np.ndarray:
    """Use on the target, as a share of all firings, times the logarithm of how rare it is in the background: [F]. Background texts should
    be short, a paragraph or a function each: in a long one everything fires. Raises UserError for activities of two dictionaries."""
    if len(target.firings_F) != len(background.firings_F):
        raise UserError(
            f"target and background are of {len(target.firings_F):,} and {len(background.firings_F):,} latents: use one dictionary"
        )
    texts = int((background.tokens_U > 0).sum())
    rarity_F = np.log((texts + 1) / (background.texts_F + 1))
    return target.firings_F / max(1, target.firings_F.sum()) * rarity_F


def relative_usage(target: Activity, background: Activity, count: int = 10) -> Chosen:
    """The latents with the highest score above 0. Raises UserError where there are none."""
    scores_F = usage_scores(target, background)
    order = [int(latent) for latent in np.argsort(-scores_F, kind="stable")[:count] if scores_F[latent] > 0]
    return Chosen("relative usage", tuple(order), tuple(float(scores_F[latent]) for latent in order))
