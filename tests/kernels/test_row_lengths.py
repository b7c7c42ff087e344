"""Lengths of rows that a step leaves behind are those that a pass over the matrix measures, whoever changed it last."""

import pytest
import torch
from torch import nn

import saebench as sb
from saebench.kernels import use_implementation
from saebench.kernels.latent_gradient import Parts, collect
from saebench.kernels.row_lengths import distances, keep_lengths, row_lengths
from saebench.trainer import Member, TrainConfig

BATCH, STEPS = 64, 6


def tokens(number):
    return torch.randn(BATCH, 20, generator=torch.Generator().manual_seed(number))


def member(**settings):
    training = TrainConfig(num_tokens=BATCH * STEPS, batch_size=BATCH, lr=1e-2)
    return Member.create(sb.TopK(d_sae=120, k=4, **settings), training, tokens(99))


def measured(W):
    return W.detach().double().norm(dim=1)


@pytest.mark.parametrize("decoder", ["free", "unit"])
def test_after_every_step_they_are_those_of_the_rows(decoder):
    trained = member(decoder=decoder)
    W = trained.dictionary.W_dec
    for step in range(STEPS):
        trained.step(tokens(step), step)
        torch.testing.assert_close(row_lengths(W).double(), measured(W), rtol=1e-6, atol=0)


def test_another_change_is_noticed():
    W = nn.Parameter(torch.ones(5, 3))
    keep_lengths(W)
    first = row_lengths(W)
    assert row_lengths(W) is first or torch.equal(row_lengths(W), first)
    with torch.no_grad():
        W.mul_(2.0)
    torch.testing.assert_close(row_lengths(W).double(), measured(W))
    W.data = torch.full((5, 3), 7.0)
    torch.testing.assert_close(row_lengths(W).double(), measured(W))


def test_a_step_of_another_implementation_does_not_leave_old_ones():
    trained = member()
    W = trained.dictionary.W_dec
    for step, name in enumerate(("cpu", "stock", "cpu", "reference", "cpu")):
        try:
            with use_implementation(name):
                trained.step(tokens(step), step)
        except sb.UserError as error:
            pytest.skip(str(error))
        torch.testing.assert_close(row_lengths(W).double(), measured(W), rtol=1e-6, atol=0)


def test_wider_types_stay_wide():
    W = torch.randn(7, 5, dtype=torch.float64)
    assert row_lengths(W).dtype == torch.float64 and row_lengths(W.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kernels", ["stock", "cpu", "reference"])
@pytest.mark.parametrize("collected", [True, False])
def test_the_gradient_is_that_of_the_norm(kernels, collected):
    generator = torch.Generator().manual_seed(0)
    W = nn.Parameter(torch.randn(9, 5, generator=generator))
    with torch.no_grad():
        W[4] = 0.0  # where torch's norm has no gradient, either
    weights_F = torch.randn(9, generator=generator)
    (expected_FD,) = torch.autograd.grad((W.norm(dim=1) * weights_F).sum(), W)
    parts = collect(W) if collected else Parts()
    try:
        with use_implementation(kernels):
            for _ in range(2):  # two parts add up
                (row_lengths(W) * weights_F).sum().backward()
    except sb.UserError as error:
        pytest.skip(str(error))
    found_FD = torch.zeros(9, 5) if W.grad is None else W.grad
    if parts.own_F is not None:
        assert W.grad is None
        found_FD = parts.own_F[:, None] * W.detach()
    assert (parts.own_F is not None) == (collected and kernels != "reference")
    torch.testing.assert_close(found_FD, 2 * expected_FD)


@pytest.mark.parametrize("kernels", ["stock", "cpu"])
def test_a_step_with_collected_lengths_is_that_of_torch(kernels):
    """Where the penalty weighs lengths: Gated with free rows, beside torch's Adam on the gradient of the dense formula."""
    config = sb.Gated(d_sae=24, coefficient=0.3, coefficient_warmup=0, decoder="free", initial_l0=6)
    training = TrainConfig(num_tokens=BATCH * STEPS, batch_size=BATCH, lr=1e-2, momentum="float32")
    results = []
    try:
        for name in (kernels, "reference"):
            with use_implementation(name):
                trained = Member.create(config, training, tokens(99))
                for step in range(STEPS):
                    trained.step(tokens(step), step)
                results.append(trained.dictionary.W_dec.detach().clone())
    except sb.UserError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["stock", "cpu"])
def test_distances_from_a_point(kernels):
    x_BD = torch.randn(3, 40, 21, generator=torch.Generator().manual_seed(0))
    point_D = torch.full((21,), 100.0)  # far off: squares are not to be taken apart
    expected_B = (x_BD.double() - 100).norm(dim=-1)
    try:
        with use_implementation(kernels):
            found_B = [distances(x_BD, point_D), distances(x_BD[0], point_D)]
    except sb.UserError:
        pytest.skip(f"no {kernels} kernels here")
    torch.testing.assert_close(found_B[0].double(), expected_B, rtol=1e-6, atol=0)
    torch.testing.assert_close(found_B[1].double(), expected_B[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(distances(x_BD.double()[0], point_D.double()), expected_B[0], rtol=1e-12, atol=0)
