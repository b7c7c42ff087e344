"""Transcoder and skip transcoder (Dunefsky et al. 2024; Paulo et al. 2025; methods.md T10): predicts what a module writes, usually an
MLP, from what it reads, through sparse latents; with `skip` a linear map beside them.

Every rule of the family is a transcoder where `target` is given; this one is TopK with what only transcoders have: a decoder that starts
from the module itself. z = x W_enc + b_enc; f = ReLU(top k of z); y_hat = f W_dec + b_dec [+ x W_skip].
Shape suffixes: `B` tokens, `D` width of what is read or written, `F` d_sae.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from saebench.dictionaries.base import register
from saebench.dictionaries.geometry import scale_to_unit
from saebench.dictionaries.sae import SparseAutoencoder
from saebench.dictionaries.topk import KRule, TopKDictionary
from saebench.errors import UserError

EXAMPLE = 'site = "blocks.2.mlp.hook_in" and target = "blocks.2.hook_mlp_out"'
PROBES_AT_ONCE = 4096
COMPARED = 256
SAME = 0.05  # share of the output's norm by which module and record may differ: activations are stored in few bits


class Transcoder(KRule):
    """Configuration of a transcoder by the TopK rule."""

    architecture = "transcoder"

    decoder: Literal["unit", "free"] = "unit"
    """Decoder rows of unit length, or of any length with selection by f_i ||d_i||."""
    centre: bool = True
    """Whether the mean of each site is subtracted while training, and folded into the biases afterwards."""
    initial_decoder: Literal["linear_map", "mlp"] = "linear_map"
    """Where decoder directions start: what the best linear map makes of the encoder's, or what the module itself makes of them."""

    @model_validator(mode="after")
    def _reads_and_writes(self) -> Self:
        if not self.reads or not self.writes or self.rewrites:
            raise ValueError(f"a transcoder reads one place and writes another: give site and target, such as {EXAMPLE}")
        if self.initial_decoder == "mlp" and (len(self.reads) > 1 or len(self.writes) > 1):
            raise ValueError("initial_decoder='mlp' is for the input and output of one module: give one site and one target")
        return self

    @property
    def needs_lm(self) -> bool:
        return self.initial_decoder == "mlp"

    @property
    def default_id(self) -> str:
        return f"skip-{super().default_id}" if self.skip else super().default_id


@register(Transcoder)
class TranscoderDictionary(TopKDictionary):
    """The TopK rule from one site to another."""

    config: Transcoder  # type: ignore[assignment]

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """As the family. With `initial_decoder = "mlp"` row i is what the module answers to a step of usual length from the mean
        input along encoder direction i, less the mean of these answers, at unit length. Raises UserError where site and target are
        not input and output of one module."""
        super().initialise(x, y, generator, lm)
        if self.config.initial_decoder == "mlp":
            with torch.no_grad():
                self.W_dec.copy_(self._answers(x, y, lm))
                scale_to_unit(self.W_dec)

    def _answers(self, x_BD: Tensor, y_BD: Tensor, lm: Any) -> Tensor:
        """What the module writes for a step along each encoder direction, centred: [F, D]."""
        if lm is None or self.scalings is None:
            raise UserError(
                "initial_decoder='mlp' starts from the model's weights: train with lm=..., the model of the activations"
            )
        read, write = (scaling.to(x_BD.device) for scaling in self.scalings)
        (site,), (target,) = self.config.reads, self.config.writes
        module = lm.site(target).module(lm.hf)
        dtype = next(module.parameters()).dtype

        def answer(x_ND: Tensor) -> Tensor:
            raw_ND = (x_ND / read.scale_D + read.shift_D).to(lm.device, dtype)
            parts = [module(part[None])[0] for part in raw_ND.split(PROBES_AT_ONCE)]
            return write(torch.cat(parts).to(x_ND.device, x_ND.dtype))

        if lm.site(target).side != "out" or (answer(x_BD[:COMPARED]) - y_BD[:COMPARED]).norm() > SAME * y_BD[:COMPARED].norm():
            raise UserError(
                f"initial_decoder='mlp' needs the input and the output of one module, and {target} is not what a module makes of {site}: "
                f'use, for example, {EXAMPLE}, or initial_decoder = "linear_map"'
            )
        mean_D = x_BD.mean(0)
        answers_FD = answer(mean_D + (x_BD - mean_D).norm(dim=1).mean() * self.W_enc_FD)
        return answers_FD - answers_FD.mean(0)


def skip_only(dictionary: SparseAutoencoder, x_BD: Tensor) -> Tensor:
    """What a dictionary predicts with all latents off: b_dec and the linear bypass. Beside the full prediction it tells what the
    latents add (methods.md T10). [B, D]."""
    constant_BD = dictionary.b_dec.expand(len(x_BD), -1)
    return constant_BD + x_BD @ dictionary.W_skip if dictionary.config.skip else constant_BD
