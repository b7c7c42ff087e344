"""Every fast path beside its reference twin, forward and backward, over shapes that divide nothing."""

import pytest
import torch

from saebench.codes import SparseCodes
from saebench.kernels import encode_topk, sparse_decode, use_implementation
from saebench.kernels.stock import select_topk

SHAPES = [(5, 7, 11, 3), (1, 4, 6, 1), (123, 5, 123, 17), (33, 16, 40, 40), (64, 3, 9, 12)]


def problem(num_tokens: int, d_in: int, d_sae: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + d_sae)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    return draw(num_tokens, d_in), draw(d_sae, d_in), draw(d_sae), draw(d_in), draw(d_sae, d_in)


def autoencode(x, W_enc, b_enc, b_in, W_dec, k):
    codes = encode_topk(x, W_enc, b_enc, b_in, k)
    return codes, sparse_decode(codes, W_dec)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_reference(shape):
    *dims, k = shape
    tensors = problem(*dims)
    results = {}
    for name in ("stock", "reference"):
        with use_implementation(name):
            codes, x_hat = autoencode(*tensors, k)
            grads = torch.autograd.grad((x_hat - tensors[0]).pow(2).sum() + codes.values.sum(), tensors)
        results[name] = (codes.to_dense(), x_hat, *grads)
    for fast, slow in zip(results["stock"], results["reference"], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_gradcheck_with_fixed_selection():
    tensors = problem(6, 5, 9)
    assert torch.autograd.gradcheck(lambda *t: autoencode(*t, 3)[1], tensors, eps=1e-6, atol=1e-6)


def test_gradient_to_the_input_can_be_left_out():
    x, *rest = problem(8, 5, 9)
    _codes, x_hat = autoencode(x.detach(), *rest, 2)
    x_hat.sum().backward()
    assert x.grad is None
    assert all(t.grad is not None for t in rest)


def test_ragged_codes_decode_like_the_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    dense = torch.where(torch.rand(7, 10, generator=generator) < 0.3, dense, 0.0)
    dense[2] = 0  # an empty row in the middle
    W_dec = torch.randn(10, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    codes = SparseCodes.from_dense(dense)
    x_hat = sparse_decode(codes, W_dec)
    torch.testing.assert_close(x_hat, dense @ W_dec)
    (grad,) = torch.autograd.grad(x_hat.pow(2).sum(), W_dec)
    (expected,) = torch.autograd.grad((dense @ W_dec).pow(2).sum(), W_dec)
    torch.testing.assert_close(grad, expected)


def test_ties_go_to_the_lowest_index():
    z = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0], [-1.0, -1.0, -1.0, -2.0, -2.0]])
    _, indices = select_topk(z, 2)
    assert indices[0].sort().values.tolist() == [1, 2]
    assert indices[1].sort().values.tolist() == [0, 1]


def test_duplicated_columns_select_the_first_of_each():
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(200, 6, generator=generator)
    W = torch.cat([half, half])
    codes = encode_topk(torch.randn(50, 6, generator=generator), W, torch.zeros(400), torch.zeros(6), 1)
    active = codes.values > 0
    assert (codes.indices[active] < 200).all()


def test_one_latent_takes_all_tokens_and_others_get_exact_zeros():
    x = torch.ones(40, 3)
    W = torch.zeros(8, 3, requires_grad=True)
    with torch.no_grad():
        W[5] = 1.0
    codes = encode_topk(x, W, torch.zeros(8), torch.zeros(3), 1)
    codes.values.sum().backward()
    assert W.grad[5].tolist() == [40.0, 40.0, 40.0]
    assert W.grad.abs().sum(1).count_nonzero() == 1


def test_negative_winners_are_padding_without_gradient():
    W = -torch.ones(4, 3)
    W.requires_grad_()
    codes = encode_topk(torch.ones(5, 3), W, torch.zeros(4), torch.zeros(3), 2)
    assert codes.values.count_nonzero() == 0
    codes.values.sum().backward()
    assert W.grad.count_nonzero() == 0


def test_same_result_for_any_number_of_threads():
    tensors = problem(300, 16, 64, dtype=torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            _, x_hat = autoencode(*tensors, 4)
            results.append(torch.autograd.grad(x_hat.pow(2).sum(), tensors[4])[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
