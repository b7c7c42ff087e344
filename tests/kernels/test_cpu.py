"""The compiled kernels beside dense float64 algebra, at shapes that divide nothing and on data that kernels trip over."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.optim import Adam as TorchAdam

from saebench.codes import SparseCodes
from saebench.errors import NotFinite, UserError
from saebench.kernels import decode_error, encode_above, encode_jumprelu, encode_topk, sparse_decode, stock, use_implementation
from saebench.kernels.cpu import build
from saebench.kernels.implementations import primitives_for
from saebench.kernels.primitives import AdamRule, Gradient, Term

cpu = pytest.importorskip("saebench.kernels.cpu")
if primitives_for(torch.zeros(1)) is not cpu:
    pytest.skip("no C++ compiler here", allow_module_level=True)

SHAPES = [(1, 1, 9, 1), (5, 7, 123, 3), (13, 33, 70, 5), (64, 130, 1100, 17), (200, 48, 2049, 32), (31, 512, 600, 7)]
BITS = sorted({cpu.screen_bits(), 16, 32} & ({8, 16, 32} if cpu.screen_bits() == 8 else {cpu.screen_bits(), 32}))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(params=BITS)
def bits(request, monkeypatch):
    """Screens scores with this many bits, whatever was learnt before."""
    monkeypatch.setattr(cpu, "_screen", lambda kind: request.param)
    monkeypatch.setattr(cpu, "_learn", lambda *_: None)
    return request.param


def expected_topk(x, W, b, scale, k, latents=None):
    """Sets of indices and values by a float64 sort; ties to the lowest index."""
    z = (x.double() @ W.double().T + b.double()) * (1.0 if scale is None else scale.double())
    if latents is not None:
        z[:, [i for i in range(len(W)) if i not in set(latents.tolist())]] = -torch.inf
    order = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k]
    return order, z.gather(1, order).relu(), z


def assert_same_selection(found, expected, z, k):
    """Equal sets of positive entries, but for scores that float32 cannot tell apart."""
    indices, values = found
    order, wanted, _ = expected
    torch.testing.assert_close(values.double(), wanted, rtol=2e-5, atol=2e-5 * float(z[z.isfinite()].abs().max()))
    for token in range(len(values)):
        ours = set(indices[token][values[token] > 0].tolist())
        theirs = set(order[token][wanted[token] > 0].tolist())
        border = float(wanted[token][-1])
        for latent in ours ^ theirs:
            assert float(z[token, latent]) == pytest.approx(border, abs=3e-5 * float(z[token].abs().max()) + 1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_topk_is_that_of_a_sort(shape, scaled, bits):
    tokens, d_in, d_sae, k = shape
    x, W, b = draw(tokens, d_in), draw(d_sae, d_in, seed=1), 0.3 * draw(d_sae, seed=2)
    scale = draw(d_sae, seed=3).exp() if scaled else None
    found = cpu.topk(x, W, b, scale, k, None)
    expected = expected_topk(x, W, b, scale, k)
    assert_same_selection(found, expected, expected[2], k)
    assert (found[1].diff(dim=1) <= 0).all()  # best first
    latents = torch.arange(0, d_sae, 2)
    if k * cpu.MANY <= len(latents):
        expected = expected_topk(x, W, b, scale, k, latents)
        assert_same_selection(cpu.topk(x, W, b, scale, k, latents), expected, expected[2], k)


def test_many_tokens_select_as_a_sort_does(bits):
    """Thousands of rows of a correlated kind, so that guesses fail now and then and are done again."""
    mixed = draw(16, 64, seed=5)
    x, W, b = draw(4000, 16) @ mixed, draw(1500, 16, seed=1) @ mixed, torch.zeros(1500)
    W[:40] *= 3  # neighbours that win together
    expected = expected_topk(x, W, b, None, 24)
    assert_same_selection(cpu.topk(x, W, b, None, 24, None), expected, expected[2], 24)


@pytest.mark.parametrize("case", ["one block wins", "duplicates", "nothing positive", "huge", "tiny", "outlier", "zero rows"])
def test_topk_on_hard_data(case, bits):
    x, W, b = draw(40, 20), draw(1200, 20, seed=1), torch.zeros(1200)
    if case == "one block wins":
        W[100:130] *= 50
    elif case == "duplicates":
        W[600:] = W[:600]
    elif case == "nothing positive":
        b -= 1000
    elif case == "huge":
        x, W = 1e15 * x, 1e15 * W
    elif case == "tiny":
        x = 1e-39 * x  # denormal
    elif case == "outlier":
        x[:, 3] = 1e4
    elif case == "zero rows":
        x[::2], W[::3] = 0, 0
    indices, values = cpu.topk(x, W, b, None, 6, None)
    order, wanted, z = expected_topk(x, W, b, None, 6)
    if case == "duplicates":
        assert (indices[values > 0].view(-1) < 1200).all()
        for token in range(40):  # three pairs; the first of each pair comes before the second
            assert torch.equal(values[token, ::2], values[token, 1::2])
            assert torch.equal(indices[token, ::2] + 600, indices[token, 1::2])
        indices, values = cpu.topk(x, W, b, None, 5, None)
        assert (indices[:, 4] < 600).all()  # of the last pair the lower index
    elif case == "nothing positive":
        assert (values == 0).all()
    else:
        assert_same_selection((indices, values), (order, wanted, z), z, 6)


@pytest.mark.parametrize("k", [1, 6, 40])
def test_more_within_the_error_of_the_screen_than_there_is_room_for(k, bits):
    """Three directions in a thousand copies each, all but a few of which differ by less than any screen can see."""
    x, few = draw(50, 24).abs(), draw(3, 24, seed=1).abs()
    W = few.repeat(1000, 1) * (1 + 1e-5 * draw(3000, 1, seed=2))
    W[::500] *= 1.5
    b = torch.zeros(3000)
    indices, values = cpu.topk(x, W, b, None, k, None)
    _, wanted, z = expected_topk(x, W, b, None, k)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-6, atol=0)
    for token in range(50):
        picked = z[token, indices[token].long()]
        assert indices[token].unique().numel() == k
        assert float(picked.min()) >= float(wanted[token, -1]) * (1 - 2e-6)  # nothing was left out that float32 can tell apart


def test_large_biases_do_not_hide_a_latent(bits):
    x, W, b = draw(60, 16), draw(2000, 16, seed=1), 1e4 * draw(2000, seed=2)
    expected = expected_topk(x, W, b, None, 5)
    assert_same_selection(cpu.topk(x, W, b, None, 5, None), expected, expected[2], 5)


def test_more_tokens_than_are_at_work_at_once(bits):
    """The room for what contends is bounded: with k 60 for some 3,500 tokens."""
    x, W, b = draw(7500, 8), draw(480, 8, seed=1), 0.1 * draw(480, seed=2)
    expected = expected_topk(x, W, b, None, 60)
    assert_same_selection(cpu.topk(x, W, b, None, 60, None), expected, expected[2], 60)


@pytest.mark.parametrize("shape", SHAPES)
def test_above_lists_what_exceeds_its_threshold(shape, bits):
    tokens, d_in, d_sae, _ = shape
    x, W, b = draw(tokens, d_in), draw(d_sae, d_in, seed=1), 0.3 * draw(d_sae, seed=2)
    threshold = draw(d_sae, seed=4).abs() * d_in**0.5
    threshold[::5], threshold[1::7] = 1e9, 0.0
    if d_sae > 100:
        threshold[50] = -torch.inf
    offsets, indices, values = cpu.above(x, W, b, None, threshold)
    z = x.double() @ W.double().T + b.double()
    clear = (z - threshold).abs() > 1e-4
    dense = SparseCodes(indices, values, d_sae, offsets).to_dense().double()
    torch.testing.assert_close(dense[clear], (z * (z > threshold))[clear], rtol=1e-4, atol=1e-4)
    for token in range(tokens):
        assert (indices[offsets[token] : offsets[token + 1]].diff() > 0).all()


@pytest.mark.parametrize(("num", "width"), [(1, 1), (3, 70), (64, 16), (1000, 33), (5000, 128)])
def test_rows_are_summed_with_weights(num, width):
    weights, rows = draw(num), draw(num, width, seed=1)
    weights[::3] = 0
    found = cpu.weighted_sum(weights, rows)
    torch.testing.assert_close(found.double(), weights.double() @ rows.double(), rtol=1e-5, atol=1e-4)


def test_nothing_above():
    offsets, indices, values = cpu.above(draw(5, 7), draw(123, 7), torch.zeros(123), None, torch.full((123,), 1e9))
    assert offsets.tolist() == [0] * 6
    assert len(indices) == len(values) == 0


@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(where, value):
    tensors = {"x": draw(30, 20), "W": draw(500, 20), "b": torch.zeros(500)}
    tensors[where].view(-1)[7] = value
    problem = "activations" if where == "x" else "encoder"
    for select in (lambda *t: cpu.topk(*t, None, 4, None), lambda *t: cpu.above(*t, None, torch.zeros(500))):
        with pytest.raises(NotFinite, match=f"NaN or Inf in the {problem}"):
            select(*tensors.values())


def codes_like(kind, tokens, d_sae):
    """Codes of which the adversarial kinds have one latent taking all, latents never used, empty rows, padding and repeats."""
    if kind == "fixed":
        indices = torch.randint(0, d_sae, (tokens, 5), generator=torch.Generator().manual_seed(1))
        values = draw(tokens, 5).abs()
        values[::3, 2:] = 0
        indices[:, 0] = 4
        return SparseCodes(indices, values, d_sae)
    dense = draw(tokens, d_sae) * (draw(tokens, d_sae, seed=9) > 1.9)
    dense[1::4] = 0
    dense[:, 10:20] = 0
    return SparseCodes.from_dense(dense)


IN_STRIPS = [(300, 1), (300, 96), (300, 131)]  # so many entries that rows are copied


@pytest.mark.parametrize("kind", ["fixed", "ragged"])
@pytest.mark.parametrize("tokens, width", [(37, 1), (37, 7), (37, 130), *IN_STRIPS])
def test_rows_are_summed_and_multiplied(kind, tokens, width):
    codes, W, rows, bias = codes_like(kind, tokens, 211), draw(211, width), draw(tokens, width, seed=2), draw(width)
    dense = codes.to_dense().double()
    torch.testing.assert_close(cpu.decode(codes, W).double(), dense @ W.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cpu.decode(codes, W, bias).double(), dense @ W.double() + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cpu.sums(codes, rows).double(), dense.T @ rows.double(), rtol=1e-5, atol=1e-5)
    products = (rows.double() @ W.double().T)[codes.tokens, codes.indices.reshape(-1).long()]
    torch.testing.assert_close(cpu.dots(codes, rows, W).reshape(-1).double(), products, rtol=1e-5, atol=1e-5)
    assert (cpu.sums(codes, rows)[codes.firings() == 0] == 0).all()
    for ours, theirs in zip(
        cpu.by_latent(codes.indices.reshape(-1), 211), stock.by_latent(codes.indices.reshape(-1), 211), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["fixed", "ragged"])
@pytest.mark.parametrize("tokens, width", [(37, 70), *IN_STRIPS])
def test_the_error_of_decoding(kind, tokens, width):
    codes, W, y, bias = codes_like(kind, tokens, 211), draw(211, width), draw(tokens, width, seed=2), draw(width)
    error, squares, products = cpu.decode_error(codes, W, bias, y)
    expected = codes.to_dense().double() @ W.double() + bias - y.double()
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), expected.square().sum(1), rtol=1e-5, atol=1e-5)
    wanted = (expected @ W.double().T)[codes.tokens, codes.indices.reshape(-1).long()]
    torch.testing.assert_close(products.reshape(-1).double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens, width", [(37, 70), *IN_STRIPS])
def test_errors_of_two_values_are_those_of_each(tokens, width):
    codes, W, y, bias = codes_like("ragged", tokens, 211), draw(211, width), draw(tokens, width, seed=2), draw(width)
    beside = draw(*codes.values.shape, seed=3)
    both = cpu.decode_error_pair(codes, beside, W, bias, y)
    first, second = (cpu.decode_error(each, W, bias, y) for each in (codes, codes.replaced(beside)))
    for ours, alone in zip(both, (*first, *second[1:]), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tokens, width", IN_STRIPS)
def test_strips_decode_what_rows_do(tokens, width):
    codes, W, bias = codes_like("fixed", tokens, 211), draw(211, width), draw(width)
    some = [slice(first, first + 100) for first in range(0, tokens, 100)]  # too few for strips
    by_rows = [cpu.decode(SparseCodes(codes.indices[each], codes.values[each], 211), W, bias) for each in some]
    torch.testing.assert_close(cpu.decode(codes, W, bias), torch.cat(by_rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["fixed", "ragged"])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("kernels", [cpu, stock], ids=["cpu", "stock"])
def test_update_is_torchs_adam_on_the_summed_gradient(kind, unit, kernels):
    generator = torch.Generator().manual_seed(3)
    ours = torch.randn(211, 19, generator=generator)
    ours /= ours.norm(dim=1, keepdim=True)
    theirs = torch.nn.Parameter(ours.double())
    moments = [torch.zeros_like(ours), torch.zeros_like(ours)]
    reference = TorchAdam([theirs], lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    for step in range(1, 101):
        terms = [Term(codes_like(kind, 37, 211), torch.randn(37, 19, generator=generator)) for _ in range(2)]
        dense = torch.randn(211, 19, generator=generator) if step % 2 else None
        own = torch.randn(211, generator=generator) if step % 3 == 0 else None
        gradient = Gradient(tuple(terms), dense, own)
        total = sum(term.codes.to_dense().double().T @ term.rows_BD.double() for term in terms)
        total = total + (0 if dense is None else dense.double()) + (0 if own is None else own[:, None] * theirs.data)
        if unit:
            along = (total * theirs.data).sum(1, keepdim=True) / theirs.data.square().sum(1, keepdim=True)
            total = total - along * theirs.data
        square = kernels.gradient_square(ours, gradient, unit)
        assert float(square) == pytest.approx(float(total.square().sum()), rel=1e-4)
        assert float(square) <= kernels.gradient_bound(ours, gradient)
        theirs.grad = 0.37 * total
        reference.step()
        if unit:
            theirs.data /= theirs.data.norm(dim=1, keepdim=True)
        told = kernels.update(ours, *moments, gradient, unit, AdamRule(3e-3, (0.9, 0.999), 1e-8, step), torch.tensor(0.37))
        torch.testing.assert_close(told, square, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.double(), theirs.data, rtol=1e-5, atol=2e-5)
    if unit:
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(211), rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("width", [64, 150])
def test_gradients_in_strips_are_those_of_other_kernels(unit, width):
    tokens, d_sae = 300, 40  # each latent is asked for often
    x, error, dense, own = (
        draw(*shape, seed=seed) for seed, shape in enumerate([(tokens, width)] * 2 + [(d_sae, width), (d_sae,)])
    )
    codes = [codes_like(kind, tokens, d_sae) for kind in ("fixed", "ragged", "fixed")]
    terms = tuple(Term(code, rows) for code, rows in zip(codes, (x, error, x), strict=True))
    assert sum(term.codes.values.numel() for term in terms) > 4 * 2 * tokens
    found = []
    for kernels, threads in ((stock, 2), (cpu, 1), (cpu, 2), (cpu, 3)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            W, m, v = draw(d_sae, width, seed=9), torch.zeros(d_sae, width), torch.zeros(d_sae, width)
            for step in (1, 2):
                gradient = Gradient(terms, dense if step == 1 else None, own)
                square = kernels.gradient_square(W, gradient, unit)
                kernels.update(W, m, v, gradient, unit, AdamRule(1e-2, (0.9, 0.99), 1e-3, step), torch.tensor(0.5))
            found.append((W, m, v, torch.as_tensor(square).float()))
        finally:
            torch.set_num_threads(before)
    for ours, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    for again in found[2:]:
        assert all(torch.equal(one, two) for one, two in zip(found[1], again, strict=True))


def outputs_and_gradients(implementation, kind):
    x, W, b = draw(60, 24), draw(400, 24, seed=1), 0.1 * draw(400, seed=2)
    b_in, W_dec, y = 0.2 * draw(24, seed=3), draw(400, 30, seed=4), draw(60, 30, seed=5)
    scale, threshold = draw(400, seed=6).exp(), 4 + draw(400, seed=7).abs()
    dtype = torch.float32 if implementation == "cpu" else torch.float64
    tensors = [t.to(dtype).requires_grad_() for t in (x, W, b, b_in, W_dec, y, scale, threshold)]
    x, W, b, b_in, W_dec, y, scale, threshold = tensors
    b_dec = W_dec.mean(0)
    with use_implementation(implementation):
        if kind == "topk":
            codes, extra = encode_topk(x, W, b, b_in, 6, scale), 0.0
        elif kind == "above":
            codes, extra = encode_above(x, W, b, b_in, 7.0, scale), 0.0
        else:
            codes, counts = encode_jumprelu(x, W, b, b_in, threshold, 1.0, True, scale)
            extra = (counts * torch.linspace(0, 1, 400, dtype=dtype)).sum()
        error, squares = decode_error(codes, W_dec, b_dec, y)
        weights = torch.linspace(1, 2, 60, dtype=dtype)
        loss = (squares * weights).sum() + codes.values.pow(2).sum() + extra
        if kind != "topk":
            loss = loss + (error * 0.3).sum() + sparse_decode(codes, W_dec).pow(2).sum()
        return loss, torch.autograd.grad(loss, tensors, allow_unused=True)


@pytest.mark.parametrize("kind", ["topk", "above", "jumprelu"])
def test_whole_operations_equal_the_dense_reference_in_float64(kind):
    (ours, our_gradients), (theirs, their_gradients) = (outputs_and_gradients(name, kind) for name in ("cpu", "reference"))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)
    for one, two in zip(our_gradients, their_gradients, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-4 * float(two.abs().max()))


def test_results_do_not_depend_on_the_number_of_threads(bits):
    x, W, b = draw(500, 64), draw(3000, 64, seed=1), 0.1 * draw(3000, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            indices, values = cpu.topk(x, W, b, None, 16, None)
            codes = SparseCodes(indices, values, 3000)
            W_next, moments = W.clone(), [torch.zeros_like(W), torch.zeros_like(W)]
            gradient = Gradient((Term(codes, x),))
            square = cpu.update(W_next, *moments, gradient, True, AdamRule(1e-3, (0.9, 0.999), 1e-8, 1), torch.tensor(1.0))
            ragged = cpu.above(x, W, b, None, torch.full((3000,), 12.0))
            found.append((indices, values, cpu.decode(codes, W), W_next, *moments, square, *ragged))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], again, strict=True))


def test_bits_of_the_screen_change_nothing(monkeypatch):
    x, W, b = draw(300, 96), draw(2500, 96, seed=1), 0.1 * draw(2500, seed=2)
    found = []
    for number in BITS:
        monkeypatch.setattr(cpu, "_screen", lambda kind, number=number: number)
        monkeypatch.setattr(cpu, "_learn", lambda *_: None)
        found.append((*cpu.topk(x, W, b, None, 20, None), *cpu.above(x, W, b, None, torch.full((2500,), 15.0))))
    for again in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], again, strict=True))


def test_a_wasteful_screen_is_given_up():
    """One coordinate dwarfs all others, so 8 bits say nothing of the rest."""
    x, W = draw(400, 40), draw(1000, 40, seed=1)
    x[:, 0], W[:, 0] = 1e4, 0
    kind = (1000, 40, True)
    cpu._bits.pop(kind, None)
    for _ in range(3):
        cpu.topk(x, W, torch.zeros(1000), None, 8, None)
    assert cpu._bits[kind][0] > cpu.screen_bits() or cpu.screen_bits() == 32


def run(environment, code):
    kept = {name: value for name, value in os.environ.items() if name not in environment}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_without_a_compiler_torch_operations_serve_and_say_so(tmp_path):
    code = (
        "import torch\nfrom saebench.kernels import encode_topk\nfrom saebench.kernels.implementations import report\n"
        "for _ in range(2): encode_topk(torch.randn(4, 8), torch.randn(100, 8), torch.zeros(100), None, 3)\nprint(report())"
    )
    done = run({"CXX": "no-such-compiler", "SAEBENCH_CACHE": str(tmp_path)}, code)
    assert done.stderr.count("the compiler that CXX names, no-such-compiler, is not there") == 1  # told once
    assert "stock torch operations" in done.stdout


def test_a_failing_build_leaves_nothing_and_is_named(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: out of luck" >&2\nexit 1\n')
    broken.chmod(0o755)
    code = (
        "import torch\nfrom saebench.kernels import encode_topk, use_implementation\nfrom saebench.errors import UserError\n"
        "try:\n    with use_implementation('cpu'): encode_topk(torch.randn(4, 8), torch.randn(100, 8), torch.zeros(100), None, 3)\n"
        "except UserError as error: print(error)"
    )
    done = run({"CXX": str(broken), "SAEBENCH_CACHE": str(tmp_path / "cache")}, code)
    assert "failed on the kernels: error: out of luck" in done.stdout
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_order_that_cannot_be_followed_is_refused():
    with use_implementation("cpu"), pytest.raises(UserError, match=r"cpu kernels were ordered .* do not serve torch.float64"):
        encode_topk(draw(3, 4).double(), draw(50, 4).double(), torch.zeros(50).double(), None, 2)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of these processors are Intel's and AMD's")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_older_processors_compute_the_same(processor, tmp_path, monkeypatch):
    """Vectors of 4 and 8 numbers instead of 16, and screens of 32 and 16 bits."""
    build.compile_to(tmp_path / "kernels.so", build.find_compiler(), [*build.FLAGS, f"-march={processor}"])
    monkeypatch.setattr("saebench.kernels.cpu.calls.load", lambda: ctypes.CDLL(str(tmp_path / "kernels.so")))
    older = cpu.library.__wrapped__()
    monkeypatch.setattr(cpu, "library", lambda: older)
    monkeypatch.setattr(cpu, "_bits", {})
    assert cpu.screen_bits() == (32 if processor == "x86-64" else 16)
    for shape in SHAPES:
        tokens, d_in, d_sae, k = shape
        x, W, b = draw(tokens, d_in), draw(d_sae, d_in, seed=1), 0.3 * draw(d_sae, seed=2)
        expected = expected_topk(x, W, b, None, k)
        assert_same_selection(cpu.topk(x, W, b, None, k, None), expected, expected[2], k)
    test_update_is_torchs_adam_on_the_summed_gradient("ragged", True, cpu)
    for kind in ("topk", "jumprelu"):
        test_whole_operations_equal_the_dense_reference_in_float64(kind)
