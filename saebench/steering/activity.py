"""What fires on some texts: counts, sums and the texts in which each latent is active, from which features are chosen.

Nothing fires on the first token of a text (BOS), as everywhere.
Shape suffixes: `F` d_sae, `U` texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.prompts import PIECE, encode_pieces, text_pieces
from saebench.lm import LanguageModel


@dataclass(frozen=True)
class Activity:
    """The codes of some texts, summed."""

    tokens_U: np.ndarray
    """Tokens of each text on which something can fire."""
    firings_F: np.ndarray
    """Tokens on which each latent is active."""
    sums_F: np.ndarray
    """Sum of its values, float64."""
    sums_UF: sp.csr_array
    """The sum in each text; latents that are not active in it have no entry."""

    @property
    def texts_F(self) -> np.ndarray:
        """Texts in which each latent is active."""
        return np.diff(self.sums_UF.tocsc().indptr)

    @property
    def tokens(self) -> int:
        return int(self.tokens_U.sum())

    @property
    def means_UF(self) -> sp.csr_array:
        """The mean over the tokens of each text; zero for texts without tokens."""
        return sp.csr_array(sp.diags_array(1.0 / np.maximum(1, self.tokens_U)) @ self.sums_UF)

    @property
    def rates_F(self) -> np.ndarray:
        """Firings per token."""
        return self.firings_F / max(1, self.tokens)


def activity(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts: Sequence[str],
    *,
    context_size: int = PIECE,
    sites: Sequence[str] | None = None,
) -> Activity:
    """Run the model over texts, in pieces of up to `context_size` tokens, and sum the codes. Raises UserError where no text has a token."""
    return _summed(lm, dictionary, text_pieces(lm, texts, context_size), len(texts), sites)


def activity_of_ids(
    lm: LanguageModel, dictionary: Dictionary, ids: Sequence[Sequence[int]], *, sites: Sequence[str] | None = None
) -> Activity:
    """The same for token ids, of which the first of each is not counted."""
    return _summed(lm, dictionary, [(number, list(some)) for number, some in enumerate(ids)], len(ids), sites)


def _summed(
    lm: LanguageModel, dictionary: Dictionary, pieces: list[tuple[int, list[int]]], count: int, sites: Sequence[str] | None
) -> Activity:
    d_sae = dictionary.config.d_sae
    texts_P = np.array([number for number, _ in pieces], dtype=np.int64)
    tokens_U = np.zeros(count, dtype=np.int64)
    np.add.at(tokens_U, texts_P, [len(ids) - 1 for _, ids in pieces])
    if not tokens_U.sum():
        raise UserError("the texts have no tokens: give texts of a few words at least")
    firings_F, sums_F, parts = np.zeros(d_sae, dtype=np.int64), np.zeros(d_sae), []
    for places_N, _, latents_N, values_N in encode_pieces(lm, dictionary, pieces, sites):
        firings_F += np.bincount(latents_N, minlength=d_sae)
        sums_F += np.bincount(latents_N, weights=values_N, minlength=d_sae)
        parts.append(sp.coo_array((values_N.astype(np.float64), (texts_P[places_N], latents_N)), shape=(count, d_sae)).tocsr())
    sums_UF = sum(parts[1:], start=parts[0]) if parts else sp.csr_array((count, d_sae))
    return Activity(tokens_U, firings_F, sums_F, sp.csr_array(sums_UF))
