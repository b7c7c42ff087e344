"""Selection over a whole batch and above a threshold beside their reference twins, forward and backward; ties, bad guesses, empty rows,
crowded codes; and that nothing as large as the scores of all tokens ever exists."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saebench.codes import SparseCodes
from saebench.kernels import encode_above, encode_batch_topk, encode_topk, scores, sparse_decode, use_implementation
from saebench.kernels.encode_batch_topk import largest

SHAPES = [(5, 7, 11), (1, 4, 6), (123, 5, 123), (33, 16, 40), (64, 3, 9)]  # tokens, width, latents


def problem(num_tokens, d_in, d_sae, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + num_tokens * 1000 + d_sae)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    return draw(num_tokens, d_in), draw(d_sae, d_in), draw(d_sae), draw(d_in), draw(d_sae, d_in)


def small_blocks(monkeypatch, d_sae, tokens=4, bytes_each=8):
    monkeypatch.setattr(scores, "BLOCK_BYTES", tokens * d_sae * bytes_each)


def both(select, tensors):
    """Dense codes, reconstruction and all gradients by each implementation."""
    results = []
    for name in ("stock", "reference"):
        with use_implementation(name):
            codes = select(*tensors[:4])
            x_hat = sparse_decode(codes, tensors[4])
            used = [t for t in tensors if t is not None]
            gradients = torch.autograd.grad((x_hat - tensors[0]).pow(2).sum() + codes.values.pow(3).sum(), used)
        results.append((codes.to_dense(), x_hat, *gradients))
    return results


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [0.5, 1, 3, 1000])  # 1000: more than there are scores; dense products take over
@pytest.mark.parametrize("guess", [0.0, 0.7, 1e9])
def test_batch_selection_equals_the_reference(shape, per_token, guess, monkeypatch):
    small_blocks(monkeypatch, shape[2])
    count = max(1, int(per_token * shape[0]))
    for fast, slow in zip(*both(lambda *t: encode_batch_topk(*t, count, guess), problem(*shape)), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 1.5, 1e9, "each"])
def test_thresholds_equal_the_reference(shape, threshold, monkeypatch):
    small_blocks(monkeypatch, shape[2])
    if threshold == "each":
        threshold = torch.rand(shape[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    for fast, slow in zip(*both(lambda *t: encode_above(*t, threshold), problem(*shape)), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_encoders_without_subtraction_equal_the_reference():
    x, W_enc, b_enc, _, W_dec = problem(20, 6, 30)
    for select in (lambda *t: encode_batch_topk(*t, 50), lambda *t: encode_above(*t, 1.0)):
        for fast, slow in zip(*both(select, (x, W_enc, b_enc, None, W_dec)), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("select", [lambda *t: encode_batch_topk(*t, 12), lambda *t: encode_above(*t, 0.8)])
def test_gradients_equal_finite_differences(select):
    tensors = problem(6, 5, 9)
    assert torch.autograd.gradcheck(lambda *t: sparse_decode(select(*t[:4]), t[4]), tensors, eps=1e-7, atol=1e-6)


def identity_problem(z):
    """Inputs whose scores are the rows of z."""
    d = z.shape[1]
    return z, torch.eye(d), torch.zeros(d), torch.zeros(d)


@pytest.mark.parametrize("guess", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("block_tokens", [1, 2, 9])
def test_ties_go_to_the_first_in_row_major_order(guess, block_tokens, monkeypatch):
    z = torch.tensor([[1.0, 2, 2], [2, 3, 2], [2, 2, 0]])
    small_blocks(monkeypatch, 3, block_tokens, 4)
    codes = encode_batch_topk(*identity_problem(z), 4, guess)
    assert codes.to_dense().tolist() == [[0, 2, 2], [2, 3, 0], [0, 0, 0]]
    assert codes.l0().tolist() == [2, 2, 0]
    assert codes.values.tolist() == [2, 2, 2, 3]


def test_many_ties_in_many_blocks_agree_with_the_reference(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    z = torch.randint(-2, 4, (200, 17), generator=generator).float()
    small_blocks(monkeypatch, 17, 3, 4)
    for count in (1, 5, 40, 333, 2000):
        with use_implementation("reference"):
            expected = encode_batch_topk(*identity_problem(z), count).to_dense()
        for guess in (0.0, 1.0, 2.0, 3.0):
            assert torch.equal(encode_batch_topk(*identity_problem(z), count, guess).to_dense(), expected)


@pytest.mark.parametrize("select", [lambda *t: encode_batch_topk(*t, 7), lambda *t: encode_above(*t, 0.0)])
def test_nothing_is_kept_where_all_scores_are_negative(select):
    x, W_enc, W_dec = torch.ones(5, 3), -torch.ones(4, 3), torch.ones(4, 3)
    W_enc.requires_grad_(), W_dec.requires_grad_()
    codes = select(x, W_enc, torch.zeros(4), torch.zeros(3))
    assert codes.values.numel() == 0 and len(codes) == 5 and codes.l0().tolist() == [0] * 5
    x_hat = sparse_decode(codes, W_dec)
    assert torch.equal(x_hat, torch.zeros(5, 3))
    (x_hat.sum() + codes.values.sum()).backward()
    assert W_enc.grad.count_nonzero() == 0 and W_dec.grad.count_nonzero() == 0


def test_a_score_of_zero_is_not_kept_and_a_score_at_the_threshold_neither():
    z = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    assert encode_batch_topk(*identity_problem(z), 4).indices.tolist() == [1, 3]
    assert encode_above(*identity_problem(z), 0.0).indices.tolist() == [1, 3]
    assert encode_above(*identity_problem(z), 1.0).indices.tolist() == [3]


def test_one_token_keeps_what_topk_keeps():
    tensors = problem(1, 8, 50)[:4]
    for k in (1, 7, 49):
        expected = encode_topk(*tensors, k)
        assert torch.equal(encode_batch_topk(*tensors, k).to_dense(), expected.to_dense())


@pytest.mark.parametrize("guess", [0.1, 0.5, 0.999, 1.0, 1.001, 3.0])
def test_the_guess_never_changes_the_result(guess):
    tensors = [t.detach() for t in problem(300, 8, 60, torch.float32)[:4]]
    exact = encode_batch_topk(*tensors, 900)
    other = encode_batch_topk(*tensors, 900, guess * float(exact.values.min()))
    assert torch.equal(exact.indices, other.indices)
    assert torch.equal(exact.values, other.values)
    assert torch.equal(exact.offsets, other.offsets)


def test_a_good_guess_keeps_candidates_few_and_a_bad_one_takes_a_second_pass(monkeypatch):
    from saebench.kernels import encode_batch_topk as module_function
    from saebench.kernels import stock

    module, found = sys.modules[module_function.__module__], []

    class Watched:
        topk = staticmethod(stock.topk)

        @staticmethod
        def above(*arguments):
            found.append(len((result := stock.above(*arguments))[2]))
            return result

    monkeypatch.setattr(module, "primitives_for", lambda *_: Watched)
    tensors = [t.detach() for t in problem(300, 8, 60, torch.float32)[:4]]
    exact = encode_batch_topk(*tensors, 900)
    assert len(found) == 1  # a sample of tokens gives a good guess
    assert found[0] < 300 * 60 / 2
    border = float(exact.values.min())
    found.clear()
    assert torch.equal(encode_batch_topk(*tensors, 900, 0.95 * border).to_dense(), exact.to_dense())
    assert len(found) == 1
    assert 900 <= found[0] < 1100
    found.clear()
    assert torch.equal(encode_batch_topk(*tensors, 900, 1.05 * border).to_dense(), exact.to_dense())
    assert len(found) == 2  # too high: a second pass from zero
    assert found[0] < 900 < found[1]


def test_largest_keeps_the_first_of_equal_values():
    assert largest(torch.tensor([1.0, 3, 2, 3, 2, 2]), 4).tolist() == [1, 2, 3, 4]
    assert largest(torch.tensor([1.0, 1.0]), 5).tolist() == [0, 1]
    assert largest(torch.tensor([]), 5).tolist() == []


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.03, 0.06, 0.9])  # both sides of the border to crowded codes
def test_sparse_and_crowded_codes_decode_alike(kept):
    generator = torch.Generator().manual_seed(4)
    dense = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    dense = torch.where(torch.rand(40, 50, generator=generator) < kept, dense, 0.0)
    dense[7] = 0
    codes = SparseCodes.from_dense(dense)
    assert codes.crowded(24) == (len(codes.values) * 24 > dense.numel())
    W = torch.randn(50, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    values = codes.values.clone().requires_grad_()
    x_hat = sparse_decode(codes.replaced(values), W)
    torch.testing.assert_close(x_hat, dense @ W)
    weight = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    by_values, by_W = torch.autograd.grad((x_hat * weight).sum(), [values, W])
    torch.testing.assert_close(by_W, dense.T @ weight)
    torch.testing.assert_close(by_values, (weight @ W.detach().T)[codes.tokens, codes.indices])


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


RULES = {
    "topk": lambda *t: encode_topk(*t, 8),
    "batch": lambda *t: encode_batch_topk(*t, 8 * len(t[0])),
    "above": lambda *t: encode_above(*t, 4.0),
}


@pytest.mark.parametrize("implementation", ["stock", "cpu"])
@pytest.mark.parametrize("rule", RULES)
def test_no_operation_makes_a_matrix_of_tokens_by_latents(rule, implementation, monkeypatch):
    tokens, d_in, d_sae = 512, 8, 4096
    small_blocks(monkeypatch, d_sae, 16, 4)
    tensors = problem(tokens, d_in, d_sae, torch.float32)
    with torch.no_grad():
        tensors[1].div_(tensors[1].norm(dim=1, keepdim=True))
        tensors[2].zero_()
    with Largest() as seen, use_implementation(implementation):
        codes = RULES[rule](*tensors[:4])
        (sparse_decode(codes, tensors[4]) - tensors[0]).square().sum().backward()
    assert codes.values.numel() > tokens  # there is something to decode
    assert 4 * tokens < seen.elements <= tokens * d_sae / 16


MEMORY = """
import torch
from saebench.kernels import encode_above, encode_batch_topk, encode_topk, sparse_decode

def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.manual_seed(0)
tokens, d_in, d_sae = 2048, 8, 131072
x, W = torch.randn(tokens, d_in), torch.nn.functional.normalize(torch.randn(d_sae, d_in)).requires_grad_()
b = torch.zeros(d_sae, requires_grad=True)
V = W.detach().clone().requires_grad_()
before = peak()
for select in (
    lambda: encode_topk(x, W, b, None, 8),
    lambda: encode_above(x, W, b, None, 4.0),
    lambda: encode_batch_topk(x, W, b, None, 8 * tokens),
):
    codes = select()
    (sparse_decode(codes, V) - x).square().sum().backward()
    assert codes.values.numel() > 1000
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_131072_latents_stays_far_below_the_dense_matrix():
    """TopK, a threshold and BatchTopK, decoded and differentiated, on 2048 tokens: the scores of all would be 1024 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 640
