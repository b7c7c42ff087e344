"""One dictionary for a group of layers (Ghilardi et al. 2024; methods.md T16): layers whose activations are alike share it, and the tokens
it is trained on.

Each token of a training step is taken from one layer of the group, drawn at random, so a group of G layers costs what one of them
does. Layers differ in scale: each is normalised by its own shift and scale, which are saved with the dictionary, whose matrices stay in
normalised units. For one layer, `at(site)` has them folded in: a plain dictionary like any other. Groups are found by
`saebench.layer_groups` from the angles between layers (activations/angular.py).
Shape suffixes: `C` contexts, `S` positions, `B` tokens, `L` layers of the group, `D` width of a layer, `W` of all side by side, `F` d_sae.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import Dictionary, DictionaryConfig, Losses, TrainingBatch, parse_dictionary, register
from saebench.dictionaries.scaling import Scaling
from saebench.errors import UserError

DRAWS = 7_919  # added to the seed for the layers drawn, so that they are independent of what the dictionary draws itself


class LayerGroup(DictionaryConfig):
    """Configuration of one dictionary for several sites of equal width; `site` lists them."""

    architecture = "layer_group"

    base: dict[str, Any] = Field(default={"architecture": "topk"})
    """The dictionary they share: an `architecture` and its own settings; d_sae and the like stand outside, beside `site`."""

    @model_validator(mode="before")
    @classmethod
    def _normalised_as_the_base(cls, values: Any) -> Any:
        if (
            not isinstance(values, dict)
            or not isinstance(values.get("base", {}), dict)
            or not isinstance(values.get("d_sae"), int)
        ):
            return values
        base = parse_base(values.get("base", {"architecture": "topk"}), {"d_sae": values["d_sae"], "site": "any"})
        return {"normalise": base.normalise, "centre": base.centre, **values}

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        if not self.reads:
            raise ValueError('a layer group names its layers: give site = ["blocks.0.hook_resid_post", ...]')
        if len(set(self.reads)) < len(self.reads):
            raise ValueError(f"site lists a layer twice: {', '.join(self.reads)}")
        if self.target is not None:
            raise ValueError("a layer group writes what it reads: leave target out")
        if self.widths_in is not None and len(set(self.widths_in)) > 1:
            raise ValueError(
                f"the sites are {', '.join(map(str, self.widths_in))} wide: layers that share a dictionary must be of one width"
            )
        return self

    def base_for(self, site: str) -> DictionaryConfig:
        """The configuration of the shared dictionary as one of that site alone."""
        shared = {name: getattr(self, name) for name in ("d_sae", "normalise", "centre", "lr", "seed")}
        if self.d_in is not None:
            width = self.d_in // len(self.reads)
            shared |= {"d_in": width, "d_out": width, "widths_in": (width,), "widths_out": (width,)}
        return parse_base(self.base, {**shared, "site": site})

    def for_sites(self, widths: Any) -> Self:
        return type(self)(**super().for_sites(widths).model_dump())  # validated anew, now that widths are known

    @property
    def betas(self) -> tuple[float, float]:  # type: ignore[override]
        return self.base_for(self.reads[0]).betas

    @property
    def largest_lr_rise(self) -> float:  # type: ignore[override]
        return self.base_for(self.reads[0]).largest_lr_rise

    @property
    def needs_lm(self) -> bool:
        return self.base_for(self.reads[0]).needs_lm

    @property
    def default_id(self) -> str:
        return f"{self.architecture}-{self.base_for(self.reads[0]).default_id}"


def parse_base(base: dict[str, Any], common: dict[str, Any]) -> DictionaryConfig:
    """The shared dictionary's configuration. Raises UserError naming the key under `base` that is wrong."""
    for key in base:
        if key in DictionaryConfig.model_fields:
            raise UserError(f"base.{key} stands in the wrong place: {key} belongs to the group, beside base")
    if base.get("architecture") == LayerGroup.architecture:
        raise UserError("base.architecture='layer_group' is a group itself: name the dictionary that the layers share")
    config = parse_dictionary({**base, **common}, "base")
    if config.sequential or not config.rewrites:
        raise UserError(
            f"base.architecture={config.architecture!r} cannot be shared: it must map activations of a token to themselves"
        )
    return config


