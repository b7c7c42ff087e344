"""What happens to every node when one is multiplied by a factor: as the graph says, in the linear model, and in the model itself.

    edge       (factor - 1) times the edge, the direct path alone
    total      along all paths of the graph: every feature on the way passes on what it gets, in proportion
    held       measured in the linear model, other features, norms and attention held: what an edge claims
    frozen     measured in the model itself with attention patterns and the scales of norms held: its MLPs respond
    measured   in the model itself with attention patterns held, those of Lorsa too, and all else free to respond: what a graph is held to
    free       in the model itself, nothing held

In the model what a feature, error or token writes is added to, or taken from, what stands at its place (holding.py).
Shape suffixes: `N` nodes, `S` positions, `D` width, `X` interventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from saebench.circuits.graphs.graph import KINDS, Graph
from saebench.circuits.graphs.holding import Held, holding, same_prompt
from saebench.circuits.graphs.parts import Part, Place
from saebench.circuits.graphs.replacement import Dictionaries, LocalModel, Streams
from saebench.circuits.graphs.targets import FINAL
from saebench.errors import UserError
from saebench.features.building import fingerprint
from saebench.lm import LanguageModel

TOKENS = 2048  # of one pass, over its interventions
MEASURES: dict[str, Held] = {"frozen": "all", "measured": "patterns", "free": "free"}


@dataclass(frozen=True)
class Intervention:
    """A node multiplied by a factor, and by how much the value of every node changed: [N] each, 0 for errors and tokens."""

    node: int
    factor: float
    edge_N: np.ndarray
    total_N: np.ndarray
    held_N: np.ndarray
    frozen_N: np.ndarray
    measured_N: np.ndarray
    free_N: np.ndarray


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
        self._clean = {name: self._measure([], held)[0] for name, held in MEASURES.items()}

    def of(self, node: int, factor: float) -> Intervention:
        return self.many([node], factor)[0]

    def many(self, nodes: Sequence[int], factor: float) -> list[Intervention]:
        """Each by itself; many in one pass of the model. Raises UserError for a node that cannot be changed."""
        for node in nodes:
            self.check(node)
        done: list[Intervention] = []
        rows = max(1, TOKENS // self.model.size)
        for start in range(0, len(nodes), rows):
            done += self._together(nodes[start : start + rows], factor)
        return done

    def _together(self, nodes: Sequence[int], factor: float) -> list[Intervention]:
        delta, chosen_X = factor - 1.0, np.array(nodes)
        edge_NX = self.graph.matrix()[:, chosen_X].toarray() * delta
        total_NX = total_effects(self.graph, chosen_X) * delta
        found = {name: self._measure([(n, delta) for n in nodes], held) - self._clean[name] for name, held in MEASURES.items()}
        done = []
        for x, node in enumerate(nodes):
            streams = self._linear(node, factor)
            held_N = self._values(streams.before, streams.after) - self._held
            measured = {f"{name}_N": changed_XN[x] for name, changed_XN in found.items()}
            done.append(Intervention(node, factor, edge_NX[:, x], total_NX[:, x], held_N, **measured))
        return done

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

    def _writes(self, node: int) -> list[tuple[str, Tensor]]:
        """What a node writes at its position, by site: [D] each."""
        described, model = self.graph.node(node), self.model
        if described.kind == "token":
            return [(described.site, model.stream[0][described.position])]
        if described.kind == "error":
            return [(described.site, self._error(described.site)[described.position])]
        number, latent = self._part(node)
        latent_M = torch.tensor([latent], device=model.lm.device)
        return [(write.place.site, described.activation * write.rows(latent_M)[0]) for write in model.parts[number].writes]

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

    def _measure(self, changes: Sequence[tuple[int, float]], held: Held) -> np.ndarray:
        """Of all nodes in the model itself, some of it held and in each row a node changed by a share of it: [X, N]; as it is, in one row,
        without any."""
        model, count = self.model, max(1, len(changes))
        added: dict[str, Tensor] = {}
        for row, (node, delta) in enumerate(changes):
            for site, written_D in self._writes(node):
                if site not in added:
                    added[site] = written_D.new_zeros(count, model.size, len(written_D))
                added[site][row, int(self.graph.nodes.position_N[node])] += delta * written_D
        sites = list(dict.fromkeys(place.site for _, place, *_ in self._readers))
        with holding(model, held, added):
            seen = model.lm.read(same_prompt(model, count), sites)
        values_XN = np.zeros((count, len(self.graph)))
        for part, place, mine, positions_M, latents in self._readers:
            for row, x_SD in enumerate(seen[place.site].float()):
                values_XN[row, mine] = self._value(part, x_SD, positions_M, latents, held=held != "free")
        return values_XN

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
