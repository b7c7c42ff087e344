"""Attention of heads that each write one number, in groups that share queries and keys (methods.md T13, K8).

A group is one attention head with values as narrow as it has heads. Forward: one program per block of queries walks over the keys that it
sees, with a running maximum and sum (flash attention), so no pattern exists; the log-sum-exp of every query is kept. Backward: one kernel
with a program per block of queries for dq, one with a program per block of keys for dk and dv; no atomics, so the same bits every time.
Rotary positions are applied by the caller. What is selected has few entries, but all heads of a group share its pattern, so the gradient
of the selected entries is written into zeros and goes through whole groups.
Shape suffixes: `C` contexts, `S` positions, `G` groups, `E` width of queries and keys, `H` heads of a group, `F` = G * H all heads,
`B` tokens, `K` selected heads of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.kernels.triton.device import on_its_device
from saebench.kernels.triton.products import dot, generation

HEADS_AT_ONCE = 128


@on_its_device
def attention(
    q_CGSE: Tensor, k_CGSE: Tensor, v_CGSH: Tensor, scale: float, soft_cap: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(causal(soft_cap * tanh(scale * q k^T / soft_cap))) v, where a position sees `window` positions up to its own (None: all).
    z [C, G, S, H], stored as [C, S, G, H], and the log-sum-exp of every query's scores [C, G, S], both float32. The last axis of q, k and v
    must be contiguous; the others may be strided."""
    contexts, groups, size, width = q_CGSE.shape
    heads = v_CGSH.shape[3]
    z_CSGH = torch.empty(contexts, size, groups, heads, dtype=torch.float32, device=q_CGSE.device)
    z_CGSH = z_CSGH.transpose(1, 2)
    lse_CGS = torch.empty(contexts, groups, size, dtype=torch.float32, device=q_CGSE.device)
    shape = _shape(q_CGSE, heads, soft_cap, window)
    for first in range(0, heads if lse_CGS.numel() else 0, HEADS_AT_ONCE):
        v, z = v_CGSH[..., first : first + HEADS_AT_ONCE], z_CGSH[..., first : first + HEADS_AT_ONCE]
        _forward[(contexts * groups, triton.cdiv(size, shape["BLOCK"]))](
            q_CGSE, k_CGSE, v, z, lse_CGS, *_strides(q_CGSE, k_CGSE, v, z), groups, size, width, v.shape[3], scale, **shape
        )
    return z_CGSH, lse_CGS


