"""What happens to every node when one is multiplied by a factor: as the graph says, in the linear model, and in the model itself.

    edge       (factor - 1) times the edge, the direct path alone
    total      along all paths of the graph: every feature on the way passes on what it gets, in proportion
    held       measured in the linear model, other features, norms and attention held: what an edge claims
    measured   in the model itself, everything else free to respond: norms, attention, other features coming and going

In the model a feature is scaled by the edits of `saebench.steering`, an error or a token by as much of it added or taken at its place.
Shape suffixes: `N` nodes, `S` positions, `D` width, `X` interventions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.graphs.parts import Part, Place
from saebench.circuits.graphs.replacement import Dictionaries, LocalModel, Streams
from saebench.circuits.graphs.targets import FINAL
from saebench.errors import UserError
from saebench.features.building import fingerprint
from saebench.lm import LanguageModel
from saebench.steering.edits import scale
from saebench.steering.hooks import steer


@dataclass(frozen=True)
class Intervention:
    """A node multiplied by a factor, and by how much the value of every node changed: [N] each, 0 for errors and tokens."""

    node: int
    factor: float
    edge_N: np.ndarray
    total_N: np.ndarray
    held_N: np.ndarray
    measured_N: np.ndarray


def at_hand(lm: LanguageModel, dictionaries: Dictionaries, graph: Graph, model: LocalModel | None = None) -> LocalModel:
    """The linear model that a graph was made from, made anew unless it is given. Raises UserError where model or dictionaries are
    others than the graph's."""
    if model is not None:
        return model
    if "unknown" not in (lm.fingerprint, graph.model["fingerprint"]) and lm.fingerprint != graph.model["fingerprint"]:
        raise UserError(
            f"the graph is of a model with other weights ({graph.model['fingerprint']}) than {lm.name!r} has ({lm.fingerprint}): "
            "load the model that it was traced on"
        )
    model = LocalModel(lm, dictionaries, graph.ids)
    given = [fingerprint(dictionary) for dictionary in model.dictionaries]
    if given != [entry["fingerprint"] for entry in graph.dictionaries]:
        names = ", ".join(entry["name"] for entry in graph.dictionaries)
        raise UserError(f"the dictionaries are not those of the graph, in its order ({names}): give these, or trace again")
    return model


@torch.no_grad()
def intervene(
    lm: LanguageModel,
    dictionaries: Dictionaries,
    graph: Graph,
    node: int | str,
    factor: float = 0.0,
    *,
    model: LocalModel | None = None,
) -> Intervention:
    """Multiply a feature, error or token by a factor, 0 to take it out. Raises UserError for a target, for what the graph lacks, for a node
    at position 0, and for model or dictionaries that are not the graph's."""
    runs = Interventions(at_hand(lm, dictionaries, graph, model), graph)
    return runs.of(graph.find(node) if isinstance(node, str) else node, factor)


