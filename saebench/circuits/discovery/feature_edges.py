"""Edges of a feature circuit: what one node does to the metric through another, and through no third (Marks et al. 2024; methods.md A2).

The edge from u to d is (u_patch - u) * dd/du * dm/dd. The gradient dd/du passes the model, and stops at every submodule between the two;
dm/dd is the whole gradient. So in first order the edges out of a node, to all nodes behind it and to the metric directly, add up to its
effect.
Shape suffixes: `B` examples, `R` rows (examples times positions), `D` width, `F` d_sae, `M` nodes of the circuit, `n` entries of these,
`P` places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.circuits.discovery.examples import Examples, measure
from saebench.circuits.discovery.patching import ERROR, NodeEffects, Patching
from saebench.circuits.discovery.submodules import Delta, Live, State, Submodule

EDGE_THRESHOLD = 0.01  # Marks et al. 2024


@dataclass(frozen=True)
class FeatureEdges:
    """Edges between some nodes of a table of effects."""

    nodes_M: Tensor
    """Which nodes of the table."""
    weight_MM: Tensor
    """From the node of a row to that of a column, patch less clean, averaged over examples; 0 where nothing leads from one to the other."""
    direct_M: Tensor
    """From each node to the metric past all others."""

    def above(self, threshold: float = EDGE_THRESHOLD) -> list[tuple[int, int, float]]:
        """(from, to, weight) of edges of at least that size, by number in `nodes_M`, largest first."""
        found = (self.weight_MM.abs() >= threshold).nonzero().tolist()
        edges = [(u, d, float(self.weight_MM[u, d])) for u, d in found]
        return sorted(edges, key=lambda edge: -abs(edge[2]))


@dataclass(frozen=True)
class _Own:
    """The nodes of the circuit in one submodule: `number_PF` says which node stands at a place and latent (F: the error), -1 for none."""

    number_PF: Tensor
    nodes: list[int]


def feature_edges(patching: Patching, effects: NodeEffects, nodes_M: Tensor) -> FeatureEdges:
    """The edges between some nodes of `effects`, such as `effects.above()`: one backward pass for every node and batch. Raises UserError
    for a node that the table lacks."""
    effects.check(nodes_M)
    count = len(nodes_M)
    own = {sub.site: _own(patching, effects, nodes_M, number) for number, sub in enumerate(patching.subs)}
    weight_MM, direct_M = torch.zeros(count, count), torch.zeros(count)
    for batch, deltas in patching.batches():
        whole = patching.gradients(batch)
        live, probes, value = _cut_run(patching, batch)

        def into(
            target: Tensor, batch: Examples = batch, deltas: dict[str, Delta] = deltas, probes: dict[str, Tensor] = probes
        ) -> Tensor:
            """What every node's change does to a number of this run, past all others: [M]."""
            found = torch.autograd.grad(target, list(probes.values()), retain_graph=True, allow_unused=True)
            row_M = torch.zeros(count, device=target.device)
            for sub, gradient_RD in zip(patching.subs, found, strict=True):
                if gradient_RD is not None:
                    row_M += _change_along(patching, batch, sub, deltas[sub.site], own[sub.site], gradient_RD, count)
            return row_M.cpu()

        direct_M += into(value)
        for number, sub in enumerate(patching.subs):
            for node in own[sub.site].nodes if number else ():
                target = _weighed(patching, batch, sub, live[sub.site], whole[sub.site], effects, int(nodes_M[node]))
                if target.requires_grad:
                    weight_MM[:, node] += into(target)
    examples = len(patching.examples)
    return FeatureEdges(nodes_M, weight_MM / examples, direct_M / examples)


def _own(patching: Patching, effects: NodeEffects, nodes_M: Tensor, number: int) -> _Own:
    sub, places = patching.subs[number], patching.examples.ids_BS.shape[1] - patching.skip if patching.keep_positions else 1
    number_PF = torch.full((places, sub.d_sae + 1), -1)
    nodes = (effects.site_N[nodes_M] == number).nonzero()[:, 0].tolist()
    for node in nodes:
        row = int(nodes_M[node])
        place = int(effects.position_N[row]) - patching.skip if patching.keep_positions else 0
        number_PF[place, int(effects.latent_N[row])] = node
    return _Own(number_PF.to(patching.lm.device), nodes)


def _cut_run(patching: Patching, batch: Examples) -> tuple[dict[str, State], dict[str, Tensor], Tensor]:
    """The clean run with the gradient stopped at every submodule: states as functions of what was put in before, zeros put in behind
    each, and the metric's sum."""
    live: dict[str, State] = {}
    probes: dict[str, Tensor] = {}

    def write(sub: Submodule, state: State, value_BSD: Tensor) -> Tensor:
        live[sub.site] = state
        probes[sub.site] = torch.zeros_like(state.rest_RD, requires_grad=True)
        held_BSD = torch.cat([value_BSD[:, : sub.skip], value_BSD[:, sub.skip :].detach()], 1)
        return sub.put(held_BSD, probes[sub.site])

    with torch.enable_grad(), patching.lm.edit(Live(patching.subs, write).changes()):
        value = measure(patching.lm, batch, patching.metric).sum()
    return live, probes, value


def _weighed(
    patching: Patching, batch: Examples, sub: Submodule, state: State, gradient_RD: Tensor, effects: NodeEffects, node: int
) -> Tensor:
    """A node as a function of the run, times the metric's gradient at it, summed over the rows that it stands for."""
    latent, position = int(effects.latent_N[node]), int(effects.position_N[node])
    rows_R = torch.arange(len(gradient_RD), device=gradient_RD.device)
    here_R = batch.inside(patching.skip).flatten()
    if patching.keep_positions:
        here_R = here_R & (patching.place(batch, rows_R) == position - patching.skip)
    with torch.enable_grad():
        if latent == ERROR:
            return ((state.rest_RD * gradient_RD).sum(1) * here_R).sum()
        f_R = state.codes.columns(torch.tensor([latent], device=gradient_RD.device))[:, 0]
        return (f_R * (gradient_RD @ sub.W_FD[latent]) * here_R).sum()


def _change_along(
    patching: Patching, batch: Examples, sub: Submodule, change: Delta, own: _Own, gradient_RD: Tensor, count: int
) -> Tensor:
    """Change times gradient of the circuit's nodes in a submodule: [M]."""
    row_M = torch.zeros(count + 1, device=gradient_RD.device)  # the last takes what is no node
    inside_R = batch.inside(patching.skip).flatten()
    rows_R = torch.arange(len(gradient_RD), device=gradient_RD.device)
    row_M.index_add_(
        0, own.number_PF[patching.place(batch, rows_R), -1] % (count + 1), (change.rest_RD * gradient_RD).sum(1) * inside_R
    )
    rows_N, latents_N = change.codes.tokens, change.codes.indices.reshape(-1).long()
    at_N = own.number_PF[patching.place(batch, rows_N), latents_N]
    n = (at_N >= 0).nonzero()[:, 0]
    dots_n = (gradient_RD[rows_N[n]] * sub.W_FD[latents_N[n]]).sum(1)
    row_M.index_add_(0, at_N[n], change.codes.values[n] * dots_n * inside_R[rows_N[n]])
    return row_M[:-1]
