"""Paths of strongest contributions back from a latent, logit or direction of a prompt, found greedily (methods.md A1).

From the target the strongest contributions one step back are taken, from each of them those to it, and so on; after each step the
strongest paths stay. What a path gives the target is a product: behind latent i with activation f_i a contribution q to it has the share
q / f_i of what i gives. Without a node no latent on the way loses more than its activation, though single contributions, balanced by
negative ones, may be larger: the score of a path has every share capped at 1. Heads, looks and bypasses are ways between latents and cap
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saebench.circuits.graphs.attribution import Rows, Sources
from saebench.circuits.graphs.replacement import LocalModel
from saebench.circuits.graphs.targets import Feature, Target, dictionary_number, rows_of
from saebench.circuits.weights.contributions import KINDS, Contribution, Contributions, Reader, Steps
from saebench.circuits.weights.invariant import Head
from saebench.errors import UserError

ITERATIONS, BRANCHES, TOP = 2, 5, 25
NODES = tuple(kind for kind in KINDS if kind != "bias")  # what paths go through or end in


@dataclass(frozen=True)
class Only:
    """Which nodes a path may go through; what is None allows all. Layers, heads and latents say nothing of nodes that have none."""

    kinds: Collection[str] | None = None
    layers: Collection[int] | None = None
    heads: Collection[Head] | None = None
    positions: Collection[int] | None = None
    """Negative ones from the end."""
    latents: Collection[tuple[str | int, int]] | None = None
    """Dictionary, by name or number, and latent."""

    def check(self, model: LocalModel) -> None:
        """Raises UserError for what there is not."""
        for kind in self.kinds or ():
            if kind not in NODES:
                raise UserError(f"there is no kind of node {kind!r} on paths: use {', '.join(NODES)}")
        for layer in (*(self.layers or ()), *(layer for layer, _ in self.heads or ())):
            if not 0 <= layer < model.layers:
                raise UserError(f"there is no layer {layer}: the model has {model.layers}, counted from 0")
        for layer, head in self.heads or ():
            if not 0 <= head < model.attention[layer].weights.num_heads:
                raise UserError(f"there is no head {head} in layer {layer}: it has {model.attention[layer].weights.num_heads}")
        for position in self.positions or ():
            if not -model.size <= position < model.size:
                raise UserError(f"position {position} of a filter is outside the prompt's {model.size} tokens")
        if self.latents:
            rows_of(model, [Feature(name, -1, latent) for name, latent in dict.fromkeys(self.latents)])

    def admits(self, found: Contributions) -> Tensor:
        """Which contributions pass: [N]."""
        model = found.model
        passes_N = found.kind_N != KINDS.index("bias")
        if self.kinds is not None:
            passes_N = passes_N & _among(found.kind_N, [KINDS.index(kind) for kind in self.kinds])
        if self.layers is not None:
            passes_N = passes_N & ((found.layer_N < 0) | _among(found.layer_N, self.layers))
        if self.heads is not None:
            own_N = found.layer_N * (1 << 32) + found.head_N
            passes_N = passes_N & ((found.head_N < 0) | _among(own_N, [layer * (1 << 32) + head for layer, head in self.heads]))
        if self.positions is not None:
            passes_N = passes_N & _among(found.position_N, [position % model.size for position in self.positions])
        if self.latents is not None:
            named = [dictionary_number(model, name) * (1 << 32) + latent for name, latent in self.latents]
            own_N = found.dictionary_N * (1 << 32) + found.latent_N
            passes_N = passes_N & ((found.latent_N < 0) | _among(own_N, named))
        return passes_N


@dataclass(frozen=True)
class Path:
    """From a target back: the nodes one after the other, each with its factors in what it gives the nearest latent before it."""

    target: str
    nodes: tuple[Contribution, ...]
    attribution: float
    """What the last node gives the target by this path, in the linear model."""
    score: float
    """The same with every share capped at 1."""

    def __str__(self) -> str:
        return " <- ".join([self.target, *(node.id for node in self.nodes)])


@dataclass(frozen=True)
class _Front:
    """A path, and how it goes on."""

    path: Path
    reader: Reader | None
    """None where it ends."""
    activation: float | None
    """Of the nearest latent; None for the target."""
    attribution: float
    """What that latent gives the target."""
    score: float


@torch.no_grad()
def greedy_paths(
    model: LocalModel,
    target: Target,
    *,
    num_iters: int = ITERATIONS,
    branches: int = BRANCHES,
    top: int = TOP,
    only: Only | Sequence[Only] | None = None,
) -> list[Path]:
    """The strongest paths to a target by the size of their score: `num_iters` nodes long, or ended before at a token, an error or a node
    that nothing allowed adds to. From every path the `branches` strongest contributions are followed, and after each step `top` paths
    stay. `only` filters nodes, one filter for all steps or one for each. No path is the beginning of another, so what they give adds up.
    Raises UserError for what there is not."""
    for name, number in (("num_iters", num_iters), ("branches", branches), ("top", top)):
        if number < 1:
            raise UserError(f"{name}={number} finds nothing: use at least 1")
    filters = [only or Only()] * num_iters if only is None or isinstance(only, Only) else list(only)
    if len(filters) != num_iters:
        raise UserError(f"there are {len(filters)} filters for {num_iters} steps: give one for each, or one for all")
    for each in filters:
        each.check(model)
    (row,) = rows_of(model, [target])
    steps = Steps(model)
    reader, value = steps.target(row)
    label = f"{row.kind}/{row.position}/{row.label}"
    if row.place is None:
        part = model.parts[row.part]
        label = f"feature/{model.names[part.number]}/{row.position}/{row.latent + part.first}"
    fronts = [_Front(Path(label, (), value, value), reader, None, value, value)]
    for allowed in filters:
        fronts = [longer for front in fronts for longer in _longer(steps, front, allowed, branches)]
        fronts = sorted(fronts, key=lambda front: -abs(front.path.score))[:top]
    return [front.path for front in fronts if front.path.nodes]


def _longer(steps: Steps, front: _Front, allowed: Only, branches: int) -> list[_Front]:
    if front.reader is None:
        return [front]
    found = steps.of(front.reader)
    longer = []
    for n in found.top(branches, allowed.admits(found)):
        node = found[n]
        attribution = score = node.value
        if front.activation is not None:
            share = node.value / front.activation
            attribution, score = front.attribution * share, front.score * min(share, 1.0)
        path = Path(front.path.target, (*front.path.nodes, node), attribution, score)
        reader = steps.follow(front.reader, found, n)
        nearest: tuple[float | None, float, float] = (front.activation, front.attribution, front.score)
        if node.kind == "feature":
            nearest = (_activation(steps.model, found, n), attribution, score)
        longer.append(_Front(path, reader, *nearest))
    return longer or [replace(front, reader=None)]


def _activation(model: LocalModel, found: Contributions, n: int) -> float:
    part = model.parts[int(found.source_N[n])]
    numbers_K = part.table_SK[int(found.position_N[n])]
    latents_K = part.latents_N[numbers_K.clamp_min(0)] + part.first
    return float(part.values_N[numbers_K[(numbers_K >= 0) & (latents_K == int(found.latent_N[n]))]])


@dataclass(frozen=True)
class Route:
    """One way of an edge: straight from latent to target, or through one head, look or bypass."""

    through: Contribution | None
    weight: float
    """Input-invariant."""
    input: float
    """Input-dependent: activation, attention and scales."""

    @property
    def value(self) -> float:
        return self.weight * self.input


@torch.no_grad()
def routes(model: LocalModel, target: Target, source: Feature) -> tuple[list[Route], float]:
    """The edge of a graph from an active latent to a target, way by way: straight and through one head, look or bypass, the largest first,
    each as the product of its factors; and what comes by longer ways. Raises UserError for what there is not or is not active."""
    (row,), (from_row,) = rows_of(model, [target]), rows_of(model, [source])
    part = model.parts[from_row.part]
    active_N = (part.positions_N == from_row.position) & (part.latents_N == from_row.latent)
    if not active_N.any():
        name = f"{model.names[part.number]}/{from_row.position}/{source.latent}"
        raise UserError(f"feature/{name} is not active in the prompt, so that it adds to nothing: choose an active one")
    steps = Steps(model)
    reader, _ = steps.target(row)
    found = steps.of(reader)
    ways = [Route(None, *factors) for factors in _factors(found, part.number, from_row.position, source.latent)]
    here_N = (found.position_N == from_row.position) & _among(found.kind_N, [KINDS.index(k) for k in ("head", "look", "skip")])
    for n in here_N.nonzero()[:, 0].tolist():
        onwards = steps.follow(reader, found, n)
        assert onwards is not None
        own = steps.of(onwards, ways=False)
        ways += [Route(found[n], *factors) for factors in _factors(own, part.number, from_row.position, source.latent)]
    rows = Rows(Sources(model))
    if row.place is None:
        at = torch.tensor([row.position], device=model.lm.device), torch.tensor([row.latent], device=model.lm.device)
        edges_TN, _ = rows.of_latents(row.part, *at)
    else:
        assert row.vector_D is not None
        bias_M = row.vector_D.new_tensor([row.bias])
        edges_TN, _ = rows.of_vectors(row.place, torch.tensor([row.position], device=model.lm.device), row.vector_D[None], bias_M)
    number = rows.sources.of_parts[from_row.part] + int(active_N.nonzero()[0, 0])
    ways = sorted((way for way in ways if way.value), key=lambda way: -abs(way.value))
    return ways, float(edges_TN[0, number]) - sum(way.value for way in ways)


def _factors(found: Contributions, dictionary: int, position: int, latent: int) -> list[tuple[float, float]]:
    mine_N = (found.dictionary_N == dictionary) & (found.position_N == position) & (found.latent_N == latent)
    return [(float(found.weight_N[n]), float(found.input_N[n])) for n in mine_N.nonzero()[:, 0]]


def _among(numbers_N: Tensor, allowed: Collection[int]) -> Tensor:
    return torch.isin(numbers_N, torch.tensor(list(allowed), dtype=torch.int64))
