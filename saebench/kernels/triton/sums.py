"""Sum one term of a gradient into a matrix (methods.md K3): for whoever needs it as a matrix; the optimiser does not.

Shape suffixes: `B` tokens, `D` width, `F` d_sae.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.primitives import Term
from saebench.kernels.triton.device import on_its_device
from saebench.kernels.triton.latents import sum_entries, term_arguments


@on_its_device
def sums(codes: SparseCodes, rows_BD: Tensor) -> Tensor:
    """The sum over entries of value * rows[token], for every latent: [F, D] float32. Exact zeros for latents without entries; the same
    bits every time."""
    out_FD = torch.empty(codes.d_sae, rows_BD.shape[1], dtype=torch.float32, device=rows_BD.device)
    add_term(Term(codes, rows_BD), out_FD, 0, add=False)
    return out_FD


def add_term(term: Term, out_MD: Tensor, first: int, *, add: bool) -> None:
    """Adds the sums of latents first, first + 1, ... to the rows of `out_MD`, or puts them there."""
    width = out_MD.shape[1]
    block = min(1024, triton.next_power_of_2(max(width, 16)))
    arguments = term_arguments([term])
    if not out_MD.numel():
        return
    crowded = term.codes.indices.numel() >= 8 * term.codes.d_sae
    _sums[(len(out_MD), triton.cdiv(width, block))](
        out_MD, first, width, ADD=add, ENTRIES=8 if crowded else 4, BLOCK=block, num_warps=4, **arguments
    )


@triton.jit
def _sums(
    out,
    first,
    D,
    tokens,
    positions,
    starts,
    values,
    rows,
    befores,
    parts,
    ADD: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PART_SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    latent = first + row
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    begin, end = tl.load(starts[0] + latent), tl.load(starts[0] + latent + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    if IN_PARTS:  # noqa: SIM102 - known when compiled, the other is not
        if end - begin > PART_SIZE:
            before = tl.load(befores[0] + latent).to(tl.int64)
            for part in range(tl.cdiv(end - begin, PART_SIZE)):
                total += tl.load(parts[0] + (before + part) * D + d, mask=inside, other=0.0)
            end = begin
    total += sum_entries(tokens[0], positions[0], values[0], rows[0], begin, end, d, inside, D, ENTRIES, BLOCK)
    if ADD:
        total += tl.load(out + row * D + d, mask=inside, other=0.0)
    tl.store(out + row * D + d, total, mask=inside)
