"""The Triton kernels beside dense float64 twins: by Triton's interpreter where there is no GPU, so shapes are tiny.

Selection is tested on small whole numbers. Their scores are exact in every type and tie often, so a set of indices is right or wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.kernels.primitives import AdamRule, Gradient, Term

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it decides when functions are decorated
triton = pytest.importorskip("triton")


def numpy_is_too_new() -> bool:
    """Triton 3.6 makes numbers of arrays of length 1, which numpy since 2.4 refuses."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return False
    try:
        return int(np.ones(1)) != 1
    except TypeError:
        return True


kernels = pytest.importorskip("saebench.kernels.triton")
if DEVICE == "cpu" and "Interpreted" not in type(sys.modules["saebench.kernels.triton.decode"]._decode).__name__:
    pytest.skip("Triton was imported before this file could ask for its interpreter", allow_module_level=True)

if DEVICE == "cpu" and numpy_is_too_new():
    pytest.skip("the interpreter of this Triton does not work with this numpy: Triton 3.7 does", allow_module_level=True)

ROOT = Path(__file__).parents[2]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that tiny shapes have several of, where nothing is gained by large ones."""
    torch.manual_seed(0)
    if DEVICE == "cpu":
        products = module("products")
        monkeypatch.setattr(products, "TILES_HOPPER", products.Tiles(16, 64, 32, warps=4, stages=1))
        monkeypatch.setattr(products, "TILES_32", products.Tiles(16, 32, 16, warps=4, stages=1))
        monkeypatch.setattr(products, "MAXIMA_BLOCK", 256)


def module(name: str):
    """A file of the package: functions of the same name hide some."""
    return sys.modules[f"saebench.kernels.triton.{name}"]


def whole(*shape: int, most: int = 3, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(dtype).to(DEVICE)


def normal(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, least: float = 1e-30) -> None:
    """Within a tolerance of the largest number expected, or of `least`; NaN never passes."""
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max().item() <= tolerance * max(expected.abs().max().item(), least)


def scores(x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None) -> Tensor:
    z_BF = x_BD.double() @ W_FD.double().T + b_F.double()
    return z_BF if scale_F is None else z_BF * scale_F.double()


def best(z_BF: Tensor, k: int) -> Tensor:
    """The k largest of each row, of equal ones the first, ascending."""
    return torch.sort(z_BF, dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


def check_topk(indices_BK: Tensor, values_BK: Tensor, z_BF: Tensor, k: int) -> None:
    assert indices_BK.dtype == torch.int32 and values_BK.dtype == FLOAT32
    order = indices_BK.sort(1)
    assert torch.equal(order.values.long(), best(z_BF, k))
    assert torch.equal(values_BK.double(), z_BF.gather(1, indices_BK.long()).relu())


@pytest.fixture(params=["fused", "library"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module("products"), "PRODUCT", request.param)
    return request.param


SHAPES = [(1, 1, 1, 1), (5, 7, 123, 1), (5, 123, 7, 7), (3, 33, 300, 9), (2, 20, 600, 12), (2, 16, 257, 400)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_topk_is_a_stable_sort(shape, dtype, product):
    B, D, F, k = shape
    x, W, b = whole(B, D, dtype=dtype), whole(F, D, dtype=dtype), whole(F)
    scale = torch.randint(1, 4, (F,)).float().to(DEVICE) if B > 2 else None
    check_topk(*kernels.topk(x, W, b, scale, k, None), scores(x, W, b, scale), min(k, F))


def test_topk_among_some_latents(product):
    x, W, b = whole(2, 20), whole(600, 20), whole(600)
    some = torch.arange(5, 600, 2, dtype=torch.int32, device=DEVICE)
    z = torch.full((2, 600), -torch.inf, dtype=torch.float64, device=DEVICE)
    z[:, some.long()] = scores(x, W, b, None)[:, some.long()]
    check_topk(*kernels.topk(x, W, b, None, 5, some), z, 5)
    indices, values = kernels.topk(x, W, b, None, 5, some[:3])
    assert indices.shape == values.shape == (2, 3) and torch.equal(indices.sort(1).values, some[:3].expand(2, 3))


def test_topk_in_blocks_of_rows_and_of_candidates(product, monkeypatch):
    monkeypatch.setattr(module("products"), "SCORE_BYTES", 4 * 250 * 2)
    monkeypatch.setattr(module("topk"), "SELECT_BLOCK", 128)
    x, W, b = whole(3, 9), whole(250, 9), whole(250)
    for k in (3, 100):
        check_topk(*kernels.topk(x, W, b, None, k, None), scores(x, W, b, None), k)


@pytest.mark.parametrize("case", ["one group", "own groups", "all equal", "all negative"])
def test_topk_wherever_the_winners_are(case):
    F, k = 512, 10
    x, W, b = torch.ones(2, 1, device=DEVICE), torch.zeros(F, 1, device=DEVICE), -torch.ones(F, device=DEVICE)
    if case == "one group":
        b[300 : 300 + k] = 1 + torch.arange(k, device=DEVICE)
    elif case == "own groups":
        b[7 :: F // k] = 5.0
    elif case == "all negative":
        b -= whole(F).abs()
    indices, values = kernels.topk(x, W, b, None, k, None)
    check_topk(indices, values, scores(x, W, b, None), k)
    assert (values == 0).all() == (case in ("all equal", "all negative"))


def test_topk_of_duplicated_latents_takes_the_first():
    x, rows = normal(3, 24), normal(50, 24)
    W, b = rows.repeat_interleave(4, 0), torch.zeros(200, device=DEVICE)
    indices, _ = kernels.topk(x, W, b, None, 6, None)
    copies = indices.sort(1).values % 4
    assert (
        torch.equal(copies, torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.int32, device=DEVICE).expand(3, 6))
        or (copies == 0).any()
    )
    for row, taken in zip(range(3), indices.sort(1).values, strict=True):
        groups = [(taken // 4 == group).sum().item() for group in (taken // 4).unique()]
        assert sorted(groups) == [2, 4], row  # four copies of the best and the first two of the second
        second = next(group for group in (taken // 4).unique() if (taken // 4 == group).sum() == 2)
        assert (taken[taken // 4 == second] % 4).tolist() == [0, 1]


@pytest.mark.parametrize("F", [90, 500])
def test_nan_reaches_the_values_and_no_other_row(F, product):
    x, W, b = whole(3, 12), whole(F, 12), whole(F)
    x[1, 3] = torch.nan
    indices, values = kernels.topk(x, W, b, None, 4, None)
    assert values[1].isnan().all() and indices[1].tolist() == [0, 1, 2, 3]
    z = scores(x, W, b, None)
    check_topk(indices[[0, 2]], values[[0, 2]], z[[0, 2]], 4)
    b[F - 5] = torch.nan
    indices, values = kernels.topk(x, W, b, None, 4, None)
    assert (indices == F - 5).any(1)[[0, 2]].all() and values[indices == F - 5].isnan().all()


def test_huge_and_denormal_scores():
    x, W, b = normal(2, 8), normal(300, 8), torch.zeros(300, device=DEVICE)
    for size in (1e37, 1e-41):
        scaled = (x.double() * size).float()
        indices, values = kernels.topk(scaled, W, b, None, 5, None)
        expected = scores(scaled, W, b, None)
        if DEVICE == "cpu":  # a GPU's matrix product may round denormals to zero
            assert torch.equal(indices.sort(1).values.long(), best(expected, 5))
            close(values, expected.gather(1, indices.long()), 1e-4)
    b[7], b[9] = torch.inf, -torch.inf
    indices, values = kernels.topk(x, W, b, None, 300, None)
    assert values[indices == 7].isinf().all() and (values[indices == 9] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 123), (3, 20, 1100)], ids=str)
def test_above_is_strict_ordered_and_complete(shape, product, monkeypatch):
    B, D, F = shape
    monkeypatch.setattr(module("products"), "SCORE_BYTES", 4 * F * 2)
    x, W, b, threshold = whole(B, D), whole(F, D), whole(F), whole(F, most=6)
    x[B // 2] = 0
    for scale in (None, torch.randint(1, 3, (F,)).float().to(DEVICE)):
        for least in (threshold, torch.full_like(threshold, -torch.inf), torch.full_like(threshold, torch.inf)):
            offsets, indices, values = kernels.above(x, W, b, scale, least)
            z = scores(x, W, b, scale)
            rows, latents = (z > least).nonzero(as_tuple=True)
            assert offsets.dtype == torch.int64 and indices.dtype == torch.int32
            assert torch.equal(offsets.diff(), (z > least).sum(1)) and offsets[0] == 0
            assert torch.equal(indices.long(), latents) and torch.equal(values.double(), z[rows, latents])


def codes_of(kind: str, B: int, F: int, k: int) -> SparseCodes:
    """Codes with padding, repeated latents, empty rows, a latent that all tokens have and latents that none has."""
    indices, values = torch.randint(F // 2 + 1, (B, k)), torch.randn(B, k)
    indices[:, 0] = F // 3
    values[torch.rand(B, k) < 0.2] = 0
    values[B // 2] = 0
    if kind == "fixed":
        return SparseCodes(indices.int().to(DEVICE), values.to(DEVICE), F)
    counts = torch.randint(0, k + 1, (B,))
    counts[0], counts[-1] = 0, k
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    kept = torch.arange(k) < counts[:, None]
    return SparseCodes(indices[kept].int().to(DEVICE), values[kept].to(DEVICE), F, offsets.to(DEVICE))


CODES = [("fixed", 5, 123, 7), ("fixed", 1, 1, 1), ("fixed", 3, 4, 19), ("ragged", 5, 123, 17), ("ragged", 2, 9, 1)]


@pytest.mark.parametrize("case", CODES, ids=str)
@pytest.mark.parametrize("D", [1, 33, 1500])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_products_with_codes_and_their_gradients(case, D, dtype):
    """decode, its gradient by the values (dots) and its gradient by the matrix (sums) are what autograd makes of a dense product."""
    kind, B, F, k = case
    codes, W, grad = codes_of(kind, B, F, k), normal(F, D, dtype=dtype), normal(B, D, dtype=dtype)
    values, W64 = codes.values.double().requires_grad_(), W.double().requires_grad_()
    dense = torch.zeros(B, F, dtype=torch.float64, device=DEVICE)
    dense = dense.index_put((codes.tokens, codes.indices.reshape(-1).long()), values.reshape(-1), accumulate=True)
    expected = dense @ W64
    by_values, by_W = torch.autograd.grad(expected, (values, W64), grad.double())
    close(kernels.decode(codes, W), expected.detach())
    bias = normal(D)
    close(kernels.decode(codes, W, bias), expected.detach() + bias)
    dots = kernels.dots(codes, grad, W)
    real = codes.values != 0
    assert dots.isfinite().all()
    close(dots * real, by_values * real)
    if kind == "ragged":
        close(dots, by_values)
    sums = kernels.sums(codes, grad)
    close(sums, by_W)
    assert (sums[dense.detach().count_nonzero(0) == 0] == 0).all()


def test_padding_adds_nothing_even_to_what_is_not_finite():
    codes = SparseCodes(torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE), torch.tensor([[2.0, 0.0]], device=DEVICE), 3)
    W, rows = torch.ones(3, 2, device=DEVICE), torch.full((1, 2), torch.inf, device=DEVICE)
    W[1] = torch.nan
    assert torch.equal(kernels.decode(codes, W), torch.full((1, 2), 2.0, device=DEVICE))
    assert kernels.dots(codes, torch.ones(1, 2, device=DEVICE), W).isfinite().all()
    assert torch.equal(kernels.sums(codes, rows)[1:], torch.zeros(2, 2, device=DEVICE))


@pytest.mark.parametrize("case", CODES, ids=str)
def test_by_latent_sorts_stably(case):
    kind, B, F, k = case
    indices = codes_of(kind, B, F, k).indices
    positions, starts = kernels.by_latent(indices.reshape(-1), F)
    assert positions.dtype == starts.dtype == torch.int32
    order = torch.argsort(indices.reshape(-1), stable=True)
    assert torch.equal(positions.long(), order)
    expected = [(indices < latent).sum().item() for latent in range(F + 1)]
    assert starts.tolist() == expected


def dense_gradient(W_FD: Tensor, gradient: Gradient, unit: bool) -> Tensor:
    total = torch.zeros(W_FD.shape, dtype=torch.float64, device=DEVICE)
    for term in gradient.terms:
        rows = term.rows_BD.double()[term.codes.tokens] * term.codes.values.double().reshape(-1, 1)
        total.index_add_(0, term.codes.indices.reshape(-1).long(), rows)
    if gradient.dense_FD is not None:
        total += gradient.dense_FD.double()
    if gradient.own_F is not None:
        total += gradient.own_F.double()[:, None] * W_FD.double()
    if unit:
        W = W_FD.double()
        total -= (total * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
    return total


def gradients(F: int, D: int) -> dict[str, Gradient]:
    fixed, ragged = codes_of("fixed", 5, F, 6), codes_of("ragged", 4, F, 9)
    first, second = Term(fixed, normal(5, D)), Term(ragged, normal(4, D, dtype=BFLOAT16))
    return {
        "one term": Gradient([first]),
        "two terms": Gradient([first, second]),
        "everything": Gradient([first, second, first], normal(F, D), normal(F)),
        "nothing": Gradient(),
    }


@pytest.mark.parametrize("unit", [False, True], ids=["free", "unit"])
@pytest.mark.parametrize("way", ["registers", "wide", "parts"])
@pytest.mark.parametrize("name", ["one term", "two terms", "everything", "nothing"])
def test_update_is_adam_with_the_summed_gradient(name, way, unit, monkeypatch):
    F, D = 23, 37
    if way == "wide":
        for file in ("gradient_square", "update"):
            monkeypatch.setattr(module(file), "MAX_WIDTH", 4)
        monkeypatch.setattr(module("wide"), "BLOCK_BYTES", 4 * D * 10)
    elif way == "parts":
        monkeypatch.setattr(module("latents"), "PART", 2)
    gradient = gradients(F, D)[name]
    W = torch.nn.functional.normalize(normal(F, D), dim=1)
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    twins = [t.double() for t in (W, m, v)]
    factor = torch.tensor(0.7, device=DEVICE)
    for step in (1, 2):
        expected = dense_gradient(W, gradient, unit)
        square = kernels.gradient_square(W, gradient, unit)
        assert square.shape == () and abs(square.item() - expected.square().sum().item()) <= 1e-5 * square.item()
        kernels.update(W, m, v, gradient, unit, AdamRule(0.01, (0.9, 0.99), 1e-8, step), factor)
        W64, m64, v64 = twins
        g = dense_gradient(W64, gradient, unit) * 0.7
        m64.mul_(0.9).add_(g, alpha=0.1)
        v64.mul_(0.99).addcmul_(g, g, value=0.01)
        W64 -= 0.01 * (m64 / (1 - 0.9**step)) / ((v64 / (1 - 0.99**step)).sqrt() + 1e-8)
        if unit:
            W64 /= W64.norm(dim=1, keepdim=True)
            assert (W.norm(dim=1) - 1).abs().max() < 1e-6
        for ours, twin in zip((W, m, v), twins, strict=True):
            close(ours, twin, 3e-5)


@pytest.mark.parametrize("way", ["registers", "wide"])
def test_update_of_rounded_weights_keeps_a_master_and_reads_the_step_from_the_device(way, monkeypatch):
    F, D = 9, 21
    if way == "wide":
        monkeypatch.setattr(module("update"), "MAX_WIDTH", 4)
    gradient = gradients(F, D)["two terms"]
    factor, start = torch.ones((), device=DEVICE), normal(F, D)
    runs = []
    for master in (None, start.clone()):
        W = start.clone() if master is None else start.to(BFLOAT16)
        m, v = torch.zeros_like(start), torch.zeros_like(start)
        for step in (1, 2, 3):
            there = torch.tensor([0.01, 1 - 0.9**step, 1 - 0.99**step], device=DEVICE) if master is not None else None
            rule = AdamRule(9.0 if there is not None else 0.01, (0.9, 0.99), 1e-8, step)
            kernels.update(W, m, v, gradient, True, rule, factor, master_FD=master, step_3=there)
        runs.append(W if master is None else master)
        if master is not None:
            rounding = 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter rounds towards zero
            assert ((W.float() - master).abs() <= rounding * master.abs()).all()
    close(runs[1], runs[0])


def test_a_latent_that_every_token_has_and_one_that_none_has(monkeypatch):
    monkeypatch.setattr(module("latents"), "PART", 8)
    codes = SparseCodes(torch.ones(61, 1, dtype=torch.int32, device=DEVICE), normal(61, 1), 3)
    rows = normal(61, 5)
    sums = kernels.sums(codes, rows)
    close(sums[1], (codes.values.double() * rows.double()).sum(0))
    assert (sums[[0, 2]] == 0).all()


def test_without_entries_and_without_tokens():
    W, b = normal(6, 4), normal(6)
    empty = SparseCodes(
        *(torch.empty(0, dtype=t, device=DEVICE) for t in (torch.int32, FLOAT32)),
        6,
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
    )
    assert torch.equal(kernels.decode(empty, W), torch.zeros(2, 4, device=DEVICE))
    assert kernels.dots(empty, normal(2, 4), W).shape == (0,)
    assert torch.equal(kernels.sums(empty, normal(2, 4)), torch.zeros(6, 4, device=DEVICE))
    none = normal(0, 4)
    assert kernels.topk(none, W, b, None, 2, None)[0].shape == (0, 2)
    assert [len(t) for t in kernels.above(none, W, b, None, b)] == [1, 0, 0]
    assert kernels.decode(SparseCodes(torch.empty(0, 2, dtype=torch.int32, device=DEVICE), normal(0, 2), 6), W).shape == (0, 4)


def test_the_same_bits_twice(product):
    x, W, b = normal(3, 33), normal(60, 33), normal(60)
    results = []
    for _ in range(2):
        indices, values = kernels.topk(x, W, b, None, 9, None)
        codes = SparseCodes(indices, values, 60)
        weights, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
        gradient = Gradient([Term(codes, x)])
        square = kernels.gradient_square(W, gradient, True)
        kernels.update(weights, m, v, gradient, True, AdamRule(0.01, (0.9, 0.99), 1e-8, 1), square.rsqrt())
        above = kernels.above(x, W, b, None, b + 3)
        results.append(
            [indices, values, *above, kernels.decode(codes, W), kernels.dots(codes, x, W), kernels.sums(codes, x), weights, m, v]
        )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_encoder_gradients_by_the_same_functions():
    """With the selection fixed, the gradients of a loss on the decoded codes by x and W_enc are a decode and sums."""
    B, D, F, k = 4, 19, 70, 5
    x, W, b, W_dec, grad = normal(B, D), normal(F, D), normal(F), normal(F, D), normal(B, D)
    indices, values = kernels.topk(x, W, b, None, k, None)
    x64, W64 = x.double().requires_grad_(), W.double().requires_grad_()
    mask = torch.zeros(B, F, dtype=torch.float64, device=DEVICE).scatter_(1, indices.long(), 1)
    x_hat = (scores(x64, W64, b, None).relu() * mask) @ W_dec.double()
    by_x, by_W = torch.autograd.grad(x_hat, (x64, W64), grad.double())
    codes = SparseCodes(indices, values, F)
    close(kernels.decode(codes, W_dec), x_hat.detach())
    by_z = codes.replaced(kernels.dots(codes, grad, W_dec) * (values > 0))
    close(kernels.decode(by_z, W), by_x)
    close(kernels.sums(by_z, x), by_W)


@pytest.mark.parametrize("shape", [(5, 7, 123), (1, 1, 1), (3, 40, 300)], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 0.6])
def test_pursuit_takes_the_steps_of_its_dense_twin(shape, tolerance):
    B, D, F = shape
    x = normal(B, D)
    x[B // 2] *= -1e-15
    atoms = torch.nn.functional.normalize(normal(F, D), dim=1)
    if F > 1:
        atoms[F // 2] = atoms[F // 3]  # of equal atoms the first is taken
    taken, coefficients, norms, residual = kernels.pursue(x, atoms, 4, tolerance)
    r, atoms64 = x.double(), atoms.double()
    for t in range(4):
        s = r @ atoms64.T
        j = s.argmax(1)
        v = s.gather(1, j[:, None])[:, 0]
        v = torch.where((v <= 0) | (r.norm(dim=1) < tolerance * x.double().norm(dim=1)), 0.0, v)
        r = r - v[:, None] * atoms64[j]
        assert torch.equal(taken[:, t][v > 1e-5], j[v > 1e-5])
        close(coefficients[:, t], v)
        close(norms[:, t], r.norm(dim=1))
    assert (taken != F // 2).all() or F == 1
    close(residual, r)


def test_pursuit_ends_with_nan():
    x = normal(3, 5)
    x[1, 2] = torch.nan
    atoms = torch.nn.functional.normalize(normal(140, 5), dim=1)
    taken, coefficients, _, residual = kernels.pursue(x, atoms, 2, 0.0)
    assert coefficients[1].isnan().all() and residual[1].isnan().all() and residual[[0, 2]].isfinite().all()
    assert ((taken >= 0) & (taken < 140)).all()


def attention_twin(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float | None, window: int | None) -> Tensor:
    s = q @ k.mT * scale
    s = s if cap is None else cap * (s / cap).tanh()
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    seen = (distance >= 0) & (distance < (window or 1 << 30))
    return s.masked_fill(~seen.to(s.device), -torch.inf).softmax(-1) @ v


ATTENTION = [(1, 5, 3, None, None), (7, 16, 1, None, None), (70, 20, 5, 4.0, None), (70, 33, 17, None, 9), (64, 8, 2, 2.0, 64)]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_attention_and_its_gradients(case, dtype):
    size, width, heads, cap, window = case
    rounding = 1e-5 if dtype == FLOAT32 else 2e-2
    q, k = normal(2, 2, size, width, dtype=dtype), normal(2, 2, size, width, dtype=dtype)
    v = normal(2, size, 2, heads, dtype=dtype).transpose(1, 2)
    q64, k64, v64 = (t.double().requires_grad_() for t in (q, k, v))
    expected = attention_twin(q64, k64, v64, 0.4, cap, window)
    z, lse = kernels.attention(q, k, v, 0.4, cap, window)
    close(z, expected.detach(), rounding)
    grad = normal(2, 2, size, heads)
    for ours, twin in zip(
        kernels.attention_gradients(q, k, v, lse, z, grad, 0.4, cap, window),
        torch.autograd.grad(expected, (q64, k64, v64), grad.double()),
        strict=True,
    ):
        close(ours, twin, 2 * rounding, least=1)


def test_attention_gradients_of_selected_entries(monkeypatch):
    C, G, S, E, H, K, skip = 2, 2, 21, 8, 5, 3, 1
    monkeypatch.setattr(module("attention"), "HEADS_AT_ONCE", 2)
    q, k, v = normal(C, G, S, E), normal(C, G, S, E), normal(C, G, S, H)
    q64, k64, v64 = (t.double().requires_grad_() for t in (q, k, v))
    z_BF = attention_twin(q64, k64, v64, 0.5, None, None).transpose(1, 2).reshape(C, S, G * H)[:, skip:].flatten(0, 1)
    indices = best(z_BF.detach(), K)
    grad = normal(len(indices), K)
    expected = torch.autograd.grad(z_BF.gather(1, indices).relu(), (q64, k64, v64), grad.double())
    z, lse = kernels.attention(q, k, v, 0.5)
    values = z.transpose(1, 2).reshape(C, S, G * H)[:, skip:].flatten(0, 1).gather(1, indices).relu()
    for ours, twin in zip(kernels.entry_gradients(q, k, v, lse, indices, values, grad, 0.5, skip=skip), expected, strict=True):
        close(ours, twin)


def run_script(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper():
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("Triton came without an assembler")
    done = run_script("benchmarks/gpu_compile.py", "--arch", "90", interpret=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_gpu_benchmark_checks_itself_without_a_gpu(tmp_path):
    done = run_script("benchmarks/gpu.py", "--smoke", "--out", str(tmp_path), interpret=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(list(tmp_path.iterdir())) == 2


def test_operations_take_these_kernels_by_order():
    """Selection, decoding, pursuit and attention with a soft cap through the operations, with their gradients, beside stock torch."""
    from saebench.kernels import encode_topk, matching_pursuit, sparse_decode, use_implementation
    from saebench.kernels.lorsa_attention import AttentionRule, attend

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    x, W, b, W_dec = draw(2, 7), draw(20, 7), draw(20), torch.nn.functional.normalize(draw(20, 7), dim=1)
    q, k, v = draw(1, 2, 5, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 3)
    found = []
    for name in ("triton", "stock"):
        leaves = [t.clone().requires_grad_() for t in (x, W, b, W_dec, q, k, v)]
        x_, W_, b_, W_dec_, *qkv = leaves
        with use_implementation(name):
            decoded = sparse_decode(encode_topk(x_, W_, b_, None, 3), W_dec_)
            pursuit = matching_pursuit(x_, W_dec_, 3)
            attended = attend(*qkv, AttentionRule(0.5, torch.empty(0, device=DEVICE), soft_cap=2.0))
            loss = decoded.square().sum() + pursuit.residual_BD.square().sum() + (attended * attended.detach().cos()).sum()
            found.append((decoded, pursuit.coefficients_BT, attended, *torch.autograd.grad(loss, leaves)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_training_step_with_rounded_weights_is_that_of_stock_torch():
    import saebench as sb
    from saebench.kernels import use_implementation
    from saebench.trainer import Member, TrainConfig

    x = whole(8, 9) / 4  # which bfloat16 holds exactly
    settings = TrainConfig(num_tokens=16, batch_size=4, lr=0.01, eps=1e-6, momentum="float32", weights="bfloat16")
    config = sb.TopK(d_sae=20, k=2, d_in=9, decoder="unit", normalise="none", initial_bias="zero")
    found = []
    for name in ("stock", "triton"):
        with use_implementation("stock"):
            member = Member.create(config, settings, x)
        with use_implementation(name):
            member.step(x[:4], 0)
        assert member.dictionary.W_enc_FD.dtype == FLOAT32
        found.append(member.dictionary.state_dict())
    for key, expected in found[0].items():
        close(found[1][key], expected, 1e-4)
