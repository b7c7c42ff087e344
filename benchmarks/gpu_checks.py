"""Every Triton kernel against float64 on the same device, at shapes that divide nothing. A check returns what is wrong, or None."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import gpu_steps
from saebench.codes import SparseCodes
from saebench.kernels import triton as kernels
from saebench.kernels.primitives import AdamRule, Gradient, Term
from saebench.kernels.triton import products

Check = Callable[[], str | None]


def checks(device: str, tiny: bool) -> Iterator[tuple[str, Check]]:
    """(name, check) of everything; tiny shapes are for the interpreter."""
    shapes = [(3, 20, 130, 5)] if tiny else [(33, 123, 1777, 13), (130, 768, 24576, 32), (40, 4096, 65537, 64), (5, 7, 123, 123)]
    types = (torch.float32, torch.bfloat16)
    for shape in shapes:
        for dtype in types:
            label = f"{shape} {str(dtype)[6:]}"
            for product in ("fused", "library"):
                yield f"topk {product} {label}", lambda s=shape, t=dtype, p=product: topk(device, s, t, p)
                yield f"above {product} {label}", lambda s=shape, t=dtype, p=product: above(device, s, t, p)
            for kind in ("fixed", "ragged"):
                yield f"decode, dots, sums {kind} {label}", lambda s=shape, t=dtype, k=kind: with_codes(device, s, t, k)
            for unit in (False, True):
                yield f"update unit={unit} {label}", lambda s=shape, t=dtype, u=unit: update(device, s, t, u)
            yield f"same bits twice {label}", lambda s=shape, t=dtype: twice(device, s, t)
        yield f"pursuit {shape}", lambda s=shape: pursuit(device, s)
    yield "whole steps", lambda: steps(device, (20, 40, 4, 5) if tiny else (200, 3000, 16, 512))
    yield "one latent has all tokens", lambda: popular(device, 50 if tiny else 5000)
    sizes = [(1, 1, 7, 8, 3)] if tiny else [(2, 3, 129, 64, 1), (1, 2, 515, 128, 16), (2, 1, 64, 33, 130)]
    for size in sizes:
        for dtype in types:
            for cap, window in ((None, None), (5.0, 40)):
                label = f"attention {size} {str(dtype)[6:]} cap={cap} window={window}"
                yield label, lambda s=size, t=dtype, c=cap, w=window: attention(device, s, t, c, w)


def whole(*shape: int, device: str, dtype: torch.dtype = torch.float32, most: int = 2) -> Tensor:
    """Small whole numbers: their products are exact in every type, and tie."""
    return torch.randint(-most, most + 1, shape, device=device).to(dtype)


def off(name: str, ours: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """What is wrong where the error is above a tolerance of the expected norm; NaN never passes."""
    error = ((ours.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return None if error <= tolerance else f"{name} is off by {error:.1e}"


def first(*found: str | None) -> str | None:
    return next((text for text in found if text), None)


def topk(device: str, shape: tuple[int, ...], dtype: torch.dtype, product: str) -> str | None:
    B, D, F, k = shape
    products.PRODUCT = product
    try:
        x, W, b = whole(B, D, device=device, dtype=dtype), whole(F, D, device=device, dtype=dtype), whole(F, device=device)
        W[F // 2] = W[F // 3]
        x[B // 2] = 0  # every score is a bias, and most of them tie
        z = x.double() @ W.double().T + b.double()
        best = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
        indices, values = kernels.topk(x, W, b, None, k, None)
        if not torch.equal(indices.sort(1).values.long(), best):
            return "the sets differ from a stable sort"
        if not torch.equal(values.double(), z.gather(1, indices.long()).relu()):
            return "values of whole numbers are not exact"
        some = torch.arange(1, F, 3, dtype=torch.int32, device=device)
        z = z[:, some.long()]
        best = some[torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k].sort(1).values]
        if not torch.equal(kernels.topk(x, W, b, None, k, some)[0].sort(1).values, best):
            return "the sets among some latents differ"
        x, W = torch.randn(B, D, device=device).to(dtype), torch.randn(F, D, device=device).to(dtype)
        z = x.double() @ W.double().T + b.double()
        indices, values = kernels.topk(x, W, b, None, k, None)
        slack = 1e-5 * z.abs().max()
        if (z.gather(1, indices.long()).min(1).values < z.topk(k).values[:, -1] - slack).any():
            return "a smaller score was taken"
        return off("values", values, z.gather(1, indices.long()).relu(), 1e-5)
    finally:
        products.PRODUCT = None


def above(device: str, shape: tuple[int, ...], dtype: torch.dtype, product: str) -> str | None:
    B, D, F, _ = shape
    products.PRODUCT = product
    try:
        x, W, b = whole(B, D, device=device, dtype=dtype), whole(F, D, device=device, dtype=dtype), whole(F, device=device)
        z = x.double() @ W.double().T + b.double()
        threshold = (z.amax(0) - 3).float()
        offsets, indices, values = kernels.above(x, W, b, None, threshold)
        rows, latents = (z > threshold).nonzero(as_tuple=True)
        if not torch.equal(indices.long(), latents) or not torch.equal(offsets.diff(), (z > threshold).sum(1)):
            return "entries differ"
        return None if torch.equal(values.double(), z[rows, latents]) else "values of whole numbers are not exact"
    finally:
        products.PRODUCT = None


def some_codes(device: str, B: int, F: int, k: int, kind: str) -> SparseCodes:
    """With padding, an empty row, a latent that every row has, latents that none has, and repeated ones."""
    indices = torch.randint(F // 2 + 1, (B, k), device=device, dtype=torch.int32)
    values = torch.randn(B, k, device=device)
    indices[:, 0] = F // 3
    values[torch.rand(B, k, device=device) < 0.1] = 0
    values[B // 2] = 0
    if kind == "fixed":
        return SparseCodes(indices, values, F)
    counts = torch.randint(k + 1, (B,), device=device)
    counts[0] = 0
    kept = torch.arange(k, device=device) < counts[:, None]
    return SparseCodes(indices[kept], values[kept], F, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def with_codes(device: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> str | None:
    B, D, F, k = shape
    codes = some_codes(device, B, F, k, kind)
    W, rows, bias = (torch.randn(*size, device=device).to(dtype) for size in ((F, D), (B, D), (D,)))
    dense = torch.zeros(B, F, dtype=torch.float64, device=device)
    flat = codes.indices.reshape(-1).long()
    dense.index_put_((codes.tokens, flat), codes.values.double().reshape(-1), accumulate=True)
    real = (codes.values != 0).reshape(-1)
    dots = (rows.double()[codes.tokens] * W.double()[flat]).sum(1)
    return first(
        off("decode", kernels.decode(codes, W), dense @ W.double(), 1e-6),
        off("decode with a bias", kernels.decode(codes, W, bias), dense @ W.double() + bias, 1e-6),
        off("dots", kernels.dots(codes, rows, W).reshape(-1) * real, dots * real, 1e-6),
        off("sums", kernels.sums(codes, rows), dense.T @ rows.double(), 1e-6),
    )


def update(device: str, shape: tuple[int, ...], dtype: torch.dtype, unit: bool) -> str | None:
    B, D, F, k = shape
    F = min(F, 5000)
    terms = [Term(some_codes(device, B, F, k, kind), torch.randn(B, D, device=device).to(dtype)) for kind in ("fixed", "ragged")]
    gradient = Gradient(terms, torch.randn(F, D, device=device), torch.randn(F, device=device))
    W = torch.nn.functional.normalize(torch.randn(F, D, device=device), dim=1)
    m, v = torch.randn(F, D, device=device), torch.rand(F, D, device=device)
    g = gradient.dense_FD.double() + gradient.own_F.double()[:, None] * W.double()  # type: ignore[union-attr]
    for term in terms:
        entries = term.rows_BD.double()[term.codes.tokens] * term.codes.values.double().reshape(-1, 1)
        g.index_add_(0, term.codes.indices.reshape(-1).long(), entries)
    if unit:
        g -= (g * W).sum(1, keepdim=True) / W.double().square().sum(1, keepdim=True) * W.double()
    square = off("gradient_square", kernels.gradient_square(W, gradient, unit), g.square().sum(), 1e-5)
    g *= 0.5
    m64, v64 = 0.9 * m.double() + 0.1 * g, 0.99 * v.double() + 0.01 * g.square()
    W64 = W.double() - 0.01 * (m64 / (1 - 0.9**3)) / ((v64 / (1 - 0.99**3)).sqrt() + 1e-8)
    if unit:
        W64 /= W64.norm(dim=1, keepdim=True)
    rounded = W.bfloat16()
    arguments = (gradient, unit, AdamRule(0.01, (0.9, 0.99), 1e-8, 3), torch.tensor(0.5, device=device))
    kernels.update(rounded, m, v, *arguments, master_FD=W)
    return first(
        square,
        off("m", m, m64, 3e-6),
        off("v", v, v64, 3e-6),
        off("W", W, W64, 3e-6),
        off("rounded W", rounded, W64, 5e-3),
    )


def twice(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    B, D, F, k = shape
    x, W = torch.randn(B, D, device=device).to(dtype), torch.randn(F, D, device=device).to(dtype)
    b, results = torch.zeros(F, device=device), []
    for _ in range(2):
        indices, values = kernels.topk(x, W, b, None, k, None)
        codes = SparseCodes(indices, values, F)
        results.append([indices, values, kernels.decode(codes, W), kernels.dots(codes, x, W), kernels.sums(codes, x)])
    return None if all(torch.equal(a, c) for a, c in zip(*results, strict=True)) else "bits differ"


def popular(device: str, tokens: int) -> str | None:
    codes = SparseCodes(torch.ones(tokens, 1, dtype=torch.int32, device=device), torch.randn(tokens, 1, device=device), 3)
    rows = torch.randn(tokens, 70, device=device)
    expected = torch.zeros(3, 70, dtype=torch.float64, device=device)
    expected[1] = (codes.values.double() * rows.double()).sum(0)
    return off("sums", kernels.sums(codes, rows), expected, 1e-5)


def steps(device: str, shape: tuple[int, ...]) -> str | None:
    """Losses of a few steps beside those of autograd through a dense code."""
    D, F, k, B = shape
    ours, dense = gpu_steps.OurStep(D, F, k, device), gpu_steps.DenseStep(D, F, k, device, compiled=False)
    with torch.no_grad():
        dense.W_dec.copy_(ours.decoder.master_FD)
        dense.W_enc.copy_(ours.encoder.master_FD)
    x = torch.randn(B, D, device=device)
    losses = [(float(ours(x)), float(dense(x))) for _ in range(4)]
    close = all(abs(a - b) <= 0.02 * b for a, b in losses) and losses[-1][0] < losses[0][0]
    return None if close else f"losses (ours, dense) {losses}"


def pursuit(device: str, shape: tuple[int, ...]) -> str | None:
    B, D, F, _ = shape
    x = torch.randn(B, D, device=device)
    atoms = torch.nn.functional.normalize(torch.randn(F, D, device=device), dim=1)
    taken, coefficients, _, residual = kernels.pursue(x, atoms, 3, 0.0)
    r = x.double()
    for t in range(3):  # follow the kernel's choices, so that a near tie does not lead elsewhere
        s = r @ atoms.double().T
        v = s.gather(1, taken[:, t, None])
        if (v[:, 0] < s.amax(1) - 1e-4).any():
            return "a smaller score was taken"
        r = r - v.clamp_min(0) * atoms.double()[taken[:, t]]
    return first(off("residual", residual, r, 1e-5), "NaN" if coefficients.isnan().any() else None)


def attention(device: str, size: tuple[int, ...], dtype: torch.dtype, cap: float | None, window: int | None) -> str | None:
    C, G, S, E, H = size
    q, k, v = (torch.randn(C, G, S, width, device=device).to(dtype) for width in (E, E, H))
    grad = torch.randn(C, G, S, H, device=device)
    q64, k64, v64 = (t.double().requires_grad_() for t in (q, k, v))
    scores = q64 @ k64.mT * E**-0.5
    scores = scores if cap is None else cap * (scores / cap).tanh()
    distance = torch.arange(S, device=device)[:, None] - torch.arange(S, device=device)
    seen = (distance >= 0) & (distance < (window or S))
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v64
    z, lse = kernels.attention(q, k, v, E**-0.5, cap, window)
    given = kernels.attention_gradients(q, k, v, lse, z, grad, E**-0.5, cap, window)
    wanted = torch.autograd.grad(expected, (q64, k64, v64), grad.double())
    tolerance = 3e-5 if dtype == torch.float32 else 1e-2
    return first(
        off("z", z, expected.detach(), tolerance),
        *(off(name, ours, twin, 2 * tolerance) for name, ours, twin in zip("qkv", given, wanted, strict=True)),
    )
