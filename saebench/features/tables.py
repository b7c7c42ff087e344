"""The parquet tables of a feature store, column by column as in docs/formats.md.

Shape suffixes: `N` entries, `M` latents of a range, `K` listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saebench.features import layout
from saebench.files import replacing
from saebench.kernels.posting_statistics import Coactivation, Moments, TopTokens
from saebench.lm import Contexts


@dataclass(frozen=True)
class Listed:
    """For each latent some numbers of latents or tokens [M, K], -1 where there are fewer, and one figure for each."""

    ids: Any
    figures: Any
    name: str


def write_table(path: Path, columns: Mapping[str, Any], group: int | None = None, dictionary: Sequence[str] = ()) -> None:
    """One parquet file, whole or not at all; not compressed, so that little is to be done to read a part of it."""
    with replacing(path) as temporary:
        pq.write_table(
            pa.table(dict(columns)),
            temporary,
            compression="none",
            row_group_size=group,
            use_dictionary=list(dictionary),
            write_statistics=True,
        )


def write_postings(path: Path, first: int, starts: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray) -> None:
    """Entries by latent, then by token: the store's largest table."""
    latents_N = np.repeat(np.arange(first, first + len(starts) - 1, dtype=np.int32), np.diff(starts))
    columns = {"latent": latents_N, "token": tokens_N, "value": values_N}
    write_table(path, columns, layout.POSTINGS_GROUP, dictionary=["latent"])


def write_latents(
    path: Path, first: int, starts: np.ndarray, found: Moments, on: TopTokens, num_tokens: int, scale: float, number: int
) -> None:
    """One row a latent with its figures over the corpus; those of a latent that never fires are 0, or null where there is none."""
    counts = np.diff(starts)
    fires = counts > 0
    n = np.maximum(counts, 1)
    mean = found.sum / n
    second, third, fourth = (total / n for total in (found.square, found.cube, found.fourth))
    variance = np.maximum(second - mean**2, 0)
    spread = np.where(variance > 1e-12 * np.maximum(second, 1e-300), variance, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        skew = (third - 3 * mean * second + 2 * mean**3) / spread**1.5
        kurtosis = (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / spread**2
    whole = np.maximum(np.abs(found.sum), 1e-300)
    columns = {
        "latent": np.arange(first, first + len(counts), dtype=np.int32),
        "count": counts,
        "density": counts / max(1, num_tokens),
        "mean": mean * scale,
        "std": np.sqrt(variance) * scale,
        "skew": pa.array(skew, mask=~np.isfinite(skew)),
        "kurtosis": pa.array(kurtosis, mask=~np.isfinite(kurtosis)),
        "min": found.low * np.float32(scale),
        "max": found.high * np.float32(scale),
        "contexts": found.contexts,
        "distinct_tokens": on.distinct,
        "top_token": pa.array(on.ids[:, 0], mask=~fires),
        "top_token_share": pa.array(on.sums[:, 0] / whole, mask=~fires),
        "file": np.full(len(counts), number, dtype=np.int32),
        "row": starts[:-1],
    }
    write_table(path, columns)


def write_details(
    path: Path, first: int, found: Moments, on: TopTokens, together: Coactivation, scale: float, more: Mapping[str, Listed]
) -> None:
    """One row a latent with what is listed of it."""
    columns: dict[str, Any] = {
        "latent": np.arange(first, first + len(found.sum), dtype=np.int32),
        "histogram": _lists(found.histogram),
        "positions": _lists(found.positions),
        "token_ids": _lists(on.ids, on.ids >= 0),
        "token_counts": _lists(on.counts, on.ids >= 0),
        "token_sums": _lists(on.sums * scale, on.ids >= 0),
        "coactive": _lists(together.latents, together.latents >= 0),
        "coactive_counts": _lists(together.together, together.latents >= 0),
        "coactive_phi": _lists(together.phi, together.latents >= 0),
    }
    for name, listed in more.items():
        ids = np.asarray(listed.ids, dtype=np.int32)
        columns[name] = _lists(ids, ids >= 0)
        columns[f"{name}_{listed.name}"] = _lists(np.asarray(listed.figures, dtype=np.float32), ids >= 0)
    write_table(path, columns, layout.DETAILS_GROUP)


def _lists(rows_MK: np.ndarray, kept_MK: np.ndarray | None = None) -> pa.ListArray:
    """Rows as lists, of those kept."""
    if kept_MK is None:
        kept_MK = np.ones(rows_MK.shape, dtype=bool)
    offsets = np.concatenate([[0], np.cumsum(kept_MK.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(rows_MK[kept_MK])))


def write_corpus(path: Path, contexts: Contexts, token_strings: Sequence[str] | None) -> list[str]:
    """Tokens once, documents and vocabulary; returns the names of the files."""
    ids_T = contexts.ids_NS.flatten().numpy().astype(np.int32)
    documents_T = contexts.documents_NS.flatten().numpy().astype(np.int32)
    columns = {"id": ids_T, "document": documents_T, "position": contexts.positions_NS.flatten().numpy().astype(np.int32)}
    write_table(path / layout.TOKENS, columns)
    counts = np.bincount(documents_T[documents_T >= 0], minlength=len(contexts.names))
    first = np.full(len(contexts.names), -1, dtype=np.int64)
    places = np.flatnonzero(documents_T >= 0)[::-1]
    first[documents_T[places]] = places
    write_table(path / layout.DOCUMENTS, {"name": contexts.names, "first_token": first, "tokens": counts})
    size = max(int(ids_T.max()) + 1, len(token_strings or ()))
    strings = [*(token_strings or ())] + [f"<{i}>" for i in range(len(token_strings or ()), size)]
    write_table(
        path / layout.VOCABULARY,
        {"id": np.arange(size, dtype=np.int32), "text": strings, "count": np.bincount(ids_T, minlength=size)},
    )
    return [layout.TOKENS, layout.DOCUMENTS, layout.VOCABULARY]
