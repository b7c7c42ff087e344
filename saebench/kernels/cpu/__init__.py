"""The primitives compiled for this machine's processor, float32 (primitives.py has the contract; encode.cpp and rows.cpp the work);
statistics of postings are in postings.py.

The same bits for any number of threads. Where so many entries are active that dense arithmetic is faster, torch's takes over.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.errors import NotFinite
from saebench.kernels import stock
from saebench.kernels.cpu.calls import at  # the others are offered here
from saebench.kernels.cpu.calls import library as library
from saebench.kernels.cpu.postings import coactivation as coactivation
from saebench.kernels.cpu.postings import merge_runs as merge_runs
from saebench.kernels.cpu.postings import moments as moments
from saebench.kernels.cpu.postings import top_tokens as top_tokens
from saebench.kernels.latent_order import latent_order
from saebench.kernels.primitives import AdamRule, Gradient, Term

CROWDED = 6  # with more than one entry in so many active, dense products are faster than gathering rows
MANY = 8  # with more than one latent in so many kept, sorting all scores of a token is faster than keeping the best
WASTEFUL = 1 / 12  # share of all scores that the screen let through, above which more bits are worth their time
RETRY = 200  # calls after which fewer bits are tried again

_bits: dict[
    tuple[int, int, bool], list[int]
] = {}  # for sizes and kind of selection: bits of the screen, calls since they were chosen


def screen_bits() -> int:
    """The fewest bits that this processor screens scores with."""
    return library().saebench_screen_bits()


def matrix_unit() -> bool:
    """Whether this processor's matrix unit (AMX) multiplies 8-bit integers, and the system lets us have it."""
    return bool(library().saebench_matrix_unit())


