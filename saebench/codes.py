"""`SparseCodes`: the currency of the library. Whatever comes out of an encoder travels as indices and values, never as a dense
`[tokens, d_sae]` matrix.

Shape suffixes here: `B` tokens, `K` entries of a token, `F` d_sae, `N` entries in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass
class LatentOrder:
    """The entries of a code sorted by latent: what a transposed sparse matrix needs. Sorted once, on first use, by
    `kernels/latent_order.py`; codes with the same entries share it.

    `indices_N` are the latents of all entries in row-major order, `tokens_N` their rows. Within a latent, entries keep the
    order of the tokens, so sums over them are deterministic.
    """

    indices_N: Tensor
    tokens_N: Tensor
    d_sae: int
    by_latent: tuple[Tensor, Tensor] | None = None
    """Positions of the entries latent by latent [N], and where each latent's begin [F + 1]: int32."""

    @cached_property
    def tokens_by_latent_N(self) -> Tensor:
        """The tokens of the entries, latent by latent: int32."""
        assert self.by_latent is not None
        return self.tokens_N.to(torch.int32).index_select(0, self.by_latent[0])


BLOCK_BYTES = 64 << 20


@dataclass
class SparseCodes:
    """The active latents of `B` tokens.

    Fixed-k codes hold `indices` and `values` of shape [B, K] and no `offsets`; an entry whose value is 0 is padding. Ragged
    codes hold flat [N] tensors and `offsets` [B + 1] (int64) where each row begins. `indices` are int32.
    """

    indices: Tensor
    values: Tensor
    d_sae: int
    offsets: Tensor | None = None
    _order: LatentOrder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape:
            raise ValueError(f"indices {tuple(self.indices.shape)} and values {tuple(self.values.shape)} differ in shape")
        if self.indices.dtype != torch.int32:
            self.indices = self.indices.to(torch.int32)
        if (self.offsets is None) != (self.indices.ndim == 2):
            raise ValueError("fixed-k codes are [B, K] without offsets; ragged codes are flat with offsets")

    @classmethod
    def from_dense(cls, dense_BF: Tensor) -> SparseCodes:
        """All non-zero entries of a dense code, as ragged codes."""
        rows_N, indices_N = dense_BF.nonzero(as_tuple=True)
        return cls.ragged(rows_N, indices_N, dense_BF[rows_N, indices_N], *dense_BF.shape)

    @classmethod
    def ragged(cls, tokens_N: Tensor, indices_N: Tensor, values_N: Tensor, num_tokens: int, d_sae: int) -> SparseCodes:
        """Ragged codes from entries sorted by token."""
        # not by counting, for which a GPU would have to be waited for
        offsets = torch.searchsorted(tokens_N, torch.arange(num_tokens + 1, device=tokens_N.device, dtype=tokens_N.dtype))
        codes = cls(indices_N, values_N, d_sae, offsets)
        codes._order = LatentOrder(codes.indices, tokens_N, d_sae)
        return codes

    @classmethod
    def side_by_side(cls, parts: Sequence[SparseCodes]) -> SparseCodes:
        """Codes of the same tokens by several dictionaries as one: latents of the second are counted on from those of the first, and
        so on. Fixed-k parts give fixed-k codes."""
        starts = list(accumulate((part.d_sae for part in parts), initial=0))
        indices = [part.indices + start for part, start in zip(parts, starts[:-1], strict=True)]
        if all(part.offsets is None for part in parts):
            return cls(torch.cat(indices, 1), torch.cat([part.values for part in parts], 1), starts[-1])
        tokens_N = torch.cat([part.tokens for part in parts])
        order_N = torch.argsort(tokens_N, stable=True)
        flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])[order_N]  # noqa: E731
        return cls.ragged(tokens_N[order_N], flat(indices), flat([part.values for part in parts]), len(parts[0]), starts[-1])

    def split(self, sizes: Sequence[int]) -> list[SparseCodes]:
        """The inverse of `side_by_side`, ragged and without padding: codes over the first `sizes[0]` latents, over the next, ..."""
        if sum(sizes) != self.d_sae:
            raise ValueError(f"parts of {list(sizes)} latents do not make up the code's {self.d_sae}")
        tokens_N, indices_N, values_N = self.nonzero()
        parts = []
        for size, start in zip(sizes, accumulate(sizes, initial=0), strict=False):
            inside_N = ((indices_N >= start) & (indices_N < start + size)).nonzero()[:, 0]
            entries = (tokens_N[inside_N], indices_N[inside_N] - start, values_N[inside_N])
            parts.append(SparseCodes.ragged(*entries, len(self), size))
        return parts

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.indices) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> SparseCodes:
        """A contiguous range of tokens."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("codes are sliced in contiguous ranges of tokens")
        if self.offsets is None:
            return SparseCodes(self.indices[start:stop], self.values[start:stop], self.d_sae)
        first, last = int(self.offsets[start]), int(self.offsets[max(start, stop)])
        offsets = self.offsets[start : max(start, stop) + 1] - first
        return SparseCodes(self.indices[first:last], self.values[first:last], self.d_sae, offsets)

    @property
    def tokens(self) -> Tensor:
        """The row of every entry, flat, in row-major order: [N] int64."""
        if self._order is not None:
            return self._order.tokens_N
        return self._tokens()

    def _tokens(self) -> Tensor:
        if self.offsets is None:
            rows_B = torch.arange(len(self), device=self.indices.device)
            return rows_B.repeat_interleave(self.indices.shape[1])
        rows_B = torch.arange(len(self), device=self.indices.device)
        return torch.repeat_interleave(rows_B, self.offsets.diff(), output_size=len(self.indices))

    @property
    def order(self) -> LatentOrder:
        """The same entries by latent."""
        if self._order is None:
            self._order = LatentOrder(self.indices.reshape(-1), self._tokens(), self.d_sae)
        return self._order

    def crowded(self, one_in: int) -> bool:
        """Whether more than one entry in so many is listed."""
        return self.indices.numel() * one_in > len(self) * self.d_sae

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Blocks of tokens whose dense codes fit in 64 MiB: (first token, tokens, first entry, last entry + 1)."""
        size = max(1, BLOCK_BYTES // (self.d_sae * self.values.element_size()))
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            if self.offsets is None:
                yield start, stop - start, start * self.indices.shape[1], stop * self.indices.shape[1]
            else:
                yield start, stop - start, int(self.offsets[start]), int(self.offsets[stop])

    def dense_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The dense code of one block of tokens after the other: (first token, [block, F]). Memory is used again by the next."""
        dense_bF = torch.empty(0)
        indices_N, values_N = self.indices.reshape(-1), self.values.reshape(-1)
        for start, count, first, last in self.blocks():
            if len(dense_bF) != count:
                dense_bF = values_N.new_empty(count, self.d_sae)
            dense_bF.zero_()
            flat_N = (self.tokens[first:last] - start) * self.d_sae + indices_N[first:last]
            dense_bF.view(-1).index_add_(0, flat_N, values_N[first:last])
            yield start, dense_bF

    def nonzero(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, latent, value) of every entry that is not padding, each [N], row-major; the first two int64."""
        values_N = self.values.reshape(-1)
        kept_N = values_N != 0
        return self.tokens[kept_N], self.indices.reshape(-1)[kept_N].long(), values_N[kept_N]

    def l0(self) -> Tensor:
        """Active latents of each token: [B] int64."""
        if self.offsets is None:
            return (self.values != 0).sum(1)
        return torch.zeros(len(self), dtype=torch.int64, device=self.values.device).index_add_(
            0, self.tokens, (self.values != 0).long()
        )

    def columns(self, latents_M: Tensor) -> Tensor:
        """The values of some latents on every token, 0 where they are not active: [B, M]."""
        place_F = torch.full((self.d_sae,), -1, device=latents_M.device)
        place_F[latents_M] = torch.arange(len(latents_M), device=latents_M.device)
        columns_N = place_F[self.indices.reshape(-1).long()]
        kept_N = columns_N >= 0
        values_BM = self.values.new_zeros(len(self), len(latents_M))
        return values_BM.index_put((self.tokens[kept_N], columns_N[kept_N]), self.values.reshape(-1)[kept_N], accumulate=True)

    def firings(self) -> Tensor:
        """How many tokens each latent is active on: [F] int64."""
        active_N = (self.values.reshape(-1) != 0).long()
        return torch.zeros(self.d_sae, dtype=torch.int64, device=active_N.device).index_add_(
            0, self.indices.reshape(-1).long(), active_N
        )

    def to_dense(self) -> Tensor:
        """The [B, F] matrix: for tests and small dictionaries; entries of the same latent add up."""
        dense_BF = self.values.new_zeros(len(self), self.d_sae)
        return dense_BF.index_put((self.tokens, self.indices.reshape(-1).long()), self.values.reshape(-1), accumulate=True)

    def detach(self) -> SparseCodes:
        return self.replaced(self.values.detach())

    def replaced(self, values: Tensor) -> SparseCodes:
        """The same entries with other values, of the same shape."""
        return SparseCodes(self.indices, values, self.d_sae, self.offsets, self._order)
