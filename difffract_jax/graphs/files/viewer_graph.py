"""A document of circuit-tracer's viewer or of Neuronpedia, taken for a graph.

1. Documents that `viewer_json` wrote tell what every node is. In others a feature's block is its layer, its index is
   unpaired from its integer, all streams are text, and columns are positions.
2. Whether that integer is paired stands in `schema_version`, which may be missing or wrong; where the node's name holds
   either number, that one is taken.
3. `viewer_links` finds the nodes that links join.

A document has no biases: of its targets the sums of the edges in it are known, their pre-activations are not (NaN).
"""

import itertools
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from difffract_jax.address import BRANCHES, PROMPT, STREAMS, TXT
from difffract_jax.config import UserError
from difffract_jax.graphs.checks import check_values
from difffract_jax.graphs.files.viewer_document import is_error
from difffract_jax.graphs.files.viewer_links import resolve_links
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, KINDS, OUTPUT, SCORE, Graph
from difffract_jax.graphs.names import feature_names
from difffract_jax.graphs.provenance import Provenance
from difffract_jax.text_files import unicode_replaced

DIGITS = 40
"""Digits of a number that is read; a graph holds at most ten."""
NO_SCORE = [-1, 0, -1]
"""Head, and stream and position of the key, of what is no attention score; the least of one."""
_LARGEST = {"layer": 2**15 - 2, "column": 2**31 - 1, "feature": 2**31 - 1}
"""What the types of a graph's arrays can hold; outputs stand one above the highest layer."""


def graph_of(document: Mapping[str, Any], source: str = "The document") -> Graph:
    """Returns the graph of a document.

    Args:
        document: from `read_document`; links with an end that is not a node are left out, as the viewers do, and
            counted in the provenance.
        source: what it was read from, for messages.

    Raises:
        UserError: if it has nodes of a kind that a graph cannot hold, as biases, or its links run in a circle.
    """
    nodes = documented_order(document)
    ids = [node["node_id"] for node in nodes]
    raw = not document["metadata"].get("schema_version")
    said = [_identity(node, raw, source) for node in nodes]
    identity = np.array([one + [PROMPT, *NO_SCORE][len(one) - 6 :] for one in said], np.int64).reshape(-1, 10)
    kind, step, stream, block, position, feature, branch, head, key_stream, key_position = identity.T
    # Logits stand above all layers, whatever their document says.
    outputs = kind == OUTPUT
    block[outputs] = max(int(block[~outputs].max(initial=-1)) + 1, int(block[outputs].max(initial=0)))
    links = resolve_links(document["links"], ids, kind == ERROR, block)
    value = np.array([link["weight"] for link in links.kept], np.float32)
    order = np.lexsort((links.source, links.target))
    weights = [float(node["token_prob"]) for node in nodes if _weight(node) > 0] or [1.0] * int(outputs.sum())
    expanded = np.union1d(np.arange(len(weights)), links.target)
    totals = (np.bincount(links.target, v.astype(np.float64), len(nodes)) for v in (value, np.abs(value)))
    sums, sizes = (total[expanded].astype(np.float64) for total in totals)
    unknown = np.full(expanded.size, np.nan)
    graph = Graph(
        node_kind=kind.astype(np.uint8),
        node_step=step.astype(np.int16),
        node_stream=stream.astype(np.uint8),
        node_block=block.astype(np.int16),
        node_position=position.astype(np.int32),
        node_feature=feature.astype(np.int32),
        node_branch=branch.astype(np.uint8),
        node_head=head.astype(np.int16),
        node_key_stream=key_stream.astype(np.uint8),
        node_key_position=key_position.astype(np.int32),
        node_value=np.array([_activation(node, k) for node, k in zip(nodes, kind.tolist(), strict=True)], np.float32),
        node_influence=np.full(len(nodes), np.nan, np.float32),
        edge_source=links.source[order].astype(np.int32),
        edge_target=links.target[order].astype(np.int32),
        edge_attribution=value[order],
        target_node=expanded.astype(np.int32),
        target_preactivation=unknown,
        target_bias=unknown.copy(),
        target_sum=sums,
        target_abs_sum=sizes,
        map_indptr=np.zeros(len(nodes) + 1, np.int64),
        map_position=np.zeros(0, np.int32),
        map_value=np.zeros(0, np.float32),
        supernodes=_supernodes(document, ids, kind),
        provenance=Provenance(
            target_weights=tuple(weights), viewer=dict(document["metadata"]), unclear_links=links.unclear
        ),
    )
    check_values(graph, source, ids)
    labels = _labels(nodes, feature_names(graph))
    return graph.with_provenance(labels=labels) if labels else graph