def topk(
    x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, k: int, latents_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    num = len(W_FD) if latents_M is None else len(latents_M)
    k = min(k, num)
    if k * MANY > num:
        return stock.topk(x_BD, W_FD, b_F, scale_F, k, latents_M)
    x_BD, W_FD, b_F, scale_F = _ready(x_BD, W_FD, b_F, scale_F)
    latents_M = None if latents_M is None else latents_M.to(torch.int32).contiguous()
    values_BK = torch.empty(len(x_BD), k)
    indices_BK = torch.empty(len(x_BD), k, dtype=torch.int32)
    kind = (num, W_FD.shape[1], True)
    computed = library().saebench_topk(
        *map(at, (x_BD, W_FD, b_F, scale_F, latents_M)),
        *map(ctypes.c_int64, (len(x_BD), W_FD.shape[1], num, k)),
        _screen(kind),
        torch.get_num_threads(),
        at(values_BK),
        at(indices_BK),
    )
    if computed < 0:
        raise _not_finite(x_BD)
    _learn(kind, computed - 2 * k * len(x_BD), len(x_BD) * num)
    return indices_BK, values_BK


def above(x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None, threshold_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_BD, W_FD, b_F, scale_F = _ready(x_BD, W_FD, b_F, scale_F)
    threshold_F = threshold_F.contiguous()
    tokens, (num, width) = len(x_BD), W_FD.shape
    offsets_B = torch.empty(tokens + 1, dtype=torch.int64)
    kind = (num, width, False)
    computed = ctypes.c_int64(0)
    selection = library().saebench_above(
        *map(at, (x_BD, W_FD, b_F, scale_F, threshold_F)),
        *map(ctypes.c_int64, (tokens, width, num)),
        _screen(kind),
        torch.get_num_threads(),
        at(offsets_B),
        ctypes.byref(computed),
    )
    if selection is None:
        raise _not_finite(x_BD)
    count = int(offsets_B[-1])
    _learn(kind, computed.value - count, tokens * num)
    indices_N, values_N = torch.empty(count, dtype=torch.int32), torch.empty(count)
    library().saebench_take(
        ctypes.c_void_p(selection),
        ctypes.c_int64(tokens),
        at(offsets_B),
        torch.get_num_threads(),
        at(indices_N),
        at(values_N),
    )
    return offsets_B, indices_N, values_N


def nearest(rows_FD: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the k largest products with all, itself among them: indices [F, k] int64, values, and the rows of which something may be
    missing."""
    (rows_FD,) = _ready(rows_FD.float())
    num, width = rows_FD.shape
    order_F, zeros_F = torch.randperm(num, generator=torch.Generator().manual_seed(0)).int(), torch.zeros(num)
    mixed_FD = rows_FD[order_F.long()]  # rows of a block lie together
    values_FK, indices_FK, again_F = torch.empty(num, k), torch.empty(num, k, dtype=torch.int32), torch.empty_like(order_F)
    kind, computed = (num, width, True), ctypes.c_int64(0)
    failed = library().saebench_nearest(
        *map(at, (mixed_FD, order_F, zeros_F)),
        *map(ctypes.c_int64, (num, width, k)),
        _screen(kind),
        torch.get_num_threads(),
        *map(at, (values_FK, indices_FK, again_F)),
        ctypes.byref(computed),
    )
    if failed < 0:
        raise _not_finite(rows_FD)
    _learn(kind, computed.value - 2 * k * num, num * num // 2)
    return indices_FK.long(), values_FK, again_F[:failed].long()


def decode(codes: SparseCodes, W_FD: Tensor, bias_D: Tensor | None = None) -> Tensor:
    if codes.crowded(CROWDED):
        return stock.decode(codes, W_FD, bias_D)
    W_FD = W_FD.contiguous()
    bias_D = W_FD.new_zeros(W_FD.shape[1]) if bias_D is None else bias_D.contiguous()
    out_BD = torch.empty(len(codes), W_FD.shape[1])
    sizes = map(ctypes.c_int64, (len(codes), W_FD.shape[1], len(W_FD)))
    library().saebench_decode(*_entries(codes), at(W_FD), at(bias_D), *sizes, torch.get_num_threads(), at(out_BD))
    return out_BD


def decode_error(codes: SparseCodes, W_FD: Tensor, bias_D: Tensor, y_BD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    if codes.crowded(CROWDED):
        error_BD = stock.decode(codes, W_FD, bias_D).sub_(y_BD)
        return error_BD, error_BD.square().sum(1), None
    W_FD, bias_D, y_BD = W_FD.contiguous(), bias_D.contiguous(), y_BD.contiguous()
    error_BD, squares_B, found = torch.empty_like(y_BD), torch.empty(len(codes)), torch.empty_like(codes.values)
    sizes = map(ctypes.c_int64, (len(codes), W_FD.shape[1], len(W_FD)))
    library().saebench_decode_error(
        *_entries(codes),
        *map(at, (W_FD, bias_D, y_BD)),
        *sizes,
        torch.get_num_threads(),
        *map(at, (error_BD, squares_B, found)),
    )
    return error_BD, squares_B, found


def decode_error_pair(
    codes: SparseCodes, beside: Tensor, W_FD: Tensor, bias_D: Tensor, y_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    W_FD, bias_D, y_BD, beside = W_FD.contiguous(), bias_D.contiguous(), y_BD.contiguous(), beside.contiguous()
    error_BD = torch.empty_like(y_BD)
    squares_2B, found_2N = torch.empty(2, len(codes)), torch.empty(2, *codes.values.shape)
    sizes = map(ctypes.c_int64, (len(codes), W_FD.shape[1], len(W_FD)))
    library().saebench_decode_error_pair(
        *_entries(codes),
        *map(at, (beside, W_FD, bias_D, y_BD)),
        *sizes,
        torch.get_num_threads(),
        *map(at, (error_BD, squares_2B, found_2N)),
    )
    return error_BD, squares_2B[0], found_2N[0], squares_2B[1], found_2N[1]


def dots(codes: SparseCodes, rows_BD: Tensor, W_FD: Tensor) -> Tensor:
    if codes.crowded(CROWDED):
        return stock.dots(codes, rows_BD, W_FD)
    rows_BD, W_FD = rows_BD.contiguous(), W_FD.contiguous()
    out = torch.empty(codes.values.shape)
    sizes = map(ctypes.c_int64, (len(codes), W_FD.shape[1]))
    library().saebench_dots(*_entries(codes), at(rows_BD), at(W_FD), *sizes, torch.get_num_threads(), at(out))
    return out


def weighted_sum(weights_B: Tensor, rows_BD: Tensor) -> Tensor:
    weights_B, rows_BD = weights_B.contiguous(), rows_BD.contiguous()
    out_D = torch.empty(rows_BD.shape[1])
    sizes = map(ctypes.c_int64, rows_BD.shape)
    library().saebench_weighted_sum(at(weights_B), at(rows_BD), *sizes, torch.get_num_threads(), at(out_D))
    return out_D


def by_latent(indices_N: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    indices_N = indices_N.contiguous()
    order_N, starts_F = torch.empty_like(indices_N), torch.empty(d_sae + 1, dtype=torch.int32)
    sizes = map(ctypes.c_int64, (len(indices_N), d_sae))
    library().saebench_by_latent(at(indices_N), *sizes, at(starts_F), at(order_N))
    return order_N, starts_F


def totals(codes: SparseCodes) -> Tensor:
    by_latent = latent_order(codes).by_latent
    assert by_latent is not None
    out_F = torch.empty(codes.d_sae)
    tensors = (*by_latent, codes.values.contiguous())
    library().saebench_totals(*map(at, tensors), ctypes.c_int64(codes.d_sae), torch.get_num_threads(), at(out_F))
    return out_F


def sums(codes: SparseCodes, rows_BD: Tensor) -> Tensor:
    if codes.crowded(CROWDED):
        return stock.sums(codes, rows_BD)
    terms, _kept = _terms([Term(codes, rows_BD)])
    out_FD = torch.empty(codes.d_sae, rows_BD.shape[1])
    sizes = map(ctypes.c_int64, out_FD.shape)
    library().saebench_sums(terms, *sizes, torch.get_num_threads(), at(out_FD))
    return out_FD


def gradient_bound(W_FD: Tensor, gradient: Gradient) -> float:
    """An upper bound of `gradient_square` that looks, for terms, at the lengths of rows alone."""
    dense = 0.0 if gradient.dense_FD is None else float(torch.linalg.vector_norm(gradient.dense_FD))
    if not gradient.terms and gradient.own_F is None:
        return dense**2
    terms, _kept = _terms(gradient.terms)
    lengths = [torch.linalg.vector_norm(term.rows_BD, dim=1) for term in gradient.terms]
    pointers = (ctypes.c_void_p * max(1, len(lengths)))(*[each.data_ptr() for each in lengths])
    bound = library().saebench_gradient_bound(
        terms,
        len(lengths),
        pointers,
        at(gradient.own_F),
        at(W_FD),
        *map(ctypes.c_int64, W_FD.shape),
        torch.get_num_threads(),
    )
    return (dense + (1.001 * bound) ** 0.5) ** 2


def gradient_square(W_FD: Tensor, gradient: Gradient, unit: bool) -> Tensor:
    return _latents(W_FD, None, None, gradient, unit, AdamRule(0.0, (0.0, 0.0), 0.0, 1), 1.0)


def update(
    W_FD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    gradient: Gradient,
    unit: bool,
    rule: AdamRule,
    factor: Tensor,
    master_FD: Tensor | None = None,
    lengths_F: Tensor | None = None,
) -> Tensor:
    """Also returns what `gradient_square` would have."""
    assert master_FD is None, "only weights in float32 are served here, and they need no master"
    return _latents(W_FD, m_FD, v_FD, gradient, unit, rule, float(factor), lengths_F)


def row_lengths(W_FD: Tensor, from_D: Tensor | None = None) -> Tensor:
    W_FD, from_D = _ready(W_FD, from_D)
    lengths_F = torch.empty(len(W_FD))
    sizes = map(ctypes.c_int64, W_FD.shape)
    library().saebench_row_lengths(at(W_FD), at(from_D), *sizes, torch.get_num_threads(), at(lengths_F))
    return lengths_F


def _latents(
    W_FD: Tensor,
    m_FD: Tensor | None,
    v_FD: Tensor | None,
    gradient: Gradient,
    unit: bool,
    rule: AdamRule,
    factor: float,
    lengths_F: Tensor | None = None,
) -> Tensor:
    assert W_FD.is_contiguous()
    terms, _kept = _terms(gradient.terms)
    dense_FD = None if gradient.dense_FD is None else gradient.dense_FD.contiguous()
    corrections = (1 - beta**rule.step for beta in rule.betas)
    squares = library().saebench_latents(
        at(W_FD),
        *(at(m_FD if m_FD is not None and m_FD.dtype == dtype else None) for dtype in (torch.float32, torch.bfloat16)),
        at(v_FD),
        terms,
        len(gradient.terms),
        at(dense_FD),
        at(gradient.own_F),
        *map(ctypes.c_int64, W_FD.shape),
        int(unit),
        *map(ctypes.c_float, (factor, rule.lr, *rule.betas, rule.eps)),
        *map(ctypes.c_double, corrections),
        torch.get_num_threads(),
        at(lengths_F),
    )
    return torch.tensor(squares, dtype=torch.float64)


class _Term(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("order", "starts", "tokens", "values", "rows")),
        ("num", ctypes.c_int64),
    ]


def _terms(terms: Sequence[Term]) -> tuple[ctypes.Array, list[Tensor]]:
    """For the library; the tensors must live as long as it reads them."""
    made, kept = (_Term * max(1, len(terms)))(), []
    for number, term in enumerate(terms):
        order = latent_order(term.codes)
        assert order.by_latent is not None
        positions_N, starts_F = order.by_latent
        tensors = [positions_N, starts_F, order.tokens_by_latent_N, term.codes.values.contiguous(), term.rows_BD.contiguous()]
        made[number] = _Term(*(each.data_ptr() for each in tensors), len(term.rows_BD))
        kept += tensors
    return made, kept


def _entries(codes: SparseCodes) -> tuple[ctypes.c_void_p | ctypes.c_int64, ...]:
    """indices, values, offsets, k"""
    fixed = codes.offsets is None
    k = codes.indices.shape[1] if fixed else 0
    codes.indices, codes.values = codes.indices.contiguous(), codes.values.contiguous()
    return *map(at, (codes.indices, codes.values, codes.offsets)), ctypes.c_int64(k)


def _ready(*tensors: Tensor | None) -> list:
    return [None if each is None else each.detach().contiguous() for each in tensors]


def _screen(kind: tuple[int, int, bool]) -> int:
    state = _bits.setdefault(kind, [screen_bits(), 0])
    state[1] += 1
    if state[1] > RETRY:
        state[:] = [screen_bits(), 0]
    return state[0]


def _learn(kind: tuple[int, int, bool], passed: int, scores: int) -> None:
    """More bits next time where the screen lets too much through: speed alone depends on it."""
    state = _bits[kind]
    if passed > WASTEFUL * scores and state[0] < 32:
        state[:] = [2 * state[0], 0]


def _not_finite(x_BD: Tensor) -> NotFinite:
    if torch.isfinite(x_BD).all():
        return NotFinite("NaN or Inf in the encoder: its weights have diverged, train with a lower learning rate")
    return NotFinite("NaN or Inf in the activations that are to be encoded: check the model and the store")
