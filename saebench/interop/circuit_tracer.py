"""Graphs as circuit-tracer's JSON, schema 1, which Neuronpedia takes too: written and read.

Latents that write an MLP's output are called as circuit-tracer calls them, LAYER_LATENT_POSITION, and tokens and logits too. Its name
for an error, 0_LAYER_POSITION, is also that of a latent of layer 0; here it is LAYER_error_mlp_POSITION. What reads or writes elsewhere
has a name that no other has: LAYER_dN_LATENT_POSITION for latents of dictionary N, LAYER_error_attn_POSITION.

What the format has no place for stands beside it under `saebench`, in `metadata` and in every node, which both programs skip: sites, the
dictionaries, values, constants and what was dropped. A graph without it is read as far as it says (docs/formats.md).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from saebench.circuits.graphs.graph import KINDS, Graph, Nodes
from saebench.circuits.graphs.influence import influence
from saebench.circuits.sets.groups import Supernodes
from saebench.errors import UserError
from saebench.files import replacing
from saebench.interop.circuit_tracer_schema import EMBEDDING, ERRORS, FEATURES, SCHEMA, pair, unpair, validate
from saebench.interop.documents import read_document, refuse, shown

OWN, VERSION = "saebench", 1
PINNED = "circuit_tracer"  # in a graph's extra: what was pinned in a file
HEAD = ("ids", "model", "dictionaries", "sites", "settings", "extra")
COLUMNS = ("value", "weight", "probability", "constant", "dropped", "dropped_size")  # of nodes, which the format lacks
SHARE = 0.8  # of influence that is shown first
TARGETS = ("logit", "difference", "direction")
TOKENS, FINAL = "blocks.0.hook_resid_pre", "ln_final.hook_out"


def write_circuit_tracer(
    graph: Graph, path: str | Path, *, scan: str | None = None, supernodes: Supernodes | None = None
) -> None:
    """Write a graph, atomically; what stood there is replaced. `scan` is the name of the model as Neuronpedia knows it, by default the
    graph's. `supernodes`, of this graph, are pinned. Raises UserError for supernodes of another graph."""
    path = Path(path)
    if supernodes is not None:
        supernodes.check(graph)
    document = _Writing(graph).document(path.stem, scan, supernodes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, allow_nan=False, separators=(",", ":"))
        file.write("\n")


def read_circuit_tracer(path: str | Path) -> Graph:
    """A graph from a file of `write_circuit_tracer`, with all that it had, or of circuit-tracer. Raises UserError for a file that is not as
    the schema says."""
    document = read_document(path)
    refuse(path, validate(document))
    own = document["metadata"].get(OWN)
    graph = _theirs(document) if own is None else _ours(document, own, path)
    seen: dict[str, int] = {}
    for number in range(len(graph)):
        name = graph.id(number)
        if name in seen:
            raise UserError(f"{path}: nodes[{number}] and nodes[{seen[name]}] are both {name}: keep one of them")
        seen[name] = number
    _pin(graph, document)
    return graph


def _pin(graph: Graph, document: dict[str, Any]) -> None:
    """Keeps what is pinned and grouped on the page, by the ids that nodes have in a graph."""
    called = {node["node_id"]: graph.id(number) for number, node in enumerate(document["nodes"])}
    view = document["qParams"]
    pinned = [called[name] for name in view.get("pinnedIds", []) if name in called]
    groups = [[group[0], *(called[n] for n in group[1:] if n in called)] for group in view.get("supernodes", []) if group]
    if pinned or groups:
        graph.extra[PINNED] = {"pinned": pinned, "supernodes": groups}


def layer_of(site: str, layers: int) -> int:
    """The layer of a site; what is behind all layers is in one of its own."""
    found = re.match(r"blocks\.(\d+)\.", site)
    return int(found[1]) if found else layers


