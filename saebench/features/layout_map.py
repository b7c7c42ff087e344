"""A map of a dictionary: its decoder directions laid out in the plane, near where their cosines are large, and grouped.

UMAP over the nearest neighbours that the feature store lists already, from a start along the two main directions, with a fixed seed; groups
by HDBSCAN on the plane. Computed once, in a process of its own (`python -m saebench.features.layout_map STORE DICTIONARY`), and kept beside
the store as ID.map.parquet: latent, x, y, cluster (-1 for those in none), by latent.

Shape suffixes: `F` d_sae, `D` width, `K` neighbours.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saebench.dictionaries import load_dictionary
from saebench.errors import UserError
from saebench.features.layout import NEIGHBOURS, details_name
from saebench.features.store import FeatureStore
from saebench.files import locked, replacing

VERSION = 1
KEY = b"saebench-map"
EPOCHS, MANY, EPOCHS_OF_MANY = 300, 50_000, 120
SEED = 0


@dataclass(frozen=True)
class LatentMap:
    """Where each latent lies, and its group."""

    x_F: np.ndarray
    y_F: np.ndarray
    cluster_F: np.ndarray
    """Number of the group, largest group first; -1 for latents in none."""


def map_path(store: FeatureStore) -> Path:
    return store.path.with_name(f"{store.path.name}.map.parquet")


def _mark(store: FeatureStore) -> bytes:
    return f"{VERSION}:{store.config['dictionary']}".encode()


def read_map(store: FeatureStore) -> LatentMap | None:
    """The map of the store's dictionary; None where it is not computed yet, or was of another one."""
    path = map_path(store)
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it, and it is computed again") from None
    if (table.schema.metadata or {}).get(KEY) != _mark(store):
        return None
    return LatentMap(*(table[name].to_numpy() for name in ("x", "y", "cluster")))


def make_map(store: FeatureStore, directions_FD: torch.Tensor) -> LatentMap:
    """Compute the map and keep it. Raises UserError for a dictionary of too few latents, or where umap-learn is missing."""
    unit_FD = torch.nn.functional.normalize(directions_FD.float(), dim=1)
    count = len(unit_FD)
    if count < 2 * NEIGHBOURS:
        raise UserError(f"a map of {count} latents says little: it takes {2 * NEIGHBOURS} at least")
    try:
        import umap
        from sklearn.cluster import HDBSCAN
    except ImportError:
        raise UserError("the map needs umap-learn, which is not installed: pip install 'saebench[app]'") from None

    known = listed_neighbours(store)
    reducer = umap.UMAP(
        n_neighbors=NEIGHBOURS,
        metric="cosine",
        min_dist=0.05,
        init=start(unit_FD),
        n_epochs=EPOCHS if count < MANY else EPOCHS_OF_MANY,
        random_state=SEED,
        n_jobs=1,
        precomputed_knn=(None, None, None) if known is None else (*known, None),
        force_approximation_algorithm=known is not None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that nothing can be added to the map later, which nobody wants to
        places_F2 = reducer.fit_transform(unit_FD.numpy())
    least = max(8, count // 400)
    found_F = HDBSCAN(min_cluster_size=least, min_samples=4, copy=True).fit_predict(places_F2)
    return write_map(store, places_F2, by_size(found_F))


def listed_neighbours(store: FeatureStore) -> tuple[np.ndarray, np.ndarray] | None:
    """Each latent and its nearest others as the store lists them: numbers [F, K] and cosine distances; None where some have too few."""
    indices: list[np.ndarray] = []
    cosines: list[np.ndarray] = []
    for number in range(len(store.manifest["ranges"])):
        table = pq.read_table(store.path / details_name(number), columns=["neighbours", "neighbours_cosine"])
        for name, into in (("neighbours", indices), ("neighbours_cosine", cosines)):
            column = table[name].combine_chunks()
            if (np.diff(column.offsets.to_numpy()) < NEIGHBOURS - 1).any():
                return None
            firsts = column.offsets.to_numpy()[:-1]
            into.append(column.values.to_numpy()[firsts[:, None] + np.arange(NEIGHBOURS - 1)])
    others_FK, cosine_FK = np.concatenate(indices), np.concatenate(cosines)
    own_F1 = np.arange(len(others_FK))[:, None]
    distances_FK = np.concatenate([np.zeros_like(cosine_FK[:, :1]), np.maximum(1 - cosine_FK, 0)], 1)
    return np.concatenate([own_F1, others_FK], 1).astype(np.int32), distances_FK.astype(np.float32)


def start(unit_FD: torch.Tensor) -> np.ndarray:
    """Places along the two main directions, from -10 to 10, with some noise that parts those on one spot."""
    torch.manual_seed(SEED)
    left_F2, sizes, _ = torch.pca_lowrank(unit_FD, q=2)
    places_F2 = left_F2 * sizes
    noise_F2 = torch.randn(places_F2.shape, generator=torch.Generator().manual_seed(SEED))
    return (10 * places_F2 / places_F2.abs().max().clamp(min=1e-12) + 1e-3 * noise_F2).numpy().astype(np.float32)


def by_size(cluster_F: np.ndarray) -> np.ndarray:
    """The same groups, numbered by size, largest first; -1 stays."""
    numbers, counts = np.unique(cluster_F[cluster_F >= 0], return_counts=True)
    renamed = np.full(cluster_F.max(initial=-1) + 2, -1, dtype=np.int32)  # the last stands for -1
    renamed[numbers[np.argsort(-counts, kind="stable")]] = np.arange(len(numbers))
    return renamed[cluster_F]


def write_map(store: FeatureStore, places_F2: np.ndarray, cluster_F: np.ndarray) -> LatentMap:
    found = LatentMap(places_F2[:, 0].astype(np.float32), places_F2[:, 1].astype(np.float32), cluster_F.astype(np.int32))
    columns = {"latent": np.arange(len(cluster_F), dtype=np.int32), "x": found.x_F, "y": found.y_F, "cluster": found.cluster_F}
    with replacing(map_path(store)) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata({KEY: _mark(store)}), temporary)
    return found


def main(store_path: str, dictionary_path: str, part: str = "") -> None:
    """Compute the map of a store unless it is there; one process at a time, without getting in anyone's way."""
    os.nice(10)
    store = FeatureStore(store_path)
    with locked(map_path(store).with_name(f".{store.path.name}.map.lock")):
        if read_map(store) is not None:
            return
        dictionary = load_dictionary(dictionary_path)
        directions_FD = (dictionary.parts()[part] if part else dictionary).directions
        if directions_FD is None:
            raise UserError("the latents of this dictionary do not write one direction each, so there is no map of them")
        make_map(store, directions_FD)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
