"""A feature's course through the depth: dictionaries of successive layers matched one to one, without data (SAE Match, Balagansky et al.
2024; methods.md A4).

A latent is folded first: encoder and bias are divided by its threshold and its decoder row multiplied, so that every latent fires
above 1 and its row is as long as what it writes there. Where a rule has no threshold, the mean where the latent fires takes its place.

    cost of A's i and B's j = |d'A_i - d'B_j|^2        the permutation with the least sum of costs matches the layers (assignment.py)

A match is believed where the cost, relative to |d'A_i|^2 + |d'B_j|^2, is rare among chance matches: those of A's latents with the nearest
of B's after each principal coordinate of B was shuffled among B's latents, which keeps the mean, spectrum and lengths of B's rows and
nothing else. A course begins and ends where no match is believed.
Shape suffixes: `F` latents, `D` width, `L` layers, `P` courses, `N` entries of codes, `B` tokens, `C` contexts, `S` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from saebench.circuits.matching.assignment import CANDIDATES, EXACT_UP_TO, NONE, Assignment, assign_nearest
from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.thresholds import LearnedThresholds
from saebench.errors import UserError

ALPHA = 0.01
NULL_LATENTS = 1000  # chance matches that others are compared with


@dataclass(frozen=True)
class Folded:
    """A dictionary's latents in units of what they are when they fire."""

    W_dec_FD: Tensor
    """Decoder rows times scale."""
    W_enc_FD: Tensor | None
    """Encoder rows over scale; None where a latent does not read one direction."""
    b_enc_F: Tensor | None
    scale_F: Tensor
    alive_F: Tensor
    """Latents that are known to fire, or of which nothing is known: only they have a course."""


def mean_where_active(codes: SparseCodes) -> Tensor:
    """The mean of each latent over the tokens on which it fires, 0 where it never does: [F]."""
    _, latents_N, values_N = codes.nonzero()
    sums_F = torch.zeros(codes.d_sae, dtype=torch.float64).index_add_(0, latents_N.cpu(), values_N.double().cpu())
    return (sums_F / codes.firings().cpu().clamp_min(1)).float()


def fold(dictionary: Dictionary, mean_F: Tensor | None = None) -> Folded:
    """Fold thresholds into the weights, or the means [F] where given (0 for latents that never fire, which then count as dead).

    Raises UserError for a dictionary that writes no one vector for each latent, has neither thresholds nor means, or a threshold at or
    below 0.
    """
    finished = dictionary.settled()
    name, rows_FD = dictionary.config.architecture, finished.directions
    if rows_FD is None:
        raise UserError(f"{name!r} does not write one vector for each latent: it cannot be matched")
    alive_F = torch.ones(len(rows_FD), dtype=torch.bool)
    if mean_F is not None:
        if mean_F.shape != (len(rows_FD),):
            raise UserError(f"means of shape {tuple(mean_F.shape)} are not of the {len(rows_FD)} latents of {name!r}")
        alive_F = mean_F.cpu() > 0
        known = mean_F.detach().float().cpu()
        scale_F = torch.where(alive_F, known, known[alive_F].median() if alive_F.any() else torch.ones(()))
    elif isinstance(finished, LearnedThresholds):
        scale_F = finished.thresholds_F.detach().float().cpu()
        if not (scale_F > 0).all():
            latent = int((scale_F <= 0).nonzero()[0])
            raise UserError(
                f"latent {latent} has threshold {float(scale_F[latent]):g}, which cannot be folded: give mean_F instead"
            )
    else:
        raise UserError(
            f"{name!r} has no thresholds to fold: give mean_F, the mean of each latent where it fires (mean_where_active)"
        )
    W_enc_FD = b_enc_F = None
    if isinstance(finished, SparseAutoencoder):
        W_enc_FD = finished.W_enc_FD.detach().float().cpu() / scale_F[:, None]
        b_enc_F = finished.b_enc.detach().float().cpu() / scale_F
    return Folded(rows_FD.float().cpu() * scale_F[:, None], W_enc_FD, b_enc_F, scale_F, alive_F)


@dataclass(frozen=True)
class Step:
    """Layer A matched to layer B."""

    partner_F: np.ndarray
    """The latent of B that each latent of A was assigned, believed or not; -1 for none, as dead ones have."""
    cost_F: np.ndarray
    """|a_i - b_p(i)|^2 of each latent of A; NaN where it has no partner."""
    p_F: np.ndarray
    """Share of chance matches that are relatively as near; 1 where there is no partner."""
    width: int
    assignment: Assignment
    """Of the living latents, numbered among themselves."""

    @property
    def mse(self) -> float:
        """Mean squared difference per coordinate over all pairs."""
        return float(np.nanmean(self.cost_F) / self.width)

    def believed(self, alpha: float = ALPHA) -> np.ndarray:
        """The partner of each latent of A where the match is rarer than that by chance, -1 elsewhere: [F]."""
        return np.where(self.p_F <= alpha, self.partner_F, NONE)


