"""Errors of nested reconstructions beside their dense definition."""

import pytest
import torch

from saebench.kernels import prefix_errors, use_implementation


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_losses_and_gradients_are_those_of_the_definition(groups):
    generator = torch.Generator().manual_seed(groups)
    first, parts = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (groups, 7, 3)))
    weights = torch.randn(groups + 1, generator=generator, dtype=torch.float64)
    results = []
    for name in ("auto", "reference"):
        leaves = first.clone().requires_grad_(), parts.clone().requires_grad_()
        with use_implementation(name):
            losses, last, squares = prefix_errors(leaves[0], leaves[1] * 1.0)  # its memory is taken over
        grads = torch.autograd.grad((losses * weights).sum(), leaves)
        results.append((losses, last, squares, *grads))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(results[0][1], first + parts.sum(0))
