"""The latents of dictionaries as nodes of a linear model: where they read, what they read there, and what they write where.

A part is what reads one place: a dictionary, or one layer of a cross-layer transcoder. The pre-activation of latent i at position t is
w_i . x_t + b_i with x what stands at the place, or, for Lorsa, the sum over source positions s of A[t, s] (w_i . x_s + b_i); while the
choice of active latents is held it is the activation itself.

Places are counted along the residual stream: point 2 l is before the attention of layer l, 2 l + 1 before its MLP, and step p leads from
point p to p + 1.
Shape suffixes: `S` positions, `D` width of what is read or written, `N` active latents of the prompt, `M` some latents, `G` patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.clt import CrossLayerTranscoder
from saebench.dictionaries.lorsa import LorsaDictionary
from saebench.errors import UserError
from saebench.kernels.lorsa_attention import attention_pattern, queries_keys

Kind = Literal["stream", "input", "heads", "written"]
PLACES: dict[str, tuple[int, Kind]] = {
    "hook_resid_pre": (0, "stream"), "hook_resid_mid": (1, "stream"), "hook_resid_post": (2, "stream"),
    "ln1.hook_out": (0, "input"), "attn.hook_in": (0, "input"), "ln2.hook_out": (1, "input"), "mlp.hook_in": (1, "input"),
    "attn.hook_z": (0, "heads"), "hook_attn_out": (0, "written"), "attn.hook_out": (0, "written"),
    "hook_mlp_out": (1, "written"), "mlp.hook_out": (1, "written"),
}  # fmt: skip
DIFFERS = 1e-3  # of the activations of a dictionary from what the linear model says, relative


@dataclass(frozen=True)
class Place:
    """A point of the stream as it is, behind its norm (`input`), or what the step behind it writes, before (`heads`) or after the heads
    are mixed (`written`)."""

    site: str
    point: int
    kind: Kind

    @classmethod
    def of(cls, site: str, layers: int) -> Place:
        """Raises UserError for a site that is no place of a graph."""
        if site == "ln_final.hook_out":
            return cls(site, 2 * layers, "input")
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
        if found is None or found[2] not in PLACES or int(found[1]) >= layers:
            names = ", ".join(f"blocks.N.{name}" for name in PLACES)
            raise UserError(f"site {site!r} is not a place of a graph: use {names} (N below {layers}) or ln_final.hook_out")
        further, kind = PLACES[found[2]]
        return cls(site, 2 * int(found[1]) + further, kind)


@dataclass
class Write:
    """What a part writes at one place: the rows of some of its latents [M, D], and what it writes without any [D]."""

    place: Place
    rows: Callable[[Tensor], Tensor]
    bias_D: Tensor


@dataclass
class Part:
    """The latents that read one place, with those active on the prompt, sorted by position and number."""

    number: int
    """Of the dictionary."""
    dictionary: Dictionary
    place: Place
    first: int
    """Number that its first latent has in the dictionary."""
    W_read_FD: Tensor
    b_read_F: Tensor
    writes: list[Write]
    W_skip_DD: Tensor | None = None
    positions_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    latents_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Counted from the part's first."""
    values_N: Tensor = field(default_factory=lambda: torch.zeros(0))
    pattern_GSS: Tensor | None = None
    """For Lorsa, where its groups of heads look."""
    table_SK: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """Its active latents by position, padded with -1."""

    def __len__(self) -> int:
        return len(self.values_N)

    @property
    def group_size(self) -> int:
        """Latents that share a pattern."""
        assert isinstance(self.dictionary, LorsaDictionary)
        return self.dictionary.group_size

    def activate(self, codes: SparseCodes, x_SD: Tensor, first_position: int) -> None:
        """Take the codes of all positions, those before the first left out. Raises UserError where activations are not what is read."""
        positions_N, latents_N, values_N = codes.nonzero()
        kept_N = positions_N >= first_position
        positions_N, latents_N, values_N = positions_N[kept_N], latents_N[kept_N], values_N[kept_N].float()
        order_N = torch.argsort(positions_N * codes.d_sae + latents_N)
        self.positions_N, self.latents_N, self.values_N = positions_N[order_N], latents_N[order_N], values_N[order_N]
        if isinstance(self.dictionary, LorsaDictionary):
            heads = self.dictionary.heads
            self.pattern_GSS = attention_pattern(*queries_keys(x_SD[None], heads, self.dictionary.rule), self.dictionary.rule)[0]
        counts_S = torch.bincount(self.positions_N, minlength=len(x_SD))
        starts_S = counts_S.cumsum(0) - counts_S
        places_K = torch.arange(int(counts_S.max()), device=counts_S.device)
        self.table_SK = torch.where(places_K < counts_S[:, None], starts_S[:, None] + places_K, -1)
        z_N = self.pre_activations(x_SD, self.positions_N, self.latents_N)
        if len(self) and not (z_N - self.values_N).norm() <= DIFFERS * self.values_N.norm():
            name = self.dictionary.config.architecture
            raise UserError(
                f"the latents of architecture {name!r} at {self.place.site} are not linear in what they read: graphs are for "
                "transcoders, cross-layer transcoders, Lorsa and SAEs with one encoder matrix, such as transcoder, clt, lorsa, topk"
            )

    def pre_activations(self, x_SD: Tensor, positions_M: Tensor, latents_M: Tensor, *, held: bool = True) -> Tensor:
        """Of some latents at some positions, given what stands at the place [S, D]: [M]. Patterns of Lorsa are `held`, or as x has them."""
        w_MD, b_M = self.W_read_FD[latents_M], self.b_read_F[latents_M]
        if self.pattern_GSS is None:
            return (x_SD[positions_M] * w_MD).sum(1) + b_M
        pattern_GSS = self.pattern_GSS
        if not held:
            assert isinstance(self.dictionary, LorsaDictionary)
            rule = self.dictionary.rule
            pattern_GSS = attention_pattern(*queries_keys(x_SD[None], self.dictionary.heads, rule), rule)[0]
        looks_MS = pattern_GSS[latents_M // self.group_size, positions_M]
        return (looks_MS * (w_MD @ x_SD.T)).sum(1) + b_M * looks_MS.sum(1)


def parts_of(dictionary: Dictionary, number: int, layers: int) -> list[Part]:
    """The parts of a dictionary, nothing active yet. Raises UserError for kinds that do not fit into a graph."""
    config, finished = dictionary.config, dictionary.settled()
    places = [Place.of(site, layers) for site in config.reads]
    targets = [Place.of(site, layers) for site in config.writes]
    name = f"the {config.architecture} dictionary that reads {' + '.join(config.reads)}"
    if isinstance(finished, CrossLayerTranscoder):
        parts = _of_layers(finished, number, places, targets)
    elif len(places) != 1 or len(targets) != 1:
        fix = (
            "give the dictionary of each layer, dictionary.at(site)"
            if len(dictionary.parts()) > 1
            else "leave it out, and give one that reads one site before it writes, such as a transcoder or Lorsa"
        )
        raise UserError(f"{name} reads or writes several sites at once, earlier ones too, which a graph has no place for: {fix}")
    elif isinstance(finished, LorsaDictionary):
        write = Write(targets[0], lambda latents_M: finished.W_dec[latents_M], finished.b_dec)
        parts = [Part(number, finished, places[0], 0, finished.W_V_FD, finished.b_V, [write])]
    elif isinstance(finished, SparseAutoencoder):
        W_read_FD, b_read_F = _encoder(finished)
        write = Write(targets[0], lambda latents_M: finished.W_dec[latents_M], finished.b_dec)
        skip = finished.W_skip if finished.config.skip else None
        parts = [Part(number, finished, places[0], 0, W_read_FD, b_read_F, [write], skip)]
    else:
        raise UserError(f"{name} is of no kind that graphs are made of: use transcoders, cross-layer transcoders, Lorsa or SAEs")
    for part in parts:
        for write in part.writes:
            behind = write.place.point - part.place.point
            through_mlp = part.place.kind == "written" and part.place.point % 2 == 1
            if behind < 0 or through_mlp or (behind == 0 and part.place.kind == "written" and write.place.kind == "heads"):
                raise UserError(
                    f"{name} writes {write.place.site}, which is not linear in what stands before it: graphs need dictionaries that read "
                    "the stream, the input of an MLP or attention, or attention's output, and write there or later"
                )
            if write.place.kind == "input":
                raise UserError(
                    f"{name} writes {write.place.site}: graphs need dictionaries that write the stream or a layer's output"
                )
    return parts


def _encoder(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    """What latents read [F, D], and their bias for inputs as they are [F]."""
    weights = sae.weights().folded()
    W_FD, b_F = weights.W_enc_FD, weights.b_enc_F
    if hasattr(sae, "r_mag"):  # a gate decides, and the magnitude is read on another scale
        W_FD, b_F = sae.r_mag.exp()[:, None] * W_FD, sae.b_mag
    return (W_FD, b_F) if sae.b_in is None else (W_FD, b_F - W_FD @ sae.b_in)


def _of_layers(clt: CrossLayerTranscoder, number: int, places: list[Place], targets: list[Place]) -> list[Part]:
    def write(source: int, target: int) -> Write:
        nothing_D = torch.zeros_like(clt.b_dec[: clt.d_out])
        bias_D = clt.b_dec[target * clt.d_out :][: clt.d_out] if source == target else nothing_D  # once, with the nearest
        return Write(targets[target], lambda latents_M: clt.decoder(source, target)[latents_M], bias_D)

    layers, per_layer = len(places), clt.config.per_layer
    encoders = zip(clt.W_enc_FD.split(per_layer), clt.b_enc.split(per_layer), strict=True)
    return [
        Part(number, clt, places[i], i * per_layer, W_FD, b_F, [write(i, j) for j in range(i, layers)])
        for i, (W_FD, b_F) in enumerate(encoders)
    ]