@register(LayerGroup)
class LayerGroupDictionary(Dictionary):
    """A dictionary on normalised activations, and the shift and scale of each layer. Its codes are in normalised units; those of `at(site)`
    in the layer's own."""

    config: LayerGroup

    def __init__(self, config: LayerGroup):
        super().__init__(config)
        assert config.d_in is not None
        layers = len(config.reads)
        self.base = config.base_for(config.reads[0]).build()
        self.register_buffer("shift_LD", torch.zeros(layers, config.d_in // layers))
        self.register_buffer("scale_L", torch.ones(layers))
        self.shift_LD: Tensor
        self.scale_L: Tensor

    def at(self, site: str) -> Dictionary:
        """The plain dictionary of one layer, for its raw activations. Raises UserError for a site that is not in the group."""
        if site not in self.config.reads:
            raise UserError(f"site {site!r} is not in this group: it has {', '.join(self.config.reads)}")
        layer = self.config.reads.index(site)
        single = copy.deepcopy(self.base)
        single.config = self.config.base_for(site)
        scaling = Scaling(self.shift_LD[layer], self.scale_L[layer].expand_as(self.shift_LD[layer]))
        single.fold(scaling, scaling)
        mine = lambda value: {site: value[site]} if isinstance(value, dict) and site in value else value  # noqa: E731
        single.trained_on = {**{key: mine(value) for key, value in self.trained_on.items()}, "reads": [site], "writes": [site]}
        return single.eval().requires_grad_(False)

    def parts(self) -> dict[str, Dictionary]:
        return {site: self.at(site) for site in self.config.reads}

    # --- all layers side by side: a token is a row of each ---

    def rows(self, x_BW: Tensor) -> Tensor:
        """Normalised activations, layer by layer of each token: [B * L, D]."""
        return ((x_BW.unflatten(1, self.shift_LD.shape) - self.shift_LD) * self.scale_L[:, None]).flatten(0, 1)

    def beside(self, rows: Tensor) -> Tensor:
        """The inverse: [B, W] in raw units."""
        return (rows.unflatten(0, (-1, len(self.scale_L))) / self.scale_L[:, None] + self.shift_LD).flatten(1)

    def encode(self, x_BD: Tensor) -> SparseCodes:
        """Codes of B * L rows: row b * L + l is layer l of token b."""
        self.check_rows(x_BD)
        return self.base.encode(self.rows(x_BD))

    def decode(self, codes: SparseCodes) -> Tensor:
        """What the codes of B * L rows stand for, layers side by side again: [B, W]."""
        return self.beside(self.base.decode(codes))

    def reconstruct(self, x_BD: Tensor, codes: SparseCodes) -> Tensor:
        return self.beside(self.base.reconstruct(self.rows(x_BD), codes))

    def encode_contexts(self, x_CSD: Tensor, skip: int = 1) -> SparseCodes:
        raise UserError("the codes of a layer group are those of its layers: index .at(site) for each site")

    def reconstruct_contexts(self, x_CSD: Tensor, skip: int = 1) -> tuple[SparseCodes, Tensor]:
        x_BW = x_CSD[:, skip:].flatten(0, 1)
        codes = self.encode(x_BW)
        return codes, self.reconstruct(x_BW, codes)

    def depends_on(self, write: int) -> range:
        return range(write, write + 1)

    def write_one(self, reads: Sequence[Tensor], write: int, skip: int = 1) -> Tensor:
        shift_D, scale = self.shift_LD[write], self.scale_L[write]
        return self.base((reads[0][:, skip:].flatten(0, 1) - shift_D) * scale) / scale + shift_D

    # --- training: one layer of each token, drawn ---

    def draw(self, x_BW: Tensor, generator: torch.Generator) -> Tensor:
        """Each token's activation at one layer of the group, drawn uniformly: [B, D]. A group of one draws nothing."""
        layers, width = self.shift_LD.shape
        if layers == 1:
            return x_BW
        drawn_B = torch.randint(layers, (len(x_BW),), generator=generator).to(x_BW.device)
        return x_BW.view(-1, width)[torch.arange(len(x_BW), device=x_BW.device) * layers + drawn_B]

    def share(self, batch: TrainingBatch) -> TrainingBatch:
        """The step of the shared dictionary."""
        x_BD = self.draw(batch.x, replace(batch, seed=batch.seed + DRAWS).generator())
        return replace(batch, x=x_BD, y=x_BD)

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """As the shared dictionary, on the union of the layers."""
        x_BD = self.draw(x, generator)
        self.base.initialise(x_BD, x_BD, generator, lm)

    def losses(self, batch: TrainingBatch) -> Losses:
        """Those of the shared dictionary on the layers drawn. Errors count for all layers, of which they are an unbiased sample, so that
        they compare with the targets of all."""
        losses = self.base.losses(self.share(batch))
        return replace(losses, squared_error_B=losses.squared_error_B * len(self.scale_L), target_BD=batch.y)

    def unit_rows(self) -> Sequence[Tensor]:
        return self.base.unit_rows()

    def latent_rows(self) -> Sequence[Tensor]:
        return self.base.latent_rows()

    def constrain(self, lr: float = 0.0) -> None:
        self.base.constrain(lr)

    def resample(self, batch: TrainingBatch) -> dict[str, Tensor]:
        return {f"base.{name}": rows for name, rows in self.base.resample(self.share(batch)).items()}

    # --- the finished dictionary ---

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        """Keep each layer's shift and scale; the shared dictionary stays in normalised units, with all else folded."""
        shift_LD, scale_L = read.shift_D.view_as(self.shift_LD), read.scale_D.view_as(self.shift_LD)[:, 0]
        self.shift_LD.copy_(shift_LD + self.shift_LD / scale_L[:, None])
        self.scale_L *= scale_L
        width = self.shift_LD.shape[1]
        self.base.fold(*[Scaling(shift_LD.new_zeros(width), shift_LD.new_ones(width))] * 2)

    @property
    def folded(self) -> bool:  # type: ignore[override]
        return self.base.folded

    def public_tensors(self) -> dict[str, Tensor]:
        """`shift` [L, D] and `scale` [L] of the layers, and the shared dictionary's tensors under `base.`."""
        shared = {f"base.{name}": tensor for name, tensor in self.base.public_tensors().items()}
        return {"shift": self.shift_LD, "scale": self.scale_L, **shared}

    @torch.no_grad()
    def load_public(self, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        for name, own in (("shift", self.shift_LD), ("scale", self.scale_L)):
            if name not in tensors or tensors[name].shape != own.shape:
                raise UserError(f"tensor {name!r} is missing or of another shape than {tuple(own.shape)} for 'layer_group'")
            own.copy_(tensors.pop(name))
        if foreign := sorted(name for name in tensors if not name.startswith("base.")):
            raise UserError(f"tensor {foreign[0]!r} is unknown for 'layer_group'")
        self.base.load_public({name.removeprefix("base."): tensor for name, tensor in tensors.items()})
