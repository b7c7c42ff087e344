"""What an attention-output dictionary's latents are made of (Kissane et al. 2024; methods.md T14): heads, source positions, and the
parts of the residual stream that the heads read there.

The dictionary is any of the family on `blocks.N.attn.hook_z`, the heads' outputs side by side before they are mixed. Everything here
explains the pre-activation of a latent, z = (x - b_in) . w + b_enc, exactly: parts and constants add up to it. Attention patterns are
taken as given, and so are the scales of the layer norm.
Shape suffixes: `C` contexts, `S` source positions, `T` target positions, `H` heads, `E` width of a head, `D` width of the residual stream,
`B` tokens, `F` d_sae.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saebench.dictionaries.base import Dictionary
from saebench.dictionaries.sae import SparseAutoencoder
from saebench.errors import UserError

SITE = re.compile(r"blocks\.(\d+)\.attn\.hook_z")
TOLERANCE = 1e-3  # of frozen layers against the model's own, relative


def head_shares(dictionary: SparseAutoencoder, num_heads: int) -> Tensor:
    """Each head's part of the length of every latent's decoder: [F, H], rows add up to 1. Raises UserError where heads do not divide
    the width."""
    norms_FH = _by_head(dictionary.W_dec.detach(), num_heads).norm(dim=2)
    return norms_FH / norms_FH.sum(1, keepdim=True)


def head_attribution(dictionary: SparseAutoencoder, z_BD: Tensor, latent: int, num_heads: int) -> Tensor:
    """What each head adds to a latent's pre-activation: [B, H]; with b_enc[latent] they add up to it. b_dec is shared out by head."""
    w_HE, _ = _encoder(dictionary, latent, num_heads)
    centred_BD = z_BD if dictionary.b_in is None else z_BD - dictionary.b_in
    return (_by_head(centred_BD, num_heads) * w_HE).sum(2)


@dataclass(frozen=True)
class SourceAttribution:
    """A latent's pre-activation at every target position, by head and source position; `constant` is what no position adds."""

    by_head_CHTS: Tensor
    constant: float

    @property
    def by_source_CTS(self) -> Tensor:
        """All heads together."""
        return self.by_head_CHTS.sum(1)

    @property
    def pre_activation_CT(self) -> Tensor:
        return self.by_source_CTS.sum(2) + self.constant


@torch.no_grad()
def source_attribution(dictionary: SparseAutoencoder, lm: Any, ids_CS: Tensor, latent: int) -> SourceAttribution:
    """How much of a latent's pre-activation at every position each head carries there from every source position (direct feature
    attribution): A[t, s] v_s . w. Raises UserError for a dictionary that does not read one `blocks.N.attn.hook_z`."""
    layer = _layer(dictionary)
    pattern_CHTS, values_CSHE = _attention(lm, layer, ids_CS)
    w_HE, constant = _encoder(dictionary, latent, pattern_CHTS.shape[1])
    if dictionary.b_in is not None:
        constant -= float(dictionary.b_in @ w_HE.flatten())
    return SourceAttribution(pattern_CHTS * torch.einsum("cshe,he->chs", values_CSHE, w_HE)[:, :, None], constant)


@dataclass(frozen=True)
class Part:
    """One term of a pre-activation: latent `latent` of the dictionary at `site`, active at `position`; or what is left of the component
    at `site` there, its bias and the dictionary's error (latent None). Constants have no position."""

    site: str
    position: int | None
    latent: int | None
    value: float
    parts: list[Part] = field(default_factory=list)
    """What the latent's own pre-activation is made of, where that was asked for."""