def _labels(nodes: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """Returns what nodes call their features where that is more than the name, by names of features, txt/3/f401."""
    labels: dict[str, str] = {}
    for node, name in zip(nodes, names, strict=True):
        label, own = node.get("clerp"), re.split("[@#~]", str(node.get("name", name)))[0]
        if name and isinstance(label, str) and label.strip() and not f"{label} ".startswith(f"{own} "):
            # Behind a label `export` puts the name, which tells features of one label apart.
            labels.setdefault(name, unicode_replaced(label.removesuffix(f" · {own}")))
    return labels


def documented_order(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a document's nodes in the graph's order: logits that carry weight, other logits, then all others.

    Args:
        document: from `read_document`.
    """
    return sorted(document["nodes"], key=lambda n: (not _is_logit(n), _weight(n) <= 0, not n.get("is_target_logit")))


def _is_logit(node: Mapping[str, Any]) -> bool:
    return node["feature_type"].lower() == "logit"


def _weight(node: Mapping[str, Any]) -> float:
    return float(node.get("token_prob") or 0.0) if _is_logit(node) else 0.0


def _supernodes(document: Mapping[str, Any], ids: list[str], kind: np.ndarray) -> dict[str, list[int]]:
    """Returns groups of nodes by name, numbered if there are several; a name that an error shares is the other node."""
    number = {name: node for node, name in enumerate(ids) if kind[node] == ERROR}
    number |= {name: node for node, name in enumerate(ids) if kind[node] != ERROR}
    groups: dict[str, list[int]] = {}
    for name, *members in document["qParams"].get("supernodes") or []:
        group = list(dict.fromkeys(number[member] for member in members if member in number))
        if group:
            groups[unused_name(name, groups)] = group
    return groups


def unused_name(name: str, names: Collection[str]) -> str:
    """Returns a name, numbered if it is in use.

    Args:
        name: wanted.
        names: in use.

    Example:
        >>> unused_name("circle", ["circle", "circle (2)"])
        'circle (3)'
    """
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return name if name not in names else next(one for one in numbered if one not in names)


def _activation(node: Mapping[str, Any], kind: int) -> float:
    known = node.get("activation")
    return float(known) if kind in (FEATURE, SCORE) and known is not None else 1.0


def _identity(node: Mapping[str, Any], raw: bool, source: str) -> list[int]:
    """Returns kind, step, stream, block, position and feature of a node, and what else `viewer_nodes` tells of it."""
    name, kind, column = node["node_id"], node["feature_type"].lower(), node["ctx_idx"]
    if "difffract" in node:
        return _own_identity(node, source)
    if kind in ("bias", "unknown"):
        raise UserError(f"In {source}, the node {name} is of type {kind!r}, which a graph of ours cannot hold.")
    layer: int | None = -1
    feature = -1
    if kind not in ("logit", "embedding"):
        layer = _number(str(node["layer"]))
        if layer is None:
            shown = json.dumps(node["layer"])[:40]
            raise UserError(f"In {source}, the node {name[:40]} has the layer {shown}, which is not a number.")
        feature = -1 if is_error(node) else _feature(node, raw, source)
    for what, number in (("layer", layer), ("column", column), ("feature", feature)):
        if not -1 <= number <= _LARGEST[what]:
            raise UserError(
                f"In {source}, the node {name} has the {what} {number}, but those of a graph lie in "
                f"[0, {_LARGEST[what]}]."
            )
    code = {"logit": OUTPUT, "embedding": INPUT}.get(kind, ERROR if is_error(node) else FEATURE)
    return [code, 0, TXT, layer, column, feature]


def _number(text: str) -> int | None:
    """Returns the number that a text is, None if it is none; Python refuses to read very long ones."""
    return int(text) if text.isdecimal() and len(text) <= DIGITS else None


def _own_identity(node: Mapping[str, Any], source: str) -> list[int]:
    """Returns what a node of a document of ours says of itself, its branch included."""
    said = node["difffract"]
    most = [len(KINDS) - 1, 2**15 - 1, len(STREAMS) - 1, 2**15 - 1, 2**31 - 1, 2**31 - 1, len(BRANCHES) - 1]
    least = [0, 0, 0, -1, -1, -1, 0]
    if said and said[0] == SCORE:
        most, least = most + [2**15 - 1, len(STREAMS) - 1, 2**31 - 1], least + NO_SCORE
    # Documents of graphs without the negative branch leave the branch out.
    told = said[:6] + [PROMPT] + said[6:] if len(said) == len(most) - 1 else said
    numbers = len(told) == len(most) and all(type(number) is int for number in told)
    if numbers and all(low <= number <= high for low, number, high in zip(least, told, most, strict=True)):
        return told
    raise UserError(
        f"In {source}, the node {node['node_id']} says {said} of itself under `difffract`, instead of kind, step, "
        "stream, block, position and feature; export the graph again."
    )


def _feature(node: Mapping[str, Any], raw: bool, source: str) -> int:
    """Returns a feature's index within its layer."""
    number, parts = node["feature"], node["node_id"].split("_")
    named = _number(parts[1]) if len(parts) == 3 else None
    if number is None and named is not None:
        return named
    if number is None or number < 0:
        raise UserError(
            f"In {source}, the node {node['node_id']} of type {node['feature_type']!r} has the feature {number}, "
            "which does not tell what it stands for."
        )
    index, unpaired = number, unpair(number)[1]
    if named is not None and named in (index, unpaired):
        return named
    return index if raw else unpaired


def unpair(number: int) -> tuple[int, int]:
    """Returns the two numbers that Cantor's pairing made one of: dictionary and feature.

    Args:
        number: not negative.
    """
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature
