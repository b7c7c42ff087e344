"""Circuits of the model itself, the measure of those made of features: which heads and MLPs, and which edges between them, a metric needs.

Effects are what the metric changes by when a component, or what one component reads of another, takes its value under a patch: that of the
counterfactual prompt, the mean over examples, or zero.

    exact   it is set so and the model run again: exhaustive, the ground truth of small models
    eap     first order, change times gradient: two runs and a backward pass for all (Syed et al. 2023)
    eap_ig  the gradient is the mean over k = 0..n-1 of that with the input embeddings moved k/n of the way to the patch (Hanna et al. 2024)

Nodes are measured on the model as it runs, at the heads' outputs and those of MLPs; edges on the model in parts (`split_model.py`).
Shape suffixes: `B` examples, `S` positions, `D` width, `H` heads, `E` width of a head, `U` sources, `T` targets, `N` nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from saebench.circuits.discovery.examples import Examples, Metric, default_metric, measure, on_model
from saebench.circuits.discovery.ranking import Curve, faithfulness_curve
from saebench.circuits.discovery.split_model import EMBEDDING, Change, Key, SplitModel
from saebench.circuits.discovery.submodules import Patch
from saebench.errors import UserError
from saebench.lm import LanguageModel

Method = Literal["eap", "eap_ig", "exact"]
IG_STEPS = 5


@dataclass(frozen=True)
class ComponentEffects:
    """Effects of heads [L, H] and MLPs [L] on the metric, patch less clean, averaged over examples."""

    heads_LH: Tensor
    mlps_L: Tensor

    @property
    def names(self) -> list[str]:
        """`a0.h0`, ..., layer by layer, then `m0`, ...: the order of `effect_N`."""
        layers, heads = self.heads_LH.shape
        return [f"a{layer}.h{head}" for layer in range(layers) for head in range(heads)] + [
            f"m{layer}" for layer in range(layers)
        ]

    @property
    def effect_N(self) -> Tensor:
        """Heads, then MLPs."""
        return torch.cat([self.heads_LH.flatten(), self.mlps_L])


@dataclass(frozen=True)
class EdgeEffects:
    """Effects of edges on the metric, patch less clean, averaged over examples: [U, T], NaN where there is no edge. Names are those that
    EAP uses: `input`, `a0.h1`, `m0` write; `a1.h0<q>`, `m1`, `logits` read."""

    sources: list[str]
    targets: list[str]
    effect_UT: Tensor

    def ranked(self) -> list[tuple[str, str, float]]:
        """Edges by falling absolute effect."""
        flat = self.effect_UT.flatten()
        order = flat.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[: int((~flat.isnan()).sum())]
        width = len(self.targets)
        return [(self.sources[i // width], self.targets[i % width], float(flat[i])) for i in order.tolist()]


class Components:
    """Heads and MLPs of a model on the examples of a task."""

    def __init__(
        self,
        lm: LanguageModel,
        examples: Examples,
        *,
        metric: Metric | None = None,
        patch: Patch | None = None,
        batch_size: int = 8,
    ):
        """Defaults are those of `patching.Patching`. Raises UserError for a patch that the examples do not allow, and for a model whose
        heads cannot be told apart."""
        self.lm, self.examples, self.batch_size = lm, on_model(lm, examples), batch_size
        self.metric = metric or default_metric(examples)
        self.patch = patch or ("zero" if examples.patch_BS is None else "resample")
        if self.patch not in get_args(Patch):
            raise UserError(f"patch {self.patch!r} is unknown: use {', '.join(get_args(Patch))}")
        if self.patch == "resample" and examples.patch_BS is None:
            raise UserError(
                "patch=resample takes activations of counterfactual prompts, and the examples have none: use zero or mean"
            )
        self.num_layers = lm.site_table.num_layers
        self.num_heads = int(getattr(lm.hf.config, "num_attention_heads", 0))
        self.head_sites = [f"blocks.{layer}.attn.hook_z" for layer in range(self.num_layers)]
        self.mlp_sites = [f"blocks.{layer}.hook_mlp_out" for layer in range(self.num_layers)]
        if not self.num_heads or lm.width(self.head_sites[0]) % self.num_heads:
            raise UserError(f"model {lm.name!r} has no attention heads that can be told apart at attn.hook_z")
        self.sites = [site for pair in zip(self.head_sites, self.mlp_sites, strict=True) for site in pair]
        self._means: dict[str, Tensor] = {}

    # --- nodes ---

    def effects(self, method: Method = "eap_ig", *, steps: int = IG_STEPS) -> ComponentEffects:
        """The effect of every head and MLP. Raises UserError for an unknown method, and for steps below 1."""
        _check(method, steps)
        heads_LH, mlps_L = torch.zeros(self.num_layers, self.num_heads), torch.zeros(self.num_layers)
        for batch in self.examples.batches(self.batch_size):
            clean = self._read(batch.ids_BS)
            patched = self._stand_ins(batch, clean)
            if method == "exact":
                h_LH, m_L = self._exact(batch, patched)
            else:
                gradients = self._gradients(batch, steps if method == "eap_ig" else 1)
                products = {site: ((patched[site] - clean[site]) * gradients[site]).sum((0, 1)) for site in self.sites}
                h_LH = torch.stack([products[site].unflatten(0, (self.num_heads, -1)).sum(1) for site in self.head_sites])
                m_L = torch.stack([products[site].sum() for site in self.mlp_sites])
            heads_LH += h_LH.cpu() / len(self.examples)
            mlps_L += m_L.cpu() / len(self.examples)
        return ComponentEffects(heads_LH, mlps_L)

    def metric_of(self, kept_N: Tensor) -> float:
        """The metric, mean over examples, with every head and MLP patched that is not kept, in the order of `ComponentEffects.effect_N`."""
        heads_LH = ~kept_N[: self.num_layers * self.num_heads].view(self.num_layers, self.num_heads).to(self.lm.device)
        mlps_L = ~kept_N[self.num_layers * self.num_heads :].to(self.lm.device)
        total = 0.0
        for batch in self.examples.batches(self.batch_size):
            patched = self._stand_ins(batch, None)
            total += float(self._run_patched(batch, patched, heads_LH, mlps_L).double().sum())
        return total / len(self.examples)

    def curve(self, effects: ComponentEffects, sizes: list[int] | None = None) -> Curve:
        """Faithfulness and completeness of the largest heads and MLPs against their number."""
        return faithfulness_curve(self.metric_of, effects.effect_N, sizes)

    def _read(self, ids_BS: Tensor) -> dict[str, Tensor]:
        return {site: value.clone() for site, value in self.lm.read(ids_BS, self.sites).items()}

    def _stand_ins(self, batch: Examples, clean: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """What each site holds under the patch: [B, S, D], or what expands to it."""
        if self.patch == "resample":
            assert batch.patch_BS is not None
            return self._read(batch.patch_BS)
        if self.patch == "zero":
            found = self._read(batch.ids_BS[:1, :1]) if clean is None else clean
            return {site: torch.zeros_like(value[:1, :1]) for site, value in found.items()}
        if not self._means:
            self._means = {site: mean_over(self.examples, self._read, site, self.batch_size) for site in self.sites}
        return self._means

    @torch.no_grad()
    def _run_patched(self, batch: Examples, patched: dict[str, Tensor], heads_LH: Tensor, mlps_L: Tensor) -> Tensor:
        """The metric [B] with some heads and MLPs patched, true where they are."""

        def heads_at(layer: int) -> Callable[[Tensor], Tensor | None]:
            out_D = heads_LH[layer].repeat_interleave(self.lm.width(self.head_sites[layer]) // self.num_heads)
            return lambda value: torch.where(out_D, patched[self.head_sites[layer]], value)

        def mlp_at(layer: int) -> Callable[[Tensor], Tensor | None]:
            return lambda value: patched[self.mlp_sites[layer]].expand_as(value).contiguous()

        changes = {self.head_sites[layer]: heads_at(layer) for layer in range(self.num_layers) if heads_LH[layer].any()}
        changes |= {self.mlp_sites[layer]: mlp_at(layer) for layer in range(self.num_layers) if mlps_L[layer]}
        with self.lm.edit(changes):
            return measure(self.lm, batch, self.metric)

    def _exact(self, batch: Examples, patched: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One run for every head and MLP: summed effects [L, H] and [L]."""
        layers, heads, device = self.num_layers, self.num_heads, self.lm.device
        flags = torch.eye(layers * (heads + 1), dtype=torch.bool, device=device)
        split = lambda row: (row[: layers * heads].view(layers, heads), row[layers * heads :])  # noqa: E731
        clean = self._run_patched(batch, patched, *split(torch.zeros_like(flags[0]))).sum()
        found = torch.stack([self._run_patched(batch, patched, *split(row)).sum() - clean for row in flags])
        return split(found)

    def _gradients(self, batch: Examples, steps: int) -> dict[str, Tensor]:
        """Gradients at all sites, their mean over runs with the embeddings moved: [B, S, D]."""
        way_BSD = None
        if steps > 1:
            start_BSD = self.lm.read(batch.ids_BS, [EMBEDDING])[EMBEDDING].clone()
            way_BSD = self._embedding_under_patch(batch) - start_BSD
        total: dict[str, Tensor] = {}
        for k in range(steps):
            probes: dict[str, Tensor] = {}

            def probe(site: str, probes: dict[str, Tensor] = probes) -> Callable[[Tensor], Tensor]:
                def add(value: Tensor) -> Tensor:
                    probes[site] = torch.zeros_like(value, requires_grad=True)
                    return value + probes[site]

                return add

            changes: dict[str, Callable[[Tensor], Tensor | None]] = {site: probe(site) for site in self.sites}
            if way_BSD is not None:
                changes[EMBEDDING] = lambda value, moved=way_BSD * (k / steps): value + moved  # type: ignore[misc]
            with torch.enable_grad(), self.lm.edit(changes):
                value_B = measure(self.lm, batch, self.metric)
                found = torch.autograd.grad(value_B.sum(), list(probes.values()), allow_unused=True)
            for (site, zero), gradient in zip(probes.items(), found, strict=True):
                total[site] = total.get(site, 0.0) + (torch.zeros_like(zero) if gradient is None else gradient) / steps
        return total

    def _embedding_under_patch(self, batch: Examples) -> Tensor:
        read = lambda ids_BS: {EMBEDDING: self.lm.read(ids_BS, [EMBEDDING])[EMBEDDING].clone()}  # noqa: E731
        if self.patch == "resample":
            assert batch.patch_BS is not None
            return read(batch.patch_BS)[EMBEDDING]
        if self.patch == "zero":
            return torch.zeros(1, 1, self.lm.width(EMBEDDING), device=self.lm.device)
        return mean_over(self.examples, read, EMBEDDING, self.batch_size)

    # --- edges ---

    def edges(self, method: Method = "eap_ig", *, steps: int = IG_STEPS) -> EdgeEffects:
        """The effect of every edge: what a target reads of a source, all else running. `exact` runs the model once for every edge. Raises
        UserError for a model that cannot be taken apart."""
        _check(method, steps)
        model = SplitModel(self.lm)
        total_UT = torch.zeros(len(model.sources), len(model.targets))
        for batch in self.examples.batches(self.batch_size):
            start_BSD = model.embedding(batch.ids_BS)
            with torch.no_grad():
                clean_BUSD = model.stacked(model.run(start_BSD)[1])
            changed_BUSD = self.sources_under_patch(model, batch) - clean_BUSD
            if method == "exact":
                effect_UT = self._exact_edges(model, batch, start_BSD, changed_BUSD)
            else:
                effect_UT = self._attributed_edges(model, batch, start_BSD, changed_BUSD, steps if method == "eap_ig" else 1)
            total_UT += effect_UT.cpu() / len(self.examples)
        for column, (layer, kind) in enumerate(input_of_targets(model)):
            total_UT[model.sources_before(layer, kind) :, column] = torch.nan
        return EdgeEffects(model.sources, model.targets, total_UT)

    @torch.no_grad()
    def sources_under_patch(self, model: SplitModel, batch: Examples) -> Tensor:
        """What sources write under the patch: [B, U, S, D], or what expands to it."""
        sources = lambda ids_BS: {"": model.stacked(model.run(model.embedding(ids_BS))[1]).transpose(1, 2)}  # noqa: E731
        if self.patch == "resample":
            assert batch.patch_BS is not None
            return sources(batch.patch_BS)[""].transpose(1, 2)
        if self.patch == "zero":
            return torch.zeros(1, 1, 1, 1, device=self.lm.device)
        return mean_over(self.examples, sources, "", self.batch_size).transpose(1, 2)

    def _attributed_edges(
        self, model: SplitModel, batch: Examples, start_BSD: Tensor, changed_BUSD: Tensor, steps: int
    ) -> Tensor:
        examples, _, positions, width = changed_BUSD.shape
        gradients: dict[Key, Tensor] = {}
        for k in range(steps):
            changes = {
                (layer, kind): Change(
                    start_BSD.new_zeros(examples, self.num_heads if kind in "qkv" else 1, positions, width).requires_grad_()
                )
                for layer, kind in dict.fromkeys(input_of_targets(model))
            }
            with torch.enable_grad():
                logits_BSV, _ = model.run(start_BSD + (k / steps) * changed_BUSD[:, 0], changes)
                value_B = self.metric(logits_BSV, batch)
                found = torch.autograd.grad(value_B.sum(), [change.added_ChSD for change in changes.values()], allow_unused=True)
            for key, gradient in zip(changes, found, strict=True):
                if gradient is not None:
                    gradients[key] = gradients.get(key, 0.0) + gradient / steps
        columns = []
        for key in dict.fromkeys(input_of_targets(model)):
            heads = self.num_heads if key[1] in "qkv" else 1
            if key in gradients:
                columns.append(torch.einsum("busd,bhsd->uh", changed_BUSD, gradients[key]))
            else:
                columns.append(changed_BUSD.new_zeros(changed_BUSD.shape[1], heads))
        return torch.cat(columns, 1)

    @torch.no_grad()
    def _exact_edges(self, model: SplitModel, batch: Examples, start_BSD: Tensor, changed_BUSD: Tensor) -> Tensor:
        clean = self.metric(model.run(start_BSD)[0], batch).sum()
        effect_UT = torch.zeros(changed_BUSD.shape[1], len(model.targets), device=start_BSD.device)
        seen: dict[Key, int] = {}
        for column, key in enumerate(input_of_targets(model)):
            head = seen.get(key, 0)
            seen[key] = head + 1
            heads = torch.tensor([head], device=start_BSD.device) if key[1] in "qkv" else None
            for source in range(model.sources_before(*key)):
                change = Change(changed_BUSD[:, source, None], heads)
                effect_UT[source, column] = self.metric(model.run(start_BSD, {key: change})[0], batch).sum() - clean
        return effect_UT


