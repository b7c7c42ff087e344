"""The parquet tables of a feature store, column by column as in docs/formats.md.

Shape suffixes: `N` entries, `M` latents of a range, `K` listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

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


def write_groups(
    path: Path, rows: int, size: int, group: Callable[[int, int], Mapping[str, Any]], dictionary: Sequence[str] = ()
) -> None:
    """As `write_table`, made and written a row group at a time: `group` gives the columns of rows begin to end."""
    with replacing(path) as temporary:
        part = pa.table(dict(group(0, min(size, rows))))
        with pq.ParquetWriter(
            temporary, part.schema, compression="none", use_dictionary=list(dictionary), write_statistics=True
        ) as writer:
            writer.write_table(part, size)
            for begin in range(size, rows, size):
                writer.write_table(pa.table(dict(group(begin, min(begin + size, rows)))), size)


def write_postings(path: Path, first: int, starts: np.ndarray, tokens_N: np.ndarray, values_N: np.ndarray) -> None:
    """Entries by latent, then by token: the store's largest table."""

    def group(begin: int, end: int) -> dict[str, np.ndarray]:
        numbers = np.arange(first, first + len(starts) - 1, dtype=np.int32)
        latents_N = np.repeat(numbers, np.diff(starts.clip(begin, end)))
        return {"latent": latents_N, "token": tokens_N[begin:end], "value": values_N[begin:end]}

    write_groups(path, len(tokens_N), layout.POSTINGS_GROUP, group, dictionary=["latent"])


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


def write_corpus(path: Path, contexts: Contexts, numbers_C: Tensor, token_strings: Sequence[str] | None) -> list[str]:
    """The tokens of some contexts, once, their documents and vocabulary; returns the names of the files. Memory is that of the documents
    and the vocabulary, however many tokens there are."""
    size = contexts.context_size
    counts, first = np.zeros(len(contexts.names), np.int64), np.full(len(contexts.names), -1, np.int64)
    uses = np.zeros(len(token_strings or ()), np.int64)

    def group(begin: int, end: int) -> dict[str, np.ndarray]:
        nonlocal uses
        part = contexts[numbers_C[begin // size : end // size]]
        ids_T, documents_T, positions_T = (
            rows_CS.flatten().numpy().astype(np.int32) for rows_CS in (part.ids_NS, part.documents_NS, part.positions_NS)
        )
        inside_T = np.flatnonzero(documents_T >= 0)
        np.add(counts, np.bincount(documents_T[inside_T], minlength=len(counts)), out=counts)
        found, places = np.unique(documents_T[inside_T], return_index=True)
        first[found] = np.where(first[found] < 0, begin + inside_T[places], first[found])
        more = np.bincount(ids_T, minlength=len(uses))
        more[: len(uses)] += uses
        uses = more
        return {"id": ids_T, "document": documents_T, "position": positions_T}

    write_groups(path / layout.TOKENS, len(numbers_C) * size, max(1, layout.TOKENS_GROUP // size) * size, group)
    write_table(path / layout.DOCUMENTS, {"name": contexts.names, "first_token": first, "tokens": counts})
    strings = [*(token_strings or ())] + [f"<{i}>" for i in range(len(token_strings or ()), len(uses))]
    write_table(path / layout.VOCABULARY, {"id": np.arange(len(uses), dtype=np.int32), "text": strings, "count": uses})
    return [layout.TOKENS, layout.DOCUMENTS, layout.VOCABULARY]


def map_ids(path: Path, contexts: Contexts, numbers_C: Tensor) -> np.ndarray:
    """The ids of the tokens of some contexts, one after the other, in a new mapped file: [T] int32."""
    ids_CS = np.memmap(path, dtype=np.int32, mode="w+", shape=(len(numbers_C), contexts.context_size))
    start = 0
    for part_C in numbers_C.split(max(1, layout.TOKENS_GROUP // contexts.context_size)):
        ids_CS[start : start + len(part_C)] = contexts.ids_NS[part_C].numpy()
        start += len(part_C)
    return np.asarray(ids_CS).reshape(-1)
