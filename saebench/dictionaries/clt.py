"""Cross-layer transcoder (Ameisen et al. 2025; methods.md T12): latents of every layer read the input of their own layer's MLP and write to
the outputs of this and all later MLPs: y_hat^t = sum over l <= t of f^l W_dec^(l->t) + b_dec^t.

Layers are numbered as the sites are listed, L of them with M latents each; latent i of layer l is number l * M + i, so `d_sae` counts
all. What layer l writes is kept as one tensor W_dec[l] of [M, L - l, D], whose block t - l goes to layer t. With sites side by side in a
row these blocks are neighbours: decoding layer l is one sparse product, added from column l * D on.
||d_i|| is the norm of all that latent i writes, concatenated; it is 1 with `decoder = "unit"`, and with `"free"` rules see f_i ||d_i||, as
in the family (sae.py).
Shape suffixes: `C` contexts, `S` positions, `B` tokens, `D` width of one site, `W` of all side by side, `M` latents of a layer, `F` d_sae.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.auxk import default_k_aux, missed_share
from saebench.dictionaries.base import Dictionary, FirstDirections, Losses, TrainingBatch, register
from saebench.dictionaries.geometry import geometric_median, linear_map, random_directions, scale_to_unit
from saebench.dictionaries.sae import Weights
from saebench.dictionaries.scaling import Scaling
from saebench.kernels import encode_topk, with_gradient
from saebench.kernels.stock import select_topk

EXAMPLE = 'site = ["blocks.0.mlp.hook_in", ...] and target = ["blocks.0.hook_mlp_out", ...]'


class CrossLayerConfig(FirstDirections):
    """What configurations of cross-layer transcoders have in common: `site` and `target` list as many sites, layer by layer."""

    decoder: Literal["unit", "free"] = "unit"
    """Whether all that a latent writes has length 1, or any length with sparsity measured on f_i ||d_i||."""
    aux_coefficient: float = Field(default=0.0, ge=0)
    """Weight of AuxK, by which dead latents learn to reconstruct the residual; 0 leaves it out."""
    k_aux: int | None = Field(default=None, gt=0)
    """Dead latents of each layer that AuxK uses on a token; default the power of two nearest half the width of a site."""

    @model_validator(mode="after")
    def _layers_match(self) -> Self:
        if not self.reads or self.target is None:
            raise ValueError(f"a cross-layer transcoder reads and writes every layer: give {EXAMPLE}")
        if len(self.reads) != len(self.writes):
            raise ValueError(
                f"site lists {len(self.reads)} layers and target {len(self.writes)}: list both layer by layer, such as {EXAMPLE}"
            )
        if self.d_sae % self.layers:
            raise ValueError(
                f"d_sae={self.d_sae} is not divisible by the {self.layers} layers: use {self.d_sae // self.layers * self.layers} or "
                f"{(self.d_sae // self.layers + 1) * self.layers}"
            )
        for key, widths in (("site", self.widths_in), ("target", self.widths_out)):
            if widths is not None and len(set(widths)) > 1:
                raise ValueError(f"the sites of {key} are {', '.join(map(str, widths))} wide: layers must be of equal width")
        return self

    @property
    def layers(self) -> int:
        return len(self.reads)

    @property
    def per_layer(self) -> int:
        """Latents of one layer."""
        return self.d_sae // self.layers

    def for_sites(self, widths: Any) -> Self:
        return type(self)(**super().for_sites(widths).model_dump())  # validated anew, now that widths are known


@dataclass
class LayerFit:
    """What a rule made of a batch: codes of each layer, error y_hat - y, the loss in units of the summed squared error per token."""

    codes: list[SparseCodes]
    error_BW: Tensor
    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class CrossLayerTranscoder(Dictionary):
    """L encoders, L (L + 1) / 2 decoders, and a rule for what stays active."""

    config: CrossLayerConfig
    causal = True
    """Whether the codes of a layer depend on its own input alone."""

    def __init__(self, config: CrossLayerConfig):
        super().__init__(config)
        assert config.d_in is not None
        layers, per_layer = config.layers, config.per_layer
        self.d_in, self.d_out = config.d_in // layers, config.width_out // layers
        self.W_enc_FD = nn.Parameter(torch.zeros(config.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.ParameterList(torch.zeros(per_layer, layers - layer, self.d_out) for layer in range(layers))
        self.b_dec = nn.Parameter(torch.zeros(layers * self.d_out))
        self.register_buffer("variance", torch.ones(()))  # of the target per coordinate: makes the loss scale-free
        self.variance: Tensor
        self.k_aux = config.k_aux or default_k_aux(self.d_out)
        self.folded = False
        self._pass: dict[Any, tuple[tuple[Tensor, ...], Tensor]] = {}

    @property
    def W_enc(self) -> Tensor:
        """[D, F]; column l * M + i reads site l."""
        return self.W_enc_FD.T

    def decoder(self, source: int, target: int) -> Tensor:
        """What the latents of layer `source` write to layer `target`, the same or a later one: [M, D]."""
        return self.W_dec[source][:, target - source]

    def weights(self) -> list[Weights]:
        """Encoder and decoder of each layer, and what makes its latents be in units of what they write. What a layer writes to itself and
        all later ones is side by side: [M, (L - l) * D]."""
        per_layer = self.config.per_layer
        layers = zip(self.W_enc_FD.split(per_layer), self.b_enc.split(per_layer), (W.flatten(1) for W in self.W_dec), strict=True)
        if self.config.decoder == "unit" or self.folded:
            return [Weights(W_enc, b_enc, W_dec) for W_enc, b_enc, W_dec in layers]
        return [Weights(W_enc, b_enc, W_dec, W_dec.norm(dim=1).clamp_min(1e-8)) for W_enc, b_enc, W_dec in layers]

    # --- what a member defines ---

    @abstractmethod
    def select_layer(self, layer: int, x_BD: Tensor, weights: Weights) -> SparseCodes:
        """The active latents of one layer by this rule, differentiable, given its input and weights: a code over M latents."""

    def select(self, inputs: Sequence[Tensor], weights: Sequence[Weights]) -> list[SparseCodes]:
        """The active latents of all layers, given their inputs [B, D] each. Rules that compare latents of different layers replace it
        and set `causal` to False."""
        return [self.select_layer(layer, x_BD, weights[layer]) for layer, x_BD in enumerate(inputs)]

    def objective(self, batch: TrainingBatch, weights: Sequence[Weights]) -> LayerFit:
        """The rule's training objective; here the squared error alone."""
        codes = self.select(self.split(batch.x), weights)
        error_BW = self.write(codes, weights) - batch.y
        return LayerFit(codes, error_BW, error_BW.square().sum(1).mean())

    def set_thresholds(self, x_BW: Tensor, y_BW: Tensor) -> None:
        """Initialise what the rule has besides matrices and biases, given a normalised sample."""

    @torch.no_grad()
    def scale_biases(self, factor: Tensor | float) -> None:
        """Latents are about to be multiplied by a positive factor, a number or one each [F]: take biases and thresholds along."""
        self.b_enc *= factor

    # --- the same for all ---

    def split(self, x_BW: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the layers: [B, D] each."""
        return x_BW.split(self.d_in, dim=1)

    def encode(self, x_BD: Tensor) -> SparseCodes:
        self.check_rows(x_BD)
        return SparseCodes.side_by_side(self.select(self.split(x_BD), self.weights()))

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.write(codes.split([self.config.per_layer] * self.config.layers), self.weights())

    def write(self, codes: Sequence[SparseCodes], weights: Sequence[Weights]) -> Tensor:
        """What the codes of all layers say of all targets: [B, W]."""
        written = [layer.decode(code) for code, layer in zip(codes, weights, strict=True)]
        return self.join(written) + self.b_dec

    def join(self, written: Sequence[Tensor]) -> Tensor:
        """The sum of what layers write, each from its own columns on: [B, W]."""
        total = written[-1]
        for earlier in reversed(written[:-1]):
            total = torch.cat([earlier[:, : self.d_out], earlier[:, self.d_out :] + total], 1)
        return total

    def depends_on(self, write: int) -> range:
        return range(write + 1) if self.causal else range(self.config.layers)

    def write_one(self, reads: Sequence[Tensor], write: int, skip: int = 1) -> Tensor:
        """As for all dictionaries. Within one pass of the model under `torch.inference_mode`, each layer is encoded and decoded once."""
        if not self.causal:
            y_hat_BW = self._once(skip, reads, lambda: self(torch.cat([x[:, skip:].flatten(0, 1) for x in reads], 1)))
            written = y_hat_BW[:, write * self.d_out :][:, : self.d_out]
        else:
            written = self.b_dec[write * self.d_out :][: self.d_out]
            for layer, x_CSD in enumerate(reads[: write + 1]):
                columns = slice((write - layer) * self.d_out, (write - layer + 1) * self.d_out)
                written = written + self._once((layer, skip), [x_CSD], partial(self._write_from, layer, x_CSD, skip))[:, columns]
        if write == self.config.layers - 1:
            self._pass.clear()
        return written

    def _write_from(self, layer: int, x_CSD: Tensor, skip: int) -> Tensor:
        """What the latents of one layer write to it and all later ones: [B, (L - l) * D]."""
        weights = self.weights()[layer]
        return weights.decode(self.select_layer(layer, x_CSD[:, skip:].flatten(0, 1), weights))

    def _once(self, key: Any, inputs: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or what it gave for the very same tensors before."""
        if not torch.is_inference_mode_enabled():
            return compute()
        known = self._pass.get(key)
        if known is None or len(known[0]) != len(inputs) or any(a is not b for a, b in zip(known[0], inputs, strict=True)):
            known = self._pass[key] = (tuple(inputs), compute())
        return known[1]

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """Encoder directions random or in their layer's active subspace, each layer writing to itself what the best linear map makes of
        them, and nothing to later layers. Biases centre inputs and outputs."""
        self.variance.copy_((y - y.mean(0)).square().mean())
        layers = zip(self.W_enc_FD.split(self.config.per_layer), self.b_enc.split(self.config.per_layer), self.W_dec, strict=True)
        targets, medians = y.split(self.d_out, dim=1), self.b_dec.split(self.d_out)
        for (W_enc_MD, b_enc_M, W_dec), x_BD, y_BD, b_dec_D in zip(layers, self.split(x), targets, medians, strict=True):
            W_enc_MD.copy_(random_directions(len(W_enc_MD), x_BD, generator, self.config.drawn_share))
            b_enc_M.copy_(-W_enc_MD @ x_BD.mean(0))
            W_dec.zero_()
            W_dec[:, 0] = W_enc_MD @ linear_map(x_BD, y_BD)
            b_dec_D.copy_(geometric_median(y_BD))
            scale_to_unit(W_dec.view(len(W_dec), -1))
        self.set_thresholds(x, y)

    def losses(self, batch: TrainingBatch) -> Losses:
        """(squared error + the rule's penalties) / (width of all targets * variance) + aux_coefficient * AuxK."""
        weights = self.weights()
        fit = self.objective(batch, weights)
        squared_error_B = fit.error_BW.detach().square().sum(1)
        scale = batch.y.shape[1] * self.variance
        parts = {"reconstruction": squared_error_B.mean() / scale, **fit.parts}
        total = fit.loss / scale
        if self.config.aux_coefficient:
            aux = self.auxk(batch.x, fit.error_BW.detach(), weights, batch.dead_F)
            total = total + self.config.aux_coefficient * aux
            parts["auxk"] = aux.detach()
        codes = SparseCodes.side_by_side([code.detach() for code in fit.codes])
        return Losses(total, parts, codes, squared_error_B, batch.y)

    def auxk(self, x_BW: Tensor, error_BW: Tensor, weights: Sequence[Weights], dead_F: Tensor) -> Tensor:
        """The share of the residual of all targets that the strongest dead latents, k_aux of each layer, miss together."""
        if not dead_F.any():
            return x_BW.new_zeros(())
        written = []
        dead = [dead_M.nonzero()[:, 0] for dead_M in dead_F.split(self.config.per_layer)]
        for dead_K, x_BD, layer in zip(dead, self.split(x_BW), weights, strict=True):
            if len(dead_K):
                codes = encode_topk(x_BD, layer.W_enc_FD, layer.b_enc_F, None, self.k_aux, layer.norm_F, dead_K)
                written.append(layer.decode(codes))
            else:
                written.append(x_BD.new_zeros(len(x_BD), layer.W_dec_FD.shape[1]))
        return missed_share((self.join(written) + error_BW).square().sum(1), error_BW)

    def unit_rows(self) -> Sequence[Tensor]:
        return tuple(self.W_dec) if self.config.decoder == "unit" else ()

    @torch.no_grad()
    def fold(self, read: Scaling, write: Scaling) -> None:
        """As in the family: norms of a free decoder go into the latents, shifts into biases, scales into matrices. Where all targets
        have one scale, all that a latent writes keeps its length."""
        norms = [layer.norm_F for layer in self.weights() if layer.norm_F is not None]
        if norms:
            self.scale_biases(torch.cat(norms))
            self.W_enc_FD *= torch.cat(norms)[:, None]
            for W, norm_M in zip(self.W_dec, norms, strict=True):
                W /= norm_M[:, None, None]
        out = write.uniform or float(write.scale_D.log().mean().exp())
        scales, offsets = read.scale_D.split(self.d_in), (read.shift_D * read.scale_D).split(self.d_in)
        encoders = zip(self.W_enc_FD.split(self.config.per_layer), self.b_enc.split(self.config.per_layer), strict=True)
        for (W_enc_MD, b_enc_M), scale_D, offset_D in zip(encoders, scales, offsets, strict=True):
            b_enc_M -= W_enc_MD @ offset_D
            W_enc_MD *= scale_D / out
        self.scale_biases(1 / out)
        for layer, W in enumerate(self.W_dec):
            W *= out / write.scale_D[layer * self.d_out :].view(-1, self.d_out)
        self.b_dec /= write.scale_D
        self.b_dec += write.shift_D
        self.variance /= out**2
        self.folded = True
        self.drop_training()


class CLT(CrossLayerConfig):
    """Configuration of a cross-layer transcoder that keeps the k strongest latents."""

    architecture = "clt"

    k: int = Field(default=32, gt=0)
    """Latents active on each token, at most: of each layer, or of all layers together."""
    joint: bool = False
    """Whether latents of all layers compete for one k. The codes of a layer then depend on the inputs of later ones too."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of AuxK, by which dead latents learn to reconstruct the residual; 0 leaves it out."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.joint and self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}: lower k or raise d_sae")
        if not self.joint and self.k > self.per_layer:
            raise ValueError(
                f"k={self.k} exceeds the {self.per_layer} latents of each layer: lower k or raise d_sae={self.d_sae}"
            )
        return self

    @property
    def default_id(self) -> str:
        return f"{self.architecture}-{self.d_sae}-{'joint-' if self.joint else ''}k{self.k}"


@register(CLT)
class TopKCrossLayerTranscoder(CrossLayerTranscoder):
    """f^l = ReLU(top k of x^l W_enc^l + b_enc^l), top k of each layer or of all layers together."""

    config: CLT

    def __init__(self, config: CLT):
        super().__init__(config)
        self.causal = not config.joint

    def select_layer(self, layer: int, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return encode_topk(x_BD, weights.W_enc_FD, weights.b_enc_F, None, self.config.k, weights.norm_F)

    def select(self, inputs: Sequence[Tensor], weights: Sequence[Weights]) -> list[SparseCodes]:
        if not self.config.joint:
            return super().select(inputs, weights)
        encoders = list(zip(inputs, weights, strict=True))
        with torch.no_grad():  # what is among the k largest of all is among the k largest of its layer
            k, per_layer = self.config.k, self.config.per_layer
            best = SparseCodes.side_by_side(
                [encode_topk(x_BD, of.W_enc_FD, of.b_enc_F, None, k, of.norm_F) for x_BD, of in encoders]
            )
            order_BN = best.indices.argsort(1)  # so that of equal scores the lowest number wins
            values_BK, places_BK = select_topk(best.values.gather(1, order_BN), k)
            indices_BK = best.indices.gather(1, order_BN).gather(1, places_BK)
            parts = SparseCodes(indices_BK, values_BK, best.d_sae).split([per_layer] * len(encoders))
        return [
            with_gradient(part, x_BD, of.W_enc_FD, of.b_enc_F, None, of.norm_F)
            for part, (x_BD, of) in zip(parts, encoders, strict=True)
        ]
