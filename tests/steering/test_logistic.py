"""Logistic regression: the conditions that hold at the minimum and nowhere else, and another library's weights."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import expit

from saebench.steering.logistic import Standard, fit_logistic


def data(seed=0, texts=90, features=40):
    rng = np.random.default_rng(seed)
    x_UF = rng.standard_normal((texts, features)) * rng.uniform(0.1, 5, features) + rng.uniform(-3, 3, features)
    x_UF[:, 7] = 2.5  # does not vary
    z_U = (x_UF[:, 0] - x_UF[:, 0].mean()) / x_UF[:, 0].std() + rng.standard_normal(texts)
    return x_UF, z_U > 0.6


@pytest.mark.parametrize("C", [0.1, 1.0])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_the_gradient_vanishes_at_the_minimum(penalty, C):
    x_UF, positive_U = data()
    z_UF = (x_UF - x_UF.mean(0)) / np.where(x_UF.std(0) > 1e-9, x_UF.std(0), 1)
    fitted = fit_logistic(x_UF, positive_U, penalty=penalty, C=C)
    wrong_U = expit(z_UF @ fitted.weights_F + fitted.intercept) - positive_U
    weight_U = np.where(positive_U, 0.5 / positive_U.mean(), 0.5 / (~positive_U).mean())
    slope_F = C * z_UF.T @ (weight_U * wrong_U)
    assert weight_U @ wrong_U == pytest.approx(0, abs=1e-4)
    if penalty == "l2":
        assert slope_F + fitted.weights_F == pytest.approx(0, abs=1e-4)
        return
    used_F = fitted.weights_F != 0
    assert 0 < used_F.sum() < 39
    assert slope_F[used_F] == pytest.approx(-np.sign(fitted.weights_F[used_F]), abs=1e-4)
    assert np.abs(slope_F[~used_F]).max() <= 1


def test_with_one_feature_of_two_values_the_classes_frequencies_come_out():
    """With next to no penalty log-odds are those of the table, classes of equal weight: 3 of 4 positives have it and 1 of 6 negatives."""
    x_UF = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], dtype=float)[:, None]
    fitted = fit_logistic(x_UF, np.arange(10) < 4, C=1e6)
    with_it, without = np.log((3 / 4) / (1 / 6)), np.log((1 / 4) / (5 / 6))
    assert fitted.scores(np.array([[1.0], [0.0]])) == pytest.approx([with_it, without], rel=1e-4)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_sparse_features_give_the_same_as_dense_ones(penalty):
    rng = np.random.default_rng(1)
    x_UF = rng.standard_normal((60, 30)) * (rng.random((60, 30)) < 0.2)
    positive_U = rng.random(60) < 0.5
    dense, sparse = (fit_logistic(x, positive_U, penalty=penalty) for x in (x_UF, sp.csr_array(x_UF)))
    assert sparse.weights_F == pytest.approx(dense.weights_F, abs=1e-4)
    assert sparse.scores(sp.csr_array(x_UF)) == pytest.approx(dense.scores(x_UF), abs=1e-3)


def test_units_of_measurement_do_not_count_and_what_does_not_vary_has_no_weight():
    x_UF, positive_U = data()
    fitted = fit_logistic(x_UF, positive_U)
    assert fitted.weights_F[7] == 0 and (np.delete(fitted.weights_F, 7) != 0).all()
    assert fit_logistic(x_UF * 1000 + 4, positive_U).weights_F == pytest.approx(fitted.weights_F, abs=1e-4)
    standard = Standard.of(x_UF)
    assert standard.mean_F == pytest.approx(x_UF.mean(0))
    assert np.delete(standard.inverse_F, 7) == pytest.approx(1 / np.delete(x_UF, 7, 1).std(0))


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_weights_are_those_of_scikit_learn(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_UF, positive_U = data(3)
    z_UF = np.delete((x_UF - x_UF.mean(0)), 7, 1) / np.delete(x_UF, 7, 1).std(0)
    kind = {"l1_ratio": 1.0, "solver": "saga"} if penalty == "l1" else {"solver": "lbfgs"}
    other = linear_model.LogisticRegression(C=0.5, class_weight="balanced", tol=1e-9, max_iter=20000, **kind).fit(
        z_UF, positive_U
    )
    fitted = fit_logistic(x_UF, positive_U, penalty=penalty, C=0.5)
    assert np.delete(fitted.weights_F, 7) == pytest.approx(other.coef_[0], abs=1e-4)
    assert fitted.intercept == pytest.approx(other.intercept_[0], abs=1e-4)
