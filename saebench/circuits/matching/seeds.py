"""Seed stability: how many latents two dictionaries of the same data share (Paulo and Belrose 2025; methods.md A5).

Latents are assigned one to one by the cosine of their decoder rows. A pair counts as shared where the mean of its decoder and its encoder
cosine exceeds the threshold, and strictly where the assignment by encoder cosine pairs it too. Dictionaries of different size are
matched over the smaller; rows of length 0 have cosine 0. All latents are in the denominator, dead ones too, unless said otherwise.
Shape suffixes: `M` latents of the smaller dictionary, in the order of its numbers; `F` latents, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saebench.circuits.matching.assignment import BLOCK_BYTES, CANDIDATES, EXACT_UP_TO, NONE, Assignment, assign
from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.features.effects import encoder_rows
from saebench.features.matching import check_directions

THRESHOLD = 0.7


@dataclass(frozen=True)
class Stability:
    """Two dictionaries, the latents of the smaller each with its partner in the other."""

    latents_a: np.ndarray
    """[M]"""
    latents_b: np.ndarray
    """[M]"""
    decoder_cosine_M: np.ndarray
    encoder_cosine_M: np.ndarray
    agree_M: np.ndarray
    """Whether the assignment by encoders pairs the same two."""
    alive_M: np.ndarray
    """Whether both are alive."""
    largest_a: np.ndarray
    """Largest decoder cosine of each latent of a with any of b, one-to-one or not: [F]."""
    largest_b: np.ndarray
    dead_a: int
    """Latents of a that were given as dead."""
    dead_b: int
    threshold: float
    by_decoder: Assignment
    by_encoder: Assignment

    @property
    def shared_M(self) -> np.ndarray:
        """Which pairs are shared."""
        return (self.decoder_cosine_M + self.encoder_cosine_M) / 2 > self.threshold

    @property
    def shared(self) -> float:
        """Share of the latents of the smaller dictionary, dead ones included, that the other has too."""
        return float(self.shared_M.mean())

    @property
    def shared_strictly(self) -> float:
        """The same where the two assignments agree."""
        return float((self.shared_M & self.agree_M).mean())

    @property
    def shared_of_alive(self) -> float:
        """Share of the pairs of living latents that are shared; NaN without any."""
        return float(self.shared_M[self.alive_M].mean()) if self.alive_M.any() else float("nan")

    def figures(self) -> dict[str, float]:
        """All of it as numbers: `shared`, `shared_strictly`, `shared_of_alive`, `mean_decoder_cosine`, `mean_encoder_cosine`,
        `mean_largest_cosine` and `largest_above_threshold` (means over the latents of both), `dead_a`, `dead_b`."""
        largest = [self.largest_a, self.largest_b]
        return {
            "shared": self.shared,
            "shared_strictly": self.shared_strictly,
            "shared_of_alive": self.shared_of_alive,
            "mean_decoder_cosine": float(self.decoder_cosine_M.mean()),
            "mean_encoder_cosine": float(self.encoder_cosine_M.mean()),
            "mean_largest_cosine": float(np.mean([part.mean() for part in largest])),
            "largest_above_threshold": float(np.mean([(part > self.threshold).mean() for part in largest])),
            "dead_a": self.dead_a,
            "dead_b": self.dead_b,
        }


def seed_stability(
    a: Dictionary,
    b: Dictionary,
    alive_a: np.ndarray | None = None,
    alive_b: np.ndarray | None = None,
    *,
    threshold: float = THRESHOLD,
    candidates: int = CANDIDATES,
    exact_up_to: int = EXACT_UP_TO,
) -> Stability:
    """Compare two dictionaries of one site; `alive_*` [F, bool] say which latents fire, by default all. Raises UserError where they write
    different sites, read different widths, or do not read and write one vector for each latent."""
    check_directions(a, b)
    rows = []
    for dictionary in (a, b):
        read_FD = encoder_rows(dictionary)
        if read_FD is None:
            raise UserError(
                f"{dictionary.config.architecture!r} does not read one direction for each latent: it cannot be compared"
            )
        assert dictionary.directions is not None
        rows.append([normalize(t.float().cpu(), dim=1) for t in (dictionary.directions, read_FD)])
    (dec_a, enc_a), (dec_b, enc_b) = rows
    by_decoder, by_encoder = (
        assign(x, y, candidates=candidates, exact_up_to=exact_up_to) for x, y in ((dec_a, dec_b), (enc_a, enc_b))
    )
    mine = np.flatnonzero(by_decoder.partner_M != NONE)
    theirs = by_decoder.partner_M[mine]
    if len(dec_b) < len(dec_a):
        order = np.argsort(theirs)
        mine, theirs = mine[order], theirs[order]
    cosine = [(x[mine] * y[theirs]).sum(1).double().clamp(-1, 1).numpy() for x, y in ((dec_a, dec_b), (enc_a, enc_b))]
    alive = [np.ones(len(part), dtype=bool) if mask is None else mask for part, mask in ((dec_a, alive_a), (dec_b, alive_b))]
    largest_a, largest_b = _largest(dec_a, dec_b)
    return Stability(
        latents_a=mine,
        latents_b=theirs,
        decoder_cosine_M=cosine[0],
        encoder_cosine_M=cosine[1],
        agree_M=by_encoder.partner_M[mine] == theirs,
        alive_M=alive[0][mine] & alive[1][theirs],
        largest_a=largest_a,
        largest_b=largest_b,
        dead_a=int((~alive[0]).sum()),
        dead_b=int((~alive[1]).sum()),
        threshold=threshold,
        by_decoder=by_decoder,
        by_encoder=by_encoder,
    )


def _largest(a_FD: Tensor, b_FD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The largest cosine of each row with any of the other set, both ways, block by block."""
    largest_a, largest_b = [], torch.full((len(b_FD),), -1.0)
    for rows_bD in a_FD.split(max(1, BLOCK_BYTES // (4 * len(b_FD)))):
        cosine_bF = rows_bD @ b_FD.T
        largest_a.append(cosine_bF.amax(1))
        largest_b = torch.maximum(largest_b, cosine_bF.amax(0))
    return torch.cat(largest_a).numpy(), largest_b.numpy()