@torch.no_grad()
def component_attribution(
    dictionaries: Mapping[int, SparseAutoencoder] | SparseAutoencoder,
    lm: Any,
    ids_S: Tensor,
    latent: int,
    position: int,
    *,
    layer: int | None = None,
    writers: Mapping[str, SparseAutoencoder] | None = None,
    depth: int = 1,
    branches: int = 3,
) -> list[Part]:
    """A latent's pre-activation at one position of one context [S] as a sum over what the residual stream held at the source positions:
    embedding, outputs of earlier attention and MLP layers, those of which dictionaries exist by latent and error. Largest first.

    `dictionaries` are attention-output dictionaries by layer (or one); the one explained is that of `layer` (default the last).
    `writers` are dictionaries by the site they write, `blocks.N.hook_mlp_out`. With `depth > 1` the `branches` largest parts that are
    latents of attention-output dictionaries are taken apart in turn (recursive attribution). Raises UserError for models whose layer
    norm, values or attention output are not of the usual form.
    """
    if isinstance(dictionaries, SparseAutoencoder):
        dictionaries = {_layer(dictionaries): dictionaries}
    layer = max(dictionaries) if layer is None else layer
    if layer not in dictionaries or not 0 <= position < len(ids_S):
        raise UserError(f"layer {layer} has no dictionary, or position {position} is outside the {len(ids_S)} tokens given")
    dictionary, writers = dictionaries[layer], writers or {}
    ids_CS = ids_S[None]
    direct = source_attribution(dictionary, lm, ids_CS, latent)

    path_SD, biases_S = _direction(dictionary, lm, ids_CS, layer, latent, position)
    site = f"blocks.{layer}.attn.hook_z"
    parts = [Part(site, None, None, direct.constant)]
    parts += [Part(f"blocks.{layer}.ln1.hook_out", s, None, v) for s, v in enumerate(biases_S.tolist())]
    sums = _written(lm, ids_CS, layer)
    for name, y_SD in sums.items():
        rest_SD = y_SD
        for source, latents in _latents_of(name, dictionaries, writers, lm, ids_CS):
            positions_N, latents_N, writes_ND = latents
            rest_SD = rest_SD.index_add(0, positions_N, -writes_ND)
            values_N = (writes_ND * path_SD[positions_N]).sum(1)
            found = zip(positions_N.tolist(), latents_N.tolist(), values_N.tolist(), strict=True)
            parts += [Part(source, s, f, v) for s, f, v in found if s <= position]
        parts += [Part(name, s, None, v) for s, v in enumerate((rest_SD * path_SD).sum(1).tolist()) if s <= position]
    parts.sort(key=lambda part: -abs(part.value))
    if depth > 1:
        taken = [part for part in parts if part.latent is not None and SITE.fullmatch(part.site)][:branches]
        for part in taken:
            assert part.latent is not None and part.position is not None
            below = int(SITE.fullmatch(part.site)[1])  # type: ignore[index]
            part.parts.extend(
                component_attribution(
                    dictionaries, lm, ids_S, part.latent, part.position,
                    layer=below, writers=writers, depth=depth - 1, branches=branches,
                )
            )  # fmt: skip
    return parts


