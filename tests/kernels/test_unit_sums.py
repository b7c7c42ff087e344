"""Sums over units, compiled and in numpy, beside the table of latents by units."""

import numpy as np
import pytest
import torch

from saebench.kernels import cpu, use_implementation
from saebench.kernels.implementations import primitives_for
from saebench.kernels.unit_sums import unit_sums

IMPLEMENTATIONS = ["cpu", "reference"] if primitives_for(torch.zeros(1)) is cpu else ["reference"]


def corpus(kind):
    """Which latents fire on which tokens [T, F], the unit of every token, set and size of every unit."""
    rng = np.random.default_rng(len(kind))
    latents, tokens, units = {"odd": (123, 517, 5), "many units": (7, 3000, 2999), "one latent": (1, 64, 3)}.get(
        kind, (40, 900, 30)
    )
    share_F = np.where(rng.random(latents) < 0.2, 0.0, rng.random(latents) ** 3)
    if kind == "crowded":
        share_F[:] = 1
    if kind == "silent":
        share_F[:] = 0
    fires_TF = rng.random((tokens, latents)) < share_F
    units_T = np.sort(rng.integers(0, units, tokens)) if kind != "scattered" else rng.integers(0, units, tokens)
    if kind != "crowded":
        units_T[rng.random(tokens) < 0.2] = -1
    if kind == "none counts":
        units_T[:] = -1
    return fires_TF, units_T.astype(np.int32), rng.random(units) < 0.4, rng.integers(0, 10**6, units)


KINDS = ["ordinary", "odd", "many units", "one latent", "scattered", "crowded", "silent", "none counts"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_table(kind, implementation):
    fires_TF, units_T, in_a_U, sizes_U = corpus(kind)
    table_UF = np.array([fires_TF[units_T == unit].sum(0) for unit in range(len(sizes_U))], dtype=np.float64)
    expected = [
        [part[of].sum(0) for of in (in_a_U, ~in_a_U)]
        for part in (table_UF, table_UF**2, table_UF * sizes_U[:, None], table_UF > 0)
    ]
    latents, tokens = np.nonzero(fires_TF.T)
    starts = np.searchsorted(latents, np.arange(fires_TF.shape[1] + 1))
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with use_implementation(implementation):
            found = unit_sums(starts, tokens.astype(np.int32), units_T, in_a_U, sizes_U)
        torch.set_num_threads(before)
        np.testing.assert_array_equal(found, np.array(expected))


def test_types_are_checked():
    with pytest.raises(ValueError, match="units_T is int64: it must be int32"):
        unit_sums(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(3, np.int64), np.zeros(1, bool), np.zeros(1))
