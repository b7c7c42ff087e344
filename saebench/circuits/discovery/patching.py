"""Feature circuits: how much each latent, and each error, of some dictionaries does for a metric on some examples (Marks et al. 2024;
methods.md A2).

A node's effect is what the metric changes by when the node takes the value it has under a patch: zero, its mean, or its value on the
counterfactual prompt. Four ways, from a guess to the truth:

    first_order   (f_patch - f) dm/df at the clean run, one backward pass. The gradient passes every dictionary as if it were not there
                  (straight-through), which is what it does: latents and error add up to what stood there.
    latents_only  the same with the errors of later dictionaries held, so that only what later latents carry counts
    integrated    the gradient is the mean over k = 0..n-1 of that at f + (k/n) (f_patch - f), all nodes of one submodule moved together
    exact         the node is set and the model run again, once for every node

Effects are summed over positions, or kept apart where prompts are alike position by position; then averaged over examples; only then do
rankings take their absolute value. Sign: patch less clean.
Shape suffixes: `B` examples, `S` positions, `s` positions from `skip` on, `R` rows (B * s), `D` width, `F` d_sae, `N` entries or nodes,
`P` places of the circuit (s, or 1 where positions are summed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from saebench.circuits.discovery.examples import Examples, Metric, default_metric, measure, on_model
from saebench.circuits.discovery.ranking import Curve, faithfulness_curve
from saebench.circuits.discovery.submodules import Changes, Delta, Live, Patch, State, Submodule, delta, means, states, submodules
from saebench.codes import SparseCodes
from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.lm import LanguageModel
from saebench.steering.positions import SKIP

Method = Literal["first_order", "latents_only", "integrated", "exact"]
NODE_THRESHOLD = 0.1  # Marks et al. 2024
ERROR = -1


@dataclass(frozen=True)
class NodeEffects:
    """Effects of nodes on the metric, averaged over examples. A node is a latent, or the error (-1), of the dictionary that writes a site,
    at one position or (-1) at all."""

    sites: tuple[str, ...]
    site_N: Tensor
    position_N: Tensor
    latent_N: Tensor
    effect_N: Tensor

    def __len__(self) -> int:
        return len(self.effect_N)

    def order(self) -> Tensor:
        """Nodes by falling absolute effect: [N] int64."""
        return self.effect_N.abs().argsort(descending=True, stable=True)

    def above(self, threshold: float = NODE_THRESHOLD) -> Tensor:
        """Nodes whose effect is at least `threshold` in size, largest first."""
        order_N = self.order()
        return order_N[self.effect_N[order_N].abs() >= threshold]

    def check(self, nodes_M: Tensor) -> None:
        """Raises UserError for a node that the table lacks."""
        if len(nodes_M) and not 0 <= int(nodes_M.min()) <= int(nodes_M.max()) < len(self):
            raise UserError(
                f"nodes are numbers from 0 to {len(self) - 1}, rows of the table of effects: {nodes_M.tolist()[:5]} are not all"
            )

    def name(self, node: int) -> str:
        """Such as `blocks.1.hook_resid_post/17@5`, or `.../error` where positions are summed."""
        latent, position = int(self.latent_N[node]), int(self.position_N[node])
        end = "" if position < 0 else f"@{position}"
        return f"{self.sites[int(self.site_N[node])]}/{'error' if latent == ERROR else latent}{end}"


class Patching:
    """The feature circuit of a task: dictionaries spliced into a model, examples, a metric and a patch."""

    def __init__(
        self,
        lm: LanguageModel,
        dictionaries: Iterable[Dictionary],
        examples: Examples,
        *,
        metric: Metric | None = None,
        patch: Patch | None = None,
        keep_positions: bool = False,
        skip: int = SKIP,
        batch_size: int = 8,
    ):
        """`metric` defaults to the logit difference, or the log-probability of the answer where no other answer is given; `patch` to
        `resample` with counterfactuals and `zero` without. The first `skip` positions (BOS) have no nodes.

        Raises UserError for dictionaries that do not fit, a patch that the examples do not allow, and positions kept of prompts of
        different length.
        """
        self.lm, self.examples = lm, on_model(lm, examples)
        self.subs = submodules(lm, dictionaries, skip)
        self.metric = metric or default_metric(examples)
        self.patch = patch or ("zero" if examples.patch_BS is None else "resample")
        self.keep_positions, self.skip, self.batch_size = keep_positions, skip, batch_size
        if self.patch not in get_args(Patch):
            raise UserError(f"patch {self.patch!r} is unknown: use {', '.join(get_args(Patch))}")
        if self.patch == "resample" and examples.patch_BS is None:
            raise UserError(
                "patch=resample takes activations of counterfactual prompts, and the examples have none: use zero or mean"
            )
        if keep_positions and not examples.same_length:
            raise UserError("positions can be kept only of prompts with the same number of tokens: sum over them")
        if int(examples.ends_B.min()) < skip:
            raise UserError(f"a prompt ends within the first {skip} positions, which have no nodes: lengthen it or lower skip")
        self.means = (
            means(lm, self.subs, self.examples, by_position=keep_positions, batch_size=batch_size) if self.patch == "mean" else {}
        )

    # --- effects of nodes ---

    def effects(self, method: Method = "integrated", *, steps: int = 10) -> NodeEffects:
        """The effect of every node that is active on an example, or whose patch is; `steps` are those of `integrated`. `exact` runs
        the model once for every node of every example and position."""
        if method not in get_args(Method):
            raise UserError(f"method {method!r} is unknown: use {', '.join(get_args(Method))}")
        if steps < 1:
            raise UserError(f"steps={steps} is no number of steps: use at least 1")
        tables: dict[str, list[tuple[Tensor, Tensor]]] = {sub.site: [] for sub in self.subs}
        for batch, deltas in self.batches():
            if method == "exact":
                found = {sub.site: self._exact(batch, sub, deltas[sub.site]) for sub in self.subs}
            else:
                if method == "integrated":
                    gradients = {sub.site: self._integrated(batch, sub, deltas[sub.site], steps) for sub in self.subs}
                else:
                    gradients = self.gradients(batch, through_latents=method == "latents_only")
                found = {sub.site: _products(sub, deltas[sub.site], gradients[sub.site]) for sub in self.subs}
            for site, (latents_N, errors_R) in found.items():
                tables[site].append(self.summed(batch, deltas[site].codes, latents_N, errors_R))
        return self._table(tables)

    def batches(self) -> Iterator[tuple[Examples, dict[str, Delta]]]:
        """Examples, a batch at a time, with what the patch changes in each submodule."""
        for batch in self.examples.batches(self.batch_size):
            clean = states(self.lm, self.subs, batch.ids_BS)
            patched = self.patched(batch)
            yield batch, {site: delta(state, patched.get(site)) for site, state in clean.items()}

    def patched(self, batch: Examples) -> dict[str, tuple[SparseCodes, Tensor]]:
        """Codes and rest that stand in for those of a batch, by site; none for zero."""
        if self.patch == "zero":
            return {}
        if self.patch == "mean":
            positions = batch.ids_BS.shape[1] - self.skip
            return {site: mean.rows(len(batch), positions) for site, mean in self.means.items()}
        assert batch.patch_BS is not None
        found = states(self.lm, self.subs, batch.patch_BS)
        return {site: (state.codes, state.rest_RD) for site, state in found.items()}

    def gradients(self, batch: Examples, *, through_latents: bool = False) -> dict[str, Tensor]:
        """The metric's gradient with respect to what stands at each site in the clean run: [R, D]."""
        probes: dict[str, Tensor] = {}

        def write(sub: Submodule, state: State, value_BSD: Tensor) -> Tensor:
            probe_RD = probes[sub.site] = torch.zeros_like(state.rest_RD, requires_grad=True)
            if through_latents:
                y_hat_RD = sub.written(state.codes) + state.rest_RD - state.error_RD
                held_BSD = torch.cat([value_BSD[:, : self.skip], value_BSD[:, self.skip :].detach()], 1)
                return sub.put(held_BSD, y_hat_RD - y_hat_RD.detach() + probe_RD)  # the same value, with what y_hat depends on
            return sub.put(value_BSD, probe_RD)

        with torch.enable_grad():
            if through_latents:
                with self.lm.edit(Live(self.subs, write).changes()):
                    value_B = measure(self.lm, batch, self.metric)
            else:
                value_B = self._run(batch, {sub.site: _probing(sub, probes) for sub in self.subs})
            found = torch.autograd.grad(value_B.sum(), list(probes.values()), allow_unused=True)
        return {
            site: torch.zeros_like(probe) if gradient is None else gradient
            for (site, probe), gradient in zip(probes.items(), found, strict=True)
        }

    def _integrated(self, batch: Examples, sub: Submodule, change: Delta, steps: int) -> Tensor:
        """The mean gradient along the way from clean to patch. All nodes of the submodule moving together move what stands at the site
        on a straight line, as decoders are affine."""
        way_RD = change.written(sub)
        total_RD = torch.zeros_like(way_RD)
        for k in range(steps):
            probes: dict[str, Tensor] = {}
            with torch.enable_grad():
                value_B = self._run(batch, {sub.site: _probing(sub, probes, way_RD * (k / steps))})
                (gradient_RD,) = torch.autograd.grad(value_B.sum(), [probes[sub.site]], allow_unused=True)
            total_RD += 0.0 if gradient_RD is None else gradient_RD
        return total_RD / steps

    @torch.no_grad()
    def _exact(self, batch: Examples, sub: Submodule, change: Delta) -> tuple[Tensor, Tensor]:
        """What each node alone does: [N] of latents, [R] of errors."""
        clean_B = measure(self.lm, batch, self.metric)
        positions = batch.ids_BS.shape[1] - self.skip
        inside_R = batch.inside(self.skip).flatten()

        def of(rows_N: Tensor, vectors: Iterator[Tensor]) -> Tensor:
            """Effects of adding one vector at one row each."""
            effects_N = torch.zeros(len(rows_N), device=rows_N.device)
            for part_N, vectors_nD in zip(
                torch.arange(len(rows_N), device=rows_N.device).split(self.batch_size), vectors, strict=True
            ):
                rows_n = rows_N[part_N]
                examples_n, here = rows_n // positions, torch.arange(len(rows_n), device=rows_n.device)
                added_nsD = vectors_nD.new_zeros(len(rows_n), positions, vectors_nD.shape[1])
                added_nsD[here, rows_n % positions] = vectors_nD
                if not bool(inside_R[rows_n].any()):
                    continue
                value_n = self._run(batch.take(examples_n), {sub.site: _adding(sub, added_nsD.flatten(0, 1))})
                effects_N[part_N] = value_n - clean_B[examples_n]
            return effects_N

        entries = zip(change.codes.indices.split(self.batch_size), change.codes.values.split(self.batch_size), strict=True)
        latents_N = of(change.codes.tokens, (sub.W_FD[at_n.long()] * values_n[:, None] for at_n, values_n in entries))
        rows_R = torch.arange(len(change.rest_RD), device=change.rest_RD.device)
        return latents_N, of(rows_R, iter(change.rest_RD.split(self.batch_size)))

    def _run(self, batch: Examples, changes: Changes) -> Tensor:
        with self.lm.edit(changes):
            return measure(self.lm, batch, self.metric)

    # --- from entries to nodes ---

    def place(self, batch: Examples, rows_N: Tensor) -> Tensor:
        """The place in the circuit, counted from 0, of each row."""
        positions = batch.ids_BS.shape[1] - self.skip
        return rows_N % positions if self.keep_positions else torch.zeros_like(rows_N)

    def summed(self, batch: Examples, codes: SparseCodes, latents_N: Tensor, errors_R: Tensor) -> tuple[Tensor, Tensor]:
        """Effects at entries and rows of a batch, summed by node: keys place * (F + 1) + latent (F for the error), and sums."""
        width = codes.d_sae + 1
        inside_R = batch.inside(self.skip).flatten()
        rows_R = torch.arange(len(errors_R), device=errors_R.device)
        rows = torch.cat([codes.tokens, rows_R])
        keys = self.place(batch, rows) * width + torch.cat(
            [codes.indices.reshape(-1).long(), torch.full_like(rows_R, codes.d_sae)]
        )
        return sum_by_key(keys[inside_R[rows]], torch.cat([latents_N, errors_R])[inside_R[rows]])

    def _table(self, tables: dict[str, list[tuple[Tensor, Tensor]]]) -> NodeEffects:
        columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for number, sub in enumerate(self.subs):
            keys_N, sums_N = sum_by_key(*(torch.cat(parts) for parts in zip(*tables[sub.site], strict=True)))
            place_N, latent_N = keys_N // (sub.d_sae + 1), keys_N % (sub.d_sae + 1)
            columns.append(
                (
                    torch.full_like(keys_N, number),
                    place_N + self.skip if self.keep_positions else torch.full_like(place_N, -1),
                    torch.where(latent_N == sub.d_sae, ERROR, latent_N),
                    sums_N / len(self.examples),
                )
            )
        return NodeEffects(
            tuple(sub.site for sub in self.subs), *(torch.cat(parts).cpu() for parts in zip(*columns, strict=True))
        )

    # --- circuits ---

    @torch.no_grad()
    def metric_of(self, effects: NodeEffects, kept_N: Tensor) -> float:
        """The metric, mean over examples, of the model with every node outside a circuit patched: what is kept is computed by the running
        model, whatever is not, latents included that fire only there, takes its value under the patch. `kept_N` says which of the
        nodes of `effects` are in the circuit."""
        masks = {sub.site: self._mask(effects, kept_N, number) for number, sub in enumerate(self.subs)}
        total = 0.0
        for batch in self.examples.batches(self.batch_size):
            patched = self.patched(batch)

            def write(
                sub: Submodule,
                state: State,
                value_BSD: Tensor,
                batch: Examples = batch,
                patched: dict[str, tuple[SparseCodes, Tensor]] = patched,
            ) -> Tensor:
                mask_PF, stand_in = masks[sub.site], patched.get(sub.site)
                added_RD = -sub.written(self._outside(batch, state.codes, mask_PF))
                if stand_in is not None:
                    added_RD += sub.written(self._outside(batch, stand_in[0], mask_PF))
                rest_RD = -state.error_RD if stand_in is None else stand_in[1] - state.rest_RD
                error_R = mask_PF[self.place(batch, torch.arange(len(rest_RD), device=rest_RD.device)), -1]
                return sub.put(value_BSD, added_RD + torch.where(error_R[:, None], 0.0, rest_RD))

            with self.lm.edit(Live(self.subs, write).changes()):
                total += float(measure(self.lm, batch, self.metric).double().sum())
        return total / len(self.examples)

    def curve(self, effects: NodeEffects, sizes: list[int] | None = None) -> Curve:
        """Faithfulness and completeness of the largest nodes against their number."""
        return faithfulness_curve(lambda kept_N: self.metric_of(effects, kept_N), effects.effect_N, sizes)

    def _mask(self, effects: NodeEffects, kept_N: Tensor, number: int) -> Tensor:
        """Which latents, and in the last column the error, a circuit holds of a submodule at each place: [P, F + 1]."""
        own_N = (effects.site_N == number) & kept_N.cpu()
        places = self.examples.ids_BS.shape[1] - self.skip if self.keep_positions else 1
        mask_PF = torch.zeros(places, self.subs[number].d_sae + 1, dtype=torch.bool)
        place_N = (
            effects.position_N[own_N] - self.skip if self.keep_positions else torch.zeros(int(own_N.sum()), dtype=torch.int64)
        )
        mask_PF[place_N, effects.latent_N[own_N]] = True  # -1, the error, is the last column
        return mask_PF.to(self.lm.device)

    def _outside(self, batch: Examples, codes: SparseCodes, mask_PF: Tensor) -> SparseCodes:
        """The entries that a circuit does not hold."""
        rows_N, latents_N, values_N = codes.nonzero()
        out_N = ~mask_PF[self.place(batch, rows_N), latents_N]
        return SparseCodes.ragged(rows_N[out_N], latents_N[out_N], values_N[out_N], len(codes), codes.d_sae)


def _products(sub: Submodule, change: Delta, gradient_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Change times gradient: [N] of latents, [R] of errors."""
    latents_N = change.codes.values * sub.along(change.codes, gradient_RD)
    return latents_N, (change.rest_RD * gradient_RD).sum(1)


def sum_by_key(keys_N: Tensor, values_N: Tensor) -> tuple[Tensor, Tensor]:
    """Values added up where keys are the same: the keys, ascending, and the sums."""
    found, place_N = keys_N.unique(return_inverse=True)
    return found, values_N.new_zeros(len(found)).index_add_(0, place_N, values_N)


def _adding(sub: Submodule, added_RD: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value_BSD: sub.put(value_BSD, added_RD)


def _probing(sub: Submodule, probes: dict[str, Tensor], added_RD: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Add something, and zeros whose gradient is that of what stands there."""

    def probing(value_BSD: Tensor) -> Tensor:
        rows_RD = sub.rows(value_BSD)
        probes[sub.site] = torch.zeros_like(rows_RD, requires_grad=True)
        return sub.put(value_BSD, probes[sub.site] if added_RD is None else added_RD + probes[sub.site])

    return probing
