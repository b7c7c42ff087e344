"""The nearest rows against brute force in float64: every size, every implementation, rows that are alike, and guesses that fail."""

import pytest
import torch

from saebench.errors import NotFinite
from saebench.kernels import cpu, use_implementation
from saebench.kernels.arrays import compiled
from saebench.kernels.nearest_rows import FEW, nearest_rows


def units(count, width, seed=0):
    return torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def check(rows_FD, count=16):
    found_FK, products_FK = nearest_rows(rows_FD, count)
    exact_FF = (rows_FD.double() @ rows_FD.double().T).fill_diagonal_(-torch.inf)
    best_FK = exact_FF.topk(min(count, len(rows_FD)), dim=1).values.clamp_min(0)
    assert torch.allclose(products_FK.double(), best_FK, atol=2e-6)
    listed_FK = found_FK >= 0
    assert torch.equal(listed_FK, products_FK > 0)
    at_FK = exact_FF.gather(1, found_FK.clamp_min(0))
    assert torch.allclose(at_FK[listed_FK], products_FK[listed_FK].double(), atol=2e-6)
    numbers_FK = torch.where(listed_FK, found_FK, -1 - torch.arange(found_FK.shape[1]))
    assert (numbers_FK.sort(dim=1).values.diff(dim=1) != 0).all()  # none twice
    assert ((products_FK.diff(dim=1) < 0) | (found_FK.diff(dim=1) > 0) | ~listed_FK[:, 1:]).all()  # ties to the lowest


@pytest.mark.parametrize("implementation", ["auto", "stock", "reference"])
@pytest.mark.parametrize(("num", "width"), [(1, 8), (5, 8), (40, 8), (FEW + 1, 123), (3000, 64)])
def test_all_sizes(num, width, implementation):
    with use_implementation(implementation):
        check(units(num, width))


def test_rows_that_are_alike_that_are_zero_and_of_any_length():
    rows_FD = units(40, 32)[torch.arange(2500) % 40].clone()
    rows_FD[::2] += 0.01 * units(1250, 32, 1)
    rows_FD[::7] = 0
    rows_FD *= torch.linspace(0.5, 2, 2500)[:, None]
    check(rows_FD)
    assert (nearest_rows(-units(1, 16).expand(2500, -1) * torch.eye(2500, 1), 4)[0] == -1).all()


@pytest.mark.skipif(compiled() is None, reason="there is no compiler")
@pytest.mark.parametrize("bits", [16, 32])
def test_other_screens(bits, monkeypatch):
    monkeypatch.setattr(cpu, "_screen", lambda kind: bits)
    monkeypatch.setattr(cpu, "_learn", lambda *_: None)
    check(units(2500, 48))


@pytest.mark.skipif(compiled() is None, reason="there is no compiler")
def test_guesses_that_fail_are_noticed():
    """A group of rows that are near to each other alone: too many of what matters are in the sample of some."""
    rows_FD = torch.cat([units(2480, 64), torch.nn.functional.normalize(units(1, 64, 1) + 0.05 * units(20, 64, 2), dim=1)])
    *_, again_M = cpu.nearest(units(6000, 64), 17)
    assert 0 < len(again_M) < 300  # a share of them fails by chance
    check(rows_FD)
    check(units(6000, 64))


@pytest.mark.skipif(compiled() is None, reason="there is no compiler")
def test_the_number_of_threads_does_not_matter():
    rows_FD, before = units(3000, 40), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(nearest_rows(rows_FD, 9))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0]) and torch.equal(found[0][1], other[1])


@pytest.mark.parametrize("num", [100, 2500])
def test_what_is_not_finite_is_refused(num):
    rows_FD = units(num, 16)
    rows_FD[num // 2, 3] = torch.nan
    with pytest.raises(NotFinite):
        nearest_rows(rows_FD, 5)
