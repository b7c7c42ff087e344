"""Circuits of heads and MLPs as the JSON of EAP-IG's `Graph`: edges with scores, what is in the circuit, and the model's size.

Scores mean the same in both: what the metric changes by when what a source writes is patched, averaged over examples.
Shape suffixes: `U` sources, `T` targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.circuits.discovery.model_edges import ComponentEffects, EdgeEffects
from saebench.errors import UserError
from saebench.files import replacing
from saebench.interop.documents import FLAG, NUMBER, OBJECT, WHOLE, Kinds, problems, read_document, refuse, shown, wrong_fields

SIZES: dict[str, Kinds] = {"n_layers": (WHOLE,), "n_heads": (WHOLE,), "d_model": (WHOLE,), "parallel_attn_mlp": (FLAG,)}
MOST_EDGES = 1 << 26


@dataclass(frozen=True)
class EapCircuit:
    """Edges with their effects, and which of them, and which components, are in the circuit."""

    effects: EdgeEffects
    kept_UT: Tensor
    nodes: dict[str, bool]
    """By name: sources, then `logits`."""
    d_model: int
    scores: dict[str, float] = field(default_factory=dict)
    """Effects of components, of those that have one."""

    @property
    def size(self) -> dict[str, Any]:
        """The model, as EAP describes it."""
        layers = sum(name.startswith("m") for name in self.effects.sources)
        heads = sum(name.startswith("a0.") for name in self.effects.sources)
        beside = bool(
            self.effects.effect_UT[1, self.effects.targets.index("m0")].isnan()
        )  # the first head's edge to its layer's MLP
        return {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": beside, "d_model": self.d_model}


def eap_circuit(
    effects: EdgeEffects, d_model: int, *, top: int | None = None, components: ComponentEffects | None = None
) -> EapCircuit:
    """The circuit of the `top` strongest edges (all by default), without those that lie on no path from the input to the logits;
    `components` are scores of its nodes. Raises UserError for a `top` that there is not."""
    edges = ~effects.effect_UT.isnan()
    count = int(edges.sum())
    if top is not None and not 1 <= top <= count:
        raise UserError(f"top={top} edges: the model has {count:,}, use a number from 1 to that")
    kept_UT = edges.clone()
    if top is not None:
        chosen = effects.effect_UT.abs().nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)[:top]
        kept_UT = torch.zeros(edges.numel(), dtype=torch.bool).index_fill_(0, chosen, True).view_as(edges)
        kept_UT &= _on_paths(effects, kept_UT)
    scores = dict(zip(components.names, components.effect_N.tolist(), strict=True)) if components is not None else {}
    return EapCircuit(effects, kept_UT, _touched(effects, kept_UT), d_model, scores)


def write_eap(circuit: EapCircuit, path: str | Path) -> None:
    """Write a circuit, atomically; what stood there is replaced."""
    path, effects = Path(path), circuit.effects
    there_UT = ~effects.effect_UT.isnan()
    scores = effects.effect_UT[there_UT].numpy().astype(str)  # float32 no longer than it needs to be to come back the same
    edges = {
        f"{effects.sources[u]}->{effects.targets[t]}": {"score": float(score), "in_graph": kept}
        for (u, t), score, kept in zip(there_UT.nonzero().tolist(), scores, circuit.kept_UT[there_UT].tolist(), strict=True)
    }
    nodes = {
        name: {"in_graph": kept} | ({"score": circuit.scores[name]} if name in circuit.scores else {})
        for name, kept in circuit.nodes.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump({"cfg": circuit.size, "nodes": nodes, "edges": edges}, file, allow_nan=False)
        file.write("\n")


def read_eap(path: str | Path) -> EapCircuit:
    """A circuit from a file of EAP-IG or of `write_eap`. Edges and nodes that the file leaves out score 0 and are not in the circuit, as
    EAP itself reads them; neurons are not read. Raises UserError for a file that is not as the format says."""
    document = read_document(path)
    refuse(path, validate(document))
    names = _Names(document["cfg"])
    effect_UT = torch.full((len(names.sources), len(names.targets)), torch.nan)
    for t, before in enumerate(names.before):
        effect_UT[:before, t] = 0.0
    kept_UT = torch.zeros_like(effect_UT, dtype=torch.bool)
    for name, edge in document["edges"].items():
        if (ends := names.edge(name)) is not None:
            effect_UT[ends], kept_UT[ends] = edge["score"], edge["in_graph"]
    nodes, scores = dict.fromkeys([*names.sources, "logits"], False), {}
    for name, node in document["nodes"].items():
        nodes[name] = node["in_graph"]
        if "score" in node:
            scores[name] = float(node["score"])
    return EapCircuit(EdgeEffects(names.sources, names.targets, effect_UT), kept_UT, nodes, document["cfg"]["d_model"], scores)


def validate(document: Any) -> list[str]:
    """What is wrong with a circuit, a line each with the place and the fix; nothing for one that EAP-IG takes. At most 100 lines."""
    return problems(_wrong(document))


def _wrong(document: Any) -> Iterator[str]:
    parts: dict[str, Kinds] = {"cfg": (OBJECT,), "nodes": (OBJECT,), "edges": (OBJECT,)}
    found = list(wrong_fields(document, "the circuit", parts)) or list(wrong_fields(document["cfg"], "cfg", SIZES))
    found = found or [
        f"cfg.{name} is {size}: it must be at least 1"
        for name, size in document["cfg"].items()
        if name in SIZES and name != "parallel_attn_mlp" and size < 1
    ]
    if not found:
        layers, heads = document["cfg"]["n_layers"], document["cfg"]["n_heads"]
        count = (1 + layers * (heads + 1)) * (1 + layers * (3 * heads + 1))
        if count > MOST_EDGES:
            found = [
                f"cfg has {layers} layers of {heads} heads, and at most {MOST_EDGES:,} pairs of components are read: correct it"
            ]
    if found:
        yield from found
        return
    names = _Names(document["cfg"])
    nodes, edges = document["nodes"], document["edges"]
    for part, where in ((nodes, "nodes"), (edges, "edges")):
        yield from wrong_fields(part, where, {})
    known = {*names.sources, "logits"}
    for name, node in nodes.items():
        where = f"nodes[{shown(name)}]"
        if name not in known:
            yield f"{where} is no component of a model of {names.size}: use input, a0.h0, m0 or logits"
        yield from wrong_fields(node, where, {"in_graph": (FLAG,)}, {"score": (NUMBER,)})
    for name, edge in edges.items():
        where = f"edges[{shown(name)}]"
        if (ends := names.edge(name)) is None:
            yield f"{where} is no edge of a model of {names.size}: use input->m0, or input->a0.h0<q> for a head's queries, keys or values"
        elif ends[0] >= names.before[ends[1]]:
            yield f"{where} goes backwards: its source must be computed before its target"
        yield from wrong_fields(edge, where, {"score": (NUMBER,), "in_graph": (FLAG,)})


class _Names:
    """The components of a model of some size, in the order of `EdgeEffects`."""

    def __init__(self, cfg: dict[str, Any]):
        layers, heads, beside = cfg["n_layers"], cfg["n_heads"], cfg["parallel_attn_mlp"]
        self.size = f"{layers} layers and {heads} heads"
        self.sources, self.targets = ["input"], []
        self.before: list[int] = []
        """By target, how many of the sources it reads: those first in order."""
        for layer in range(layers):
            self.targets += [f"a{layer}.h{head}<{kind}>" for kind in "qkv" for head in range(heads)] + [f"m{layer}"]
            self.before += [len(self.sources)] * (3 * heads) + [len(self.sources) + (0 if beside else heads)]
            self.sources += [f"a{layer}.h{head}" for head in range(heads)] + [f"m{layer}"]
        self.targets.append("logits")
        self.before.append(len(self.sources))
        self._sources = {name: number for number, name in enumerate(self.sources)}
        self._targets = {name: number for number, name in enumerate(self.targets)}

    def edge(self, name: str) -> tuple[int, int] | None:
        """The numbers of its source and target."""
        source, _, target = name.partition("->")
        return (self._sources[source], self._targets[target]) if source in self._sources and target in self._targets else None


def _component(target: str) -> str:
    """What a target belongs to: `a0.h1<q>` to `a0.h1`."""
    return re.sub(r"<[qkv]>$", "", target)


def _on_paths(effects: EdgeEffects, kept_UT: Tensor) -> Tensor:
    """Which edges have a source that the input reaches and a target that reaches the logits: [U, T]."""
    of_T = [_component(target) for target in effects.targets]
    fed, needed = {"input"}, {"logits"}
    for t, name in enumerate(of_T):  # targets stand in the order in which they are computed
        if any(effects.sources[u] in fed for u in kept_UT[:, t].nonzero().flatten().tolist()):
            fed.add(name)
    for u in reversed(range(len(effects.sources))):
        if any(of_T[t] in needed for t in kept_UT[u].nonzero().flatten().tolist()):
            needed.add(effects.sources[u])
    fed_U = torch.tensor([source in fed for source in effects.sources])
    needed_T = torch.tensor([target in needed for target in of_T])
    return fed_U[:, None] & needed_T


def _touched(effects: EdgeEffects, kept_UT: Tensor) -> dict[str, bool]:
    """Components that an edge of the circuit begins or ends at; the logits always."""
    ends = {_component(effects.targets[t]) for t in kept_UT.any(0).nonzero().flatten().tolist()}
    begins = {effects.sources[u] for u in kept_UT.any(1).nonzero().flatten().tolist()}
    return {name: name in begins or name in ends for name in effects.sources} | {"logits": True}
