"""The JumpReLU kernel beside its dense twin, the worked example of the fixture, and the meaning of its pseudo-gradient."""

import math

import pytest
import torch

from saebench.kernels import encode_above, encode_jumprelu, sparse_decode, use_implementation

D = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1.0]])
X_A = torch.tensor([[2, 1.5, -1, 3.0]])


def problem(num_tokens: int, d_in: int, d_sae: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + d_sae)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    x, W_enc, b_enc, b_in, W_dec = draw(num_tokens, d_in), draw(d_sae, d_in), draw(d_sae), draw(d_in), draw(d_sae, d_in)
    threshold = draw(d_sae).abs() + 0.05
    return [t.requires_grad_() for t in (x, W_enc, b_enc, b_in, threshold, W_dec)]


def results(tensors, eps, straight_through):
    x, W_enc, b_enc, b_in, threshold, W_dec = tensors
    codes, counts = encode_jumprelu(x, W_enc, b_enc, b_in, threshold, eps, straight_through)
    x_hat = sparse_decode(codes, W_dec)
    loss = (x_hat - x).square().sum() + 0.7 * counts.sum() + counts.square().sum() / 9 + codes.values.tanh().sum()
    return codes.to_dense(), x_hat, counts, *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("shape", [(5, 7, 11), (1, 4, 6), (123, 5, 123), (33, 16, 40), (300, 3, 9)])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("eps", [1e-9, 0.3, 3.0])
def test_values_and_gradients_equal_the_reference(shape, eps, straight_through):
    tensors = problem(*shape)
    fast = results(tensors, eps, straight_through)
    with use_implementation("reference"):
        slow = results(tensors, eps, straight_through)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_without_an_input_bias_and_in_single_precision():
    x, W_enc, b_enc, _, threshold, _ = problem(50, 6, 21, torch.float32)
    fast = encode_jumprelu(x, W_enc, b_enc, None, threshold, 0.2)
    with use_implementation("reference"):
        slow = encode_jumprelu(x, W_enc, b_enc, None, threshold, 0.2)
    torch.testing.assert_close(fast[0].to_dense(), slow[0].to_dense())
    assert torch.equal(fast[1], slow[1])
    active = encode_above(x, W_enc, b_enc, None, threshold)
    assert torch.equal(fast[0].to_dense(), active.to_dense())
    assert torch.equal(fast[0].firings().float(), fast[1])


@pytest.mark.parametrize("implementation", ["stock", "reference"])
def test_worked_example(implementation):
    threshold = torch.full((6,), 1.9, requires_grad=True)
    W_enc, b_enc = D.clone(), torch.zeros(6, requires_grad=True)
    with use_implementation(implementation):
        codes, counts = encode_jumprelu(X_A, W_enc, b_enc, None, threshold, 0.4)
        torch.testing.assert_close(codes.to_dense()[0], torch.tensor([2, 0, 2.4, 0, 0, 0]))
        assert counts.sum() == 2
        (of_l0,) = torch.autograd.grad(counts.sum(), threshold, retain_graph=True)
        error = (sparse_decode(codes, D) - X_A).square().sum()
        of_error, of_z = torch.autograd.grad(error, (threshold, b_enc))
    torch.testing.assert_close(of_l0, torch.tensor([-2.5, 0, 0, 0, -2.5, 0]))
    torch.testing.assert_close(of_error, torch.tensor([-13.68, 0, 0, 0, 17.1, 0]))
    torch.testing.assert_close(of_z, torch.tensor([2.88, 0, 2.4, 0, 0, 0]))


def test_straight_through_gives_z_the_opposite_of_the_threshold():
    threshold, b_enc = torch.full((6,), 1.9, requires_grad=True), torch.zeros(6, requires_grad=True)
    codes, counts = encode_jumprelu(X_A, D, b_enc, None, threshold, 0.4, straight_through=True)
    for_z, for_threshold = torch.autograd.grad(counts.sum(), (b_enc, threshold), retain_graph=True)
    assert torch.equal(for_z, -for_threshold)
    for_z, for_threshold = torch.autograd.grad((sparse_decode(codes, D) - X_A).square().sum(), (b_enc, threshold))
    torch.testing.assert_close(for_z, torch.tensor([2.88, 0, 2.4, 0, 0, 0]) - for_threshold)


def test_the_mean_pseudo_gradient_of_l0_is_minus_the_density_at_the_threshold():
    z = torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0))
    threshold = torch.tensor([0.5], requires_grad=True)
    _, counts = encode_jumprelu(z, torch.ones(1, 1), torch.zeros(1), None, threshold, 0.1)
    (gradient,) = torch.autograd.grad(counts.sum() / len(z), threshold)
    density = math.exp(-0.125) / math.sqrt(2 * math.pi)
    assert float(gradient) == pytest.approx(-density, rel=0.02)


def test_gradient_of_the_values_is_that_of_the_selected_pre_activations():
    x, W_enc, b_enc, b_in, threshold, W_dec = problem(6, 5, 9)
    decode = lambda *t: sparse_decode(encode_jumprelu(*t[:4], threshold.detach(), 1e-7)[0], t[4])  # noqa: E731
    assert torch.autograd.gradcheck(decode, (x, W_enc, b_enc, b_in, W_dec), eps=1e-8, atol=1e-5)


def test_no_window_no_active_entries_and_full_rows():
    x, W_enc, b_enc, b_in, _, W_dec = problem(20, 4, 7)
    for level, active in ((1e6, 0), (1e-6, None)):
        threshold = torch.full((7,), level, dtype=torch.float64, requires_grad=True)
        tensors = [x, W_enc, b_enc + (0 if active == 0 else 1e3), b_in, threshold, W_dec]
        codes, counts = encode_jumprelu(*tensors[:5], 1e-7)
        loss = sparse_decode(codes, W_dec).square().sum() + counts.sum()
        gradients = torch.autograd.grad(loss, (W_enc, threshold))
        assert counts.sum() == (0 if active == 0 else 20 * 7)
        assert gradients[1].count_nonzero() == 0
        assert (gradients[0].count_nonzero() == 0) == (active == 0)


def test_equality_with_the_threshold_is_not_active():
    codes, counts = encode_jumprelu(torch.tensor([[2.0]]), torch.ones(1, 1), torch.zeros(1), None, torch.tensor([2.0]), 0.1)
    assert counts.tolist() == [0] and codes.l0().tolist() == [0]


def test_nothing_below_zero_is_inside_a_window():
    threshold = torch.tensor([0.1], requires_grad=True)
    x = torch.tensor([[-0.05], [0.05], [0.2]])
    for implementation in ("stock", "reference"):
        with use_implementation(implementation):
            _, counts = encode_jumprelu(x, torch.ones(1, 1), torch.zeros(1), None, threshold, 1.0)
            (gradient,) = torch.autograd.grad(counts.sum(), threshold)
        torch.testing.assert_close(gradient, torch.tensor([-2.0]))
