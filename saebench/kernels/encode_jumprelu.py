"""Encode and jump: f = z where z exceeds its latent's threshold, with the pseudo-derivatives by which thresholds learn (methods.md T5, K7).

The step 1[z > theta] has no useful derivative. A rectangular window of width eps around theta stands in for it: entries with
|z - theta| < eps/2 give the threshold -theta/eps times what f would receive, and -1/eps times what the count of active entries receives.
Entries with z <= 0 are outside of every window (z passes through a ReLU first, and the mass this puts at 0 is no density at theta).

Only two kinds of entries matter, active ones and those inside a window, so scores pass in blocks and their union is kept: ragged codes
in which an entry below its threshold has value 0.
Shape suffixes: `B` tokens, `D` d_in, `F` d_sae, `N` kept entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.encode_above import encode_above
from saebench.kernels.implementations import current_implementation
from saebench.kernels.latent_numbers import at_entries, latent_totals


def encode_jumprelu(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    threshold_F: Tensor,
    eps: Tensor | float,
    straight_through: bool = False,
    scale_F: Tensor | None = None,
) -> tuple[SparseCodes, Tensor]:
    """f = z 1[z > theta] for z = ((x - b_in) W_enc^T + b_enc) * scale and theta > 0, and how many tokens each latent is active on [F].

    Ragged codes, latents in ascending order in each row; entries of value 0 are padding that only carries gradient. Codes and counts are
    differentiable in all tensors, in thresholds by the window of width `eps`, in z by the active entries; with `straight_through` the
    window's gradient reaches z too, with the opposite sign."""
    if current_implementation() == "reference":
        return _reference(x_BD, W_enc_FD, b_enc_F, b_in_D, threshold_F, eps, straight_through, scale_F)
    lowest_F = (threshold_F.detach() - eps / 2).clamp_min(0)
    scores = encode_above(x_BD, W_enc_FD, b_enc_F, b_in_D, lowest_F, scale_F)
    values_N, counts_F = _Jump.apply(scores.values, threshold_F, scores.detach(), eps, straight_through)
    return scores.replaced(values_N), counts_F


class _Jump(torch.autograd.Function):
    """The jump at listed entries."""

    @staticmethod
    def forward(
        ctx: Any, z_N: Tensor, threshold_F: Tensor, scores: SparseCodes, eps: Tensor | float, straight_through: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.scores, ctx.eps, ctx.straight_through = scores, eps, straight_through
        theta_N = at_entries(threshold_F, scores)
        active_N = (z_N > theta_N).to(threshold_F.dtype)
        ctx.save_for_backward(z_N, theta_N, active_N)
        return z_N * active_N, latent_totals(scores.replaced(active_N))

    @staticmethod
    def backward(ctx: Any, grad_f_N: Tensor, grad_counts_F: Tensor) -> tuple[Tensor | None, ...]:
        z_N, theta_N, active_N = ctx.saved_tensors
        inside_N = (z_N - theta_N).abs_() < ctx.eps / 2
        received_N = at_entries(grad_counts_F, ctx.scores).addcmul_(theta_N, grad_f_N)
        window_N = received_N.mul_(inside_N).div_(ctx.eps)
        grad_z_N = grad_f_N * active_N
        if ctx.straight_through:
            grad_z_N += window_N
        return grad_z_N, -latent_totals(ctx.scores.replaced(window_N)), None, None, None


def _reference(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    threshold_F: Tensor,
    eps: Tensor | float,
    straight_through: bool,
    scale_F: Tensor | None,
) -> tuple[SparseCodes, Tensor]:
    """The same with all scores at once; every entry is listed. The step's window is written as a clamped ramp of slope 1/eps, of which
    only the derivative is kept."""
    z_BF = (x_BD if b_in_D is None else x_BD - b_in_D) @ W_enc_FD.T + b_enc_F
    z_BF = z_BF if scale_F is None else z_BF * scale_F
    passing = z_BF if straight_through else z_BF.detach()
    u_BF = (passing - threshold_F) / eps
    u_BF = torch.where((u_BF.abs() < 0.5) & (z_BF > 0), u_BF, u_BF.detach())
    step_BF = (z_BF > threshold_F).to(z_BF.dtype) + u_BF - u_BF.detach()
    # the product rule puts z before the step's derivative; the threshold stands in for it, as in the definition
    f_BF = z_BF * step_BF.detach() + threshold_F.detach() * (step_BF - step_BF.detach())
    indices_BF = torch.arange(len(W_enc_FD), device=x_BD.device).expand(z_BF.shape)
    return SparseCodes(indices_BF, f_BF, len(W_enc_FD)), step_BF.sum(0)
