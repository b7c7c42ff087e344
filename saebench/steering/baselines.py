"""What a selection of features has to beat, in the same call: DiffMean, PCA, a prompt, random directions, random latents of the same
density, and the same selection on a dictionary that nobody trained.

Shape suffixes: `D` width of a site, `T` tokens, `F` d_sae, `N` directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from saebench.dictionaries import Dictionary, TopK
from saebench.dictionaries.geometry import random_unit_rows
from saebench.errors import UserError
from saebench.features.prompts import PIECE, batches, text_pieces
from saebench.lm import LanguageModel
from saebench.steering.activity import Activity
from saebench.steering.edits import Edit

Kind = Literal["features", "baseline", "control"]
LEAST_TEXTS = 2


@dataclass(frozen=True)
class Method:
    """A way to steer that can be turned up: edits, or a text put before every prompt."""

    name: str
    kind: Kind
    """Features that were chosen, something else that works, or what shows what chance does."""
    edits: tuple[Edit, ...] = ()
    prefix: str = ""
    group: str = ""
    """Methods of one group (random directions, say) share a colour and a line in the figure; default the name."""

    def at(self, strength: float) -> list[Edit]:
        """The edits, each as many times its own strength."""
        return [replace(edit, strength=edit.strength * strength) for edit in self.edits]

    @property
    def dosed(self) -> bool:
        """Whether it has a strength; a prompt has none."""
        return bool(self.edits)


def unit_of(lm: LanguageModel, sites: Sequence[str], texts: Sequence[str]) -> float:
    """A tenth of the mean length of what stands at the sites side by side: the unit of strengths (methods.md I1)."""
    return _tenth(_activations(lm, list(sites), texts))


def unit_of_ids(lm: LanguageModel, sites: Sequence[str], ids_CS: Tensor) -> float:
    """The same over token contexts, all tokens but the first of each."""
    return _tenth(_standing(lm, list(sites), some_CS) for some_CS in ids_CS.split(8))


def _tenth(parts: Iterable[Tensor]) -> float:
    """A tenth of the mean length of rows."""
    total, count = 0.0, 0
    for x_TD in parts:
        total += float(x_TD.norm(dim=1).sum(dtype=torch.float64))
        count += len(x_TD)
    if not count:
        raise UserError("the texts have no tokens: give texts of a few words at least")
    return total / count / 10


def diff_mean(lm: LanguageModel, site: str, positives: Sequence[str], negatives: Sequence[str]) -> Tensor:
    """The mean over tokens of the positives less that of the negatives, [D] (Marks and Tegmark 2023; AxBench). Raises UserError for fewer
    than two texts on a side."""
    means = []
    for side, texts in (("positives", positives), ("negatives", negatives)):
        if len(texts) < LEAST_TEXTS:
            raise UserError(f"{len(texts)} {side} are too few for a mean: give at least {LEAST_TEXTS}")
        parts = [(x_TD.sum(0, dtype=torch.float64), len(x_TD)) for x_TD in _activations(lm, [site], texts)]
        if not parts:
            raise UserError(f"the {side} have no tokens: give texts of a few words at least")
        means.append(sum(total for total, _ in parts) / sum(count for _, count in parts))
    return (means[0] - means[1]).float()


def first_component(lm: LanguageModel, site: str, positives: Sequence[str], towards: Tensor) -> Tensor:
    """The direction in which activations of the positives vary most, [D], turned so that it points along `towards`."""
    x_TD = torch.cat(list(_activations(lm, [site], positives))).double()
    _, _, rows_ND = torch.linalg.svd(x_TD - x_TD.mean(0), full_matrices=False)
    direction_D = rows_ND[0].float()
    return direction_D if direction_D @ towards >= 0 else -direction_D


def random_directions(width: int, count: int, seed: int = 0) -> Tensor:
    """Directions of unit length, uniform on the sphere: [N, D]."""
    return random_unit_rows(count, width, torch.Generator().manual_seed(seed))


def random_latents(activity: Activity, like: Sequence[int], count: int, seed: int = 0) -> list[list[int]]:
    """Sets of latents drawn at random, each as dense as those of `like`: every member comes from the hundred that are nearest in firings,
    those of `like` left out."""
    generator = np.random.default_rng(seed)
    alive = np.flatnonzero(activity.firings_F > 0)
    alive = alive[~np.isin(alive, list(like))]
    if len(alive) < len(like):
        raise UserError(f"{len(alive)} other latents fire on these texts, too few to draw {len(like)} at random: give more text")
    sets = []
    for _ in range(count):
        drawn: list[int] = []
        for latent in like:
            gaps = np.abs(np.log(activity.firings_F[alive] / max(1, activity.firings_F[latent])))
            near = [int(i) for i in alive[np.argsort(gaps, kind="stable")[:100]] if int(i) not in drawn]
            drawn.append(int(generator.choice(near)))
        sets.append(drawn)
    return sets


def random_dictionary(lm: LanguageModel, site: str, texts: Sequence[str], d_sae: int, k: int, seed: int = 0) -> Dictionary:
    """A TopK dictionary of random directions, encoder and decoder tied, b_dec the mean of the activations: what choosing among `d_sae`
    directions gives when nobody trained them."""
    x_TD = torch.cat(list(_activations(lm, [site], texts)))
    config = TopK(d_sae=d_sae, k=k, decoder="unit").for_sites({site: x_TD.shape[1]})
    dictionary = config.build()
    rows_FD = random_unit_rows(d_sae, x_TD.shape[1], torch.Generator().manual_seed(seed))
    with torch.no_grad():
        dictionary.W_enc_FD.copy_(rows_FD)
        dictionary.W_dec.copy_(rows_FD)
        dictionary.b_dec.copy_(x_TD.mean(0))
    return dictionary.settled().to(lm.device).eval().requires_grad_(False)


def _activations(lm: LanguageModel, sites: list[str], texts: Sequence[str]) -> Iterator[Tensor]:
    """What stands at some sites, side by side, on the tokens of texts but the first of each piece: [T, D] float32, on the CPU."""
    for _, ids_CS in batches(text_pieces(lm, texts, PIECE)):
        yield _standing(lm, sites, ids_CS)


def _standing(lm: LanguageModel, sites: list[str], ids_CS: Tensor) -> Tensor:
    """The same on token contexts."""
    read = lm.read(ids_CS, sites)
    return torch.cat([read[site][:, 1:].flatten(2).flatten(0, 1).float() for site in sites], -1).cpu()
