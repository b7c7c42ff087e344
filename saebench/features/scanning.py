"""Read the postings of many latents one after the other: every part of the files once, in blocks of bounded size.

Shape suffixes: `M` latents of a block, `N` their entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from saebench.features import layout
from saebench.features.store import FeatureStore

BLOCK_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Block:
    """The postings of neighbouring latents: `first` is the first of them, entries starts[i] to starts[i + 1] are those of latent first + i,
    their tokens ascending. `values_N` is empty where it was not asked for."""

    first: int
    starts: np.ndarray
    tokens_N: np.ndarray
    values_N: np.ndarray

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(latent, tokens, values) of each."""
        for number in range(len(self.starts) - 1):
            part = slice(self.starts[number], self.starts[number + 1])
            yield self.first + number, self.tokens_N[part], self.values_N[part]


def blocks(store: FeatureStore, *, values: bool = True, latents_F: np.ndarray | None = None) -> Iterator[Block]:
    """All latents of a store in order, about a million entries at a time (more where one latent has more). Blocks in which none of
    `latents_F` [F, bool] is wanted are left out."""
    counts_F, rows_F = store.counts_F, store.latents["row"].to_numpy()
    columns = ["token", "value"] if values else ["token"]
    for number, (start, stop) in enumerate(store.manifest["ranges"]):
        file = pq.ParquetFile(store.path / layout.postings_name(number), memory_map=True)
        for first, last in _bounds(counts_F, start, stop):
            if latents_F is not None and not latents_F[first:last].any():
                continue
            begin, end = int(rows_F[first]), int(rows_F[last - 1] + counts_F[last - 1])
            groups = range(begin // layout.POSTINGS_GROUP, -(-end // layout.POSTINGS_GROUP) if end > begin else 0)
            table = file.read_row_groups(list(groups), columns=columns)
            table = table.slice(begin % layout.POSTINGS_GROUP if groups else 0, end - begin)
            found_N = table["value"].to_numpy() if values else np.empty(0)
            yield Block(
                first,
                np.append(rows_F[first:last], end) - begin,
                table["token"].to_numpy(),
                found_N.astype(np.float32) * np.float32(store.value_scale),
            )


def _bounds(counts_F: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of the latents start to stop [first, last), with up to `BLOCK_ENTRIES` entries unless it is one latent."""
    ends = np.cumsum(counts_F[start:stop])
    first = start
    while first < stop:
        before = int(ends[first - start - 1]) if first > start else 0
        last = max(first + 1, start + int(np.searchsorted(ends, before + BLOCK_ENTRIES, side="right")))
        yield first, last
        first = last
