"""Documents of circuit-tracer's viewer and of Neuronpedia, read, checked and taken for graphs (docs/viewers.md).

1. `read_document` checks what the viewers rely on, and returns the document as it is, but for the view: saving in the
   viewer turns its lists into strings, which become lists again (trap 8).
2. `graph_of` makes a graph of it. Documents that `viewer_json` wrote tell what every node is. In others a feature's
   block is its layer, its index is unpaired from its integer, all streams are text, and columns are positions.

A document has no biases: of its targets the sums of the edges in it are known, their pre-activations are not (NaN).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffract_jax.address import TXT
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT, Graph
from difffract_jax.graphs.provenance import Provenance
from difffract_jax.storage.files import atomic_file

_TEXT, _INTEGER, _NUMBER = (str,), (int,), (int, float)
NODE_FIELDS: dict[str, tuple[type, ...]] = {
    "node_id": _TEXT,
    "feature": (int, type(None)),
    "layer": (str, int),
    "ctx_idx": _INTEGER,
    "feature_type": _TEXT,
    "jsNodeId": _TEXT,
    "clerp": _TEXT,
}
"""What every node must have."""
METADATA_FIELDS: dict[str, tuple[type, ...]] = {
    "slug": _TEXT,
    "scan": _TEXT,
    "transcoder_list": (list,),
    "prompt_tokens": (list,),
    "prompt": _TEXT,
}
LINK_FIELDS: dict[str, tuple[type, ...]] = {"source": _TEXT, "target": _TEXT, "weight": _NUMBER}


def write_document(document: Mapping[str, Any], path: str | Path) -> None:
    """Writes a document.

    Args:
        document: from `read_document` or `viewer_json`.
        path: file to write; it appears only when it is complete.
    """
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_document(path: str | Path) -> dict[str, Any]:
    """Reads a document.

    Args:
        path: the file.

    Raises:
        UserError: naming the first thing in it that the viewers would not take.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({error}); export the graph again.") from None
    problem = problem_of(document)
    if problem:
        raise UserError(f"{path} is not a graph of circuit-tracer or Neuronpedia: {problem}.")
    view = dict(document["qParams"])
    if isinstance(view.get("pinnedIds"), str):
        view["pinnedIds"] = [name for name in view["pinnedIds"].split(",") if name]
    if isinstance(view.get("supernodes"), str):
        view["supernodes"] = json.loads(view["supernodes"] or "[]")
    return document | {"qParams": view}


def problem_of(document: Any) -> str | None:
    """Returns the first thing that is wrong with a document, None if nothing is."""
    if not isinstance(document, dict):
        return f"it is a {type(document).__name__} instead of an object"
    for key, form in (("metadata", dict), ("qParams", dict), ("nodes", list), ("links", list)):
        if not isinstance(document.get(key), form):
            return f"its {key} are missing or no {form.__name__}"
    tables = [("metadata", METADATA_FIELDS, [document["metadata"]])]
    tables += [("a node", NODE_FIELDS, document["nodes"]), ("a link", LINK_FIELDS, document["links"])]
    for what, table, entries in tables:
        for entry in entries:
            if not isinstance(entry, dict):
                return f"{what} is a {type(entry).__name__} instead of an object"
            wrong = [name for name, types in table.items() if not isinstance(entry.get(name, entry), types)]
            if wrong:
                return f"{what} has no {wrong[0]} of the right type in {json.dumps(entry)[:100]}"
    ids = [node["node_id"] for node in document["nodes"]]
    if len(set(ids)) < len(ids):
        return f"two nodes are called {next(name for name in ids if ids.count(name) > 1)}"
    if not any(node["feature_type"] == "logit" for node in document["nodes"]):
        return "it has no logit, which would be its target"
    return None


