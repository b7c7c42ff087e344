"""Matching pursuit without a matrix of scores (methods.md T9).

A step is two launches: products of residuals with atoms, of which every tile keeps only its best atom per token; then one program per token
finds the best tile, takes the coefficient from the atom itself, subtracts, and measures what is left. Nothing waits for the device.
Shape suffixes: `B` tokens, `D` width, `F` atoms, `T` steps, `P` tiles of atoms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench.kernels.triton.device import on_its_device
from saebench.kernels.triton.products import tile_order, tile_product, tiles_for


@on_its_device
def pursue(x_BD: Tensor, atoms_FD: Tensor, steps: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Up to `steps` steps of non-negative matching pursuit: atoms int64 [B, T], coefficients [B, T] and lengths of the residual after each
    step [B, T], residual [B, D], all float32. A token is done when no score is positive or its residual is shorter than `tolerance`
    times its own length; steps not taken have coefficient 0. NaN in the input gives NaN coefficients."""
    r_BD = x_BD.to(torch.float32, copy=True).contiguous()
    norm_B = r_BD.norm(dim=1)
    shortest_B = tolerance * norm_B
    atoms_BT = torch.empty(len(x_BD), steps, dtype=torch.int64, device=x_BD.device)
    coefficients_BT = torch.empty(len(x_BD), steps, dtype=torch.float32, device=x_BD.device)
    norms_BT = torch.empty_like(coefficients_BT)
    for t in range(steps):
        atoms_BT[:, t], coefficients_BT[:, t] = pursuit_step(r_BD, atoms_FD, norm_B, shortest_B)
        norms_BT[:, t] = norm_B
    return atoms_BT, coefficients_BT, norms_BT, r_BD


@on_its_device
def pursuit_step(r_BD: Tensor, atoms_FD: Tensor, norm_B: Tensor, shortest_B: Tensor) -> tuple[Tensor, Tensor]:
    """One step on every token: j = argmax_i r . d_i (of equal ones the lowest), v = r . d_j, r <- r - v d_j in place and norm <- ||r||
    in place. v is 0 where r . d_j <= 0 or the norm before was less than `shortest`. r, norm and shortest are float32; scores are taken
    in the type of the atoms, coefficients in float32. Returns j int32 and v float32, [B] each."""
    tokens, width = r_BD.shape
    num = len(atoms_FD)
    tiles = tiles_for(atoms_FD)
    parts = triton.cdiv(num, tiles.latents)
    best_BP = torch.empty(tokens, parts, dtype=torch.float32, device=r_BD.device)
    where_BP = torch.empty(tokens, parts, dtype=torch.int32, device=r_BD.device)
    atoms_B = torch.empty(tokens, dtype=torch.int32, device=r_BD.device)
    coefficients_B = torch.empty(tokens, dtype=torch.float32, device=r_BD.device)
    if not tokens:
        return atoms_B, coefficients_B
    _best[(triton.cdiv(tokens, tiles.rows) * parts,)](
        r_BD.to(atoms_FD.dtype),
        atoms_FD,
        best_BP,
        where_BP,
        tokens,
        num,
        width,
        parts,
        EVEN=width % tiles.depth == 0,
        BLOCK_B=tiles.rows,
        BLOCK_F=tiles.latents,
        BLOCK_D=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    _step[(tokens,)](
        r_BD,
        atoms_FD,
        best_BP,
        where_BP,
        norm_B,
        shortest_B,
        atoms_B,
        coefficients_B,
        num,
        width,
        parts,
        BLOCK_P=min(1024, triton.next_power_of_2(parts)),
        BLOCK_D=min(2048, triton.next_power_of_2(max(width, 16))),
        num_warps=4,
    )
    return atoms_B, coefficients_B


@triton.jit
def _best(
    r,
    atoms,
    best,
    where,
    rows,
    F,
    D,
    parts,
    EVEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i, j = tile_order(tl.program_id(0), tl.cdiv(rows, BLOCK_B), parts, 8)
    row = i * BLOCK_B + tl.arange(0, BLOCK_B)
    column = j * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tile_product(r, atoms, row, column % F, rows, D, EVEN, BLOCK_B, BLOCK_F, BLOCK_D)
    # a NaN would make the order of comparisons matter; its token's coefficient is NaN with any atom
    acc = tl.where((column < F)[None, :] & (acc == acc), acc, float("-inf"))
    most, at = tl.max(acc, 1, return_indices=True, return_indices_tie_break_left=True)
    here = row.to(tl.int64) * parts + j
    tl.store(best + here, most, mask=row < rows)
    tl.store(where + here, j * BLOCK_F + at, mask=row < rows)


@triton.jit
def _step(
    r,
    atoms,
    best,
    where,
    norms,
    shortest,
    chosen,
    coefficients,
    F,
    D,
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    most = tl.full((), float("-inf"), tl.float32)
    first = tl.full((), 0, tl.int32)
    for start in range(0, parts, BLOCK_P):
        value = tl.load(best + token * parts + start + part, mask=start + part < parts, other=float("-inf"))
        here, at = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
        first = tl.where(here > most, start + at, first)
        most = tl.maximum(most, here)
    # -inf everywhere leaves the first tile, whose index may be past the last atom
    atom = tl.minimum(tl.load(where + token * parts + first), F - 1)
    row, atom_row = r + token * D, atoms + atom.to(tl.int64) * D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        acc += tl.load(row + d, mask=d < D, other=0.0) * tl.load(atom_row + d, mask=d < D, other=0.0).to(tl.float32)
    value = tl.sum(acc, 0)
    value = tl.where((value <= 0) | (tl.load(norms + token) < tl.load(shortest + token)), 0.0, value)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left = tl.load(row + d, mask=d < D, other=0.0) - value * tl.load(atom_row + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(row + d, left, mask=d < D)
        acc += left * left
    tl.store(norms + token, tl.sqrt_rn(tl.sum(acc, 0)))
    tl.store(chosen + token, atom)
    tl.store(coefficients + token, value)
