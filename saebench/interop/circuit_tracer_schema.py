"""What a graph of circuit-tracer must be like (schema 1): as its own classes define it and as Neuronpedia's schema and page take it.

The number that a feature has there is the Cantor pair of its layer and its number in the layer's dictionary, from which Neuronpedia
reads both.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from saebench.interop.documents import FLAG, LIST, NULL, NUMBER, OBJECT, TEXT, WHOLE, Kinds, problems, shown, wrong_fields

SCHEMA = 1
FEATURES, ERRORS = ("cross layer transcoder", "lorsa"), ("mlp reconstruction error", "lorsa error")
KINDS = (*FEATURES, *ERRORS, "embedding", "logit")
EMBEDDING = "E"  # the layer of tokens

METADATA: dict[str, Kinds] = {
    "slug": (TEXT,),
    "scan": (TEXT,),
    "prompt_tokens": (LIST,),
    "prompt": (TEXT,),
    "schema_version": (WHOLE,),
}
METADATA_MORE: dict[str, Kinds] = {"transcoder_list": (LIST,), "node_threshold": (NUMBER, NULL), "feature_details": (OBJECT,)}
VIEW: dict[str, Kinds] = {
    "pinnedIds": (LIST,), "supernodes": (LIST,), "linkType": (TEXT,), "clickedId": (TEXT, NULL), "sg_pos": (TEXT,),
}  # fmt: skip
NODE: dict[str, Kinds] = {
    "node_id": (TEXT,), "feature": (WHOLE, NULL), "layer": (TEXT, WHOLE), "ctx_idx": (WHOLE,), "feature_type": (TEXT,),
    "jsNodeId": (TEXT,), "clerp": (TEXT,),
}  # fmt: skip
NODE_MORE: dict[str, Kinds] = {
    "influence": (NUMBER, NULL), "activation": (NUMBER, NULL), "token_prob": (NUMBER, NULL), "is_target_logit": (FLAG,),
    "run_idx": (WHOLE,), "reverse_ctx_idx": (WHOLE,),
}  # fmt: skip
LINK: dict[str, Kinds] = {"source": (TEXT,), "target": (TEXT,), "weight": (NUMBER,)}


def pair(layer: int, index: int) -> int:
    """The number of a feature: the Cantor pair of its layer and its number in the layer."""
    return (layer + index) * (layer + index + 1) // 2 + index


def unpair(feature: int) -> tuple[int, int]:
    """Layer and number in the layer."""
    both = (isqrt(8 * feature + 1) - 1) // 2
    index = feature - both * (both + 1) // 2
    return both - index, index


def validate(document: Any) -> list[str]:
    """What is wrong with a graph, a line each with the place and the fix; nothing for one that circuit-tracer and Neuronpedia take. At most
    100 lines."""
    return problems(_wrong(document))


def _wrong(document: Any) -> Iterator[str]:
    yield from wrong_fields(
        document, "the graph", {"metadata": (OBJECT,), "qParams": (OBJECT,), "nodes": (LIST,), "links": (LIST,)}
    )
    if not isinstance(document, dict):
        return
    metadata, view, nodes, links = (document.get(name) for name in ("metadata", "qParams", "nodes", "links"))
    tokens = metadata.get("prompt_tokens") if isinstance(metadata, dict) else None
    if isinstance(metadata, dict):
        yield from _wrong_metadata(metadata)
    if isinstance(view, dict):
        yield from _wrong_view(view)
    if not isinstance(nodes, list) or not isinstance(links, list):
        return
    numbers: dict[str, int] = {}
    for number, node in enumerate(nodes):
        where = f"nodes[{number}]"
        found = list(wrong_fields(node, where, NODE, NODE_MORE))
        yield from found or _wrong_node(node, where, len(tokens) if isinstance(tokens, list) else None)
        name = node.get("node_id") if isinstance(node, dict) else None
        if isinstance(name, str):
            if name in numbers:
                yield f"{where}.node_id is {shown(name)}, as that of nodes[{numbers[name]}]{_hint(name)}: give every node its own"
            numbers.setdefault(name, number)
    yield from _wrong_links(links, numbers)


def _wrong_metadata(metadata: dict[str, Any]) -> Iterator[str]:
    yield from wrong_fields(metadata, "metadata", METADATA, METADATA_MORE)
    version = metadata.get("schema_version")
    if isinstance(version, int) and version != SCHEMA:
        yield f"metadata.schema_version is {shown(version)}: it must be {SCHEMA}, features numbered by layer and index"
    for name in ("prompt_tokens", "transcoder_list"):
        if isinstance(metadata.get(name), list):
            for number, token in enumerate(metadata[name]):
                if not isinstance(token, str):
                    yield f"metadata.{name}[{number}] is {shown(token)}: it must be text"


def _wrong_view(view: dict[str, Any]) -> Iterator[str]:
    yield from wrong_fields(view, "qParams", {}, VIEW)
    groups = view.get("supernodes")
    lists = [("qParams.pinnedIds", view.get("pinnedIds"))]
    lists += [(f"qParams.supernodes[{i}]", group) for i, group in enumerate(groups if isinstance(groups, list) else [])]
    for where, names in lists:
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            yield f"{where} is {shown(names)}: it must be a list of texts"


def _wrong_node(node: dict[str, Any], where: str, size: int | None) -> Iterator[str]:
    """Of a node whose fields are of the right kinds."""
    kind, layer, feature = node["feature_type"], str(node["layer"]), node["feature"]
    if kind not in KINDS:
        yield f"{where}.feature_type is {shown(kind)}: it must be one of {', '.join(KINDS)}"
        return
    if not node["node_id"]:
        yield f"{where}.node_id is empty: give every node its own"
    if node["ctx_idx"] < 0 or (size is not None and node["ctx_idx"] >= size):
        yield f"{where}.ctx_idx is {node['ctx_idx']}: it must be a position among metadata.prompt_tokens, which are {size}"
    if kind == "embedding":
        if layer != EMBEDDING:
            yield f"{where}.layer is {shown(layer)}: that of an embedding must be {EMBEDDING!r}"
        return
    if not (layer.isascii() and layer.isdigit() and len(layer) < 6):
        yield f"{where}.layer is {shown(layer)}: it must be the number of a layer"
        return
    if kind in FEATURES:
        if feature is None or feature < 0:
            yield f"{where}.feature is {shown(feature)}: it must be the pair of its layer and its number in the layer"
        elif unpair(feature)[0] != int(layer):
            of, index = unpair(feature)
            yield f"{where}.feature is {feature}, latent {index} of layer {of}, and its layer is {layer}: correct one of them"
    if kind == "logit":
        if feature is None or feature < 0:
            yield f"{where}.feature is {shown(feature)}: that of a logit must be the number of its token"
        if node["clerp"] and "(p=" not in node["clerp"]:
            yield f"{where}.clerp is {shown(node['clerp'])}: it must be empty or end in (p=PROBABILITY), which Neuronpedia reads"


def _wrong_links(links: list[Any], numbers: dict[str, int]) -> Iterator[str]:
    ends: dict[tuple[int, int], int] = {}
    sound = True
    for number, link in enumerate(links):
        where = f"links[{number}]"
        found = list(wrong_fields(link, where, LINK))
        if not found:
            found = [
                f"{where}.{end} is {shown(link[end])}, which no node has: add the node or remove the link"
                for end in ("source", "target")
                if link[end] not in numbers
            ]
        if not found:
            edge = (numbers[link["target"]], numbers[link["source"]])
            if edge in ends:
                found = [f"{where} joins the nodes that links[{ends[edge]}] joins: keep one of them"]
            ends.setdefault(edge, number)
        sound &= not found
        yield from found
    if sound and ends:
        yield from _circles(np.array(list(ends)), {number: name for name, number in numbers.items()})


def _circles(edges_E2: np.ndarray, names: dict[int, str]) -> Iterator[str]:
    """Influence is a sum over paths, which has no end where links go round."""
    count = int(edges_E2.max()) + 1
    matrix = sp.csr_array((np.ones(len(edges_E2)), edges_E2.T), shape=(count, count))
    _, groups_N = connected_components(matrix, connection="strong")
    round_N = np.bincount(groups_N)[groups_N] > 1
    round_N[edges_E2[edges_E2[:, 0] == edges_E2[:, 1], 0]] = True
    if round_N.any():
        yield f"links go in a circle through the node {shown(names[int(round_N.argmax())])}: remove those that go backwards"


def _hint(name: str) -> str:
    """circuit-tracer gives the error of layer 3 and latent 3 of layer 0 at one position the same id."""
    return " (circuit-tracer names an error of layer N and latent N of layer 0 alike)" if name.startswith("0_") else ""
