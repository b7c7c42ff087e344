"""The entries of a code by latent, and the gradient of one latent's row (methods.md K3b): what everything that walks over latents shares.

A latent is one program's work. Popular ones would hold it up, so of a latent with more than PART entries the parts are summed first, each
by a program of its own; how many parts there are is bounded by the number of entries, so nothing waits for the device. All sums
are taken in the order of entries, without atomics: the same bits every time.
Shape suffixes: `B` tokens, `D` width, `F` d_sae, `N` entries, `P` parts of popular latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.primitives import Gradient, Term
from saebench.kernels.triton.device import on_its_device

PART = 1024


@on_its_device
def by_latent(indices_N: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Positions of the entries sorted by latent, stable, [N] int32; and where each latent's begin, [F + 1] int32."""
    ranked = torch.sort(indices_N.reshape(-1), stable=True)
    latents = torch.arange(d_sae + 1, dtype=indices_N.dtype, device=indices_N.device)
    return ranked.indices.to(torch.int32), torch.searchsorted(ranked.values, latents, out_int32=True)


@dataclass(frozen=True)
class Order:
    """Entries by latent, each with its token; and the parts of popular latents."""

    positions_N: Tensor
    starts_F: Tensor
    tokens_N: Tensor

    @cached_property
    def has_parts(self) -> bool:
        return len(self.positions_N) > PART

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """How many parts the latents before one have, [F + 1] int32, and the latent of every part, [P] int32: F for those past the last."""
        counts_F = self.starts_F.diff()
        parts_F = torch.where(counts_F > PART, (counts_F + PART - 1) // PART, 0)
        before_F = torch.nn.functional.pad(parts_F.cumsum(0, dtype=torch.int32), (1, 0))
        parts_P = torch.arange(2 * len(self.positions_N) // PART, dtype=torch.int32, device=before_F.device)
        return before_F, torch.searchsorted(before_F[1:], parts_P, right=True, out_int32=True)


def order_of(codes: SparseCodes) -> Order:
    """The order of a code's entries: the one that the code has, if it has one. It is remembered with the tensor of indices, so that the
    terms of encoder and decoder share it."""
    indices = codes.indices
    known = None if indices.is_inference() else getattr(indices, "_order_by_latent", None)
    if known is not None and known[:2] == (indices._version, codes.d_sae):
        return known[2]
    shared = None if codes._order is None else codes._order.by_latent
    positions_N, starts_F = by_latent(indices, codes.d_sae) if shared is None else shared
    if codes.offsets is None:
        tokens_N = positions_N // max(1, indices.shape[1])
    else:
        tokens = torch.arange(len(codes), dtype=torch.int32, device=indices.device)
        tokens_N = torch.repeat_interleave(tokens, codes.offsets.diff(), output_size=len(indices))[positions_N]
    order = Order(positions_N, starts_F, tokens_N)
    if not indices.is_inference():
        indices._order_by_latent = (indices._version, codes.d_sae, order)
    return order


def term_arguments(terms: Sequence[Term]) -> dict[str, Any]:
    """What a kernel needs to know of the terms of a gradient: a tuple of each thing, one element per term."""
    orders = [order_of(term.codes) for term in terms]
    in_parts = any(order.has_parts for order in orders)
    return {
        "tokens": tuple(order.tokens_N for order in orders),
        "positions": tuple(order.positions_N for order in orders),
        "starts": tuple(order.starts_F for order in orders),
        "values": tuple(term.codes.values for term in terms),
        "rows": tuple(term.rows_BD for term in terms),
        "befores": tuple(order.parts[0] for order in orders) if in_parts else (),
        "parts": tuple(_sums_of_parts(term, order) for term, order in zip(terms, orders, strict=True)) if in_parts else (),
        "IN_PARTS": in_parts,
        "PART_SIZE": PART,
    }


def gradient_arguments(gradient: Gradient) -> dict[str, Any]:
    """The same for a whole gradient."""
    return {
        **term_arguments(gradient.terms),
        "dense": gradient.dense_FD,
        "own": gradient.own_F,
        "HAS_DENSE": gradient.dense_FD is not None,
        "HAS_OWN": gradient.own_F is not None,
    }


def _sums_of_parts(term: Term, order: Order) -> Tensor:
    before_F, latents_P = order.parts
    width = term.rows_BD.shape[1]
    out_PD = torch.empty(len(latents_P), width, dtype=torch.float32, device=before_F.device)
    block = min(1024, triton.next_power_of_2(max(width, 16)))
    if out_PD.numel():
        _sum_parts[(len(latents_P), triton.cdiv(width, block))](
            order.tokens_N,
            order.positions_N,
            order.starts_F,
            term.codes.values,
            term.rows_BD,
            before_F,
            latents_P,
            out_PD,
            term.codes.d_sae,
            width,
            PART_SIZE=PART,
            ENTRIES=8,
            BLOCK=block,
            num_warps=4,
        )
    return out_PD


@triton.jit
def sum_entries(tokens, positions, values, rows, begin, end, d, inside, D, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over entries begin to end of value * row at columns d: [BLOCK]. Rows of several entries are on their way at once."""
    entry = tl.arange(0, ENTRIES)
    acc = tl.zeros((ENTRIES, BLOCK), tl.float32)
    for start in range(begin, end, ENTRIES):
        here = start + entry < end
        token = tl.load(tokens + start + entry, mask=here, other=0).to(tl.int64)
        value = tl.load(values + tl.load(positions + start + entry, mask=here, other=0), mask=here, other=0.0).to(tl.float32)
        row = tl.load(rows + token[:, None] * D + d[None, :], mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc += tl.where((value != 0)[:, None], value[:, None] * row, 0.0)
    return tl.sum(acc, 0)


@triton.jit
def _sum_parts(
    tokens,
    positions,
    starts,
    values,
    rows,
    before,
    latents,
    out,
    F,
    D,
    PART_SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0)
    latent = tl.load(latents + part)
    if latent < F:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        begin = tl.load(starts + latent) + (part - tl.load(before + latent)) * PART_SIZE
        end = tl.minimum(begin + PART_SIZE, tl.load(starts + latent + 1))
        total = sum_entries(tokens, positions, values, rows, begin, end, d, d < D, D, ENTRIES, BLOCK)
        tl.store(out + part.to(tl.int64) * D + d, total, mask=d < D)


@triton.jit
def term_gradient(
    acc,
    latent,
    tokens,
    positions,
    starts,
    values,
    rows,
    before,
    parts,
    d,
    inside,
    D,
    IN_PARTS: tl.constexpr,
    PART_SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """acc plus one term's sum for one latent, at columns d. ENTRIES entries are unrolled, so that their rows are loaded side by side; the
    running sum is one row, which leaves registers for weights and moments."""
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    if IN_PARTS:  # noqa: SIM102 - known when compiled, the other is not
        if end - begin > PART_SIZE:
            first = tl.load(before + latent).to(tl.int64)
            for part in range(tl.cdiv(end - begin, PART_SIZE)):
                acc += tl.load(parts + (first + part) * D + d, mask=inside, other=0.0)
            end = begin
    for start in range(begin, end, ENTRIES):
        for entry in tl.static_range(ENTRIES):
            here = start + entry < end
            token = tl.load(tokens + start + entry, mask=here, other=0).to(tl.int64)
            value = tl.load(values + tl.load(positions + start + entry, mask=here, other=0), mask=here, other=0.0).to(tl.float32)
            row = tl.load(rows + token * D + d, mask=d < tl.where(here, D, 0), other=0.0).to(tl.float32)
            acc += tl.where(value != 0, value * row, 0.0)
    return acc


@triton.jit
def row_gradient(
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
    IN_PARTS: tl.constexpr,
    PART_SIZE: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one latent's row w, whole: [BLOCK]."""
    g = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(rows)):
        before, part = None, None
        if IN_PARTS:
            before, part = befores[i], parts[i]
        g = term_gradient(
            g,
            latent,
            tokens[i],
            positions[i],
            starts[i],
            values[i],
            rows[i],
            before,
            part,
            d,
            inside,
            D,
            IN_PARTS,
            PART_SIZE,
            ENTRIES,
        )
    if HAS_DENSE:
        g += tl.load(dense + latent * D + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_OWN:
        g += tl.load(own + latent).to(tl.float32) * w
    return g


@triton.jit
def without_component(g, w):
    """What is left of g when its component along w is removed."""
    return g - tl.sum(g * w, 0) / tl.maximum(tl.sum(w * w, 0), 1e-24) * w
