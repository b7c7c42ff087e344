"""BatchTopK (Bussmann et al. 2024; methods.md T3): the k * B largest pre-activations of a batch of B tokens, so that a token gets as many
latents as it needs. At inference a threshold takes the place of the batch.

The threshold is a running average of the smallest pre-activation that each training batch kept. It remembers a twentieth of the run, at
most 1000 steps (the 0.999 of the book), so it follows the weights in a short run as in a long one, and needs no late start: what the
first steps left in it has faded by a factor of e^20 at the end.
The logged `l0` is that of the training batches, k unless scores run out; held-out figures are those of the threshold. If the two differ,
compare the logged `threshold` with `smallest_kept`: a threshold that lies below lags behind weights that still grow.
Shape suffixes: `B` tokens, `D` width of what is read, `F` d_sae.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.dictionaries.base import TrainingBatch, register
from saebench.dictionaries.sae import Fit, Weights
from saebench.dictionaries.topk import KRule, KRuleDictionary
from saebench.kernels import encode_above, encode_batch_topk

MEMORY_SHARE, MEMORY_STEPS = 1 / 20, 1000
GUESS = 0.95  # of the last batch's smallest kept value: rarely above the next one's, and few candidates lie between


class BatchTopK(KRule):
    """Configuration of a BatchTopK sparse autoencoder, or transcoder where `target` is given."""

    architecture = "batchtopk"

    inference: Literal["threshold", "batch"] = "threshold"
    """What a finished dictionary keeps: scores above the learned threshold, or the k * B largest of whatever batch it is given."""


class OrtSAE(BatchTopK):
    """BatchTopK with decoder rows kept apart (methods.md T8): the published setting of the family's `orthogonality`."""

    architecture = "ortsae"

    orthogonality: float = Field(default=0.25, ge=0)
    """Weight of the penalty on decoder rows that are alike."""


@register(OrtSAE)
@register(BatchTopK)
class BatchTopKDictionary(KRuleDictionary):
    """z = (x - b_dec) W_enc + b_enc; f = the k * B largest positive z of a batch, or z where z > threshold."""

    config: BatchTopK

    def __init__(self, config: BatchTopK):
        super().__init__(config)
        self.register_buffer("threshold", torch.tensor(-1.0))  # below zero: not known yet
        # of the last batch; it only makes the next one faster
        self.register_buffer("smallest_kept", torch.zeros(()), persistent=False)
        self.threshold: Tensor
        self.smallest_kept: Tensor
        self.followed = False  # whether it says anything; the device would have to be waited for

    def select(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        """By the threshold, unless the configuration says batch or no threshold is known yet."""
        if self.config.inference == "batch" or float(self.threshold) < 0:
            return self.select_batch(x_BD, weights)
        return encode_above(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, self.threshold, weights.norm_F)

    def select_batch(self, x_BD: Tensor, weights: Weights) -> SparseCodes:
        """By comparison within the batch, as in training."""
        count, guess = self.config.k * len(x_BD), GUESS * self.smallest_kept if self.followed else 0.0
        return encode_batch_topk(x_BD, weights.W_enc_FD, weights.b_enc_F, self.b_in, count, guess, weights.norm_F)

    def objective(self, batch: TrainingBatch, weights: Weights) -> Fit:
        """The squared error, with latents compared within the batch."""
        codes = self.select_batch(batch.x, weights)
        error_BD, squares_B = self.error(codes, weights, batch)
        return Fit(codes, error_BD, squares_B, squares_B.mean(), self.follow(codes, batch))

    @torch.no_grad()
    def follow(self, codes: SparseCodes, batch: TrainingBatch) -> dict[str, Tensor]:
        """Move the threshold towards the smallest value kept; returns what is logged of it."""
        if codes.values.numel():
            self.smallest_kept.copy_(codes.values.min())
            self.followed = True
            memory = min(MEMORY_STEPS, max(1.0, MEMORY_SHARE * batch.steps))
            moved = self.threshold + (self.smallest_kept - self.threshold) / memory
            self.threshold.copy_(torch.where(self.threshold < 0, self.smallest_kept, moved))
        return {"threshold": self.threshold.clone(), "smallest_kept": self.smallest_kept.clone()}

    @torch.no_grad()
    def scale_biases(self, factor: Tensor | float) -> None:
        """As the family. The threshold is compared with what latents write, f_i ||d_i||, which factors for single latents leave as it
        is."""
        super().scale_biases(factor)
        if not isinstance(factor, Tensor):
            known = self.threshold >= 0
            self.threshold.copy_(torch.where(known, self.threshold * factor, self.threshold))
