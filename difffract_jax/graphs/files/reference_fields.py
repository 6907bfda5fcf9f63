"""What a document of the reference must hold to be read, and what is wrong with one that does not."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from difffract_jax.address import STREAMS
from difffract_jax.graphs.files.json_text import INTEGER, LIST, NUMBER, OBJECT, TEXT, is_number, wrong_field
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT

VERSION = 2
DIGITS = 10
"""Digits of the largest position that a graph holds."""
KIND_OF = {"feature": FEATURE, "error": ERROR, "input": INPUT}
DOCUMENT_FIELDS: dict[str, tuple[str, ...]] = {
    "version": (NUMBER, TEXT),
    "target": (OBJECT,),
    "config": (OBJECT,),
    "nodes": (LIST,),
    "edges": (LIST,),
    "metadata": (OBJECT, "missing"),
}
TARGET_FIELDS: dict[str, tuple[str, ...]] = {"id": (TEXT,), "preactivation": (NUMBER,), "encoder_bias": (NUMBER,)}
NODE_FIELDS: dict[str, tuple[str, ...]] = {
    "id": (TEXT,),
    "type": (TEXT,),
    "layer": (INTEGER,),
    "stream": (TEXT,),
    "feat_idx": (INTEGER,),
    "activation_map": (OBJECT,),
}
CONFIG_FIELDS: dict[str, tuple[str, ...]] = {"step": (INTEGER,)}
EDGE_FIELDS: dict[str, tuple[str, ...]] = {"src": (TEXT,), "tgt": (TEXT,), "attribution": (NUMBER,)}
"""What a document must hold to be read; what else it holds is kept."""


def problem_of(document: Any) -> str | None:
    """Returns the first thing that is wrong with a document, None if nothing is."""
    problem = wrong_field(document, DOCUMENT_FIELDS, "it")
    if problem or document["version"] != VERSION:
        return problem or f"its version is {document['version']!r}, not {VERSION}"
    tables = [("its target", TARGET_FIELDS, [document["target"]]), ("its config", CONFIG_FIELDS, [document["config"]])]
    tables += [("a node", NODE_FIELDS, document["nodes"]), ("an edge", EDGE_FIELDS, document["edges"])]
    problems = (wrong_field(entry, table, what) for what, table, entries in tables for entry in entries)
    return next(filter(None, problems), None) or _unsound(document)


def _unsound(document: Mapping[str, Any]) -> str | None:
    """Returns what keeps nodes and edges, each well formed, from being a graph; None if nothing does."""
    ids = [node["id"] for node in document["nodes"]]
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        return f"two nodes are called {twice[0]}"
    if not _fits(document["config"]["step"], 15):
        return f"its step is {document['config']['step']}"
    target = document["target"]
    if target["id"] not in ids:
        return f"its target {target['id']} is not among its nodes"
    for name in ("preactivation", "encoder_bias"):
        if not is_number(target[name]):
            return f"the {name} of its target is {target[name]}, which is not a finite number"
    for node in document["nodes"]:
        if node["type"] not in KIND_OF or node["stream"] not in STREAMS:
            return f"the node {node['id']} has the type {node['type']!r} and the stream {node['stream']!r}"
        entries = node["activation_map"].items()
        if not all(
            position.isdecimal() and len(position) <= DIGITS and is_number(value) for position, value in entries
        ):
            return f"the activation map of the node {node['id']} is not finite numbers by position"
        positions = map(int, node["activation_map"])
        if not (_fits(node["layer"], 15) and _fits(node["feat_idx"], 31) and all(_fits(p, 31) for p in positions)):
            return f"the node {node['id']} has a layer, feature or position that a graph cannot hold"
    known = set(ids)
    for edge in document["edges"]:
        unknown = [edge[end] for end in ("src", "tgt") if edge[end] not in known]
        if unknown:
            return f"its edges name {unknown[0]}, which is not among its nodes"
        if not is_number(edge["attribution"]):
            place = f"the edge from {edge['src']} to {edge['tgt']}"
            return f"the attribution of {place} is {edge['attribution']}, which is not a finite number"
    return None


def _fits(number: int, bits: int) -> bool:
    """Says whether a number is -1, for none, or an index that the type of a graph's array holds."""
    return -1 <= number < 2**bits
