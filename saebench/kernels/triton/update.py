"""One pass over the latents: gradient, Adam and norm of a row while it is in registers (methods.md K12).

Every parameter and moment is read once and written once, and the gradient is never stored. One program per latent; a latent without entries
takes its step too, as the moments of dense Adam decay.
Shape suffixes: `D` width, `F` d_sae.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saebench.kernels.primitives import AdamRule, Gradient
from saebench.kernels.triton.device import on_its_device
from saebench.kernels.triton.latents import gradient_arguments, row_gradient, without_component
from saebench.kernels.triton.wide import MAX_WIDTH, gradient_blocks, row_shape


@on_its_device
def update(
    W_FD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    gradient: Gradient,
    unit: bool,
    rule: AdamRule,
    factor: Tensor,
    master_FD: Tensor | None = None,
    *,
    step_3: Tensor | None = None,
) -> None:
    """Sum the gradient of a row, with `unit` remove its component along the row, multiply by `factor` (0-dim, on the device), take Adam's
    step, with `unit` scale the row to length 1; all in place. Arithmetic is float32, whatever W, m and v are stored as.

    `master_FD`: float32 weights that take the step; W (bfloat16, say) becomes their rounded copy. `step_3`: lr, 1 - b1^t and 1 - b2^t as a
    float32 tensor on the device, read instead of the rule's, so that a captured graph can be replayed with other ones.
    """
    num, width = W_FD.shape
    b1, b2 = rule.betas
    corrections = (1 - b1**rule.step, 1 - b2**rule.step)
    if width > MAX_WIDTH:
        _wide(W_FD, m_FD, v_FD, gradient, unit, rule, factor, master_FD, step_3)
    elif W_FD.numel():
        _update[(num,)](
            W_FD if master_FD is None else master_FD,
            W_FD,
            m_FD,
            v_FD,
            factor,
            step_3,
            width,
            rule.lr,
            b1,
            1 - b1,
            b2,
            1 - b2,
            rule.eps,
            *corrections,
            **gradient_arguments(gradient),
            UNIT=unit,
            COPY=master_FD is not None,
            ON_DEVICE=step_3 is not None,
            ENTRIES=4,
            **row_shape(width),
        )


def _wide(
    W_FD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    gradient: Gradient,
    unit: bool,
    rule: AdamRule,
    factor: Tensor,
    master_FD: Tensor | None,
    step_3: Tensor | None,
) -> None:
    b1, b2 = rule.betas
    lr, c1, c2 = (rule.lr, 1 - b1**rule.step, 1 - b2**rule.step) if step_3 is None else step_3
    weights_FD = W_FD if master_FD is None else master_FD
    for rows, g_MD in gradient_blocks(weights_FD, gradient, unit):
        g_MD *= factor
        m_MD = m_FD[rows].float().mul_(b1).add_(g_MD, alpha=1 - b1)
        v_MD = v_FD[rows].float().mul_(b2).addcmul_(g_MD, g_MD, value=1 - b2)
        w_MD = weights_FD[rows].float() - lr * (m_MD / c1) / ((v_MD / c2).sqrt_() + rule.eps)
        if unit:
            w_MD /= w_MD.norm(dim=1, keepdim=True).clamp_min_(1e-12)
        for stored_FD, new_MD in ((m_FD, m_MD), (v_FD, v_MD), (weights_FD, w_MD)):
            stored_FD[rows] = new_MD
        if master_FD is not None:
            W_FD[rows] = w_MD.to(W_FD.dtype)


@triton.jit
def _update(
    weights,
    W,
    m,
    v,
    factor,
    step,
    D,
    lr,
    b1,
    rest1,
    b2,
    rest2,
    eps,
    c1,
    c2,
    tokens,
    positions,
    starts,
    values,
    rows,
    befores,
    parts,
    dense,
    own,
    UNIT: tl.constexpr,
    COPY: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PART_SIZE: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    at = latent * D + d
    # weights and moments are read once: they should not drive token rows, which many latents read, out of the cache
    w = tl.load(weights + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    m_old = tl.load(m + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    v_old = tl.load(v + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    g = row_gradient(
        latent,
        w,
        tokens,
        positions,
        starts,
        values,
        rows,
        befores,
        parts,
        dense,
        own,
        d,
        inside,
        D,
        IN_PARTS,
        PART_SIZE,
        HAS_DENSE,
        HAS_OWN,
        ENTRIES,
        BLOCK,
    )
    if UNIT:
        g = without_component(g, w)
    g *= tl.load(factor).to(tl.float32)
    if ON_DEVICE:
        lr, c1, c2 = tl.load(step), tl.load(step + 1), tl.load(step + 2)
    m_new = b1 * m_old + rest1 * g
    v_new = b2 * v_old + rest2 * g * g
    w -= lr * (m_new / c1) / (tl.sqrt_rn(v_new / c2) + eps)
    if UNIT:
        w /= tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1e-12)
    tl.store(m + at, m_new, mask=inside, eviction_policy="evict_first")
    tl.store(v + at, v_new, mask=inside, eviction_policy="evict_first")
    tl.store(weights + at, w, mask=inside, eviction_policy="evict_first")
    if COPY:
        tl.store(W + at, w, mask=inside)
