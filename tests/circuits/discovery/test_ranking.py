"""Rankings against circuits that are known: brute force over pairs and orders, and figures worked out by hand."""

from itertools import permutations

import pytest
import torch

from saebench.circuits.discovery.ranking import faithfulness_curve, precision_recall, roc_auc
from saebench.errors import UserError


def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 5, (14,), generator=generator).float()
        true = torch.rand(14, generator=generator) < 0.4
        true[0], true[1] = True, False
        pairs = [(float(a), float(b)) for a in scores[true] for b in scores[~true]]
        expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert roc_auc(scores, true) == pytest.approx(expected, abs=1e-12)
    assert roc_auc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, True, False])) == 1.0
    assert roc_auc(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5


def test_precision_and_recall_are_means_over_all_orders_of_equal_scores():
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    true = torch.tensor([True, True, False, False, True])
    for k in range(1, 6):
        hits = []
        for order in permutations(range(5)):
            ranked = sorted(order, key=lambda i: -scores[i])  # stable: equal scores stay in the order drawn
            hits.append(sum(bool(true[i]) for i in ranked[:k]))
        found = precision_recall(scores, true, k)
        mean = sum(hits) / len(hits)
        assert (found.precision, found.recall) == pytest.approx((mean / k, mean / 3))
    assert precision_recall(scores, true).k == 3
    perfect = precision_recall(torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    assert (perfect.precision, perfect.recall, perfect.f1) == (1, 1, 1)


def test_the_curve_of_an_additive_metric_is_the_running_sum():
    effects = torch.tensor([1.0, -4.0, 2.0, 0.0])
    curve = faithfulness_curve(lambda kept: 5.0 + float((effects * kept).sum()), effects, [0, 1, 2, 3, 4])
    assert (curve.full, curve.none) == (4, 5)
    assert curve.faithfulness_K == [0, 4, 2, 1, 1] and curve.completeness_K == [1, -3, -1, 0, 0]
    assert curve.smallest(0.5) == 1
    spread = faithfulness_curve(lambda kept: float(kept.sum()), torch.arange(500.0), points=12)
    assert spread.sizes_K[0] == 0 and spread.sizes_K[-1] == 500 and len(spread.sizes_K) <= 13
    assert spread.faithfulness_K == [size / 500 for size in spread.sizes_K]
    assert spread.smallest(1.01) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roc_auc(torch.ones(3), torch.zeros(3).bool()), "0 of 3 components are in the circuit"),
        (lambda: roc_auc(torch.ones(3), torch.zeros(2).bool()), "3 scores are given for 2 components"),
        (lambda: roc_auc(torch.tensor([1.0, torch.nan]), torch.tensor([True, False])), "1 of 2 scores are not numbers"),
        (lambda: precision_recall(torch.ones(3), torch.zeros(3).bool()), "the circuit is empty"),
        (lambda: precision_recall(torch.ones(3), torch.ones(3).bool(), 4), "k=4 is not between 1 and the 3"),
        (lambda: faithfulness_curve(lambda kept: 1.0, torch.ones(3)), "with and without all components"),
        (lambda: faithfulness_curve(lambda kept: 1.0, torch.ones(3), [4]), "do not lie between 0 and the 3"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
