"""Edges of the local replacement model: what every source adds to a target, by one pass backwards for a chunk of targets.

A target is a number that is linear in what stands at a place: the pre-activation of a latent, a logit less the mean of all, a direction.
Going back through norms, attention and bypasses gives what it depends on at every place that is written; the inner product with what a
latent (its activation times its direction), an error or a token writes there is the edge. The inner products with the constants add up to
the target's own constant, so that edges and constant together are the target's value.
Sources are numbered: active latents part by part, errors place by place, tokens.
Shape suffixes: `T` targets, `S` positions, `D` width, `N` sources, `K` active latents of a position, `M` latents or targets of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from saebench.circuits.graphs.parts import Part, Place, Write
from saebench.circuits.graphs.replacement import LocalModel, Written

BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Gradient:
    """What targets depend on in the stream at a point: at all positions up to the last that counts [T, S, D], or at one each [T, D]."""

    value: Tensor
    positions_T: Tensor | None = None

    def dot(self, x_SD: Tensor) -> Tensor:
        """With what is added to the stream: [T]."""
        if self.positions_T is not None:
            return (self.value * x_SD[self.positions_T]).sum(1)
        return torch.einsum("tsd,sd->t", self.value, x_SD[: self.value.shape[1]])

    def plus(self, other: Gradient) -> Gradient:
        """The sum, in the wider form."""
        if (self.positions_T is None) == (other.positions_T is None):
            return replace(self, value=self.value + other.value)
        one, all_ = (self, other) if other.positions_T is None else (other, self)
        assert one.positions_T is not None
        value = all_.value.clone()
        value[torch.arange(len(value), device=value.device), one.positions_T] += one.value
        return Gradient(value)


class Sources:
    """The numbering of all that writes in a local model."""

    def __init__(self, model: LocalModel):
        self.model = model
        self.places: list[Written] = model.replaced()
        sizes = [len(part) for part in model.parts] + [model.size] * (len(self.places) + 1)
        starts = list(accumulate(sizes, initial=0))
        self.of_parts = starts[: len(model.parts)]
        self.of_errors = starts[len(model.parts) : -2]
        self.of_tokens, self.count = starts[-2], starts[-1]
        self.latents = sum(sizes[: len(model.parts)])

    def latent(self, number: int) -> tuple[int, int]:
        """The part of a source that is a latent, and its place among the part's."""
        part = max(i for i, start in enumerate(self.of_parts) if start <= number and len(self.model.parts[i]))
        return part, number - self.of_parts[part]