def graph_of(document: Mapping[str, Any]) -> Graph:
    """Returns the graph of a document.

    Args:
        document: from `read_document`; links with an end that is not a node are left out, as the viewers do.

    Raises:
        UserError: if it has nodes of a kind that a graph cannot hold, as biases.
    """
    nodes = _targets_first(document["nodes"])
    number = {node["node_id"]: place for place, node in enumerate(nodes)}
    raw = not document["metadata"].get("schema_version", 0)
    identity = np.array([_identity(node, raw) for node in nodes], np.int64).reshape(-1, 6)
    kind, step, stream, block, position, feature = identity.T
    # Logits stand above all layers, whatever their document says.
    outputs = kind == OUTPUT
    block[outputs] = max(int(block[~outputs].max(initial=-1)) + 1, int(block[outputs].max(initial=0)))
    links = [link for link in document["links"] if link["source"] in number and link["target"] in number]
    source, target = (np.array([number[link[end]] for link in links], np.int32) for end in ("source", "target"))
    value = np.array([link["weight"] for link in links], np.float32)
    order = np.lexsort((source, target))
    weights = [float(node["token_prob"]) for node in nodes if _weight(node) > 0] or [1.0] * int(outputs.sum())
    expanded = np.union1d(np.arange(len(weights)), target).astype(np.int32)
    sums, sizes = (np.bincount(target, v.astype(np.float64), len(nodes))[expanded] for v in (value, np.abs(value)))
    unknown = np.full(expanded.size, np.nan)
    groups = {str(name): [number[n] for n in ids if n in number] for name, *ids in _supernodes(document)}
    return Graph(
        node_kind=kind.astype(np.uint8),
        node_step=step.astype(np.int16),
        node_stream=stream.astype(np.uint8),
        node_block=block.astype(np.int16),
        node_position=position.astype(np.int32),
        node_feature=feature.astype(np.int32),
        node_value=np.array([_activation(node, k) for node, k in zip(nodes, kind.tolist(), strict=True)], np.float32),
        node_influence=np.full(len(nodes), np.nan, np.float32),
        edge_source=source[order],
        edge_target=target[order],
        edge_attribution=value[order],
        target_node=expanded,
        target_preactivation=unknown,
        target_bias=unknown.copy(),
        target_sum=sums,
        target_abs_sum=sizes,
        map_indptr=np.zeros(len(nodes) + 1, np.int64),
        map_position=np.zeros(0, np.int32),
        map_value=np.zeros(0, np.float32),
        supernodes=groups,
        provenance=Provenance(target_weights=tuple(weights), viewer=dict(document["metadata"])),
    )


def _targets_first(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the nodes with the logits that carry weight first, then the other logits, then all others."""
    return sorted(nodes, key=lambda n: (n["feature_type"] != "logit", _weight(n) <= 0, not n.get("is_target_logit")))


def _weight(node: Mapping[str, Any]) -> float:
    return float(node.get("token_prob") or 0.0) if node["feature_type"] == "logit" else 0.0


def _supernodes(document: Mapping[str, Any]) -> list[list[str]]:
    return document["qParams"].get("supernodes") or []


def _activation(node: Mapping[str, Any], kind: int) -> float:
    known = node.get("activation")
    return float(known) if kind == FEATURE and known is not None else 1.0


def _identity(node: Mapping[str, Any], raw: bool) -> list[int]:
    """Returns kind, step, stream, block, position and feature of a node."""
    if "difffract" in node:
        return node["difffract"]
    kind, column = node["feature_type"], node["ctx_idx"]
    if kind == "logit":
        return [OUTPUT, 0, TXT, -1, column, -1]
    if kind == "embedding":
        return [INPUT, 0, TXT, -1, column, -1]
    if "error" in kind:
        return [ERROR, 0, TXT, int(node["layer"]), column, -1]
    if kind in ("bias", "unknown") or node["feature"] is None:
        raise UserError(f"The node {node['node_id']} is of type {kind!r}, which a graph of ours cannot hold.")
    return [FEATURE, 0, TXT, int(node["layer"]), column, node["feature"] if raw else unpair(node["feature"])[1]]


def unpair(number: int) -> tuple[int, int]:
    """Returns the two numbers that Cantor's pairing made one of: dictionary and feature.

    Args:
        number: not negative.
    """
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature
