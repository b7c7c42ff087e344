"""How a vector in the residual stream acts on the logits when nothing but the final norm stands between."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

RESIDUAL = re.compile(r"blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_attn_out|hook_mlp_out)")


def writes_residual(site: str) -> bool:
    """Whether what stands at a site is in the residual stream, or is added to it as it is."""
    return RESIDUAL.fullmatch(site) is not None


@torch.no_grad()
def direct_unembedding(hf: Any, norm: Any) -> Tensor:
    """The matrix [V, D] that takes a vector d to what it adds to the logits: gain * W_U, with the mean over D removed where the final norm
    removes it. The norm's scale, which depends on the rest of the stream, is taken as 1."""
    W_U_VD = hf.get_output_embeddings().weight.detach().float()
    gain_D, centred = _gain(norm, W_U_VD.shape[1])
    direct_VD = W_U_VD * gain_D
    return (direct_VD - direct_VD.mean(1, keepdim=True) if centred else direct_VD).cpu()


def _gain(norm: Any, width: int) -> tuple[Tensor, bool]:
    """What a norm multiplies each coordinate by, found from what it does, so that weights kept as 1 + w are right too; and whether it
    removes the mean. Vectors of +1 and -1 have a scale of 1; they are long, so that epsilon does not count."""
    weight = next(norm.parameters())
    signs_D = torch.ones(width, device=weight.device)
    signs_D[1 : width - width % 2 : 2] = -1
    signs_D[width - width % 2 :] = 0  # of an odd number the last, which is found by another vector
    length = 1000.0

    def apart(x_D: Tensor) -> Tensor:
        high_D, low_D = (norm((sign * length * x_D).to(weight.dtype)).float() for sign in (1, -1))
        return (high_D - low_D) / 2 * x_D.square().mean().sqrt()  # the bias falls out

    gain_D = apart(signs_D) * signs_D
    if width % 2:
        rolled_D = signs_D.roll(1)
        gain_D[-1] = (apart(rolled_D) * rolled_D)[-1]
    moved = apart(signs_D + 10) / (signs_D + 10).square().mean().sqrt() - apart(signs_D) / signs_D.square().mean().sqrt()
    return gain_D, bool(moved.norm() < 1e-2 * apart(signs_D).norm())