class Rows:
    """Edges into targets of one place, dense over all sources, and the targets' constants."""

    def __init__(self, sources: Sources):
        self.sources, self.model = sources, sources.model
        self._numbers = {id(part): i for i, part in enumerate(self.model.parts)}
        self._order = {id(written): i for i, written in enumerate(sources.places)}

    @torch.no_grad()
    def of_latents(self, number: int, positions_M: Tensor, latents_M: Tensor) -> tuple[Tensor, Tensor]:
        """Edges into the pre-activations of latents of a part, counted from its first, at some positions: [M, N] and constants [M]."""
        part = self.model.parts[number]
        w_MD, b_M = part.W_read_FD[latents_M], part.b_read_F[latents_M]
        before = any(write.place.kind == "stream" and write.place.point == part.place.point for write in part.writes)
        if part.pattern_GSS is None:
            return self.of_vectors(part.place, positions_M, w_MD, b_M, before=before)
        size = int(positions_M.max()) + 1
        looks_MS = part.pattern_GSS[latents_M // part.group_size, positions_M, :size]
        constant_M = b_M * looks_MS.sum(1)
        g_MSD = looks_MS[:, :, None] * w_MD[:, None]
        if part.place.kind == "input":
            norm = self.model.norms[part.place.point]
            constant_M = constant_M + (w_MD @ norm.bias_D) * looks_MS.sum(1)
            g_MSD = norm.pull(g_MSD)
        return self._back(part.place.point, Gradient(g_MSD), constant_M, before)

    @torch.no_grad()
    def of_vectors(
        self, place: Place, positions_M: Tensor, v_MD: Tensor, b_M: Tensor, *, before: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Edges into v . x + b, x what stands at a place at some positions: [M, N] and constants [M]. `before` what a dictionary writes
        at a point of the stream, where there is one."""
        point = place.point
        if place.kind == "stream":
            return self._back(point, Gradient(v_MD, positions_M), b_M, before)
        norm = self.model.norms[point]
        if place.kind == "input":
            return self._back(point, Gradient(norm.pull(v_MD, positions_M), positions_M), b_M + v_MD @ norm.bias_D, before)
        attention = self.model.attention[point // 2]
        if place.kind == "written":
            b_M = b_M + (v_MD * attention.bias_SD[positions_M]).sum(1)
            v_MD = attention.unmixed(v_MD, positions_M)
        b_M = b_M + v_MD @ attention.weights.b_V_HE.flatten() + attention.values_back(v_MD).sum(1) @ norm.bias_D
        return self._back(point, Gradient(norm.pull(attention.pull_heads_at(v_MD, positions_M))), b_M, before)

    def _back(self, point: int, g: Gradient, constant_T: Tensor, before: bool) -> tuple[Tensor, Tensor]:
        """From a point of the stream to its start."""
        model, constant_T = self.model, constant_T.double()
        out_TN = g.value.new_zeros(len(g.value), self.sources.count)
        while True:
            cut = model.cuts[point]
            if cut is not None and not before:
                self._take(cut, g, out_TN)
                return out_TN, constant_T + g.dot(cut.constant_SD)
            before = False
            if point == 0:
                self._each(g, model.stream[0], out_TN, self.sources.of_tokens)
                return out_TN, constant_T
            point -= 1
            written = model.steps[point]
            constant_T = constant_T + g.dot(model.constants[point])
            if written is not None:
                self._take(written, g, out_TN)
            g = self._through(point, g)

    def _through(self, step: int, g: Gradient) -> Gradient:
        """From behind a step to before it: what passes, and what goes through attention or a bypass."""
        model, written, norm = self.model, self.model.steps[step], self.model.norms[step]
        if written is None:
            attention = model.attention[step // 2]
            if g.positions_T is None:
                return g.plus(Gradient(norm.pull(attention.pull(g.value))))
            return g.plus(Gradient(norm.pull(attention.pull_heads_at(attention.unmixed(g.value, g.positions_T), g.positions_T))))
        for part, _ in written.writers:
            if part.W_skip_DD is not None:
                value = g.value @ part.W_skip_DD.T
                if g.positions_T is None:
                    value[:, : model.first] = 0.0
                else:
                    value[g.positions_T < model.first] = 0.0
                return g.plus(replace(g, value=norm.pull(value, g.positions_T) if part.place.kind == "input" else value))
        return g

    def _take(self, written: Written, g: Gradient, out_TN: Tensor) -> None:
        """The edges from what is written at one place."""
        if written.place.kind == "heads":
            g = replace(g, value=self.model.attention[written.place.point // 2].unmixed(g.value, g.positions_T))
        for part, write in written.writers:
            if len(part):
                start = self.sources.of_parts[self._numbers[id(part)]]
                out_TP = out_TN[:, start : start + len(part)]
                if g.positions_T is None:
                    _latents_everywhere(part, write, g.value, out_TP)
                else:
                    _latents_at(part, write, g.value, g.positions_T, out_TP)
        self._each(g, written.error_SD, out_TN, self.sources.of_errors[self._order[id(written)]])

    @staticmethod
    def _each(g: Gradient, x_SD: Tensor, out_TN: Tensor, start: int) -> None:
        """The edges from what stands at each position."""
        if g.positions_T is None:
            size = g.value.shape[1]
            out_TN[:, start : start + size] = torch.einsum("tsd,sd->ts", g.value, x_SD[:size])
        else:
            rows_T = torch.arange(len(g.value), device=g.value.device)
            out_TN[rows_T, start + g.positions_T] = (g.value * x_SD[g.positions_T]).sum(1)


def _rows(part: Part, write: Write, numbers: Tensor) -> Tensor:
    """What active latents, by their number among the part's, write: activation times direction [..., D], zeros for -1."""
    known = numbers.clamp_min(0)
    rows = write.rows(part.latents_N[known.flatten()]).view(*numbers.shape, -1)
    return rows * (part.values_N[known] * (numbers >= 0))[..., None]


def _latents_everywhere(part: Part, write: Write, g_TSD: Tensor, out_TP: Tensor) -> None:
    """Adds the edges from the latents of all positions, block by block of positions."""
    size, most = g_TSD.shape[1], part.table_SK.shape[1]
    step = max(1, BLOCK_BYTES // (4 * most * g_TSD.shape[2]))
    for start in range(0, size, step):
        numbers_SK = part.table_SK[start : min(size, start + step)]
        active_SK = numbers_SK >= 0
        rows_SKD = _rows(part, write, numbers_SK)
        found_STK = g_TSD[:, start : start + step].transpose(0, 1) @ rows_SKD.mT
        out_TP[:, numbers_SK[active_SK]] += found_STK.transpose(0, 1)[:, active_SK]


def _latents_at(part: Part, write: Write, g_TD: Tensor, positions_T: Tensor, out_TP: Tensor) -> None:
    """Adds the edges from the latents at each target's own position."""
    numbers_TK = part.table_SK[positions_T]
    found_TK = (_rows(part, write, numbers_TK) @ g_TD[:, :, None])[:, :, 0]
    active_TK = numbers_TK >= 0
    targets_TK = torch.arange(len(g_TD), device=g_TD.device)[:, None].expand_as(numbers_TK)
    out_TP[targets_TK[active_TK], numbers_TK[active_TK]] += found_TK[active_TK]
