"""TopK dictionaries of one shape as one, whose objective is that of each (kernels/stacked.py): their matrices lie below each other.

Everything but the selection and what is summed over tokens is that of a single dictionary, latent by latent and token by token.
Shape suffixes: `n` dictionaries, `B` tokens of each, `D` width of what is read or written, `F` d_sae of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch
from saebench.dictionaries.sae import Weights
from saebench.dictionaries.topk import TopKDictionary
from saebench.kernels import decode_error, encode_topk
from saebench.kernels.latent_gradient import Parts, collect


class StackedTopK(TopKDictionary):
    """A TopK dictionary with n F latents, whose batches are x_nBD, y_nBD and dead_nF, and whose losses are [n]. Its memory is that of
    its parts, which are to move in."""

    def __init__(self, parts: Sequence[TopKDictionary]):
        super().__init__(parts[0].config)
        self.stacked, self.ks = list(parts), [part.config.k for part in parts]
        for name, parameter in parts[0].named_parameters():
            shape = (len(parts), *parameter.shape) if name == "b_dec" else (len(parts) * len(parameter), *parameter.shape[1:])
            setattr(self, name, nn.Parameter(parameter.new_empty(shape)))
        self.collected: dict[str, Parts] = {name: collect(p) for name, p in self.named_parameters() if name.startswith("W_")}
        self.variance = torch.stack([part.variance for part in parts])

    def memory(self, number: int) -> dict[str, Tensor]:
        """Where a part's parameters lie, by name."""
        return {
            name: p.data.chunk(len(self.ks))[number].view(getattr(self.stacked[number], name).shape)
            for name, p in self.named_parameters()
        }

    def forget_gradients(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.grad = None
            if name in self.collected:
                self.collected[name].clear()

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        return encode_topk(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, self.ks, weights.norm_F)

    def error(self, codes: SparseCodes, weights: Weights, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Errors [n B, D] and their squared lengths [n, B]."""
        error_BD, squares_B = decode_error(weights.unscaled(codes), weights.W_dec_FD, self.b_dec, batch.y)
        return error_BD, squares_B.view(len(self.ks), -1)

    def auxk(self, batch: TrainingBatch, error_BD: Tensor, weights: Weights) -> Tensor:
        """Of each its own, from its own parameters: latents die in different numbers."""
        if batch.most_dead == 0 or (batch.most_dead is None and not batch.dead_F.any()):
            return error_BD.new_zeros(len(self.ks))
        found = []
        for part, x_BD, e_BD, dead_F in zip(self.stacked, batch.x, error_BD.chunk(len(self.ks)), batch.dead_F, strict=True):
            found.append(part.auxk(TrainingBatch(x_BD, x_BD, dead_F, most_dead=batch.most_dead), e_BD, part.weights()))
        return torch.stack(found)
