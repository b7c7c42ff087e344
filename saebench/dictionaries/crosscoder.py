"""Crosscoder (Lindsey et al. 2024; methods.md T11): one code for several places, layers of a model or the same layer of two models, each
with an encoder and a decoder of its own. f = act(sum over sources of x^h W_enc^h + b_enc); x_hat^h = f W_dec^h + b_dec^h.

Every rule of the family is a crosscoder where `site` is a list. This one is BatchTopK that ranks f_i times the sum of the lengths of
latent i's decoders. The published loss, L1 of that product, is `architecture = "relu"` with `decoder = "free"` and
`subtract_b_dec = false`.
What a latent belongs to is read from its decoders' lengths. They are compared in normalised units, each source divided by its own
scale, or else the source with the longer activations would seem to own everything.
Shape suffixes: `B` tokens, `D` width of all sources together, `F` d_sae, `H` sources.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saebench.dictionaries.base import Dictionary, register
from saebench.dictionaries.batchtopk import BatchTopK, BatchTopKDictionary
from saebench.dictionaries.sae import SparseAutoencoder
from saebench.errors import UserError

FIRST_ONLY, SECOND_ONLY = 0.3, 0.7  # relative norms below and above which a latent belongs to one source


class Crosscoder(BatchTopK):
    """Configuration of a crosscoder by the BatchTopK rule."""

    architecture = "crosscoder"

    decoder: Literal["unit", "free"] = "free"
    """Decoder rows of unit length, or of any length with sparsity measured on f_i (||d_i^1|| + ... + ||d_i^H||)."""
    initial_norm: float = Field(default=0.3, gt=0)
    """Length of a free decoder's rows at the start, so that what a latent owns is learned and not drawn: 1 leaves more error, 0.1 more
    dead latents."""
    subtract_b_dec: bool = False
    """Whether b_dec is subtracted from the input."""
    centre: bool = True
    """Whether the mean of each site is subtracted while training, and folded into the biases afterwards."""

    @model_validator(mode="after")
    def _several_sites(self) -> Self:
        if len(self.reads) < 2:
            raise ValueError(
                "a crosscoder reads several places: give site as a list of two or more, such as "
                'site = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]'
            )
        if len(set(self.reads)) < len(self.reads):
            raise ValueError(f"site names {', '.join(self.reads)} repeat: name each once")
        return self


@register(Crosscoder)
class CrosscoderDictionary(BatchTopKDictionary):
    """The BatchTopK rule over several sites."""

    config: Crosscoder

    def initialise(self, x: Tensor, y: Tensor, generator: torch.Generator, lm: Any = None) -> None:
        """As the family; and, where b_dec is not subtracted, with biases that do so to begin with."""
        super().initialise(x, y, generator, lm)
        if self.config.rewrites and self.b_in is None:
            with torch.no_grad():
                self.b_enc.copy_(-self.W_enc_FD @ self.b_dec)


def source_norms(dictionary: SparseAutoencoder) -> Tensor:
    """The length of every latent's decoder in every site it writes, in the units of training: [F, H]."""
    blocks = dictionary.W_dec.detach().split(list(dictionary.config.blocks_out), dim=1)
    scales = site_scales(dictionary)
    return torch.stack([block.norm(dim=1) * scale for block, scale in zip(blocks, scales, strict=True)], 1)


def site_scales(dictionary: Dictionary) -> list[float]:
    """What the activations of each site written were multiplied by while the dictionary was trained; 1 where nobody trained it."""
    scales = dictionary.trained_on.get("scales", {})
    return [scales.get(site, 1.0) for site in dictionary.config.writes] or [1.0] * len(dictionary.config.blocks_out)


def relative_norms(dictionary: SparseAutoencoder, first: str | None = None, second: str | None = None) -> Tensor:
    """rho = ||d^second|| / (||d^first|| + ||d^second||) of every latent: near 0 it belongs to the first source, near 1 to the second,
    at 0.5 to both alike; NaN for a latent that writes neither. [F]. Sites may be left out where there are two. Raises UserError
    for unknown sites."""
    norms_FH = source_norms(dictionary)
    a, b = _pair(dictionary, first, second)
    return norms_FH[:, b] / (norms_FH[:, a] + norms_FH[:, b])


def belonging(rho_F: Tensor) -> dict[str, Tensor]:
    """Latents by relative norm: masks [F] of those of the first source only (below 0.3), shared, and of the second only (above
    0.7). A statement about decoders: whether the other source lacks the concept is for its activations to tell."""
    first, second = rho_F < FIRST_ONLY, rho_F > SECOND_ONLY
    return {"first_only": first, "shared": ~first & ~second & ~rho_F.isnan(), "second_only": second}


def decoder_cosines(dictionary: SparseAutoencoder, first: str | None = None, second: str | None = None) -> Tensor:
    """The cosine of every latent's decoders in two sources of equal width: [F]. Raises UserError where the widths differ."""
    a, b = _pair(dictionary, first, second)
    blocks = dictionary.W_dec.detach().split(list(dictionary.config.blocks_out), dim=1)
    if blocks[a].shape != blocks[b].shape:
        raise UserError(
            f"decoders of {blocks[a].shape[1]} and {blocks[b].shape[1]} numbers have no cosine: sources differ in width"
        )
    return torch.nn.functional.cosine_similarity(blocks[a], blocks[b], dim=1)


def _pair(dictionary: SparseAutoencoder, first: str | None, second: str | None) -> tuple[int, int]:
    """The two sources asked for, by number."""
    sites = dictionary.config.writes
    if first is None and second is None and len(sites) == 2:
        return 0, 1
    if first not in sites or second not in sites:
        raise UserError(f"{first!r} and {second!r} are not two of the sites that the dictionary writes: {', '.join(sites)}")
    return sites.index(first), sites.index(second)
