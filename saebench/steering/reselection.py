"""Latents selected anew with their pre-activations z multiplied by a factor each: f' = act(z * factor) (methods.md I2).

The dictionary's own rule and kernels select: the encoder's rows and biases are multiplied, thresholds and k stay. `weight` takes f' as it
is; `swap` takes f' only as a mask and gives the entries in it their own values z. What is written is x + strength (f' - f) W_dec, so that
with factors of 1 nothing changes, to the last bit. Small factors make `weight` shrink all that is written; `swap` does not.
Shape suffixes: `T` tokens, `D` width of what is read or written, `F` d_sae, `N` entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary, SparseAutoencoder
from saebench.dictionaries.gated import GatedDictionary
from saebench.dictionaries.sae import Weights
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.steering.edits import Edit
from saebench.steering.hooks import Change, Pass, check_edit
from saebench.steering.positions import Positions

Mode = Literal["weight", "swap"]


@contextmanager
def reselect(
    lm: LanguageModel,
    dictionary: Dictionary,
    factor_F: Tensor | Sequence[float],
    mode: Mode = "swap",
    *,
    strength: float = 1.0,
    positions: str | Positions = "all",
    keep_error: bool = True,
) -> Iterator[None]:
    """While the block runs, what the dictionary writes is that of latents selected anew, under generation with a cache too.

    Factors are not negative. Raises UserError for a kind of dictionary whose latents are not selected by one pre-activation each, and
    where dictionary or positions do not fit the model.
    """
    if mode not in ("weight", "swap"):
        raise UserError(f"unknown mode {mode!r}: use weight or swap")
    if not isinstance(dictionary, SparseAutoencoder) or isinstance(dictionary, GatedDictionary):
        raise UserError(
            f"{mode} is not for {dictionary.config.architecture!r}, which selects by more than one z a latent: use clamp"
        )
    factors = torch.as_tensor(factor_F, dtype=torch.float32)
    if factors.shape != (dictionary.config.d_sae,) or not (factors.isfinite() & (factors >= 0)).all():
        raise UserError(f"factors have to be {dictionary.config.d_sae:,} finite numbers that are not negative")
    # for hooks this is one more change of codes: where it acts, what is read for it and how often are settled there
    carrier = Edit(
        "scale",
        dictionary.config.writes,
        dictionary,
        strength=strength,
        positions=Positions.parse(positions),
        keep_error=keep_error,
    )
    check_edit(lm, carrier)
    if not strength:
        yield
        return
    running = _Reselection(lm, carrier, dictionary, factors, mode)
    before = lm.hf.base_model.register_forward_pre_hook(running.begin, with_kwargs=True)
    try:
        with lm.edit(running.functions()):
            yield
    finally:
        before.remove()


class _Reselection(Pass):
    """A forward pass in which one dictionary selects anew."""

    def __init__(self, lm: LanguageModel, carrier: Edit, dictionary: SparseAutoencoder, factor_F: Tensor, mode: Mode):
        super().__init__(lm, [carrier])
        self.dictionary, self.mode = dictionary.to(lm.device), mode
        self.factor_F = factor_F.to(lm.device)
        self.weights = dictionary.weights().held()
        self.scaled = scaled(self.weights, self.factor_F)

    def change_of_codes(self, edit: Edit, number: int) -> Change:
        reader, widths = self.readers[id(self.dictionary)], self.dictionary.config.blocks_out

        def apply(x_BsD: Tensor, part: slice) -> Tensor:
            read_TD = reader.inputs(part, self.start, self.size).flatten(0, 1)
            codes = self.dictionary.select(read_TD, self.weights)
            anew = selected_anew(self.dictionary, read_TD, self.scaled, self.factor_F, self.mode)
            written_TD = edit.strength * (self.weights.decode(anew) - self.weights.decode(codes))
            if not edit.keep_error:
                written_TD = self.dictionary.reconstruct(read_TD, codes) + written_TD
            written_BsD = written_TD.split(list(widths), dim=1)[number].view_as(x_BsD)
            return (x_BsD + written_BsD if edit.keep_error else written_BsD).to(x_BsD.dtype)

        return apply


def scaled(weights: Weights, factor_F: Tensor) -> Weights:
    """An encoder whose pre-activations are multiplied by a factor each."""
    return replace(weights, W_enc_FD=weights.W_enc_FD * factor_F[:, None], b_enc_F=weights.b_enc_F * factor_F)


def selected_anew(dictionary: SparseAutoencoder, x_TD: Tensor, weights: Weights, factor_F: Tensor, mode: Mode) -> SparseCodes:
    """The codes by scaled weights; with `swap` in the values that their latents have by themselves."""
    codes = dictionary.select(x_TD, weights)
    if mode == "weight":
        return codes
    factors = factor_F[codes.indices.reshape(-1).long()].reshape(codes.values.shape)
    return codes.replaced(torch.where(codes.values != 0, codes.values / factors.clamp_min(1e-30), codes.values))
