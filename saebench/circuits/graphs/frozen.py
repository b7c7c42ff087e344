"""The linear pieces that a model is made of around one prompt: norms whose scales are held, attention whose patterns are held.

Each piece goes forwards, with its biases or without, and backwards: `pull` takes what a number depends on behind the piece to what it
depends on before it. Backwards there are two forms: all positions [T, S, D], or one position for each target [T, D], which is where
most targets begin.
Shape suffixes: `T` targets, `S` positions, `D` width of the stream, `H` heads, `E` width of a head, `G` patterns, `N` latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.lm.attention import AttentionWeights

TOLERANCE = 1e-3  # of frozen pieces against the model's own, relative
EQUAL = 1e-5  # forms of a norm that fit equally well, relative


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its scale at every position a constant: n = (r, centred or not) * scale * gain + bias."""

    scale_S: Tensor
    """1 / sigma: of the prompt, where the gain is of the model."""
    gain_D: Tensor
    bias_D: Tensor
    centred: bool

    @classmethod
    def of(cls, norm: Any, r_SD: Tensor, n_SD: Tensor, where: str) -> FrozenNorm:
        """From the module, what it read and what it made of it. Raises UserError where it is no layer norm or RMS norm."""
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        weight_D = torch.ones_like(r_SD[0]) if weight is None else weight.detach().float()
        bias_D = torch.zeros_like(r_SD[0]) if bias is None else bias.detach().float()
        fits = []
        for centred in (True, False):
            for gain_D in (weight_D, 1 + weight_D):  # some models keep the gain as 1 + weight
                x_SD = (_centred(r_SD) if centred else r_SD).double()
                form_SD = x_SD * gain_D
                scale_S = ((n_SD - bias_D) * form_SD).sum(1) / form_SD.square().sum(1).clamp_min(1e-300)
                missed = (form_SD * scale_S[:, None] + bias_D - n_SD).norm() / n_SD.norm().clamp_min(1e-30)
                strange = (scale_S * x_SD.square().mean(1).sqrt() - 1).abs().median()  # a scale is 1 over the size
                fits.append((float(missed), float(strange), scale_S.float(), gain_D, centred))
        best = min(fit[0] for fit in fits)
        missed, _, scale_S, gain_D, centred = min((fit for fit in fits if not fit[0] > best + EQUAL), key=lambda fit: fit[1])
        if not missed < TOLERANCE:
            raise UserError(
                f"{where} is not a norm of the residual stream that scales and shifts (off by {missed:.0%}): graphs are for models whose "
                "attention and MLP follow each other, each behind a layer norm or RMS norm, such as GPT-2 and Llama"
            )
        return cls(scale_S, gain_D, bias_D, centred)

    @cached_property
    def gain_SD(self) -> Tensor:
        """Scale and gain together."""
        return self.scale_S[:, None] * self.gain_D

    @property
    def unit(self) -> FrozenNorm:
        """Its one position in any prompt, the scale taken as 1: what the weights alone say of it."""
        return FrozenNorm(torch.ones_like(self.scale_S[:1]), self.gain_D, self.bias_D, self.centred)

    def linear(self, r_SD: Tensor) -> Tensor:
        """Without the bias."""
        return (_centred(r_SD) if self.centred else r_SD) * self.gain_SD

    def __call__(self, r_SD: Tensor) -> Tensor:
        return self.linear(r_SD) + self.bias_D

    def pull(self, g: Tensor, positions_T: Tensor | None = None) -> Tensor:
        """[T, S, D], or [T, D] at one position each."""
        g = g * (self.gain_SD[: g.shape[1]] if positions_T is None else self.gain_SD[positions_T])
        return _centred(g) if self.centred else g


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@dataclass(frozen=True)
class FrozenAttention:
    """Attention with its patterns held: linear in what it reads, by the way of the values."""

    weights: AttentionWeights
    pattern_HSS: Tensor
    post: FrozenNorm | None = None
    """Between its output and the stream, where a model has one there."""

    @property
    def unit(self) -> FrozenAttention:
        """Of one position, which every head looks at: what the weights alone say of it."""
        pattern_HSS = torch.ones_like(self.pattern_HSS[:, :1, :1])
        return FrozenAttention(self.weights, pattern_HSS, None if self.post is None else self.post.unit)

    def heads(self, n_SD: Tensor, *, biases: bool) -> Tensor:
        """What the heads gather, side by side: [S, H * E]."""
        v_HSE = n_SD @ self.weights.W_V_HDE
        if biases:
            v_HSE = v_HSE + self.weights.b_V_HE[:, None]
        return (self.pattern_HSS @ v_HSE).transpose(0, 1).flatten(1)

    def mixed(self, z_SX: Tensor) -> Tensor:
        """From the heads' space to the stream, without the bias: [S, H * E] to [S, D]."""
        out_SD = z_SX @ self.weights.W_O_HED.flatten(0, 1)
        return out_SD if self.post is None else self.post.linear(out_SD)

    @property
    def bias_SD(self) -> Tensor:
        """What it writes when the heads gather nothing."""
        bias_SD = self.weights.b_O_D.expand(self.pattern_HSS.shape[1], -1)
        return bias_SD if self.post is None else self.post(bias_SD)

    def linear(self, n_SD: Tensor) -> Tensor:
        return self.mixed(self.heads(n_SD, biases=False))

    def __call__(self, n_SD: Tensor) -> Tensor:
        return self.mixed(self.heads(n_SD, biases=True)) + self.bias_SD

    def unmixed(self, g: Tensor, positions_T: Tensor | None = None) -> Tensor:
        """`mixed` backwards: [T, S, D], or [T, D] at one position each, to [..., H * E]."""
        if self.post is not None:
            g = self.post.pull(g, positions_T)
        return g @ self.weights.W_O_HED.flatten(0, 1).T

    def pull(self, g_TSD: Tensor) -> Tensor:
        """All positions at once."""
        count, size = g_TSD.shape[:2]
        heads, d_head = self.weights.num_heads, self.weights.d_head
        g_HSX = self.unmixed(g_TSD).view(count, size, heads, d_head).permute(2, 1, 0, 3).reshape(heads, size, -1)
        g_HSX = self.pattern_HSS[:, :size, :size].mT @ g_HSX
        g_TSX = g_HSX.view(heads, size, count, d_head).permute(2, 1, 0, 3).reshape(count, size, -1)
        return g_TSX @ self.weights.W_V_HDE.transpose(1, 2).reshape(heads * d_head, -1)

    def pull_heads_at(self, g_TX: Tensor, positions_T: Tensor) -> Tensor:
        """From the heads' space at one position each [T, H * E] to all positions that it looks at, up to the last of them: [T, S, D]."""
        u_THD = self.values_back(g_TX)
        looks_THS = self.pattern_HSS[:, positions_T, : int(positions_T.max()) + 1].transpose(0, 1)
        return looks_THS.mT @ u_THD

    def values_back(self, g_TX: Tensor) -> Tensor:
        """What each head's values depend on: [T, H, D]."""
        g_HTE = g_TX.view(len(g_TX), self.weights.num_heads, -1).transpose(0, 1)
        return (g_HTE @ self.weights.W_V_HDE.mT).transpose(0, 1)
