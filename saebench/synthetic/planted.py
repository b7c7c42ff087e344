"""Activations drawn from a dictionary that we know, so that what a trained dictionary found can be held against the truth.

A token is x = offset + sum over its active features of coefficient * direction + noise. What makes real activations hard can be
turned on one by one: frequencies by a power law, topics whose features fire together, and trees of features in which a child
fires only where its parent does.

Only the active entries are ever drawn. A feature that fires with probability p is a Poisson process of intensity -log(1 - p)
that left at least one point on the token; so a whole block needs one Poisson number, and each point a feature and a token.

Shape suffixes: `B` tokens, `D` width, `F` features, `R` roots (the features without a parent, which come first), `N` active
entries or points, `G` topics, `K` chunks of tokens with similar value of a topic.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from saebench.codes import SparseCodes
from saebench.config import Config
from saebench.errors import UserError

BLOCK = 8192  # tokens drawn at once; part of what a sample is: another number gives other tokens
CHUNKS = 64  # divides BLOCK
MIX = 1_000_003


class PlantedDictionary(Config):
    """A known dictionary of unit directions, and the distribution of tokens made of them. Everything follows from the fields."""

    num_features: int = Field(gt=0)
    """Directions in the dictionary; may exceed `width`."""
    width: int = Field(gt=1)
    """Numbers per token."""
    l0: float = Field(gt=0)
    """Mean number of active features of a token."""
    exponent: float = Field(default=1.0, ge=0)
    """The root of rank r (from 1) fires at a rate proportional to r ** -exponent, but never above `max_rate`."""
    max_rate: float = Field(default=0.5, gt=0, lt=1)
    """The highest rate of a feature."""
    magnitude: float = Field(default=1.0, gt=0)
    """Coefficients are magnitude + spread * |standard normal|."""
    spread: float = Field(default=1.0, ge=0)
    """The random part of the coefficients."""
    noise: float = Field(default=0.05, ge=0)
    """Standard deviation of the Gaussian noise on every coordinate."""
    offset: float = Field(default=1.0, ge=0)
    """Length of the constant vector added to every token."""
    topics: int = Field(default=16, gt=0)
    """Latent factors of the Gaussian copula; every root belongs to one."""
    correlation: float = Field(default=0.0, ge=0, le=0.95)
    """Correlation of the copula's normals between roots of one topic. It leaves every feature's own rate as it is."""
    tree_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the features that sit in trees, rounded down to whole trees."""
    branching: int = Field(default=4, gt=0)
    """Children of every parent."""
    depth: int = Field(default=1, gt=0)
    """Levels below the root of a tree."""
    child_rate: float = Field(default=0.2, gt=0, le=1)
    """Probability that a child fires where its parent fires."""
    exclusive: bool = False
    """Whether at most one child of a parent fires on a token."""
    sibling_cosine: float = Field(default=0.3, ge=0, lt=1)
    """Expected cosine between children of one parent; each is orthogonal to all its ancestors."""
    seed: int = Field(default=0, ge=0)
    """Determines directions, offset and topics."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.tree_share and not self.num_trees:
            raise ValueError(
                f"a tree with branching={self.branching} and depth={self.depth} has {self.tree_size} features, more than "
                f"tree_share={self.tree_share} of num_features={self.num_features}: lower branching or depth, or raise tree_share"
            )
        if self.tree_share and self.depth >= self.width:
            raise ValueError(
                f"depth={self.depth} leaves no direction orthogonal to all ancestors in width={self.width}: lower it"
            )
        if self.exclusive and self.branching * self.child_rate > 1 + 1e-9:
            raise ValueError(
                f"branching={self.branching} exclusive children cannot each fire with child_rate={self.child_rate}: "
                f"lower child_rate to at most {1 / self.branching:.3g}"
            )
        largest = self.max_rate * float(self._firings_per_root_R.sum())
        if self.l0 > largest:
            raise ValueError(
                f"l0={self.l0:g} exceeds {largest:g}, which max_rate={self.max_rate} allows: lower l0 or raise max_rate"
            )
        return self

    @property
    def tree_size(self) -> int:
        """Features of a tree, its root included."""
        return sum(self.branching**level for level in range(self.depth + 1))

    @property
    def num_trees(self) -> int:
        return int(self.tree_share * self.num_features + 1e-9) // self.tree_size

    @property
    def num_roots(self) -> int:
        """Features without a parent, alone or on top of a tree: they have the lowest numbers, the most frequent first."""
        return self.num_features - self.num_trees * (self.tree_size - 1)

    @cached_property
    def directions_FD(self) -> Tensor:
        """The dictionary: unit rows, float32. A child is orthogonal to its parent and all ancestors above it, not to siblings."""
        generator = self._generator(0, 0)
        draw = torch.randn(self.num_features, self.width, generator=generator, dtype=torch.float64)
        directions_FD = normalize(draw)
        for level, children in enumerate(self._levels[1:], 1):
            shared = torch.randn(len(children) // self.branching, self.width, generator=generator, dtype=torch.float64)
            shared = normalize(shared).repeat_interleave(self.branching, 0)
            rows = self.sibling_cosine**0.5 * shared + (1 - self.sibling_cosine) ** 0.5 * directions_FD[children]
            ancestors = children
            for _ in range(level):
                ancestors = self.parents_F[ancestors]
                above = directions_FD[ancestors]
                rows = rows - (rows * above).sum(1, keepdim=True) * above
            directions_FD[children] = normalize(rows)
        return directions_FD.float()

    @cached_property
    def offset_D(self) -> Tensor:
        """The constant part of every token."""
        return self.offset * normalize(torch.randn(self.width, generator=self._generator(0, 1)), dim=0)

    @cached_property
    def parents_F(self) -> Tensor:
        """The parent of every feature, -1 for roots: int64."""
        parents_F = torch.full((self.num_features,), -1)
        for above, children in zip(self._levels, self._levels[1:], strict=False):
            parents_F[children] = above.repeat_interleave(self.branching)
        return parents_F

    @cached_property
    def topics_F(self) -> Tensor:
        """The topic of every feature, a child's being its root's: int64."""
        topics_F = torch.randint(self.topics, (self.num_features,), generator=self._generator(0, 2))
        for children in self._levels[1:]:
            topics_F[children] = topics_F[self.parents_F[children]]
        return topics_F

    @cached_property
    def rates_F(self) -> Tensor:
        """The probability of every feature to fire on a token: float64; they add up to `l0`."""
        firings_R = self._firings_per_root_R
        weights_R = torch.arange(1, self.num_roots + 1, dtype=torch.float64) ** -self.exponent
        capped_R = self.max_rate * (firings_R.cumsum(0) - firings_R)  # what the roots before this one bring at most
        rest_R = (firings_R * weights_R).flip(0).cumsum(0).flip(0)
        scales_R = (self.l0 - capped_R) / rest_R  # if exactly the roots before this one are capped
        fits_R = scales_R * weights_R <= self.max_rate
        scale = scales_R[fits_R.int().argmax()] if fits_R.any() else torch.tensor(torch.inf)
        rates_F = torch.empty(self.num_features, dtype=torch.float64)
        rates_F[: self.num_roots] = (scale * weights_R).clamp_max(self.max_rate)
        for children in self._levels[1:]:
            rates_F[children] = rates_F[self.parents_F[children]] * self.child_rate
        return rates_F

    def sample(self, tokens: int, seed: int = 0, *, start: int = 0) -> tuple[Tensor, SparseCodes]:
        """Tokens `start` to `start + tokens` of the endless sequence that belongs to `seed`.

        Returns x [tokens, width] float32 and the true codes (ragged; within a token by ascending feature), so that
        x = offset + codes @ directions + noise. The same tokens come whatever the pieces they are asked for in; memory beyond
        the result does not grow with `tokens`. Raises UserError for a range that is none.
        """
        if tokens < 1 or start < 0 or seed < 0:
            raise UserError(
                f"tokens={tokens}, start={start}, seed={seed}: ask for at least one token, from 0 on, with a seed >= 0"
            )
        x_BD = torch.empty(tokens, self.width)
        parts = []
        for block in range(start // BLOCK, -(-(start + tokens) // BLOCK)):
            begins = block * BLOCK
            kept = slice(max(start - begins, 0), min(start + tokens - begins, BLOCK))
            x, codes = self._block(self._generator(1 + seed, block))
            x_BD[begins + kept.start - start : begins + kept.stop - start] = x[kept]
            parts.append(codes[kept])
        lengths = torch.cat([part.l0() for part in parts])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        indices, values = torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
        return x_BD, SparseCodes(indices, values, self.num_features, offsets)

    def _block(self, generator: torch.Generator) -> tuple[Tensor, SparseCodes]:
        """A whole block of tokens."""
        rows_N, features_N = self._roots_that_fire(generator)
        keys = [rows_N * self.num_features + features_N]
        for _ in range(self.depth if self.num_trees else 0):
            rows_N, features_N = self._children_that_fire(rows_N, features_N, generator)
            keys.append(rows_N * self.num_features + features_N)
        keys_N = torch.cat(keys).sort().values
        rows_N, features_N = keys_N // self.num_features, keys_N % self.num_features
        offsets = torch.cat([keys_N.new_zeros(1), torch.bincount(rows_N, minlength=BLOCK).cumsum(0)])
        values_N = self.magnitude + self.spread * torch.randn(len(keys_N), generator=generator).abs()
        x_BD = embedding_bag(features_N, self.directions_FD, offsets[:-1], mode="sum", per_sample_weights=values_N)
        x_BD += self.offset_D
        if self.noise:
            x_BD += self.noise * torch.randn(BLOCK, self.width, generator=generator)
        return x_BD, SparseCodes(features_N, values_N, self.num_features, offsets)

    def _roots_that_fire(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(token, root) of all firings of roots in a block.

        Given its topic's value z, a root's intensity rises with z. Tokens sorted by z are cut into chunks; points are drawn at
        the intensity of each chunk's last token and kept with the ratio of the token's own to it, so the law is exact.
        """
        chunks = CHUNKS if self.correlation else 1
        size = BLOCK // chunks
        z_BG = torch.randn(BLOCK, self.topics if self.correlation else 1, generator=generator, dtype=torch.float64)
        topics_R = self.topics_F[: self.num_roots] if self.correlation else torch.zeros(self.num_roots, dtype=torch.int64)
        sorted_BG, order_BG = z_BG.sort(0)
        highest_KR = sorted_BG[size - 1 :: size][:, topics_R]
        bound_KR = self._intensity(highest_KR, slice(None))
        up_to = size * bound_KR.flatten().cumsum(0)
        points = int(torch.poisson(up_to[-1], generator=generator))
        draws_N = torch.rand(points, generator=generator, dtype=torch.float64) * up_to[-1]
        picks_N = torch.searchsorted(up_to, draws_N).clamp_max(len(up_to) - 1)
        roots_N = picks_N % self.num_roots
        places_N = picks_N // self.num_roots * size + torch.randint(size, (points,), generator=generator)
        rows_N = order_BG[places_N, topics_R[roots_N]]
        if self.correlation:
            own_N = self._intensity(z_BG[rows_N, topics_R[roots_N]], roots_N)
            thinning_N = torch.rand(points, generator=generator, dtype=torch.float64)
            kept_N = thinning_N * bound_KR.flatten()[picks_N] < own_N
            rows_N, roots_N = rows_N[kept_N], roots_N[kept_N]
        keys_N = torch.unique(rows_N * self.num_roots + roots_N)
        return keys_N // self.num_roots, keys_N % self.num_roots

    def _children_that_fire(self, rows_N: Tensor, features_N: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(token, child) of all firings one level below the given ones."""
        first_N = self._first_child_F[features_N]
        rows_N, first_N = rows_N[first_N >= 0], first_N[first_N >= 0]
        if self.exclusive:
            which_N = (torch.rand(len(rows_N), generator=generator, dtype=torch.float64) / self.child_rate).long()
            fires_N = which_N < self.branching
            return rows_N[fires_N], (first_N + which_N)[fires_N]
        fires = torch.rand(len(rows_N), self.branching, generator=generator, dtype=torch.float64) < self.child_rate
        events_N, which_N = fires.nonzero(as_tuple=True)
        return rows_N[events_N], first_N[events_N] + which_N

    def _intensity(self, z: Tensor, roots: Tensor | slice) -> Tensor:
        """-log(1 - q) with q the probability that sqrt(correlation) z + sqrt(1 - correlation) normal exceeds the threshold at which
        the root fires at its rate."""
        thresholds = -torch.special.ndtri(self.rates_F[: self.num_roots])[roots]
        return -torch.special.log_ndtr((thresholds - math.sqrt(self.correlation) * z) / math.sqrt(1 - self.correlation))

    @cached_property
    def _levels(self) -> list[Tensor]:
        """The features of all trees by level: first the roots of trees, spread evenly over the ranks."""
        if not self.num_trees:
            return [torch.zeros(0, dtype=torch.int64)]
        levels = [((torch.arange(self.num_trees) + 0.5) * self.num_roots / self.num_trees).long()]
        first = self.num_roots
        for _ in range(self.depth):
            levels.append(torch.arange(first, first + len(levels[-1]) * self.branching))
            first += len(levels[-1])
        return levels

    @cached_property
    def _first_child_F(self) -> Tensor:
        first_F = torch.full((self.num_features,), -1)
        for above, children in zip(self._levels, self._levels[1:], strict=False):
            first_F[above] = children[:: self.branching]
        return first_F

    @cached_property
    def _firings_per_root_R(self) -> Tensor:
        """Expected features that fire where a root fires, itself included."""
        firings_R = torch.ones(self.num_roots, dtype=torch.float64)
        firings_R[self._levels[0]] = sum((self.branching * self.child_rate) ** level for level in range(self.depth + 1))
        return firings_R

    def _generator(self, stream: int, number: int) -> torch.Generator:
        seed = ((self.seed * MIX + stream) * MIX + number) % (1 << 63)
        return torch.Generator().manual_seed(seed)