def input_of_targets(model: SplitModel) -> list[Key]:
    """The input that each target of `SplitModel.targets` has."""
    keys: list[Key] = []
    for layer in range(model.num_layers):
        keys += [(layer, kind) for kind in "qkv" for _ in range(model.num_heads)] + [(layer, "mlp")]
    return [*keys, (model.num_layers, "logits")]


def mean_over(examples: Examples, read: Callable[[Tensor], dict[str, Tensor]], site: str, batch_size: int) -> Tensor:
    """The mean of what stands at a site, over counterfactual prompts or where there are none the prompts themselves: by position where all
    have the same length [1, S, ...], else over all their tokens [1, 1, ...]."""
    total: Tensor | float = 0.0
    count: Tensor | float = 0.0
    for batch in examples.batches(batch_size):
        value = read(batch.ids_BS if batch.patch_BS is None else batch.patch_BS)[site]
        weight = batch.inside(0).to(value.dtype).view(*value.shape[:2], *[1] * (value.ndim - 2))
        over = 0 if examples.same_length else (0, 1)
        total = total + (value * weight).sum(over, keepdim=True)
        count = count + weight.sum(over, keepdim=True)
    assert isinstance(total, Tensor) and isinstance(count, Tensor)
    return total / count.clamp_min(1)


def _check(method: str, steps: int) -> None:
    if method not in get_args(Method):
        raise UserError(f"method {method!r} is unknown: use {', '.join(get_args(Method))}")
    if steps < 1:
        raise UserError(f"steps={steps} is no number of steps: use at least 1")
