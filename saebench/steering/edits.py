"""What an edit is: a change of the activations at one or several sites, and the primitives that make one (methods.md I1).

With x what stands at the site, f the codes, d_i the direction that latent i writes, u a direction of unit length, a the strength:

    add         x + a unit u                           u = d_i / ||d_i||, or the weighted sum of several, of length 1
    scale       f_i' = value f_i                       scale, clamp, ablate and swap: x + a (f' - f) W_dec, so that what the
    clamp       f_i' = value                           dictionary misses is kept; without `keep_error` the decoded f + a (f' - f)
    ablate      f_i' = 0
    swap        f_i' = f_j, f_j' = f_i
    orthogonal  x - a (x U) U^T                        U an orthonormal basis of the directions: what is left is orthogonal to all
    cap         x - a max(0, x.u - value) u            the projection is at most value
    affine      x + a (value - x.u) u                  the projection is value

The change is linear in a; a = 0 is none at all.
Shape suffixes: `M` latents of an edit, `N` directions, `D` width of what is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.steering.positions import Positions

How = Literal["add", "scale", "clamp", "ablate", "swap", "orthogonal", "cap", "affine"]
ON_CODES = ("scale", "clamp", "ablate", "swap")
ON_VECTORS = ("add", "orthogonal", "cap", "affine")
NEED_VALUE = {
    "scale": "a factor",
    "clamp": "what the latents are set to",
    "cap": "the largest projection",
    "affine": "the projection",
}


@dataclass(frozen=True)
class Edit:
    """One change. Made by the functions below, which check it."""

    how: How
    sites: tuple[str, ...]
    """What it writes."""
    dictionary: Dictionary | None = None
    """Whose latents it changes, if it is not of plain directions."""
    latents: tuple[int, ...] = ()
    vectors: tuple[Tensor, ...] = ()
    """Directions, of any length, at each site: [N, D] each."""
    strength: float = 1.0
    value: float = 0.0
    unit: float = 1.0
    """What a strength of 1 adds, as a length."""
    positions: Positions = field(default_factory=Positions)
    keep_error: bool = True

    def __post_init__(self) -> None:
        _finite(self.strength, "strength")
        _finite(self.value, f"value of {self.how}")
        _finite(self.unit, "unit")

    def at(self, strength: float) -> Edit:
        """The same with another strength."""
        return replace(self, strength=strength)

    @property
    def on_codes(self) -> bool:
        return self.how in ON_CODES

    def describe(self) -> str:
        """Such as `add 4 of latent 12 at blocks.2.hook_resid_post, all`."""
        what = "a direction" if not self.latents else f"latent{'s' * (len(self.latents) > 1)} {', '.join(map(str, self.latents))}"
        value = f" {self.value:g}" if self.how in NEED_VALUE else ""
        return f"{self.how}{value} x {self.strength:g}, {what} at {' + '.join(self.sites)}, positions {self.positions}"


def edit(
    how: How,
    of: Dictionary | Tensor,
    latents: int | Sequence[int] = (),
    *,
    site: str | None = None,
    strength: float = 1.0,
    value: float | None = None,
    unit: float = 1.0,
    weights: Sequence[float] = (),
    positions: str | Positions = "all",
    keep_error: bool = True,
) -> Edit:
    """Any primitive by its name, on `latents` of a dictionary or on directions [D] or [N, D] at a `site`.

    `weights` say how much of each latent's direction goes into an `add`; default equal parts. Raises UserError for an unknown primitive, a
    latent that the dictionary does not have, a missing value, and numbers that are NaN or infinite.
    """
    if how not in ON_CODES + ON_VECTORS:
        raise UserError(f"unknown primitive {how!r}: use one of {', '.join(ON_VECTORS + ON_CODES)}")
    if how in NEED_VALUE and value is None:
        raise UserError(f"{how} needs a value: {NEED_VALUE[how]}")
    if how not in NEED_VALUE and value is not None:
        raise UserError(f"{how} takes no value: leave it out; how much of it is done is its strength")
    common: dict[str, Any] = {
        "how": how, "strength": float(strength), "value": float(value or 0.0), "unit": float(unit),
        "positions": Positions.parse(positions), "keep_error": keep_error,
    }  # fmt: skip
    if isinstance(of, Dictionary):
        chosen = (latents,) if isinstance(latents, int) else tuple(int(latent) for latent in latents)
        _check_latents(of, how, chosen)
        if not of.config.writes:
            raise UserError("the dictionary names no site, so it cannot steer: train it on activations of a site")
        vectors = () if how in ON_CODES else _directions(of, how, chosen, weights)
        return Edit(sites=of.config.writes, dictionary=of, latents=chosen, vectors=vectors, **common)
    if how in ON_CODES:
        raise UserError(f"{how} changes latents, and a direction has none: give a dictionary, or use {', '.join(ON_VECTORS)}")
    if site is None:
        raise UserError("a direction needs the site that it is added at: give site=")
    return Edit(sites=(site,), vectors=(_plain(of, how),), **common)


def add(of: Dictionary | Tensor, latents: int | Sequence[int] = (), strength: float = 1.0, **options: Any) -> Edit:
    """Add directions: x + strength * unit * u. Options as in `edit`."""
    return edit("add", of, latents, strength=strength, **options)


def scale(of: Dictionary, latents: int | Sequence[int], value: float, **options: Any) -> Edit:
    """Multiply latents by a factor."""
    return edit("scale", of, latents, value=value, **options)


def clamp(of: Dictionary, latents: int | Sequence[int], value: float, **options: Any) -> Edit:
    """Set latents to a value, whether they are active or not."""
    return edit("clamp", of, latents, value=value, **options)


def ablate(of: Dictionary, latents: int | Sequence[int], **options: Any) -> Edit:
    """Set latents to zero."""
    return edit("ablate", of, latents, **options)


def swap(of: Dictionary, one: int, other: int, **options: Any) -> Edit:
    """Exchange the activations of two latents."""
    return edit("swap", of, (one, other), **options)


def orthogonal(of: Dictionary | Tensor, latents: int | Sequence[int] = (), **options: Any) -> Edit:
    """Take out what lies in the span of some directions."""
    return edit("orthogonal", of, latents, **options)


def cap(of: Dictionary | Tensor, latents: int | Sequence[int] = (), *, value: float, **options: Any) -> Edit:
    """Bound the projection on a direction from above; from below by the opposite direction and value."""
    return edit("cap", of, latents, value=value, **options)


def affine(of: Dictionary | Tensor, latents: int | Sequence[int] = (), *, value: float, **options: Any) -> Edit:
    """Set the projection on a direction."""
    return edit("affine", of, latents, value=value, **options)


def latent_rows(dictionary: Dictionary, latents: Sequence[int]) -> Tensor:
    """What each of some latents writes, all sites side by side, per unit of its activation: [M, D] float32, on the dictionary's device."""
    if (directions_FD := dictionary.directions) is not None:
        return directions_FD[list(latents)].float()
    count, device = len(latents), next(dictionary.parameters()).device
    rows = torch.arange(count, device=device)
    one = SparseCodes.ragged(
        rows, torch.tensor(latents, device=device), torch.ones(count, device=device), count + 1, dictionary.config.d_sae
    )
    decoded = dictionary.decode(one).detach().float()
    return decoded[:-1] - decoded[-1]  # the last row is that of no latent: biases


