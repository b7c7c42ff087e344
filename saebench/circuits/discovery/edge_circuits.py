"""What a model still does with only some edges: faithfulness and completeness of circuits of edges, between heads and MLPs or latents.

Where an edge is not in the circuit, its target reads of its source what the source holds under the patch; where it is, what the source does
in the circuit itself. Between heads and MLPs (EAP's edges) that is one pass of the model in parts. Between latents it is one pass for
all nodes of a submodule that keep the same edges: every submodule before them is set, so that an edge is what acts through no third
node, as in `feature_edges.py`. An edge from a node to the metric is what it does past all later submodules.

Edges are ranked by the size of their effect. With every edge kept the model is untouched, with none it runs on patches alone; completeness
is the share that everything else still does.
Shape suffixes: `B` examples, `S` positions, `D` width, `U` sources, `T` targets, `R` rows, `F` d_sae, `P` places, `M` nodes, `N` entries,
`E` edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.circuits.discovery.examples import Examples, measure
from saebench.circuits.discovery.feature_edges import FeatureEdges
from saebench.circuits.discovery.model_edges import Components, EdgeEffects, input_of_targets
from saebench.circuits.discovery.patching import NodeEffects, Patching
from saebench.circuits.discovery.ranking import Curve, faithfulness_curve, spread_sizes
from saebench.circuits.discovery.split_model import Change, Key, SplitModel, Written
from saebench.circuits.discovery.submodules import Live, State, Submodule
from saebench.codes import SparseCodes
from saebench.errors import UserError

# --- heads and MLPs ---


@torch.no_grad()
def metric_of_edges(components: Components, kept_UT: Tensor) -> float:
    """The metric, mean over examples, with every edge patched that is not kept: `kept_UT` [U, T] bool, rows and columns as in
    `EdgeEffects`. Raises UserError for another shape."""
    return _ModelEdges(components).metric_of(kept_UT)


def edge_curve(components: Components, edges: EdgeEffects, sizes: Sequence[int] | None = None, *, points: int = 12) -> Curve:
    """Faithfulness and completeness of the largest edges against their number."""
    there_UT = ~edges.effect_UT.isnan()
    model = _ModelEdges(components)

    def evaluate(kept_E: Tensor) -> float:
        kept_UT = torch.zeros_like(there_UT)
        kept_UT[there_UT] = kept_E
        return model.metric_of(kept_UT)

    return faithfulness_curve(evaluate, edges.effect_UT[there_UT], sizes, points=points)


class _ModelEdges:
    """A model in parts whose targets read some sources as they run and others under the patch."""

    def __init__(self, components: Components):
        self.components, self.model = components, SplitModel(components.lm)
        self.columns: dict[Key, list[int]] = {}
        for column, key in enumerate(input_of_targets(self.model)):
            self.columns.setdefault(key, []).append(column)

    @torch.no_grad()
    def metric_of(self, kept_UT: Tensor) -> float:
        shape = (len(self.model.sources), len(self.model.targets))
        if kept_UT.shape != shape:
            raise UserError(
                f"edges are kept in a table of {tuple(kept_UT.shape)}: there are {shape[0]} sources and {shape[1]} targets"
            )
        components, total = self.components, 0.0
        cut_UT = ~kept_UT.to(components.lm.device)
        for batch in components.examples.batches(components.batch_size):
            patch_BUSD = components.sources_under_patch(self.model, batch)

            def change(key: Key, written: Written, patch_BUSD: Tensor = patch_BUSD) -> Change | None:
                count = self.model.sources_before(*key)
                cut_Uh = cut_UT[:count, self.columns[key]]
                if not cut_Uh.any():
                    return None
                moved_BUSD = patch_BUSD[:, :count] - self.model.stacked(written)[:, :count]
                return Change(torch.einsum("busd,uh->bhsd", moved_BUSD, cut_Uh.to(moved_BUSD.dtype)))

            logits_BSV, _ = self.model.run(self.model.embedding(batch.ids_BS), change)
            total += float(components.metric(logits_BSV, batch).double().sum())
        return total / len(components.examples)


# --- latents ---


def feature_edge_curve(
    patching: Patching, effects: NodeEffects, edges: FeatureEdges, sizes: Sequence[int] | None = None, *, points: int = 12
) -> Curve:
    """Faithfulness and completeness of the largest edges, those to the metric among them, against their number. One more than there are is
    the model with all edges of all nodes, those that `edges` leaves out included; it ends the default sizes."""
    circuit = FeatureCircuit(patching, effects, edges.nodes_M)
    there_MM = circuit.before_MM
    scores_E = torch.cat([edges.weight_MM[there_MM], edges.direct_M, torch.zeros(1)])

    def evaluate(kept_E: Tensor) -> float:
        kept_MM = torch.zeros_like(there_MM)
        between, direct = kept_E[:-1].split([int(there_MM.sum()), len(edges.nodes_M)])
        kept_MM[there_MM] = between
        return circuit.metric_of(kept_MM, direct, others=bool(kept_E[-1]))

    count = len(scores_E) - 1
    return faithfulness_curve(evaluate, scores_E, [*spread_sizes(count, points), count + 1] if sizes is None else sizes)


@torch.no_grad()
def exact_feature_edges(patching: Patching, effects: NodeEffects, nodes_M: Tensor) -> FeatureEdges:
    """What each edge between some nodes does to the metric when it alone is patched and all other edges of all nodes run: the ground truth
    of `feature_edges`, at the price of a few passes for every edge."""
    circuit = FeatureCircuit(patching, effects, nodes_M)
    count = len(nodes_M)
    every_MM, every_M = torch.ones(count, count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    clean = circuit.metric_of(every_MM, every_M, others=True)
    weight_MM, direct_M = torch.zeros(count, count), torch.zeros(count)
    for u, d in circuit.before_MM.nonzero().tolist():
        kept_MM = every_MM.clone()
        kept_MM[u, d] = False
        weight_MM[u, d] = circuit.metric_of(kept_MM, every_M, others=True) - clean
    for u in range(count):
        kept_M = every_M.clone()
        kept_M[u] = False
        direct_M[u] = circuit.metric_of(every_MM, kept_M, others=True) - clean
    return FeatureEdges(nodes_M, weight_MM, direct_M)


@dataclass
class _Values:
    """What nodes of a submodule hold in the circuit: entries of latents, and the rest and error of each row."""

    codes: SparseCodes
    rest_RD: Tensor
    error_RD: Tensor


class FeatureCircuit:
    """Some nodes of a feature circuit, with edges between them that can be kept or patched one by one."""

    def __init__(self, patching: Patching, effects: NodeEffects, nodes_M: Tensor):
        """Raises UserError for a node that the table of effects lacks."""
        effects.check(nodes_M)
        self.patching, self.nodes_M = patching, nodes_M
        site_M, position_M = effects.site_N[nodes_M], effects.position_N[nodes_M]
        self.site_M, self.latent_M = site_M, effects.latent_N[nodes_M]
        self.place_M = position_M - patching.skip if patching.keep_positions else torch.zeros_like(position_M)
        self.places = patching.examples.ids_BS.shape[1] - patching.skip if patching.keep_positions else 1
        earlier_MM = site_M[:, None] < site_M[None]
        self.before_MM = earlier_MM & (position_M[:, None] <= position_M[None])
        """Which pairs of nodes an edge can lead between: from an earlier submodule, and no later position."""

    @torch.no_grad()
    def metric_of(self, kept_MM: Tensor, direct_M: Tensor, *, others: bool) -> float:
        """The metric, mean over examples, with the edges kept that `kept_MM` [from, to] and, to the metric, `direct_M` say; nodes that are
        not among these, and all edges from and to them, run (`others`) or are patched."""
        total = 0.0
        for batch in self.patching.examples.batches(self.patching.batch_size):
            total += float(self._run(batch, kept_MM, direct_M, others).double().sum())
        return total / len(self.patching.examples)

    def _run(self, batch: Examples, kept_MM: Tensor, direct_M: Tensor, others: bool) -> Tensor:
        """Every submodule's values in turn, then the metric [B]."""
        patching, patched = self.patching, self.patching.patched(batch)
        known: dict[str, _Values] = {}
        for number, sub in enumerate(patching.subs):
            for own_PF, parents_M in self._groups(number, kept_MM, others):
                held: list[State] = []
                with patching.lm.edit(self._setting(batch, patched, known, parents_M, others, number, held).changes()):
                    patching.lm.read(batch.ids_BS, [sub.site])
                values = self._joined(batch, own_PF, held[0], known.get(sub.site))
                known = {**known, sub.site: values}
        with patching.lm.edit(self._setting(batch, patched, known, direct_M, others).changes()):
            return measure(patching.lm, batch, patching.metric)

    def _groups(self, number: int, kept_MM: Tensor, others: bool) -> list[tuple[Tensor, Tensor]]:
        """Nodes of a submodule as masks [P, F + 1], those that keep the same edges together, with whom they keep [M]."""
        own = (self.site_M == number).nonzero()[:, 0].tolist()
        columns: dict[tuple[bool, ...], list[int]] = {}
        # What lies behind, or is later, cannot be read, so that it makes no difference.
        for node in own:
            columns.setdefault(tuple((kept_MM[:, node] | ~self.before_MM[:, node]).tolist()), []).append(node)
        groups = [(self._mask(number, nodes), torch.tensor(kept)) for kept, nodes in columns.items()]
        if others:
            groups.append((~self._mask(number, own), torch.ones(len(self.nodes_M), dtype=torch.bool)))
        return groups

    def _mask(self, number: int, nodes: list[int]) -> Tensor:
        mask_PF = torch.zeros(self.places, self.patching.subs[number].d_sae + 1, dtype=torch.bool)
        mask_PF[self.place_M[nodes], self.latent_M[nodes]] = True  # -1, the error, is the last column
        return mask_PF.to(self.patching.lm.device)

    def _joined(self, batch: Examples, own_PF: Tensor, state: State, known: _Values | None) -> _Values:
        """The values of some nodes as they came out of a pass, beside those of others."""
        place_R = self.patching.place(batch, torch.arange(len(state.rest_RD), device=own_PF.device))
        rows_N, latents_N, values_N = state.codes.nonzero()
        own_N = own_PF[place_R[rows_N], latents_N]
        entries = [(rows_N[own_N], latents_N[own_N], values_N[own_N])]
        rest_RD, error_RD = state.rest_RD, state.error_RD
        if known is not None:
            entries.append(known.codes.nonzero())
            error_R = own_PF[place_R, -1][:, None]
            rest_RD, error_RD = torch.where(error_R, rest_RD, known.rest_RD), torch.where(error_R, error_RD, known.error_RD)
        rows_N, latents_N, values_N = (torch.cat(parts) for parts in zip(*entries, strict=True))
        order_N = rows_N.argsort(stable=True)
        rows_N, latents_N, values_N = rows_N[order_N], latents_N[order_N], values_N[order_N]
        return _Values(SparseCodes.ragged(rows_N, latents_N, values_N, len(state.codes), state.codes.d_sae), rest_RD, error_RD)

    def _setting(
        self,
        batch: Examples,
        patched: dict[str, tuple[SparseCodes, Tensor]],
        known: dict[str, _Values],
        parents_M: Tensor,
        others: bool,
        until: int | None = None,
        held: list[State] | None = None,
    ) -> Live:
        """Every submodule set, to the circuit's values at `parents_M` and the patch's elsewhere; those before `until` only, what this one
        then holds being put into `held`."""
        numbers = {sub.site: number for number, sub in enumerate(self.patching.subs)}

        def write(sub: Submodule, state: State, value_BSD: Tensor) -> Tensor | None:
            number = numbers[sub.site]
            if until is not None and number >= until:
                if number == until and held is not None:
                    held.append(state)
                return None
            own_M = self.site_M == number
            read_PF = self._mask(number, (own_M & parents_M).nonzero()[:, 0].tolist())
            if others:
                read_PF |= ~self._mask(number, own_M.nonzero()[:, 0].tolist())
            new_RD = self._set(batch, sub, state, patched.get(sub.site), known.get(sub.site), read_PF)
            return sub.put(value_BSD, new_RD - sub.rows(value_BSD))

        return Live(self.patching.subs, write)

    def _set(
        self,
        batch: Examples,
        sub: Submodule,
        state: State,
        stand_in: tuple[SparseCodes, Tensor] | None,
        values: _Values | None,
        read_PF: Tensor,
    ) -> Tensor:
        """What stands at a site [R, D] with the circuit's values at some of its nodes. Without a stand-in the patch is zero: of latents and
        of the error, while biases and a linear bypass run."""
        place_R = self.patching.place(batch, torch.arange(len(state.rest_RD), device=read_PF.device))
        running_RD = state.rest_RD - state.error_RD
        rest_RD = running_RD if stand_in is None else stand_in[1]
        if values is not None:
            own_RD = running_RD + values.error_RD if stand_in is None else values.rest_RD
            rest_RD = torch.where(read_PF[place_R, -1][:, None], own_RD, rest_RD) + sub.written(
                _part(values.codes, read_PF, place_R)
            )
        return rest_RD if stand_in is None else rest_RD + sub.written(_part(stand_in[0], ~read_PF, place_R))


def _part(codes: SparseCodes, mask_PF: Tensor, place_R: Tensor) -> SparseCodes:
    """The entries whose node the mask holds."""
    rows_N, latents_N, values_N = codes.nonzero()
    kept_N = mask_PF[place_R[rows_N], latents_N]
    return SparseCodes.ragged(rows_N[kept_N], latents_N[kept_N], values_N[kept_N], len(codes), codes.d_sae)
