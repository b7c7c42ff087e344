"""Shuffled batches of tokens from a store or a stream.

The order is a function of the seed: an epoch permutes the contexts of the whole corpus, takes them in groups that fit in memory,
and permutes the tokens inside each group. So contexts are read whole, a batch mixes hundreds of documents, every token comes once an epoch,
and the batch at any position can be had at once: resuming needs only its number. The next group is read in the background, and only
read: whatever torch splits among threads would raise a second team of them there, beside which the caller's sleep wherever they wait
(a step takes a quarter longer). A model that runs on the training's own processors is asked when its activations are needed.

Shape suffixes: `N` contexts, `S` positions, `B` tokens in a batch, `D` width of a site, `R` rows of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from saebench.activations.encoding import Encoded
from saebench.activations.statistics import SiteStatistics
from saebench.errors import UserError
from saebench.lm import Contexts

GROUP_TOKENS = 65_536  # the same for all sites, so that the order does not depend on which of them are read
MIX = 1_000_003


class Source(Protocol):
    """What batches are drawn from: `ActivationStore`, `ActivationStream` or `TensorSource`."""

    widths: dict[str, int]
    num_contexts: int
    context_size: int
    skip: int
    """Positions at the start of every context that are neither trained on nor measured."""
    ordered: bool
    """Whether contexts are sequences, or rows without an order."""
    competes: bool
    """Whether fetching keeps the processors busy that training needs."""

    @property
    def contexts(self) -> Contexts: ...
    @property
    def identity(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    def verify(self) -> None: ...
    def check_sites(self, sites: list[str]) -> None: ...
    def fetch(self, contexts_N: Tensor, sites: list[str], out: dict[str, Encoded] | None = None) -> dict[str, Encoded]: ...
    def statistics(self, site: str) -> SiteStatistics: ...


class Batches:
    """An endless sequence of batches, each a dict of site to float32 [B, D]; `position` is the number of the next one.

    The first positions of every context are left out, as many as the source says (`skip`).
    With `world > 1` each rank sees its own part of every epoch.
    """

    def __init__(
        self,
        source: Source,
        sites: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        position: int = 0,
        skip: int | None = None,
        rank: int = 0,
        world: int = 1,
        end: int | None = None,
    ):
        """`end` is the position behind the last batch that will be asked for, where that is known: nothing is read ahead beyond it."""
        self.source, self.sites, self.batch_size = source, list(dict.fromkeys(sites)), batch_size
        self.skip = skip = source.skip if skip is None else skip
        self.seed, self.position, self.rank, self.world = seed, position, rank, world
        source.check_sites(self.sites)
        if not 0 <= rank < world:
            raise UserError(f"rank={rank} is not in a world of {world}")
        self.rows_per_context = source.context_size - skip
        self.contexts_per_epoch = source.num_contexts // world  # equal for all ranks; the remainder differs from epoch to epoch
        if self.contexts_per_epoch < 1 or self.rows_per_context < 1:
            raise UserError(f"{source.num_contexts} contexts of {source.context_size} tokens are too few for {world} ranks")
        fitting = max(1, GROUP_TOKENS // source.context_size)
        needed = -(-2 * batch_size // self.rows_per_context)
        self.contexts_per_group = min(max(fitting, needed), self.contexts_per_epoch)
        self._last_group = None if end is None else self._place(max(0, end * batch_size - 1))[0]
        self._epoch: tuple[int, Tensor] | None = None
        self._groups: dict[int, tuple[Tensor, Future]] = {}  # order of the rows, and what is read
        self._spare: list[dict[str, Encoded]] = []  # memory of groups that are used up: fresh memory costs more than filling it
        self._pool = _reader(source)

    @property
    def tokens_per_epoch(self) -> int:
        return self.contexts_per_epoch * self.rows_per_context

    @property
    def groups_per_epoch(self) -> int:
        return -(-self.contexts_per_epoch // self.contexts_per_group)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch. Raises UserError naming site and batch when it holds NaN or Inf."""
        start = self.position * self.batch_size
        pieces: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        wanted = self.batch_size
        while wanted:
            group, row = self._place(start)
            order_R, encoded = self._group(group)
            index = order_R[row : row + wanted]
            for site in self.sites:
                pieces[site].append(encoded[site].take(index))
            start += len(index)
            wanted -= len(index)
        batch = {site: torch.cat(parts) if len(parts) > 1 else parts[0] for site, parts in pieces.items()}
        check_finite(batch, self.position)
        self.position += 1
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _place(self, token: int) -> tuple[int, int]:
        """Group and row within it of a token of the endless sequence."""
        epoch, row = divmod(token, self.tokens_per_epoch)
        number, row = divmod(row, self.contexts_per_group * self.rows_per_context)
        return epoch * self.groups_per_epoch + number, row

    def _group(self, number: int) -> tuple[Tensor, dict[str, Encoded]]:
        for old in [n for n in self._groups if n < number]:
            self._spare.append(self._groups.pop(old)[1].result())
        for wanted in (number,) if self.source.competes else (number, number + 1):
            beyond = self._last_group is not None and wanted > max(number, self._last_group)
            if wanted not in self._groups and not beyond:
                contexts_N, order_R = self._order(wanted)
                spare = self._spare.pop() if self._spare else None
                self._groups[wanted] = order_R, self._pool.submit(self.source.fetch, contexts_N, self.sites, spare)
        order_R, read = self._groups[number]
        return order_R, {site: values.flat() for site, values in read.result().items()}

    def _order(self, number: int) -> tuple[Tensor, Tensor]:
        """The contexts of a group, and in which order their tokens come."""
        epoch, group = divmod(number, self.groups_per_epoch)
        contexts_N = self._contexts_of(epoch)[group * self.contexts_per_group : (group + 1) * self.contexts_per_group]
        size = self.source.context_size
        kept_R = (torch.arange(len(contexts_N))[:, None] * size + torch.arange(self.skip, size)).flatten()
        return contexts_N, kept_R[torch.randperm(len(kept_R), generator=generator_of(self.seed, epoch, 1 + group))]

    def _contexts_of(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            permuted_N = torch.randperm(self.source.num_contexts, generator=generator_of(self.seed, epoch, 0))
            self._epoch = (epoch, permuted_N[self.rank :: self.world][: self.contexts_per_epoch])
        return self._epoch[1]


class ContextBatches:
    """An endless sequence of batches of whole contexts, each a dict of site to float32 [C, S, D], in an order that is a function of
    the seed: an epoch permutes the contexts. For dictionaries that read sequences."""

    def __init__(self, source: Source, sites: Sequence[str], batch_size: int, *, seed: int = 0, position: int = 0):
        """`batch_size` counts contexts. Raises UserError for a source without order, or an unknown site."""
        self.source, self.sites = source, list(dict.fromkeys(sites))
        self.batch_size, self.seed, self.position = min(batch_size, source.num_contexts), seed, position
        source.check_sites(self.sites)
        if not source.ordered:
            raise UserError(
                "these activations are shuffled rows without an order: a dictionary that reads sequences needs contexts"
            )
        self._pool = _reader(source)
        self._ahead: dict[int, Future] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch. Raises UserError naming site and batch when it holds NaN or Inf."""
        for position in (self.position,) if self.source.competes else (self.position, self.position + 1):
            if position not in self._ahead:
                self._ahead[position] = self._pool.submit(self.source.fetch, self._contexts(position), self.sites)
        batch = {site: encoded.decode() for site, encoded in self._ahead.pop(self.position).result().items()}
        check_finite(batch, self.position)
        self.position += 1
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _contexts(self, position: int) -> Tensor:
        per_epoch = self.source.num_contexts // self.batch_size  # whole batches; what is left over differs from epoch to epoch
        epoch, number = divmod(position, per_epoch)
        permuted_N = torch.randperm(self.source.num_contexts, generator=generator_of(self.seed, epoch, 0))
        return permuted_N[number * self.batch_size : (number + 1) * self.batch_size]


def _reader(source: Source) -> Executor:
    """What fetches: in the background, or, where that would only slow down both, when it is asked to."""
    return _AtOnce() if source.competes else ThreadPoolExecutor(1, thread_name_prefix="batches")


class _AtOnce(Executor):
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def check_finite(batch: dict[str, Tensor], number: int) -> None:
    """Raises UserError naming the site and the batch where there is NaN or Inf."""
    for site, x in batch.items():
        if not torch.isfinite(x.sum()):
            raise UserError(f"NaN or Inf in the activations of site {site!r}, batch {number}: check the model and the store")


def generator_of(seed: int, epoch: int, number: int) -> torch.Generator:
    """Random numbers that belong to one place in the order."""
    return torch.Generator().manual_seed(((seed * MIX + epoch) * MIX + number) % (1 << 63))
