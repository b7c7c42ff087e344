"""A model whose residual stream is taken apart: what each component reads can be changed without changing what the others read.

The stream is the sum of what its sources wrote: the embedding, every attention head, every MLP, and constants. Each target (a head's
queries, keys or values, an MLP, the logits) reads the sum through its layer norm; here every target has an input of its own, to which
something may be added. That is what edges between components are measured by. Norms, MLPs and the unembedding are the model's own
modules; attention is that of `lm/attention.py`. Both forms of a block are known, attention and MLP one after the other or side by
side; a model that is built otherwise is refused, because what comes out is compared with its own logits.
Shape suffixes: `C` contexts, `S` positions, `D` width, `H` heads, `h` some heads, `E` width of a head, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.kernels.lorsa_attention import attend, rotate
from saebench.lm import LanguageModel
from saebench.lm.attention import attention_weights

PROBE = (2, 12)
TOLERANCE = 1e-3
EMBEDDING = "blocks.0.hook_resid_pre"
Key = tuple[int, str]
"""Which inputs: layer and one of q, k, v, mlp; (number of layers, "logits") for the last."""


@dataclass(frozen=True)
class Change:
    """What is added to inputs before their norm: [C, h, S, D] for the heads named, [C, 1, S, D] for an MLP and the logits."""

    added_ChSD: Tensor
    heads: Tensor | None = None
    """Which heads; None for all."""


@dataclass
class Written:
    """What every source wrote in a pass, so far: the embedding [C, S, D], heads [C, H, S, D] by layer, MLPs [C, S, D] by layer."""

    embedding_CSD: Tensor
    heads: list[Tensor] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)


Changes = Mapping[Key, Change] | Callable[[Key, Written], Change | None]
"""Changes of inputs, known beforehand or made of what was written before them in the same pass."""


class SplitModel:
    """A language model in parts. `num_layers`, `num_heads` and `parallel` (attention and MLP side by side) describe it."""

    def __init__(self, lm: LanguageModel):
        """Raises UserError for a model whose stream is not such a sum, or whose attention is not known."""
        self.lm, self.num_layers = lm, lm.site_table.num_layers
        self.attention = [attention_weights(lm, layer) for layer in range(self.num_layers)]
        self.num_heads = self.attention[0].num_heads
        module = lambda name: lm.site(name).module(lm.hf)  # noqa: E731
        self.norms: list[tuple[Any, Any]] = [
            (module(f"blocks.{layer}.ln1.hook_out"), module(f"blocks.{layer}.ln2.hook_out")) for layer in range(self.num_layers)
        ]
        self.mlps = [module(f"blocks.{layer}.hook_mlp_out") for layer in range(self.num_layers)]
        self.final, self.unembed = module("ln_final.hook_out"), lm.hf.get_output_embeddings()
        self.parallel = False
        self._find_form()

    def _find_form(self) -> None:
        size = (PROBE[0], min(PROBE[1], self.lm.max_context or PROBE[1]))
        ids_CS = torch.randint(0, self.lm.hf.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
        expected = self.lm.logits(ids_CS).float()
        for self.parallel in (False, True):
            with torch.no_grad():
                missed = (self.run(self.embedding(ids_CS))[0].float() - expected).norm() / expected.norm().clamp_min(1e-30)
            if missed < TOLERANCE:
                return
        raise UserError(
            f"model {self.lm.name!r} is no sum of embedding, heads and MLPs read through norms (logits come out {float(missed):.0%} off): "
            "edges between its components cannot be measured, effects of heads and MLPs can"
        )

    def embedding(self, ids_CS: Tensor) -> Tensor:
        """What the stream begins with: [C, S, D]."""
        return self.lm.read(ids_CS, [EMBEDDING])[EMBEDDING].clone().float()

    def run(self, embedding_CSD: Tensor, changes: Changes | None = None) -> tuple[Tensor, Written]:
        """Logits [C, S, V] and what was written, with the inputs changed that `changes` names."""
        written, r_CSD = Written(embedding_CSD), embedding_CSD

        def change(layer: int, kind: str) -> Change | None:
            if changes is None:
                return None
            return changes((layer, kind), written) if callable(changes) else changes.get((layer, kind))

        for layer in range(self.num_layers):
            before_CSD = r_CSD
            heads_CHSD = self._heads(layer, before_CSD, {kind: change(layer, kind) for kind in "qkv"})
            written.heads.append(heads_CHSD)
            r_CSD = before_CSD + heads_CHSD.sum(1) + self.attention[layer].b_O_D
            mlp_CSD = self._read(self.norms[layer][1], before_CSD if self.parallel else r_CSD, change(layer, "mlp"))
            mlp_CSD = self.mlps[layer](mlp_CSD)
            written.mlps.append(mlp_CSD)
            r_CSD = r_CSD + mlp_CSD
        return self.unembed(self._read(self.final, r_CSD, change(self.num_layers, "logits"))), written

    def _heads(self, layer: int, r_CSD: Tensor, changes: Mapping[str, Change | None]) -> Tensor:
        """What each head writes: [C, H, S, D]."""
        weights = self.attention[layer]
        x_CSD = self.norms[layer][0](r_CSD)
        parts = []
        for kind, W_HDE, b_HE in (
            ("q", weights.W_Q_HDE, weights.b_Q_HE),
            ("k", weights.W_K_HDE, weights.b_K_HE),
            ("v", weights.W_V_HDE, weights.b_V_HE),
        ):
            change = changes[kind]
            if change is None or change.heads is not None:
                y_CHSE = torch.einsum("csd,hde->chse", x_CSD, W_HDE) + b_HE[:, None]
            if change is not None:
                at = slice(None) if change.heads is None else change.heads
                own_ChSD = self.norms[layer][0](r_CSD[:, None] + change.added_ChSD)
                own_ChSE = torch.einsum("chsd,hde->chse", own_ChSD, W_HDE[at]) + b_HE[at][:, None]
                y_CHSE = own_ChSE if change.heads is None else y_CHSE.index_copy(1, change.heads, own_ChSE)
            parts.append(y_CHSE if kind == "v" else rotate(y_CHSE, weights.rule.frequencies_R))
        z_CHSE = attend(parts[0], parts[1], parts[2], weights.rule)
        return torch.einsum("chse,hed->chsd", z_CHSE, weights.W_O_HED)

    @staticmethod
    def _read(norm: Any, r_CSD: Tensor, change: Change | None) -> Tensor:
        return norm(r_CSD if change is None else r_CSD + change.added_ChSD[:, 0])

    # --- names ---

    @property
    def sources(self) -> list[str]:
        """Every source in the order in which it is computed: `input`, `a0.h0`, ..., `m0`, `a1.h0`, ..."""
        names = ["input"]
        for layer in range(self.num_layers):
            names += [f"a{layer}.h{head}" for head in range(self.num_heads)] + [f"m{layer}"]
        return names

    @property
    def targets(self) -> list[str]:
        """Every target: `a0.h0<q>`, `a0.h0<k>`, `a0.h0<v>`, ..., `m0`, ..., `logits`."""
        names: list[str] = []
        for layer in range(self.num_layers):
            names += [f"a{layer}.h{head}<{kind}>" for kind in "qkv" for head in range(self.num_heads)] + [f"m{layer}"]
        return [*names, "logits"]

    def sources_before(self, layer: int, kind: str) -> int:
        """How many of the sources a target reads: those first in order."""
        through_attention = kind == "mlp" and not self.parallel
        return 1 + layer * (self.num_heads + 1) + (self.num_heads if through_attention else 0)

    @staticmethod
    def stacked(written: Written) -> Tensor:
        """What all sources wrote so far, in order: [C, U, S, D]."""
        parts = [written.embedding_CSD[:, None]]
        for layer, heads_CHSD in enumerate(written.heads):
            parts += [heads_CHSD, *(mlp_CSD[:, None] for mlp_CSD in written.mlps[layer : layer + 1])]
        return torch.cat(parts, 1)
