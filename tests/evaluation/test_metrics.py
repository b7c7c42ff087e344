import math

import pytest
import torch

from saebench.codes import SparseCodes
from saebench.evaluation import Reconstruction, SplicedLoss
from saebench.evaluation.metrics import max_decoder_cosine

X = torch.tensor([[2, 1.5, -1, 3.0], [0.5, 0, 0, -1.0]])
X_HAT = torch.tensor([[3.44, 1.92, 0, 0], [0.5, 0, 0, -1.0]])
CODES = torch.tensor([[2, 0, 2.4, 0, 0, 0], [0.5, 0, 0, 0, 0, 1.0]])


def test_worked_example():
    """The batch {xA, xB} under TopK k=2 (methods.md 0.2)."""
    quality = Reconstruction(4, 6)
    quality.update(X, X_HAT, SparseCodes.from_dense(CODES))
    figures = quality.figures()
    assert figures["fvu"] == pytest.approx(1.139535, abs=1e-6)
    assert figures["mse"] == pytest.approx(1.53125)
    assert figures["explained_variance_of_residual"] == pytest.approx(0.430233, abs=1e-6)
    assert figures["relative_reconstruction_bias"] == pytest.approx(1.523161, abs=1e-6)
    assert figures["cosine"] == pytest.approx((0.614578 + 1) / 2, abs=1e-6)
    assert figures["l2_ratio"] == pytest.approx((X_HAT.norm(dim=1) / X.norm(dim=1)).mean().item(), rel=1e-6)
    assert figures["l0"] == 2
    assert figures["dead"] == pytest.approx(3 / 6)
    assert quality.density_F.tolist() == [1, 0, 0.5, 0, 0, 0.5]


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_figures_do_not_depend_on_the_batch_size(batch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 5, generator=generator) + 1e4  # a large mean, which a naive sum of squares would not survive
    x_hat = x + 0.3 * torch.randn(100, 5, generator=generator)
    dense = torch.rand(100, 8, generator=generator).mul(torch.rand(100, 8, generator=generator) > 0.7)
    quality = Reconstruction(5, 8)
    for start in range(0, 100, batch):
        part = slice(start, start + batch)
        quality.update(x[part], x_hat[part], SparseCodes.from_dense(dense[part]))
    error = (x.double() - x_hat.double()).square().sum()
    expected = error / (x.double() - x.double().mean(0)).square().sum()
    assert quality.figures()["fvu"] == pytest.approx(float(expected), rel=1e-12)
    assert quality.figures()["l0"] == pytest.approx(float((dense > 0).sum() / 100))


def test_perfect_and_mean_reconstructions():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    nothing = SparseCodes.from_dense(torch.zeros(50, 2))
    for x_hat, fvu, bias in ((x, 0.0, 1.0), (x.mean(0).expand_as(x), 1.0, 1.0), (x / 2, None, 0.5)):
        quality = Reconstruction(3, 2)
        quality.update(x, x_hat, nothing)
        figures = quality.figures()
        if fvu is not None:
            assert figures["fvu"] == pytest.approx(fvu, abs=1e-9)
        assert figures["relative_reconstruction_bias"] == pytest.approx(bias, rel=1e-5)
        assert figures["dead"] == 1


def logits_of(probabilities):
    return torch.tensor(probabilities).log()[None, None]


def test_losses_of_known_distributions():
    """One token, two classes: everything by hand."""
    loss = SplicedLoss()
    p, q, zero, mean = [0.5, 0.5], [0.25, 0.75], [0.125, 0.875], [0.2, 0.8]
    loss.update(
        torch.zeros(1, 1, dtype=torch.int64),
        {"clean": logits_of(p), "spliced": logits_of(q), "zero": logits_of(zero), "mean": logits_of(mean)},
    )
    f = loss.figures()
    assert f["ce_clean"] == pytest.approx(math.log(2))
    assert f["ce_spliced"] == pytest.approx(math.log(4))
    assert f["ce_increase"] == pytest.approx(math.log(2))
    assert f["ce_recovered_zero"] == pytest.approx((math.log(8) - math.log(4)) / (math.log(8) - math.log(2)))
    assert f["ce_recovered_mean"] == pytest.approx((math.log(5) - math.log(4)) / (math.log(5) - math.log(2)))
    kl = {name: sum(a * math.log(a / b) for a, b in zip(p, r, strict=True)) for name, r in {"q": q, "zero": zero}.items()}
    assert f["kl_spliced"] == pytest.approx(kl["q"], rel=1e-6)
    assert f["kl_recovered_zero"] == pytest.approx(1 - kl["q"] / kl["zero"], rel=1e-6)


def test_losses_do_not_depend_on_the_batch_and_intervals_hold_the_mean():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (12, 4), generator=generator)
    logits = {
        name: torch.randn(12, 4, 5, generator=generator) * scale
        for name, scale in {"clean": 1, "spliced": 1.2, "zero": 3, "mean": 2}.items()
    }
    results = []
    for batch in (12, 5, 1):
        loss = SplicedLoss()
        for start in range(0, 12, batch):
            loss.update(targets[start : start + batch], {k: v[start : start + batch] for k, v in logits.items()})
        results.append(loss.figures())
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-9)
    intervals = loss.intervals()
    for name, value in results[0].items():
        low, high = intervals[name]
        assert low <= value <= high
    assert loss.intervals() == intervals


def test_max_decoder_cosine_leaves_out_the_diagonal():
    W = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.8], [0, 0, 0, -1]])
    expected = torch.tensor([0.6, 0.8, 0.8, 0.6, 0.6, 0.0])
    torch.testing.assert_close(max_decoder_cosine(W * 3, block=4), expected)
    generator = torch.Generator().manual_seed(0)
    many = torch.nn.functional.normalize(torch.randn(2500, 24, generator=generator))  # enough for the compiled kernel
    torch.testing.assert_close(max_decoder_cosine(2 * many), (many @ many.T).fill_diagonal_(-torch.inf).amax(1))
    torch.testing.assert_close(max_decoder_cosine(-torch.eye(2)[:1].repeat(1, 1).expand(1, 2).repeat(2, 1)), torch.ones(2))
