"""How alike the features of a graph are, as one figure from 0 to 1 for each pair: what supernodes are made by.

Up to three measures, each 0 where it is negative; the figure is their mean by `SHARES`, of those that are known for the pair:

    role          cosine of what carries into two features, and cosine of what they carry on, the mean of both: the same sources with the
                  same signs in the same proportions, and the same targets. What an edge carries is its share of its target's input times
                  what comes through the target, with the edge's sign.
    decoder       cosine of what they write, summed over the places where they write the stream. Features of other spaces, such as
                  heads' outputs, are compared with those of their own site. The same latent at two positions has 1.
    coactivation  phi of firing over a corpus (features/matching.py), for latents that fire there.

Role alone decides where nothing else is given. It counts as much as the two others together, since a supernode is to be one step of this
prompt's computation; the others keep apart what merely stands at the same place in it. On three prompts of the bundled model, pairs that
do the same to the model when they are taken out (cosine of all measured changes above 0.5) are told from other pairs with AUC 0.88 to 0.92
by role and decoder in these shares, 0.86 to 0.92 by role alone, 0.82 to 0.89 by decoder alone.
Shape suffixes: `N` nodes, `M` features compared, `T` tokens, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from saebench.circuits.graphs.graph import Graph
from saebench.circuits.graphs.parts import parts_of
from saebench.circuits.graphs.replacement import Dictionaries
from saebench.codes import SparseCodes
from saebench.errors import UserError
from saebench.features.building import fingerprint
from saebench.features.matching import check_tokens
from saebench.features.store import FeatureStore

SHARES = {"role": 0.5, "decoder": 0.25, "coactivation": 0.25}
LAYERS = 1 << 20  # more than any model has: where a dictionary writes needs no model

Stores = FeatureStore | Sequence[FeatureStore] | Mapping[str, FeatureStore | SparseCodes]
Latents = Sequence[tuple[str, int]]
"""The dictionary's name and the latent of each feature."""


