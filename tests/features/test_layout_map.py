"""The map of directions: neighbours as the store lists them, groups that were planted, computed once."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from saebench.errors import UserError
from saebench.features import FeatureStore
from saebench.features.layout import NEIGHBOURS
from saebench.features.layout_map import by_size, listed_neighbours, main, make_map, map_path, read_map, start, write_map


def test_neighbours_are_those_of_the_store(small):
    found = listed_neighbours(small.store)
    lists = [small.store.details(latent).neighbours for latent in range(small.store.d_sae)]
    if min(map(len, lists)) < NEIGHBOURS - 1:
        assert found is None
        return
    others_FK, distances_FK = found
    assert others_FK.shape == distances_FK.shape == (small.store.d_sae, NEIGHBOURS)
    for latent, near in enumerate(lists):
        assert others_FK[latent].tolist() == [latent, *(other for other, _ in near[: NEIGHBOURS - 1])]
        np.testing.assert_allclose(distances_FK[latent], [0, *(1 - cosine for _, cosine in near[: NEIGHBOURS - 1])], atol=1e-6)


def test_groups_are_numbered_by_size():
    assert by_size(np.array([5, 5, 2, -1, 2, 2, 9])).tolist() == [1, 1, 0, -1, 0, 0, 2]
    assert by_size(np.array([-1, -1])).tolist() == [-1, -1]


def test_the_start_is_the_same_each_time():
    unit_FD = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    a, b = start(unit_FD), start(unit_FD)
    np.testing.assert_array_equal(a, b)
    assert a.shape == (50, 2) and 9.9 < np.abs(a).max() < 10.1


@pytest.fixture
def copied(small, tmp_path) -> FeatureStore:
    shutil.copytree(small.store.path, tmp_path / "store")
    return FeatureStore(tmp_path / "store")


def test_a_map_belongs_to_its_dictionary(copied):
    places = np.arange(2.0 * copied.d_sae).reshape(-1, 2)
    assert read_map(copied) is None
    write_map(copied, places, np.arange(copied.d_sae))
    found = read_map(copied)
    np.testing.assert_array_equal(found.x_F, places[:, 0].astype(np.float32))
    np.testing.assert_array_equal(found.cluster_F, np.arange(copied.d_sae))
    assert pq.read_table(map_path(copied)).column_names == ["latent", "x", "y", "cluster"]
    copied.config = copied.config | {"dictionary": "another"}
    assert read_map(copied) is None
    map_path(copied).write_bytes(b"PAR1")
    with pytest.raises(UserError, match="damaged"):
        read_map(copied)


def test_too_few_latents(copied):
    with pytest.raises(UserError, match="says little"):
        make_map(copied, torch.eye(8))


def test_it_is_computed_once(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("os.nice", lambda by: 0)
    write_map(copied, np.zeros((copied.d_sae, 2)), np.zeros(copied.d_sae))
    before = map_path(copied).stat().st_mtime_ns
    main(str(copied.path), str(tmp_path / "no such dictionary"))  # nothing is left to do, so it is not even opened
    assert map_path(copied).stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False])
def test_planted_groups_are_found(small, copied, monkeypatch, listed):
    pytest.importorskip("umap")
    if small.kind != "topk":
        pytest.skip("once is enough")
    generator = torch.Generator().manual_seed(0)
    group_F = torch.arange(240) % 6
    rows_FD = torch.randn(6, 24, generator=generator)[group_F] + 0.35 * torch.randn(240, 24, generator=generator)
    unit_FD = torch.nn.functional.normalize(rows_FD, dim=1)
    cosines_FK, others_FK = (unit_FD @ unit_FD.T).topk(NEIGHBOURS, dim=1)
    known = (others_FK.int().numpy(), (1 - cosines_FK).clamp(min=0).numpy()) if listed else None
    monkeypatch.setattr("saebench.features.layout_map.listed_neighbours", lambda store: known)
    found = make_map(copied, rows_FD)
    places_F2 = np.stack([found.x_F, found.y_F], 1)
    distances_FF = np.linalg.norm(places_F2[:, None] - places_F2[None], axis=2) + 1e9 * np.eye(240)
    near_FK = np.argsort(distances_FF, axis=1)[:, :10]
    assert (group_F.numpy()[near_FK] == group_F.numpy()[:, None]).mean() > 0.95
    grouped = found.cluster_F >= 0
    assert grouped.mean() > 0.8
    for cluster in set(found.cluster_F[grouped].tolist()):
        assert len(set(group_F.numpy()[found.cluster_F == cluster].tolist())) == 1
    again = make_map(copied, rows_FD)
    np.testing.assert_array_equal(again.x_F, found.x_F)
