"""What an attribution graph is: nodes, the strongest edges between them, and how much was left out.

Edges are kept by target in CSR: those into node n are entries offsets[n] to offsets[n + 1]; the weight is what the source adds to the
target. Of what is left out each target keeps the sum and the sum of sizes, and beside it what no node adds (`constant`), so that

    sum of edges into n + dropped + constant = value of n

Nodes are active features, errors (what a dictionary missed, or an MLP without one wrote), tokens, and the targets: logits, differences of
logits, directions, or features. Tokens and errors have no edges into them.
Shape suffixes: `N` nodes, `E` edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from saebench.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from saebench.circuits.graphs.replacement import LocalModel

KINDS = ("feature", "error", "token", "logit", "difference", "direction")


@dataclass(frozen=True)
class Node:
    """One node, as people see it."""

    id: str
    kind: str
    site: str
    """Where a feature reads, an error is written, a token stands or a target is taken."""
    dictionary: int
    """Number of the feature's dictionary, -1 for none."""
    position: int
    latent: int
    """Number in the dictionary, -1 for none."""
    token: int
    """Token at the position; of a logit the token that it is of."""
    activation: float
    """Of a feature."""
    value: float
    """Pre-activation of a feature, value of a target; 0 for others."""
    weight: float
    """Share of what is explained, for targets."""
    probability: float
    label: str


@dataclass
class Nodes:
    """The table of nodes, a column each."""

    kind_N: np.ndarray
    """Number in KINDS, int8."""
    site_N: np.ndarray
    """Number in the graph's sites, int16."""
    dictionary_N: np.ndarray
    position_N: np.ndarray
    latent_N: np.ndarray
    token_N: np.ndarray
    activation_N: np.ndarray
    value_N: np.ndarray
    weight_N: np.ndarray
    probability_N: np.ndarray
    constant_N: np.ndarray
    """What no node adds to the value: biases, and what is written at BOS."""
    dropped_N: np.ndarray
    """Sum of the edges left out."""
    dropped_size_N: np.ndarray
    """Sum of their sizes."""

    def __len__(self) -> int:
        return len(self.kind_N)

    def take(self, rows: np.ndarray) -> Nodes:
        return Nodes(**{name: column[rows] for name, column in self.__dict__.items()})