def combined(measures: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean of measures [M, M] by `SHARES`; NaN is unknown, and what is unknown in all is 0."""
    total_MM, share_MM = (np.zeros_like(next(iter(measures.values())), dtype=np.float64) for _ in range(2))
    for name, measure_MM in measures.items():
        total_MM += SHARES[name] * np.nan_to_num(measure_MM).clip(0, 1)
        share_MM += SHARES[name] * ~np.isnan(measure_MM)
    mean_MM = np.divide(total_MM, share_MM, out=np.zeros_like(total_MM), where=share_MM > 0)
    np.fill_diagonal(mean_MM, 1.0)
    return mean_MM


def role(carried_NN: sp.csr_array, features_M: np.ndarray) -> np.ndarray:
    """[M, M], given what each edge carries with its sign [N, N], targets by rows."""
    into_MM, has_M = _cosines(sp.csr_array(carried_NN)[features_M])
    on_MM, goes_M = _cosines(sp.csr_array(sp.csr_array(carried_NN).T)[features_M])
    either_MM, any_MM = has_M[:, None] | has_M, goes_M[:, None] | goes_M
    count_MM = either_MM.astype(float) + any_MM
    return np.divide(into_MM + on_MM, count_MM, out=np.zeros_like(count_MM), where=count_MM > 0)


def _cosines(rows: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Of all pairs of rows, 0 with an empty one; and which rows are not empty."""
    lengths_M = np.sqrt(np.asarray(rows.multiply(rows).sum(1), dtype=np.float64)).ravel()
    scale_M = np.divide(1.0, lengths_M, out=np.zeros_like(lengths_M), where=lengths_M > 0)
    unit = sp.diags_array(scale_M) @ rows
    return (unit @ unit.T).toarray(), lengths_M > 0


def decoder(latents: Latents, dictionaries: Mapping) -> np.ndarray:
    """[M, M]; NaN for pairs that write different spaces, and where a dictionary is not given."""
    vectors: dict[str, list[tuple[int, np.ndarray]]] = {}
    names = np.array([name for name, _ in latents])
    for name, dictionary in dictionaries.items():
        for part in parts_of(dictionary, 0, LAYERS):
            last = part.first + len(part.W_read_FD)
            mine = [m for m in np.flatnonzero(names == name).tolist() if part.first <= latents[m][1] < last]
            spaces: dict[str, np.ndarray] = {}
            for write in part.writes:
                space = write.place.site if write.place.kind == "heads" else "stream"
                rows_MD = _rows(write.rows, [latents[m][1] - part.first for m in mine])
                spaces[space] = spaces[space] + rows_MD if space in spaces else rows_MD
            for space, rows_MD in spaces.items():
                vectors.setdefault(space, []).extend(zip(mine, rows_MD, strict=True))
    found_MM = np.full((len(latents), len(latents)), np.nan)
    for pairs in vectors.values():
        if pairs:
            numbers = np.array([m for m, _ in pairs])
            rows_MD = np.stack([row_D for _, row_D in pairs])
            unit_MD = rows_MD / np.maximum(np.linalg.norm(rows_MD, axis=1, keepdims=True), 1e-300)
            found_MM[np.ix_(numbers, numbers)] = unit_MD @ unit_MD.T
    return found_MM


def _rows(rows: object, latents: list[int]) -> np.ndarray:
    import torch

    assert callable(rows)
    return rows(torch.tensor(latents, dtype=torch.int64)).detach().double().cpu().numpy()


def coactivation(latents: Latents, stores: Mapping[str, FeatureStore | SparseCodes]) -> np.ndarray:
    """[M, M]; NaN for latents without a store, and those that never fire, or always. Raises UserError for different tokens."""
    sizes = {
        len(store) if isinstance(store, SparseCodes) else store.num_contexts * store.context_size for store in stores.values()
    }
    if len(sizes) > 1:
        raise UserError(f"the stores are over {min(sizes):,} and {max(sizes):,} tokens: index all over the same")
    over = [store for store in stores.values() if isinstance(store, FeatureStore)]
    for other in over[1:]:
        check_tokens(over[0], other)
    tokens = [over[0].num_tokens] if over else list(sizes)
    firing: dict[tuple[str, int], np.ndarray] = {}
    for name, store in stores.items():
        mine = sorted({latent for owner, latent in latents if owner == name})
        if isinstance(store, FeatureStore):
            firing |= {(name, latent): store.postings(latent)[0] for latent in mine}
        else:
            tokens_N, latents_N, _ = (column.cpu().numpy() for column in store.nonzero())
            firing |= {(name, latent): np.unique(tokens_N[latents_N == latent]) for latent in mine}
    rows = [firing.get(key, np.zeros(0, dtype=np.int64)) for key in latents]
    shape = (len(rows), max(sizes, default=0))
    at = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    fires = sp.csr_array((np.ones(at[-1]), np.concatenate([*rows, np.zeros(0, dtype=np.int64)]), at), shape=shape)
    together_MM = (fires @ fires.T).toarray()
    n_M, T = np.diff(at).astype(np.float64), float(tokens[0]) if tokens else 0.0
    scale_M = np.sqrt(n_M * (T - n_M))
    with np.errstate(invalid="ignore", divide="ignore"):
        phi_MM = (together_MM * T - n_M[:, None] * n_M) / (scale_M[:, None] * scale_M)
    return np.where(np.isfinite(phi_MM), phi_MM, np.nan)


def named(dictionaries: Dictionaries, graph: Graph) -> dict:
    """Dictionaries by the names that a graph has for them. Raises UserError for others than the graph's."""
    known = {each["fingerprint"]: each["name"] for each in graph.dictionaries}
    listed = list(dictionaries.values()) if isinstance(dictionaries, Mapping) else list(dictionaries)
    found = {}
    for dictionary in listed:
        if (mark := fingerprint(dictionary)) not in known:
            raise UserError(
                f"a {dictionary.config.architecture} dictionary of {', '.join(dictionary.config.reads)} is none of the graph's: "
                "give those that it was traced with"
            )
        found[known[mark]] = dictionary
    return found


def stores_of(stores: Stores, graph: Graph) -> dict[str, FeatureStore | SparseCodes]:
    """Stores, or codes of text, by the names of a graph's dictionaries. Raises UserError for those of others."""
    marks = {each["name"]: each["fingerprint"] for each in graph.dictionaries}
    if isinstance(stores, Mapping):
        found = dict(stores)
    else:
        names = {mark: name for name, mark in marks.items()}
        listed = [stores] if isinstance(stores, FeatureStore) else list(stores)
        found = {names.get(store.config["dictionary"], str(store.path)): store for store in listed}
    for name, store in found.items():
        if name not in marks or (isinstance(store, FeatureStore) and store.config["dictionary"] != marks[name]):
            raise UserError(f"the store {name!r} is of none of the graph's dictionaries ({', '.join(marks)}): leave it out")
    return found