def _direction(
    dictionary: SparseAutoencoder, lm: Any, ids_CS: Tensor, layer: int, latent: int, position: int
) -> tuple[Tensor, Tensor]:
    """What a vector in the residual stream before the layer adds to the pre-activation, from every source position [S, D], and what
    the biases of layer norm and values add there [S]."""
    pattern_CHTS, values_CSHE = _attention(lm, layer, ids_CS)
    heads = pattern_CHTS.shape[1]
    w_HE, _ = _encoder(dictionary, latent, heads)
    attention = lm.bridge.blocks[layer].attn
    expand = lambda t: t.repeat_interleave(heads // len(t), 0)  # noqa: E731
    W_V_HDE = expand(attention.W_V)
    b_V_HE = values_CSHE.new_zeros(w_HE.shape) if attention.b_V is None else expand(attention.b_V.view(-1, w_HE.shape[1]))
    names = [f"blocks.{layer}.{end}" for end in ("hook_resid_pre", "ln1.hook_out")]
    r_SD, n_SD = (value[0] for value in lm.read(ids_CS, names).values())
    _check(
        torch.einsum("sd,hde->she", n_SD, W_V_HDE) + b_V_HE, values_CSHE[0], "values that are linear in the layer norm's output"
    )
    reads_SD = torch.einsum("hs,hde,he->sd", pattern_CHTS[0, :, position], W_V_HDE, w_HE)
    gain_SD, bias_D, centred = _frozen_norm(lm.site(names[1]).module(lm.hf), r_SD, n_SD)
    biases_S = reads_SD @ bias_D + torch.einsum("hs,he,he->s", pattern_CHTS[0, :, position], b_V_HE, w_HE)
    path_SD = reads_SD * gain_SD
    return path_SD - path_SD.mean(1, keepdim=True) if centred else path_SD, biases_S[: position + 1]


def _frozen_norm(norm: Any, r_SD: Tensor, n_SD: Tensor) -> tuple[Tensor, Tensor, bool]:
    """A layer norm with its scale at every position taken as a constant: n = (r, centred or not) * gain [S, D] + bias [D]. Raises
    UserError where it is none."""
    bias = getattr(norm, "bias", None)
    bias_D = torch.zeros_like(r_SD[0]) if bias is None else bias
    fits = []
    for centred in (True, False):
        for weight_D in (norm.weight, 1 + norm.weight):
            form_SD = (r_SD - r_SD.mean(1, keepdim=True) if centred else r_SD) * weight_D
            scale_S = ((n_SD - bias_D) * form_SD).sum(1) / form_SD.square().sum(1)
            error = (form_SD * scale_S[:, None] + bias_D - n_SD).norm()
            fits.append((float(error), scale_S[:, None] * weight_D, centred))
    error, gain_SD, centred = min(fits, key=lambda fit: fit[0])
    _check(error / n_SD.norm(), n_SD.new_zeros(()), "a layer norm that scales and shifts")
    return gain_SD, bias_D, centred


def _written(lm: Any, ids_CS: Tensor, layer: int) -> dict[str, Tensor]:
    """What the residual stream before a layer is the sum of: [S, D] by site."""
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{below}.{end}" for below in range(layer) for end in ("hook_attn_out", "hook_mlp_out")]
    read = lm.read(ids_CS, [*names, f"blocks.{layer}.hook_resid_pre"])
    total = sum(read[name][0] for name in names)
    _check(total, read[f"blocks.{layer}.hook_resid_pre"][0], "a residual stream that is the sum of its layers' outputs")
    return {name: read[name][0] for name in names}


def _latents_of(
    name: str, dictionaries: Mapping[int, SparseAutoencoder], writers: Mapping[str, SparseAutoencoder], lm: Any, ids_CS: Tensor
) -> list[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Active latents behind a component of the residual stream: site, and (position, latent, what it writes [N, D])."""
    layer = int(name.split(".")[1])
    if name.endswith("hook_attn_out") and layer in dictionaries:
        dictionary, site = dictionaries[layer], f"blocks.{layer}.attn.hook_z"
        read = lm.read(ids_CS, [site, name])
        output = lm.site(site).module(lm.hf)
        _check(output(read[site]), read[name], "an attention output that is linear in the heads' outputs")
        mixed = lambda z_ND: output(z_ND) - output(torch.zeros_like(z_ND[:1]))  # noqa: E731
    elif name in writers:
        dictionary, site = writers[name], name
        if dictionary.config.writes != (name,):
            raise UserError(f"the dictionary given for {name!r} writes {' + '.join(dictionary.config.writes) or 'no named site'}")
        mixed = lambda y_ND: y_ND  # noqa: E731
    else:
        return []
    x_SD = torch.cat([value[0] for value in lm.read(ids_CS, list(dictionary.config.reads)).values()], 1).float()
    positions_N, latents_N, values_N = dictionary.encode(x_SD).nonzero()
    directions_ND = dictionary.weights().folded().W_dec_FD[latents_N]
    return [(site, (positions_N, latents_N, mixed(values_N[:, None] * directions_ND)))]


def _attention(lm: Any, layer: int, ids_CS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention patterns [C, H, T, S] and values [C, S, H, E] of a layer, values that heads share repeated for each."""
    names = [f"blocks.{layer}.attn.hook_{end}" for end in ("pattern", "v")]
    lm.check_context(ids_CS.shape[1])
    _, cache = lm.bridge.run_with_cache(ids_CS.long().to(lm.device), names_filter=names)
    pattern_CHTS, values_CSHE = (cache[name].float() for name in names)
    return pattern_CHTS, values_CSHE.repeat_interleave(pattern_CHTS.shape[1] // values_CSHE.shape[2], 2)


def _encoder(dictionary: SparseAutoencoder, latent: int, num_heads: int) -> tuple[Tensor, float]:
    """A latent's encoder by head [H, E] and its bias."""
    weights = dictionary.weights().folded()
    if not 0 <= latent < len(weights.W_enc_FD):
        raise UserError(f"latent {latent} is not one of the {len(weights.W_enc_FD)}, counted from 0")
    return _by_head(weights.W_enc_FD[latent].detach(), num_heads), float(weights.b_enc_F[latent])


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    if x.shape[-1] % num_heads:
        raise UserError(f"{num_heads} heads do not divide a width of {x.shape[-1]}: is this a dictionary of attn.hook_z?")
    return x.unflatten(-1, (num_heads, -1))


def _layer(dictionary: Dictionary) -> int:
    reads = dictionary.config.reads
    if len(reads) != 1 or not (match := SITE.fullmatch(reads[0])):
        raise UserError(f"the dictionary reads {' + '.join(reads) or 'no named site'}: this is for one blocks.N.attn.hook_z")
    return int(match[1])


def _check(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises UserError where a model is not built as the arithmetic takes it to be."""
    if float((found - expected).norm()) > TOLERANCE * max(1.0, float(expected.norm())):
        raise UserError(
            f"this model has no {what.removeprefix('a ').removeprefix('an ')}: attribution by component is not exact for it"
        )