@dataclass
class Graph:
    """Of one prompt."""

    prompt: str
    ids: list[int]
    tokens: list[str]
    """The text of each token."""
    model: dict[str, str]
    """`name` and `fingerprint`."""
    dictionaries: list[dict[str, Any]]
    """`name`, `architecture`, `d_sae`, `reads`, `writes` and `fingerprint` of each."""
    sites: list[str]
    nodes: Nodes
    offsets_N: np.ndarray
    sources_E: np.ndarray
    weights_E: np.ndarray
    labels: dict[int, str] = field(default_factory=dict)
    """Text of the nodes that have one: targets."""
    vectors: dict[int, list[float]] = field(default_factory=dict)
    """Of differences and directions: what stands at their site is multiplied by it, and the last number added."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was made."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What was found out about it later, such as `verification`; anything JSON can hold."""
    origin: LocalModel | None = field(default=None, repr=False, compare=False)
    """The linear model it was made from; not in the file."""

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def num_edges(self) -> int:
        return len(self.sources_E)

    @property
    def targets(self) -> np.ndarray:
        """Numbers of the nodes that are explained."""
        return np.flatnonzero(self.nodes.weight_N > 0)

    def is_kind(self, *kinds: str) -> np.ndarray:
        """Which nodes are of some kinds: [N]."""
        return np.isin(self.nodes.kind_N, [KINDS.index(kind) for kind in kinds])

    def matrix(self) -> sp.csr_array:
        """Weights [N, N], targets by rows."""
        return sp.csr_array((self.weights_E, self.sources_E, self.offsets_N), shape=(len(self), len(self)))

    def edges_into(self, number: int) -> list[tuple[int, float]]:
        """Sources and weights, strongest first."""
        part = slice(self.offsets_N[number], self.offsets_N[number + 1])
        order = np.argsort(-np.abs(self.weights_E[part]), kind="stable")
        return list(zip(self.sources_E[part][order].tolist(), self.weights_E[part][order].tolist(), strict=True))

    def id(self, number: int) -> str:
        """A name that no other node has, such as `feature/transcoder-0/5/123` (dictionary, position, latent), `error/SITE/POSITION`,
        `token/POSITION`, `logit/POSITION/TOKEN`."""
        nodes, kind = self.nodes, KINDS[self.nodes.kind_N[number]]
        position = nodes.position_N[number]
        if kind == "feature":
            return f"feature/{self.dictionaries[nodes.dictionary_N[number]]['name']}/{position}/{nodes.latent_N[number]}"
        if kind == "error":
            return f"error/{self.sites[nodes.site_N[number]]}/{position}"
        if kind == "token":
            return f"token/{position}"
        if kind == "logit":
            return f"logit/{position}/{nodes.token_N[number]}"
        before = self.nodes.kind_N[:number] == nodes.kind_N[number]
        return f"{kind}/{position}/{int(before.sum())}"

    def find(self, id: str) -> int:
        """The number of a node. Raises UserError where the graph lacks it."""
        if "_numbers" not in self.__dict__:
            self.__dict__["_numbers"] = {self.id(n): n for n in range(len(self))}
        if id not in self.__dict__["_numbers"]:
            raise UserError(f"the graph has no node {id!r}: nodes are such as {self.id(0)}")
        return self.__dict__["_numbers"][id]

    def numbers_in(self, whole: Graph) -> np.ndarray:
        """The numbers [N] that the nodes have in another graph of the prompt, such as the one that this was pruned from. Raises UserError
        for a node that it lacks."""
        return np.array([whole.find(self.id(n)) for n in range(len(self))], dtype=np.int64)

    def node(self, which: int | str) -> Node:
        """A node by number or id. Raises UserError where the graph lacks it."""
        number = self.find(which) if isinstance(which, str) else which
        if not 0 <= number < len(self):
            raise UserError(f"the graph has no node {number}: it has {len(self):,}, counted from 0")
        n = self.nodes
        return Node(
            self.id(number), KINDS[n.kind_N[number]], self.sites[n.site_N[number]], int(n.dictionary_N[number]),
            int(n.position_N[number]), int(n.latent_N[number]), int(n.token_N[number]), float(n.activation_N[number]),
            float(n.value_N[number]), float(n.weight_N[number]), float(n.probability_N[number]), self.labels.get(number, ""),
        )  # fmt: skip

    def only(self, nodes: np.ndarray, edges: np.ndarray) -> Graph:
        """The graph of some nodes [N] and edges [E] (both as masks); what the others added to nodes that stay counts as dropped."""
        rows_E = np.repeat(np.arange(len(self)), np.diff(self.offsets_N))
        kept_E = edges & nodes[rows_E] & nodes[self.sources_E]
        gone_E = ~kept_E
        table = self.nodes.take(np.arange(len(self)))
        gone = np.bincount(rows_E[gone_E], weights=self.weights_E[gone_E].astype(np.float64), minlength=len(self))
        size = np.bincount(rows_E[gone_E], weights=np.abs(self.weights_E[gone_E]).astype(np.float64), minlength=len(self))
        table.dropped_N = table.dropped_N + gone
        table.dropped_size_N = table.dropped_size_N + size
        numbers = np.flatnonzero(nodes)
        renumbered_N = np.cumsum(nodes) - 1
        counts_N = np.bincount(rows_E[kept_E], minlength=len(self))[numbers]
        return Graph(
            self.prompt, self.ids, self.tokens, self.model, self.dictionaries, self.sites, table.take(numbers),
            np.concatenate([[0], np.cumsum(counts_N)]).astype(np.int64),
            renumbered_N[self.sources_E[kept_E]].astype(np.int32), self.weights_E[kept_E],
            {int(renumbered_N[n]): text for n, text in self.labels.items() if nodes[n]},
            {int(renumbered_N[n]): vector for n, vector in self.vectors.items() if nodes[n]},
            dict(self.settings), {}, self.origin,
        )  # fmt: skip

    # --- what is done with it, each in its own file ---

    def influence(self) -> np.ndarray:
        """How much of the targets comes through each node: [N] (influence.py)."""
        from saebench.circuits.graphs.influence import influence

        return influence(self)

    def scores(self) -> Any:
        """Replacement and completeness with their bounds (influence.py)."""
        from saebench.circuits.graphs.influence import scores

        return scores(self)

    def prune(self, node_share: float = 0.8, edge_share: float = 0.98, *, keep_errors: bool = True) -> Graph:
        """The nodes and edges that carry most of the influence (influence.py)."""
        from saebench.circuits.graphs.influence import prune

        return prune(self, node_share, edge_share, keep_errors=keep_errors)

    def verify(self, top: int = 50) -> Any:
        """Predicted against measured effects (verification.py). Raises UserError for a graph from a file, which has no model with it."""
        from saebench.circuits.graphs.verification import verify

        return verify(*self._at_hand(), self, top=top, model=self.origin)

    def intervene(self, node: int | str, factor: float = 0.0) -> Any:
        """What happens when a node is multiplied by a factor (interventions.py). Raises UserError as `verify`."""
        from saebench.circuits.graphs.interventions import intervene

        return intervene(*self._at_hand(), self, node, factor, model=self.origin)

    def _at_hand(self) -> tuple[Any, Any]:
        if self.origin is None:
            raise UserError(
                "the graph is from a file and has no model with it: use verify(lm, dictionaries, graph) or trace again"
            )
        return self.origin.lm, self.origin.dictionaries

    def save(self, path: str | Path) -> None:
        """Write it as JSON (graph_file.py)."""
        from saebench.circuits.graphs.graph_file import save_graph

        save_graph(self, path)