def match_layers(
    a: Folded,
    b: Folded,
    *,
    encoder: bool = False,
    candidates: int = CANDIDATES,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
) -> Step:
    """Match the living latents of two layers, by what they write, or with `encoder` by that, what they read and their bias together.
    Raises UserError for dictionaries of different widths or without living latents, and where `encoder` is asked of one without."""
    rows_a, rows_b = _rows(a, encoder), _rows(b, encoder)
    if rows_a.shape[1] != rows_b.shape[1]:
        raise UserError(
            f"dictionaries of widths {rows_a.shape[1]} and {rows_b.shape[1]} cannot be matched: take sites of one width"
        )
    alive_a, alive_b = (folded.alive_F.nonzero()[:, 0] for folded in (a, b))
    if not len(alive_a) or not len(alive_b):
        raise UserError("no latent of one of the layers is alive: take means over more tokens, or another dictionary")
    assignment = assign_nearest(rows_a[alive_a], rows_b[alive_b], candidates=candidates, exact_up_to=exact_up_to)
    found = torch.from_numpy(assignment.partner_M)
    mine, theirs = alive_a[found != NONE], alive_b[found[found != NONE]]
    partner_F, cost_F, p_F = torch.full((len(rows_a),), NONE), torch.full((len(rows_a),), torch.nan), torch.ones(len(rows_a))
    partner_F[mine], cost_F[mine] = theirs, (rows_a[mine] - rows_b[theirs]).square().sum(1)
    squares = rows_a[mine].square().sum(1) + rows_b[theirs].square().sum(1)
    null, _ = chance_costs(rows_a[alive_a], rows_b[alive_b], seed).sort()
    p_F[mine] = (torch.searchsorted(null, cost_F[mine] / squares.clamp_min(1e-30), right=True) + 1) / (len(null) + 1)
    return Step(partner_F.numpy(), cost_F.numpy(), p_F.numpy(), rows_a.shape[1], assignment)


def _rows(folded: Folded, encoder: bool) -> Tensor:
    if not encoder:
        return folded.W_dec_FD
    if folded.W_enc_FD is None or folded.b_enc_F is None:
        raise UserError("a dictionary without one encoder row for each latent is matched by its decoder: leave encoder out")
    return torch.cat([folded.W_dec_FD, folded.W_enc_FD, folded.b_enc_F[:, None]], 1)