@on_its_device
def attention_gradients(
    q_CGSE: Tensor,
    k_CGSE: Tensor,
    v_CGSH: Tensor,
    lse_CGS: Tensor,
    z_CGSH: Tensor,
    grad_z_CGSH: Tensor,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, float32, given that of z. z is needed only where its gradient is not 0."""
    contexts, groups, size, width = q_CGSE.shape
    heads = v_CGSH.shape[3]
    dq_CGSE = torch.zeros(contexts, groups, size, width, dtype=torch.float32, device=q_CGSE.device)
    dk_CGSE = torch.zeros_like(dq_CGSE)
    dv_CGSH = torch.empty(contexts, groups, size, heads, dtype=torch.float32, device=q_CGSE.device)
    shape = _shape(q_CGSE, heads, soft_cap, window)
    grid = (contexts * groups, triton.cdiv(size, shape["BLOCK"]))
    for first in range(0, heads if lse_CGS.numel() else 0, HEADS_AT_ONCE):  # gradients are linear in that of z: parts add up
        part = slice(first, first + HEADS_AT_ONCE)
        v, dz, dv = v_CGSH[..., part], grad_z_CGSH[..., part], dv_CGSH[..., part]
        delta_CGS = (dz * z_CGSH[..., part]).sum(-1)
        given = (q_CGSE, k_CGSE, v, dz, lse_CGS, delta_CGS)
        numbers = (groups, size, width, v.shape[3], scale)
        _query_gradient[grid](*given, dq_CGSE, *_strides(q_CGSE, k_CGSE, v, dz), *numbers, **shape)
        _key_gradient[grid](*given, dk_CGSE, dv, *_strides(q_CGSE, k_CGSE, v, dz), heads, *numbers, **shape)
    return dq_CGSE, dk_CGSE, dv_CGSH


@on_its_device
def entry_gradients(
    q_CGSE: Tensor,
    k_CGSE: Tensor,
    v_CGSH: Tensor,
    lse_CGS: Tensor,
    indices_BK: Tensor,
    values_BK: Tensor,
    grad_BK: Tensor,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    skip: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given those of selected entries of z: B = C * (S - skip) tokens, row-major, no head twice in a token. An
    entry of value 0 passes none."""
    contexts, groups, size, _ = q_CGSE.shape
    heads = v_CGSH.shape[3]

    def spread(entries_BK: Tensor) -> Tensor:
        whole_CSF = torch.zeros(contexts, size, groups * heads, dtype=torch.float32, device=q_CGSE.device)
        at = indices_BK.long().view(contexts, size - skip, -1)
        whole_CSF[:, skip:].scatter_(2, at, entries_BK.float().view(at.shape))
        return whole_CSF.view(contexts, size, groups, heads).transpose(1, 2)

    grad_z, z = spread(torch.where(values_BK != 0, grad_BK, 0)), spread(values_BK)
    return attention_gradients(q_CGSE, k_CGSE, v_CGSH, lse_CGS, z, grad_z, scale, soft_cap, window)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _shape(q_CGSE: Tensor, heads: int, soft_cap: float | None, window: int | None) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(q_CGSE.shape[3]))
    narrow = max(16, triton.next_power_of_2(min(heads, HEADS_AT_ONCE)))
    # float32 goes through the matrix units as three products of tf32, as good as float32, where the card has them
    ampere = generation(q_CGSE) >= 8
    block = 16 if not ampere else 32 if q_CGSE.dtype == torch.float32 else 64
    return {
        "cap": soft_cap or 0.0,
        "window": window or 0,
        "HAS_CAP": soft_cap is not None,
        "HAS_WINDOW": window is not None,
        "BLOCK": block if width <= 128 else max(16, block // 2),
        "BLOCK_E": width,
        "BLOCK_H": narrow,
        "PRECISION": "tf32x3" if ampere else "ieee",
        "num_warps": 8 if width + narrow >= 256 and block == 64 else 4,
        "num_stages": 2,
    }


@triton.jit
def _tile(base, at, size, stride, column, width):
    """Rows `at` of a matrix, zeros outside."""
    inside = (at < size)[:, None] & (column < width)[None, :]
    return tl.load(base + at.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))  # the quotient cancels near 0
    return tl.where(tl.abs(x) < 0.2, near, far)