def _check_latents(dictionary: Dictionary, how: str, latents: tuple[int, ...]) -> None:
    if not latents:
        raise UserError(f"{how} names no latent: give one or several of the {dictionary.config.d_sae:,}, counted from 0")
    for latent in latents:
        if not 0 <= latent < dictionary.config.d_sae:
            raise UserError(f"latent {latent} is not one of the {dictionary.config.d_sae:,}, counted from 0")
    if len(set(latents)) < len(latents):
        raise UserError(f"latents {', '.join(map(str, latents))} repeat: name each once")
    if how == "swap" and len(latents) != 2:
        raise UserError(f"swap exchanges two latents, not {len(latents)}: name two")


def _directions(dictionary: Dictionary, how: str, latents: tuple[int, ...], weights: Sequence[float]) -> tuple[Tensor, ...]:
    """The directions of latents at each site that they write, [N, D]: for `add` one, whose length over all sites is 1."""
    rows_MD = latent_rows(dictionary, latents)
    if weights and how != "add":
        raise UserError(f"weights are for add, not for {how}: leave them out")
    if how == "add":
        if weights and len(weights) != len(latents):
            raise UserError(f"{len(latents)} latents have {len(weights)} weights: give one each, or none")
        unit_MD = rows_MD / rows_MD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        weight_M = unit_MD.new_tensor(list(weights)) if weights else unit_MD.new_ones(len(latents))
        sum_D = weight_M @ (rows_MD if weights else unit_MD)
        if not sum_D.norm() > 1e-9:
            raise UserError(f"latents {', '.join(map(str, latents))} write nothing, or cancel each other: choose others")
        rows_MD = sum_D[None] / sum_D.norm()
    elif how in ("cap", "affine"):
        _one(how, len(rows_MD))
    return tuple(rows_MD.split(list(dictionary.config.blocks_out), dim=1))


def _plain(vectors: Tensor, how: str) -> Tensor:
    rows_ND = torch.atleast_2d(vectors.detach().float())
    if rows_ND.ndim != 2 or not rows_ND.isfinite().all():
        raise UserError(f"directions of shape {tuple(vectors.shape)} are not finite rows [D] or [N, D]: correct them")
    if not (rows_ND.norm(dim=1) > 1e-12).all():
        raise UserError("a direction is zero: it points nowhere")
    if how == "add":
        sum_D = rows_ND.sum(0)
        return sum_D[None] / sum_D.norm()
    if how in ("cap", "affine"):
        _one(how, len(rows_ND))
    return rows_ND


def _one(how: str, count: int) -> None:
    if count > 1:
        raise UserError(f"{how} is of one direction, not of {count}: make one edit for each")


def _finite(number: float, what: str) -> None:
    if not math.isfinite(number):
        raise UserError(f"{what} is {number}: give a finite number")