def chance_costs(a_FD: Tensor, b_FD: Tensor, seed: int = 0) -> Tensor:
    """Relative costs of the best matches of rows of a with rows of b that were taken apart: about 1000 of them, [N]."""
    generator = torch.Generator().manual_seed(seed)
    axes_DD = torch.linalg.eigh((b_FD.T @ b_FD).double()).eigenvectors.float()
    parts_FD = b_FD @ axes_DD
    nearest = []
    for _ in range(-(-NULL_LATENTS // len(a_FD))):
        order_FD = torch.rand(parts_FD.shape, generator=generator).argsort(0)
        shuffled_FD = parts_FD.gather(0, order_FD) @ axes_DD.T
        shuffled_FD *= (b_FD.norm(dim=1) / shuffled_FD.norm(dim=1).clamp_min(1e-30))[:, None]
        square_F = shuffled_FD.square().sum(1)
        for rows in torch.randperm(len(a_FD), generator=generator)[:NULL_LATENTS].split(256):
            rows_bD = a_FD[rows]
            squares_bF = rows_bD.square().sum(1, keepdim=True) + square_F
            nearest.append((1 - 2 * (rows_bD @ shuffled_FD.T) / squares_bF.clamp_min(1e-30)).amin(1))
    return torch.cat(nearest)


@dataclass(frozen=True)
class Course:
    """Dictionaries in order, each matched to the next."""

    names: tuple[str, ...]
    """The sites they write."""
    folded: tuple[Folded, ...]
    steps: tuple[Step, ...]
    alpha: float

    @cached_property
    def paths_PL(self) -> np.ndarray:
        """All courses: the latent at each layer, -1 before it begins and after it ends. Every latent that is alive is in one of them."""
        sizes = [len(folded.W_dec_FD) for folded in self.folded]
        paths, count = np.full((sum(sizes), len(sizes)), NONE, dtype=np.int64), 0
        at = np.full(sizes[0], NONE, dtype=np.int64)  # the course that each latent of the layer is on
        for layer, folded in enumerate(self.folded):
            new = np.flatnonzero((at == NONE) & folded.alive_F.numpy())
            at[new] = count + np.arange(len(new))
            count += len(new)
            on_course = np.flatnonzero(at != NONE)
            paths[at[on_course], layer] = on_course
            if layer < len(self.steps):
                partner = self.steps[layer].believed(self.alpha)
                following = np.full(sizes[layer + 1], NONE, dtype=np.int64)
                following[partner[partner != NONE]] = at[partner != NONE]
                at = following
        return paths[:count]

    @property
    def lengths_P(self) -> np.ndarray:
        """Layers that each course goes through."""
        return (self.paths_PL != NONE).sum(1)

    def of(self, layer: int, latent: int) -> dict[str, int]:
        """The course of one latent: the latent at every layer it goes through, by name, in order; empty for a dead one. Raises UserError
        for an unknown layer or latent."""
        if not 0 <= layer < len(self.names) or not 0 <= latent < len(self.folded[layer].W_dec_FD):
            raise UserError(f"there is no latent {latent} at layer number {layer}: the course has {len(self.names)} layers")
        found = np.flatnonzero(self.paths_PL[:, layer] == latent)
        path_L = self.paths_PL[found[0]].tolist() if len(found) else []
        return {name: stop for name, stop in zip(self.names, path_L, strict=False) if stop != NONE}

    def composed(self, first: int, last: int) -> np.ndarray:
        """The latents of layer `last` that those of layer `first` come to step by step, believed or not; -1 for none: [F]."""
        at = np.arange(len(self.folded[first].W_dec_FD))
        for step in self.steps[first:last]:
            at = np.where(at == NONE, NONE, step.partner_F[at])
        return at

    def figures(self) -> list[dict[str, float | str]]:
        """For each step: `from`, `to`, `continued` (share of living latents whose match is believed), `mse`, `gap` and `pruned`."""
        return [
            {
                "from": here,
                "to": there,
                "continued": float((step.believed(self.alpha) != NONE).sum() / max(1, int(folded.alive_F.sum()))),
                "mse": step.mse,
                "gap": step.assignment.gap,
                "pruned": step.assignment.pruned,
            }
            for here, there, step, folded in zip(self.names, self.names[1:], self.steps, self.folded, strict=False)
        ]


def course(
    dictionaries: Sequence[Dictionary],
    means: Sequence[Tensor | None] | None = None,
    *,
    alpha: float = ALPHA,
    encoder: bool = False,
    candidates: int = CANDIDATES,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
) -> Course:
    """Match dictionaries in order, each to the next. `means` holds each one's mean activations [F], None for thresholds. Raises UserError
    as `fold` and `match_layers` do, and for fewer than two."""
    if len(dictionaries) < 2:
        raise UserError(f"{len(dictionaries)} dictionary has no course: give those of at least two layers, in order")
    means = means or [None] * len(dictionaries)
    folded = tuple(fold(*pair) for pair in zip(dictionaries, means, strict=True))
    steps = tuple(
        match_layers(a, b, encoder=encoder, candidates=candidates, exact_up_to=exact_up_to, seed=seed + i)
        for i, (a, b) in enumerate(pairwise(folded))
    )
    names = tuple(" + ".join(d.config.writes) or f"dictionary {i}" for i, d in enumerate(dictionaries))
    return Course(names, folded, steps, alpha)


@dataclass(frozen=True)
class Composition:
    """A matching in steps beside the direct one."""

    agreement: float
    """Share of the first layer's latents with a direct partner that come to it step by step."""
    agreement_on_courses: float
    """The same of those whose course goes through all layers; NaN if none does."""
    mse: float
    """Mean squared difference per coordinate of what the steps lead to."""
    direct_mse: float


def composition(found: Course, first: int = 0, last: int = -1, *, encoder: bool = False) -> Composition:
    """Whether P(A -> C) is P(B -> C) after P(A -> B): the steps of a course from layer `first` to `last` beside one match of both."""
    last %= len(found.names)
    a, c = found.folded[first], found.folded[last]
    direct = match_layers(a, c, encoder=encoder)
    at = torch.from_numpy(found.composed(first, last))
    has = at != NONE
    rows_a, rows_c = _rows(a, encoder), _rows(c, encoder)
    mse = float((rows_a[has] - rows_c[at[has]]).square().mean())
    same_F, matched_F = at.numpy() == direct.partner_F, direct.partner_F != NONE
    through = found.paths_PL[(found.paths_PL[:, first : last + 1] != NONE).all(1), first]
    on_courses = float(same_F[through].mean()) if len(through) else float("nan")
    return Composition(float(same_F[matched_F].mean()), on_courses, mse, direct.mse)