class _Writing:
    def __init__(self, graph: Graph):
        self.graph = graph
        sites = [*graph.sites, *(site for d in graph.dictionaries for site in (*d["reads"], *d["writes"]))]
        self.layers = 1 + max((layer_of(site, -1) for site in sites), default=0)
        self.attention = [any("attn" in site for site in d["writes"]) for d in graph.dictionaries]
        self.plain: dict[int, tuple[int, str]] = {}
        """By layer the dictionary, and where it reads, whose latents are called as circuit-tracer's."""
        for number, d in enumerate(graph.dictionaries):
            if any("mlp" in site for site in d["writes"]):
                for site in d["reads"]:
                    self.plain.setdefault(layer_of(site, self.layers), (number, site))
        self.errors: dict[tuple[int, str], int] = {}

    def document(self, slug: str, scan: str | None, supernodes: Supernodes | None) -> dict[str, Any]:
        graph = self.graph
        names = [self.name(number) for number in range(len(graph))]
        into_E = np.repeat(np.arange(len(graph)), np.diff(graph.offsets_N))
        reached_N = self.reached()
        return {
            "metadata": {
                "slug": slug,
                "scan": scan or graph.model["name"],
                "transcoder_list": [d["name"] for d in graph.dictionaries],
                "prompt_tokens": graph.tokens,
                "prompt": graph.prompt,
                "node_threshold": graph.settings.get("node_share", SHARE),
                "schema_version": SCHEMA,
                "info": {"generator": {"name": "saebench"}},
                OWN: {"version": VERSION, **{name: getattr(graph, name) for name in HEAD}},
            },
            "qParams": {**self.pinned(names, supernodes), "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": [self.node(number, name, float(reached_N[number])) for number, name in enumerate(names)],
            "links": [
                {"source": names[source], "target": names[target], "weight": weight}
                for source, target, weight in zip(graph.sources_E.tolist(), into_E.tolist(), _short(graph.weights_E), strict=True)
            ],
        }

    def pinned(self, names: list[str], supernodes: Supernodes | None) -> dict[str, list]:
        """What the page's subgraph shows: supernodes, or what was pinned in the file that the graph was read from."""
        if supernodes is not None:
            groups = [[group.name, *(names[n] for n in group.members)] for group in supernodes.groups]
            return {"pinnedIds": [name for group in groups for name in group[1:]], "supernodes": groups}
        before = self.graph.extra.get(PINNED, {"pinned": [], "supernodes": []})
        called = {self.graph.id(n): name for n, name in enumerate(names)} if before["pinned"] or before["supernodes"] else {}
        groups = [[group[0], *(called[id] for id in group[1:] if id in called)] for group in before["supernodes"]]
        return {"pinnedIds": [called[id] for id in before["pinned"] if id in called], "supernodes": groups}

    def reached(self) -> np.ndarray:
        """The share of all influence that a node and those above it hold: what the page's slider hides nodes by."""
        influence_N = influence(self.graph)
        order_N = np.argsort(-influence_N, kind="stable")
        total = float(influence_N.sum())
        reached_N = np.zeros(len(influence_N))
        reached_N[order_N] = np.cumsum(influence_N[order_N]) / (total or 1.0)
        return reached_N.clip(0.0, 1.0)

    def layer(self, number: int) -> int:
        nodes = self.graph.nodes
        return layer_of(self.graph.sites[nodes.site_N[number]], self.layers)

    def index(self, number: int) -> int:
        """The number of a latent among those of its layer."""
        nodes = self.graph.nodes
        dictionary, site = self.graph.dictionaries[nodes.dictionary_N[number]], self.graph.sites[nodes.site_N[number]]
        per_layer = dictionary["d_sae"] // max(1, len(dictionary["reads"]))
        first = dictionary["reads"].index(site) * per_layer if len(dictionary["reads"]) > 1 and site in dictionary["reads"] else 0
        return int(nodes.latent_N[number]) - first

    def name(self, number: int) -> str:
        """A name that no other node of the graph has, of letters that are safe in a page."""
        nodes, kind, layer = self.graph.nodes, KINDS[self.graph.nodes.kind_N[number]], self.layer(number)
        position = nodes.position_N[number]
        if kind == "feature":
            dictionary = int(nodes.dictionary_N[number])
            if self.plain.get(layer) == (dictionary, self.graph.sites[nodes.site_N[number]]):
                return f"{layer}_{self.index(number)}_{position}"
            return f"{layer}_d{dictionary}_{nodes.latent_N[number]}_{position}"
        if kind == "error":
            site = int(nodes.site_N[number])
            what = next((part for part in ("mlp", "attn") if part in self.graph.sites[site]), "stream")
            first = self.errors.setdefault((layer, what), site)
            return f"{layer}_error_{what}{'' if first == site else site}_{position}"
        if kind == "token":
            return f"{EMBEDDING}_{nodes.token_N[number]}_{position}"
        if kind == "logit":
            return f"{self.layers + 1}_{nodes.token_N[number]}_{position}"
        return f"{self.layers + 1}_{self.graph.id(number).replace('/', '_')}_{position}"

    def node(self, number: int, name: str, reached: float) -> dict[str, Any]:
        graph, nodes, kind = self.graph, self.graph.nodes, KINDS[self.graph.nodes.kind_N[number]]
        attention = (
            self.attention[nodes.dictionary_N[number]] if kind == "feature" else "attn" in graph.sites[nodes.site_N[number]]
        )
        label = graph.labels.get(number, "")
        made: dict[str, Any] = {
            "node_id": name,
            "feature": -1,
            "layer": str(self.layer(number)),
            "ctx_idx": int(nodes.position_N[number]),
        }
        more: dict[str, Any] = {"influence": reached}
        if kind == "feature":
            made |= {"feature_type": FEATURES[attention], "feature": pair(self.layer(number), self.index(number))}
            more["activation"] = _short(nodes.activation_N[number : number + 1])[0]
        elif kind == "error":
            made["feature_type"] = ERRORS[attention]
        elif kind == "token":
            made |= {"feature_type": "embedding", "feature": int(nodes.position_N[number]), "layer": EMBEDDING}
        else:  # targets that are no logits are shown as such, with their share as the probability
            chance = float((nodes.probability_N if kind == "logit" else nodes.weight_N)[number])
            made |= {"feature_type": "logit", "feature": int(nodes.token_N[number]), "layer": str(self.layers + 1)}
            more = {"token_prob": chance}
            label = f'Output "{label}" (p={chance:.3f})'
        return {
            **made, "jsNodeId": name, "clerp": label, "token_prob": 0.0, "is_target_logit": bool(nodes.weight_N[number] > 0), **more,
            OWN: self.own(number, kind),
        }  # fmt: skip

    def own(self, number: int, kind: str) -> dict[str, Any]:
        """What the format has no place for, zeros left out."""
        graph, nodes = self.graph, self.graph.nodes
        own: dict[str, Any] = {"kind": kind, "site": int(nodes.site_N[number]), "token": int(nodes.token_N[number])}
        if nodes.dictionary_N[number] >= 0:
            own |= {"dictionary": int(nodes.dictionary_N[number]), "latent": int(nodes.latent_N[number])}
        own |= {name: value for name in COLUMNS if (value := float(getattr(nodes, f"{name}_N")[number]))}
        if number in graph.labels:
            own["label"] = graph.labels[number]
        if number in graph.vectors:
            own["vector"] = graph.vectors[number]
        return own


def _short(column: np.ndarray) -> list[float]:
    """float32 as numbers that are no longer than they need to be to come back the same."""
    return [float(text) for text in column.astype(np.float32).astype(str)]


# --- reading ---


def _assembled(document: dict[str, Any], columns: dict[str, Any], head: dict[str, Any], **named: Any) -> Graph:
    """A graph of some columns of nodes, and the file's links."""
    nodes, links, metadata = document["nodes"], document["links"], document["metadata"]
    numbers = {node["node_id"]: number for number, node in enumerate(nodes)}
    into_E = np.array([numbers[link["target"]] for link in links], dtype=np.int64)
    order_E = np.argsort(into_E, kind="stable")
    from_E = np.array([numbers[link["source"]] for link in links], dtype=np.int32)
    weights_E = np.array([link["weight"] for link in links], dtype=np.float32)
    kinds = {"site": np.int16, "dictionary": np.int16, "latent": np.int32, "token": np.int32} | dict.fromkeys(COLUMNS, np.float64)
    table = Nodes(
        kind_N=np.array([KINDS.index(kind) for kind in columns["kind"]], dtype=np.int8),
        position_N=np.array([node["ctx_idx"] for node in nodes], dtype=np.int32),
        activation_N=np.array([node.get("activation") or 0.0 for node in nodes], dtype=np.float32),
        **{f"{name}_N": np.array(columns[name], dtype=kind) for name, kind in kinds.items()},
    )
    return Graph(
        prompt=metadata["prompt"], tokens=metadata["prompt_tokens"], nodes=table,
        offsets_N=np.concatenate([[0], np.cumsum(np.bincount(into_E, minlength=len(nodes)))]).astype(np.int64),
        sources_E=from_E[order_E], weights_E=weights_E[order_E], **head, **named,
    )  # fmt: skip


def _ours(document: dict[str, Any], own: Any, path: str | Path) -> Graph:
    """A graph that this package wrote."""
    if not isinstance(own, dict) or own.get("version") != VERSION:
        version = shown(own.get("version") if isinstance(own, dict) else own)
        raise UserError(
            f"{path}: metadata.{OWN} is of version {version}, and this saebench reads {VERSION}: remove it to read the rest"
        )
    try:
        head = {name: own[name] for name in HEAD}
        parts = [node[OWN] for node in document["nodes"]]
        columns = {name: [part.get(name, 0.0) for part in parts] for name in COLUMNS}
        columns |= {name: [part[name] for part in parts] for name in ("kind", "site", "token")}
        columns |= {name: [part.get(name, -1) for part in parts] for name in ("dictionary", "latent")}
        labels = {n: str(part["label"]) for n, part in enumerate(parts) if "label" in part}
        vectors = {n: [float(x) for x in part["vector"]] for n, part in enumerate(parts) if "vector" in part}
        graph = _assembled(document, columns, head, labels=labels, vectors=vectors)
        table = graph.nodes
        features_N = graph.is_kind("feature")
        whole = (
            len(graph.ids) == len(graph.tokens)
            and all(np.isfinite(column).all() for column in table.__dict__.values())
            and ((table.site_N >= 0) & (table.site_N < len(graph.sites))).all()
            and ((table.dictionary_N[features_N] >= 0) & (table.dictionary_N[features_N] < len(graph.dictionaries))).all()
            and (set(vectors) == set(np.flatnonzero(graph.is_kind("difference", "direction")).tolist()))
        )
        reason = "its parts do not fit together"
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        whole, reason = False, f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    if not whole:
        raise UserError(f"{path}: what stands under {OWN!r} is damaged ({reason}): remove it from metadata to read the rest")
    return graph


def _theirs(document: dict[str, Any]) -> Graph:
    """A graph that says only what the format says: dictionaries at the usual sites, and what is not said of values is a constant."""
    nodes, metadata = document["nodes"], document["metadata"]
    ids = _token_ids(nodes, len(metadata["prompt_tokens"]))
    parts = [_part(node, ids) for node in nodes]
    sites = list(dict.fromkeys([TOKENS, FINAL, *(part["site"] for part in parts)]))
    largest: dict[tuple[str, int], int] = {}
    """By kind and layer the largest number of a latent."""
    for part in parts:
        if (key := part["dictionary"]) is not None:
            largest[key] = max(part["latent"], largest.get(key, 0))
    order = sorted(largest)
    dictionaries = [
        {
            "name": f"{what}-{layer}",
            "architecture": "lorsa" if what == "attention" else "transcoder",
            "d_sae": largest[what, layer] + 1,
            "reads": [_places(what, layer)[0]],
            "writes": [_places(what, layer)[1]],
            "fingerprint": "",
        }
        for what, layer in order
    ]
    columns: dict[str, Any] = {name: [part[name] for part in parts] for name in ("kind", "latent", "token")}
    columns["site"] = [sites.index(part["site"]) for part in parts]
    columns["dictionary"] = [-1 if part["dictionary"] is None else order.index(part["dictionary"]) for part in parts]
    chance_N = np.array([part["probability"] for part in parts], dtype=np.float64)
    columns |= {name: np.zeros(len(nodes)) for name in COLUMNS}
    columns |= {"probability": chance_N, "weight": chance_N / (chance_N.sum() or 1.0)}
    head = {
        "ids": ids,
        "model": {"name": metadata["scan"], "fingerprint": ""},
        "dictionaries": dictionaries,
        "sites": sites,
        "settings": {"source": "circuit-tracer"},
        "extra": {},
    }
    graph = _assembled(document, columns, head, labels={n: part["label"] for n, part in enumerate(parts) if part["label"]})
    added_N = np.asarray(graph.matrix().sum(1), dtype=np.float64)
    features_N = graph.is_kind("feature")
    graph.nodes.value_N[:] = np.where(features_N, graph.nodes.activation_N, np.where(graph.is_kind("logit"), added_N, 0.0))
    graph.nodes.constant_N[features_N] = (graph.nodes.value_N - added_N)[features_N]
    return graph


def _token_ids(nodes: list[dict[str, Any]], count: int) -> list[int]:
    """Of the prompt, from the names of its nodes; -1 where there is none."""
    ids = [-1] * count
    for node in nodes:
        if node["feature_type"] == "embedding" and (found := re.fullmatch(rf"{EMBEDDING}_(\d{{1,9}})_\d+", node["node_id"])):
            ids[node["ctx_idx"]] = int(found[1])
    return ids


def _part(node: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """What a node says of itself, in our words."""
    kind = node["feature_type"]
    what = "attention" if kind in (FEATURES[1], ERRORS[1]) else "mlp"
    part = {"kind": "token", "site": TOKENS, "dictionary": None, "latent": -1, "token": ids[node["ctx_idx"]], "probability": 0.0}
    part["label"] = ""
    if kind in FEATURES:
        layer, latent = unpair(node["feature"])
        part |= {"kind": "feature", "site": _places(what, layer)[0], "dictionary": (what, layer), "latent": latent}
        part["label"] = node["clerp"]
    elif kind in ERRORS:
        part |= {"kind": "error", "site": _places(what, int(node["layer"]))[1]}
    elif kind == "logit":
        said = re.fullmatch(r'[^"]*"(.*)" \(p=[^)]*\)', node["clerp"], re.DOTALL)
        part |= {"kind": "logit", "site": FINAL, "token": node["feature"], "probability": node.get("token_prob") or 0.0}
        part["label"] = said[1] if said else node["clerp"]
    return part


def _places(what: str, layer: int) -> tuple[str, str]:
    """Where dictionaries of an MLP or of attention read and write."""
    ends = ("attn.hook_in", "hook_attn_out") if what == "attention" else ("mlp.hook_in", "hook_mlp_out")
    return f"blocks.{layer}.{ends[0]}", f"blocks.{layer}.{ends[1]}"
