"""Where a firing of an attention latent comes from: the positions that were looked at, and the heads that looked.

For dictionaries on the heads' outputs the parts are those of the latent's pre-activation (dictionaries/attention_output.py), for Lorsa
those of the head's z. Both are sums: parts and constant add up to the firing's value.
Shape suffixes: `H` heads, `S` source positions, `D` width of what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.attention_output import SITE, source_attribution
from saebench.dictionaries.lorsa import LorsaDictionary
from saebench.features.examples import Example
from saebench.features.store import FeatureStore
from saebench.lm import LanguageModel


@dataclass(frozen=True)
class Sources:
    """What each position up to the firing adds to a latent's value there."""

    first: int
    """Number in the store of the first source position, the start of the context; the last is the firing itself."""
    ids: list[int]
    """Tokens at the source positions."""
    by_source_S: np.ndarray
    by_head_HS: np.ndarray | None
    """The same by head of the model; None for Lorsa, whose latents are heads themselves."""
    head_shares_H: np.ndarray | None
    """Each head's part of the length of what the latent writes; sums to 1."""
    pattern_S: np.ndarray | None
    """Attention weights of a Lorsa head from the firing; sums to 1."""
    constant: float
    """What no position adds: biases."""

    @property
    def value(self) -> float:
        """All parts together: the latent's pre-activation at the firing."""
        return float(self.by_source_S.sum()) + self.constant

    def strongest(self, count: int = 5) -> list[tuple[int, int, float]]:
        """The source positions that add most: (number in the store, token id, what it adds)."""
        order = np.argsort(-self.by_source_S, kind="stable")[:count]
        return [(self.first + s, self.ids[s], float(self.by_source_S[s])) for s in order.tolist()]


@torch.inference_mode()
def example_sources(
    store: FeatureStore, lm: LanguageModel, dictionary: Dictionary, latent: int, example: Example
) -> Sources | None:
    """Take the firing in focus apart by source position; None for a dictionary that does not read along a context, and for an example
    that is not from the store. Raises UserError for an unknown latent."""
    store.check_latent(latent)
    if example.token < 0:
        return None
    first = example.context * store.context_size
    return sources_at(lm, dictionary, store.config["sites"], store.ids_T[first : example.token + 1].tolist(), latent, first)


@torch.inference_mode()
def sources_at(
    lm: LanguageModel, dictionary: Dictionary, reads: Sequence[str], ids: list[int], latent: int, first: int = 0
) -> Sources | None:
    """Take a latent's value on the last of some tokens apart, of which the first has number `first`; None for a dictionary that does not
    read along a context. `reads` are the sites that it reads."""
    ids_CS = torch.tensor([ids])
    with lm.edit({}):  # the model's other view has hooks of its own, which are not for two threads at once either
        if isinstance(dictionary, LorsaDictionary):
            x_SD = lm.read(ids_CS, reads)[reads[0]][0].float()
            parts_S = dictionary.z_pattern(x_SD, latent)[-1]
            pattern_S = dictionary.attention_pattern(x_SD[None], [latent])[0, 0, -1]
            return Sources(first, ids, parts_S.cpu().numpy(), None, None, pattern_S.cpu().numpy(), 0.0)
        if isinstance(dictionary, SparseAutoencoder) and len(reads) == 1 and SITE.fullmatch(reads[0]):
            found = source_attribution(dictionary, lm, ids_CS, latent)
            by_head_HS = found.by_head_CHTS[0, :, -1].cpu().numpy()
            lengths_H = dictionary.W_dec[latent].unflatten(0, (len(by_head_HS), -1)).norm(dim=1).cpu().numpy()
            return Sources(first, ids, by_head_HS.sum(0), by_head_HS, lengths_H / lengths_H.sum(), None, found.constant)
    return None
