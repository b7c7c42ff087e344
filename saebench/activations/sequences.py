"""Whole contexts in order, from a store or a stream: for indexing, and for dictionaries that read sequences.

Shape suffixes: `C` contexts at once, `S` positions, `D` width of the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saebench.activations.batches import Source
from saebench.errors import UserError


def sequences(
    source: Source,
    sites: Sequence[str],
    at_once: int = 32,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Contexts `start` to `stop` of a source, a few at once: (number of the first, float32 [C, S, D] by site).

    With `world > 1` each rank gets a contiguous part of its own. Raises UserError for a rank outside the world.
    """
    if not 0 <= rank < world:
        raise UserError(f"rank={rank} is not in a world of {world}")
    stop = source.num_contexts if stop is None else min(stop, source.num_contexts)
    count = max(0, stop - start)
    first, last = start + count * rank // world, start + count * (rank + 1) // world
    for begin in range(first, last, at_once):
        fetched = source.fetch(torch.arange(begin, min(begin + at_once, last)), list(sites))
        yield begin, {site: encoded.decode() for site, encoded in fetched.items()}
