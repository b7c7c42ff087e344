"""Numbers of latents at entries and sums of entries by latent: against dense algebra, and against each other's gradients."""

import pytest
import torch

from saebench.codes import SparseCodes
from saebench.errors import UserError
from saebench.kernels import use_implementation
from saebench.kernels.latent_numbers import at_entries, latent_firings, latent_totals

TOKENS, LATENTS = 57, 29


@pytest.fixture(params=["stock", "cpu", "auto"])
def kernels(request):
    with use_implementation(request.param):
        yield request.param


def codes(ragged, dtype=torch.float32, seed=0):
    """Some values are 0, one latent is active everywhere and one nowhere; ragged codes have empty rows."""
    generator = torch.Generator().manual_seed(seed)
    if ragged:
        dense_BF = torch.randn(TOKENS, LATENTS, generator=generator, dtype=dtype)
        dense_BF *= torch.rand(TOKENS, LATENTS, generator=generator) < 0.2
        dense_BF[:, 3], dense_BF[:, 7], dense_BF[5] = 1.5, 0.0, 0.0
        made = SparseCodes.from_dense(dense_BF)
        made.values[::6] = 0.0
        return made
    indices_BK = torch.stack([torch.randperm(LATENTS - 1, generator=generator)[:4] for _ in range(TOKENS)])
    values_BK = torch.randn(TOKENS, 4, generator=generator, dtype=dtype)
    values_BK[::5, 1] = 0.0
    return SparseCodes(indices_BK, values_BK, LATENTS)


def served(make):
    try:
        return make()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("ragged", [True, False])
def test_sums_and_firings_are_those_of_the_dense_code(kernels, ragged):
    code = codes(ragged)
    totals_F = served(lambda: latent_totals(code))
    torch.testing.assert_close(totals_F.double(), code.to_dense().double().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(latent_firings(code).long(), code.firings())
    numbers_F = torch.arange(LATENTS) + 0.5
    assert torch.equal(at_entries(numbers_F, code), numbers_F[code.indices.long()])


@pytest.mark.parametrize("ragged", [True, False])
def test_each_is_the_gradient_of_the_other(kernels, ragged):
    code = codes(ragged)
    numbers_F = torch.randn(LATENTS, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.randn(code.values.shape, generator=torch.Generator().manual_seed(2))
    (found_F,) = torch.autograd.grad(served(lambda: (at_entries(numbers_F, code) * weights).sum()), numbers_F)
    torch.testing.assert_close(found_F, code.replaced(weights).to_dense().sum(0), rtol=1e-5, atol=1e-5)
    values = code.values.clone().requires_grad_()
    (found,) = torch.autograd.grad((latent_totals(code.replaced(values)) * numbers_F.detach()).sum(), values)
    assert torch.equal(found, numbers_F.detach()[code.indices.long()])


def test_wider_types_stay_wide():
    code = codes(True, torch.float64)
    assert latent_totals(code).dtype == torch.float64
    torch.testing.assert_close(latent_totals(code), code.to_dense().sum(0), rtol=1e-12, atol=1e-12)


def test_no_entries_at_all():
    code = SparseCodes(torch.empty(0, dtype=torch.int32), torch.empty(0), LATENTS, torch.zeros(TOKENS + 1, dtype=torch.int64))
    assert torch.equal(latent_totals(code), torch.zeros(LATENTS))
    assert at_entries(torch.ones(LATENTS), code).shape == (0,)


def test_the_number_of_threads_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    code = SparseCodes(
        torch.randint(0, LATENTS, (4096, 8), generator=generator), torch.randn(4096, 8, generator=generator), LATENTS
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(latent_totals(code.replaced(code.values)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
