"""Assignment against SciPy's on all pairs, and against all permutations."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saebench.circuits.matching import assignment
from saebench.circuits.matching.assignment import assign, assign_nearest
from saebench.errors import UserError


def rows(count: int, width: int, seed: int, norms: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
    return made * torch.randn(count, 1, generator=generator).exp() if norms else made


@pytest.mark.parametrize(("m", "n"), [(120, 120), (80, 140), (140, 80)])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("candidates", [3, 20])
def test_candidates_lead_to_the_same_as_all_pairs(m, n, norms, candidates):
    a, b = rows(m, 16, 0, norms), rows(n, 16, 1, norms)
    b[: min(m, n) // 3] = a[: min(m, n) // 3] + 0.02 * rows(min(m, n) // 3, 16, 2)
    score = a.double().numpy() @ b.double().numpy().T
    best = score[linear_sum_assignment(score, maximize=True)].sum()
    found = assign(a, b, candidates=candidates, exact_up_to=10)
    has = found.partner_M >= 0
    assert has.sum() == min(m, n) == len(set(found.partner_M[has].tolist()))
    assert found.total == pytest.approx(score[np.flatnonzero(has), found.partner_M[has]].sum(), rel=1e-6)
    assert best - found.gap - 1e-4 <= found.total <= best + 1e-4
    assert found.exact and 0 < found.pruned < 1
    distance = np.square(a.double().numpy()[:, None] - b.double().numpy()).sum(2)
    least = distance[linear_sum_assignment(distance)].sum()
    nearest = assign_nearest(a, b, candidates=candidates, exact_up_to=10)
    assert least - 1e-3 <= nearest.total <= least + nearest.gap + 1e-3
    whole = assign_nearest(a, b)
    assert whole.exact and whole.pruned == 0 and whole.total == pytest.approx(least, abs=1e-4)


def test_all_permutations():
    a, b = rows(6, 3, 3), rows(6, 3, 4)
    best = max(sum(float(a[i] @ b[j]) for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    assert assign(a, b).total == pytest.approx(best, abs=1e-6)
    assert assign(a, b, candidates=1, exact_up_to=1).total == pytest.approx(best, abs=1e-6)


def test_a_gap_is_stated_where_rounds_run_out(monkeypatch):
    monkeypatch.setattr(assignment, "ROUNDS", 1)
    a, b = rows(150, 4, 5, norms=True), rows(150, 4, 6, norms=True)
    found = assign(a, b, candidates=1, exact_up_to=1)
    score = a.double().numpy() @ b.double().numpy().T
    best = score[linear_sum_assignment(score, maximize=True)].sum()
    assert not found.exact and found.total < best - 1e-3 and best <= found.total + found.gap + 1e-4
    assert found.total >= float(score.trace()) - 1e-4


def test_the_identity_is_never_better():
    a = rows(90, 8, 7)
    b = a + 0.5 * rows(90, 8, 8)
    found = assign_nearest(a, b, candidates=2, exact_up_to=1)
    assert found.total <= float((a - b).square().sum()) + 1e-4


@pytest.mark.parametrize(("a", "b"), [(torch.ones(3, 2), torch.ones(3, 4)), (torch.ones(0, 2), torch.ones(3, 2))])
def test_sets_that_do_not_fit_are_refused(a, b):
    with pytest.raises(UserError, match="cannot be assigned"):
        assign(a, b)
    with pytest.raises(UserError, match="not finite"):
        assign(torch.full((2, 2), torch.nan), torch.ones(2, 2))