@triton.jit
def _scores(
    q,
    k,
    query,
    key,
    size,
    scale,
    cap,
    window,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of queries and keys, -inf where a query does not see a key, and the derivative of the soft cap."""
    s = dot(q, tl.trans(k), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION) * scale
    slope = 1.0
    if HAS_CAP:
        t = _tanh(s / cap)
        s = cap * t
        slope = 1 - t * t
    seen = (key[None, :] <= query[:, None]) & (key < size)[None, :]
    if HAS_WINDOW:
        seen = seen & (key[None, :] > query[:, None] - window)
    return tl.where(seen, s, float("-inf")), slope


@triton.jit
def _forward(
    q,
    k,
    v,
    z,
    lse,
    q_c,
    q_g,
    q_s,
    k_c,
    k_g,
    k_s,
    v_c,
    v_g,
    v_s,
    z_c,
    z_g,
    z_s,
    G,
    S,
    E,
    H,
    scale,
    cap,
    window,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    both = tl.program_id(0).to(tl.int64)
    c, g = both // G, both % G
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK  # the last queries see most: they begin first
    query = start + tl.arange(0, BLOCK)
    e, h = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    q_tile = _tile(q + c * q_c + g * q_g, query, S, q_s, e, E)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_H), tl.float32)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(start - window + 1, 0) // BLOCK * BLOCK
    for first in range(begin, start + BLOCK, BLOCK):
        key = first + tl.arange(0, BLOCK)
        k_tile = _tile(k + c * k_c + g * k_g, key, S, k_s, e, E)
        v_tile = _tile(v + c * v_c + g * v_g, key, S, v_s, h, H)
        s, _ = _scores(q_tile, k_tile, query, key, S, scale, cap, window, HAS_CAP, HAS_WINDOW, BLOCK, PRECISION)
        new = tl.maximum(most, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(most - base)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
        most = new
    total = tl.where(total > 0, total, 1.0)  # queries past the end may see nothing
    inside = (query < S)[:, None] & (h < H)[None, :]
    z_at = z + c * z_c + g * z_g + query.to(tl.int64)[:, None] * z_s + h[None, :]
    tl.store(z_at, acc / total[:, None], mask=inside)
    tl.store(lse + both * S + query, most + tl.log(total), mask=query < S)


@triton.jit
def _query_gradient(
    q,
    k,
    v,
    dz,
    lse,
    delta,
    dq,
    q_c,
    q_g,
    q_s,
    k_c,
    k_g,
    k_s,
    v_c,
    v_g,
    v_s,
    z_c,
    z_g,
    z_s,
    G,
    S,
    E,
    H,
    scale,
    cap,
    window,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    both = tl.program_id(0).to(tl.int64)
    c, g = both // G, both % G
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK
    query = start + tl.arange(0, BLOCK)
    e, h = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    q_tile = _tile(q + c * q_c + g * q_g, query, S, q_s, e, E)
    dz_tile = _tile(dz + c * z_c + g * z_g, query, S, z_s, h, H)
    lse_tile = tl.load(lse + both * S + query, mask=query < S, other=0.0)
    delta_tile = tl.load(delta + both * S + query, mask=query < S, other=0.0)
    acc = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(start - window + 1, 0) // BLOCK * BLOCK
    for first in range(begin, start + BLOCK, BLOCK):
        key = first + tl.arange(0, BLOCK)
        k_tile = _tile(k + c * k_c + g * k_g, key, S, k_s, e, E)
        v_tile = _tile(v + c * v_c + g * v_g, key, S, v_s, h, H)
        s, slope = _scores(q_tile, k_tile, query, key, S, scale, cap, window, HAS_CAP, HAS_WINDOW, BLOCK, PRECISION)
        p = tl.where((query < S)[:, None], tl.exp(s - lse_tile[:, None]), 0.0)
        dp = dot(dz_tile.to(v_tile.dtype), tl.trans(v_tile), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
        ds = p * (dp - delta_tile[:, None]) * slope * scale
        acc = dot(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
    at = dq + (both * S + query.to(tl.int64))[:, None] * E + e[None, :]
    inside = (query < S)[:, None] & (e < E)[None, :]
    tl.store(at, acc + tl.load(at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _key_gradient(
    q,
    k,
    v,
    dz,
    lse,
    delta,
    dk,
    dv,
    q_c,
    q_g,
    q_s,
    k_c,
    k_g,
    k_s,
    v_c,
    v_g,
    v_s,
    z_c,
    z_g,
    z_s,
    all_heads,
    G,
    S,
    E,
    H,
    scale,
    cap,
    window,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    both = tl.program_id(0).to(tl.int64)
    c, g = both // G, both % G
    start = tl.program_id(1) * BLOCK
    key = start + tl.arange(0, BLOCK)
    e, h = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_H)
    k_tile = _tile(k + c * k_c + g * k_g, key, S, k_s, e, E)
    v_tile = _tile(v + c * v_c + g * v_g, key, S, v_s, h, H)
    dk_acc = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    dv_acc = tl.zeros((BLOCK, BLOCK_H), tl.float32)
    end = S
    if HAS_WINDOW:
        end = tl.minimum(S, start + BLOCK + window - 1)
    for first in range(start, end, BLOCK):
        query = first + tl.arange(0, BLOCK)
        q_tile = _tile(q + c * q_c + g * q_g, query, S, q_s, e, E)
        dz_tile = _tile(dz + c * z_c + g * z_g, query, S, z_s, h, H)
        lse_tile = tl.load(lse + both * S + query, mask=query < S, other=0.0)
        delta_tile = tl.load(delta + both * S + query, mask=query < S, other=0.0)
        s, slope = _scores(q_tile, k_tile, query, key, S, scale, cap, window, HAS_CAP, HAS_WINDOW, BLOCK, PRECISION)
        p = tl.where((query < S)[:, None], tl.exp(s - lse_tile[:, None]), 0.0)
        dv_acc = dot(tl.trans(p.to(v_tile.dtype)), dz_tile.to(v_tile.dtype), dv_acc, PRECISION)
        dp = dot(dz_tile.to(v_tile.dtype), tl.trans(v_tile), tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION)
        ds = p * (dp - delta_tile[:, None]) * slope * scale
        dk_acc = dot(tl.trans(ds.to(q_tile.dtype)), q_tile, dk_acc, PRECISION)
    row = (both * S + key.to(tl.int64))[:, None]
    inside = (key < S)[:, None] & (e < E)[None, :]
    dk_at = dk + row * E + e[None, :]
    tl.store(dk_at, dk_acc + tl.load(dk_at, mask=inside, other=0.0), mask=inside)
    tl.store(dv + row * all_heads + h[None, :], dv_acc, mask=(key < S)[:, None] & (h < H)[None, :])