class Interventions:
    """Many of them on one graph."""

    def __init__(self, model: LocalModel, graph: Graph):
        self.model, self.graph = model, graph
        self._number = {(part.number, part.first): i for i, part in enumerate(model.parts)}
        self._readers = self._read_by()
        streams = model.run()
        self._held = self._values(streams.before, streams.after)
        self._free = self._measure()

    def of(self, node: int, factor: float) -> Intervention:
        self.check(node)
        delta = factor - 1.0
        edge_N = np.zeros(len(self.graph))
        column = self.graph.matrix()[:, [node]].tocoo()
        edge_N[column.row] = delta * column.data
        total_N = total_effects(self.graph, np.array([node]))[:, 0] * delta
        streams = self._linear(node, factor)
        held_N = self._values(streams.before, streams.after) - self._held
        with self._changed(node, delta):
            measured_N = self._measure() - self._free
        return Intervention(node, factor, edge_N, total_N, held_N, measured_N)

    def check(self, node: int) -> None:
        """Raises UserError for a node that cannot be changed."""
        described = self.graph.node(node)
        if described.kind not in ("feature", "error", "token"):
            raise UserError(f"{described.id} is a target, which nothing depends on: choose a feature, an error or a token")
        if described.position < 1:
            raise UserError(f"{described.id} is at position 0, which is left as it is: choose a node at a later position")

    def can(self, node: int) -> bool:
        """Whether it can be changed."""
        kind = KINDS[self.graph.nodes.kind_N[node]]
        return kind in ("feature", "error", "token") and bool(self.graph.nodes.position_N[node] >= 1)

    # --- changes ---

    def _part(self, node: int) -> tuple[int, int]:
        """The part of a feature, and its latent's number in it."""
        dictionary, latent = int(self.graph.nodes.dictionary_N[node]), int(self.graph.nodes.latent_N[node])
        for i, part in enumerate(self.model.parts):
            if part.number == dictionary and part.first <= latent < part.first + len(part.W_read_FD):
                return i, latent - part.first
        raise UserError(f"the dictionaries have no latent {latent}: are they those of the graph?")

    def _linear(self, node: int, factor: float) -> Streams:
        """The linear model with one node multiplied."""
        described, model = self.graph.node(node), self.model
        position = described.position
        if described.kind == "token":
            tokens_SD = model.stream[0].clone()
            tokens_SD[position] *= factor
            return model.run(tokens_SD=tokens_SD)
        if described.kind == "error":
            error_SD = self._error(described.site).clone()
            error_SD[position] *= factor
            return model.run(errors={described.site: error_SD})
        number, latent = self._part(node)
        part = model.parts[number]
        values_N = part.values_N.clone()
        values_N[(part.positions_N == position) & (part.latents_N == latent)] *= factor
        return model.run({number: values_N})

    def _error(self, site: str) -> Tensor:
        return next(written.error_SD for written in self.model.replaced() if written.place.site == site)

    @contextmanager
    def _changed(self, node: int, delta: float) -> Iterator[None]:
        """The model with one node multiplied by 1 + delta, while the block runs."""
        described, model = self.graph.node(node), self.model
        position = described.position
        if described.kind == "feature":
            dictionary = model.dictionaries[described.dictionary]
            with steer(model.lm, scale(dictionary, described.latent, 1.0 + delta, positions=f"{position}-{position + 1}")):
                yield
            return
        added_D = delta * (model.stream[0] if described.kind == "token" else self._error(described.site))[position]

        def add(x_BSD: Tensor) -> Tensor:
            x_BSD = x_BSD.clone()
            x_BSD[:, position] += added_D.to(x_BSD.dtype)
            return x_BSD

        with model.lm.edit({described.site: add}):
            yield

    # --- values ---

    def _read_by(self) -> list[tuple[Part | None, Place, np.ndarray, Tensor, Tensor]]:
        """Nodes with a value by what reads them: their numbers, positions, and latents of the part or vectors with the bias behind."""
        graph, model = self.graph, self.model
        device, nodes = model.lm.device, self.graph.nodes
        readers: list[tuple[Part | None, Place, np.ndarray, Tensor, Tensor]] = []
        numbers_N = np.flatnonzero(graph.is_kind("feature"))
        for part in model.parts:
            inside = nodes.latent_N[numbers_N] - part.first
            mine = numbers_N[(nodes.dictionary_N[numbers_N] == part.number) & (inside >= 0) & (inside < len(part.W_read_FD))]
            if len(mine):
                latents_M = torch.as_tensor(nodes.latent_N[mine] - part.first, device=device).long()
                readers.append((part, part.place, mine, torch.as_tensor(nodes.position_N[mine], device=device).long(), latents_M))
        W_VD, b_V = model.unembedding()
        final = Place.of(FINAL, model.layers)
        for n in np.flatnonzero(graph.is_kind("logit")).tolist():
            token = int(nodes.token_N[n])
            vector_D = torch.cat([W_VD[token] - W_VD.mean(0), (b_V[token] - b_V.mean())[None]])
            readers.append((None, final, np.array([n]), torch.tensor([nodes.position_N[n]], device=device), vector_D))
        for n in np.flatnonzero(graph.is_kind("difference", "direction")).tolist():
            place = Place.of(graph.sites[nodes.site_N[n]], model.layers)
            vector_D = torch.tensor(graph.vectors[n], device=device)
            readers.append((None, place, np.array([n]), torch.tensor([nodes.position_N[n]], device=device), vector_D))
        return readers

    def _values(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> np.ndarray:
        """Of all nodes in the linear model."""
        values_N = np.zeros(len(self.graph))
        for part, place, mine, positions_M, latents in self._readers:
            ahead = part is not None and any(w.place.kind == "stream" and w.place.point == place.point for w in part.writes)
            x_SD = self.model.stands_at(place, before if ahead else after)
            values_N[mine] = self._value(part, x_SD, positions_M, latents, held=True)
        return values_N

    def _measure(self) -> np.ndarray:
        """Of all nodes in the model itself, as it runs now."""
        sites = list(dict.fromkeys(place.site for _, place, *_ in self._readers))
        seen = self.model.lm.read(torch.tensor([self.model.ids]), sites)
        values_N = np.zeros(len(self.graph))
        for part, place, mine, positions_M, latents in self._readers:
            values_N[mine] = self._value(part, seen[place.site][0].float(), positions_M, latents, held=False)
        return values_N

    @staticmethod
    def _value(part: Part | None, x_SD: Tensor, positions_M: Tensor, latents: Tensor, *, held: bool) -> np.ndarray:
        if part is None:
            return (x_SD[positions_M] @ latents[:-1] + latents[-1]).cpu().numpy()
        return part.pre_activations(x_SD, positions_M, latents, held=held).cpu().numpy()


def total_effects(graph: Graph, nodes_X: np.ndarray) -> np.ndarray:
    """What one time each of some nodes adds to the value of every node along all paths of the graph: [N, X]."""
    count = len(graph)
    activation_N = graph.nodes.activation_N.astype(np.float64)
    passes_N = np.divide(1.0, activation_N, out=np.zeros(count), where=activation_N != 0)
    A = graph.matrix().astype(np.float64)
    per_value = sp.csr_array(A @ sp.diags_array(passes_N))
    wave = A[:, nodes_X].toarray()
    total = wave.copy()
    while wave.any():
        wave = per_value @ wave
        total += wave
    return total
