"""Documents of circuit-tracer's viewer and of Neuronpedia, read, checked and written (docs/viewers.md).

`read_document` checks what a graph is made of, and returns the document as it is, but for the view: saving in the
viewer turns its lists into strings, which become lists again (trap 8). What Neuronpedia's schema makes optional may be
missing, and so may what only serves to show a graph: the view, and the nodes' labels. `viewer_graph` makes a graph of
it.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.graphs.files.json_text import (
    INTEGER,
    LIST,
    NUMBER,
    OBJECT,
    TEXT,
    is_number,
    json_kind,
    load_json,
    wrong_field,
)
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.cache import local_file

NODE_FIELDS: dict[str, tuple[str, ...]] = {
    "node_id": (TEXT,),
    "feature": (INTEGER, "null"),
    "layer": (TEXT, INTEGER),
    "ctx_idx": (INTEGER,),
    "feature_type": (TEXT,),
    "token_prob": (NUMBER, "null", "missing"),
    "activation": (NUMBER, "null", "missing"),
    "difffract": (LIST, "missing"),
}
"""What every node must have, and what is read where there is one."""
METADATA_FIELDS: dict[str, tuple[str, ...]] = {
    "slug": (TEXT,),
    "scan": (TEXT,),
    "prompt_tokens": (LIST,),
    "prompt": (TEXT,),
    "schema_version": (INTEGER, "null", "missing"),
}
LINK_FIELDS: dict[str, tuple[str, ...]] = {"source": (TEXT,), "target": (TEXT,), "weight": (NUMBER,)}


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
        path: the file, of any encoding, gzipped or not.

    Raises:
        UserError: naming the first thing in it that a graph cannot be made of.
    """
    return checked_document(load_json(local_file(path)), str(path))


def checked_document(document: Any, source: str) -> dict[str, Any]:
    """Returns a document with its view as lists.

    Args:
        document: a JSON value.
        source: what it was read from, for messages.

    Raises:
        UserError: naming the first thing in it that a graph cannot be made of.
    """
    problem = problem_of(document)
    if problem is None:
        view = _view(document.get("qParams") or {})
        if _is_view(view):
            return document | {"qParams": view}
        problem = "the supernodes of its qParams are not lists of names"
    raise UserError(
        f"{source} is not a graph of circuit-tracer or Neuronpedia: {problem}; correct it, or export the graph again."
    )


def _view(view: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the view with lists for the strings that saving made of them."""
    view = dict(view)
    if isinstance(view.get("pinnedIds"), str):
        view["pinnedIds"] = [name for name in view["pinnedIds"].split(",") if name]
    if isinstance(view.get("supernodes"), str):
        with suppress(ValueError, RecursionError):  # else it stays a string, which is refused
            view["supernodes"] = json.loads(view["supernodes"] or "[]")
    return view


def _is_view(view: Mapping[str, Any]) -> bool:
    groups = view.get("supernodes") or []
    return isinstance(groups, list) and all(
        isinstance(group, list) and group and all(isinstance(name, str) for name in group) for group in groups
    )


def problem_of(document: Any) -> str | None:
    """Returns the first thing that is wrong with a document, None if nothing is."""
    if not isinstance(document, dict):
        return f"it is {json_kind(document)} instead of an object"
    for key, form in (("metadata", OBJECT), ("nodes", LIST), ("links", LIST)):
        if not isinstance(document.get(key), {OBJECT: dict, LIST: list}[form]):
            return f"its {key} are {'missing' if key not in document else json_kind(document[key])} instead of {form}"
    if not isinstance(document.get("qParams") or {}, dict):
        return f"its qParams are {json_kind(document['qParams'])} instead of an object"
    tables = [("its metadata", METADATA_FIELDS, [document["metadata"]])]
    tables += [("a node", NODE_FIELDS, document["nodes"]), ("a link", LINK_FIELDS, document["links"])]
    problems = (wrong_field(entry, table, what) for what, table, entries in tables for entry in entries)
    return next(filter(None, problems), None) or _unsound(document["nodes"], document["links"])


def is_error(node: Mapping[str, Any]) -> bool:
    """Says whether a node stands for what a transcoder misses; the document's name for it may also be a feature's."""
    return "error" in node["feature_type"].lower()


def _unsound(nodes: list[dict[str, Any]], links: list[dict[str, Any]]) -> str | None:
    """Returns what keeps nodes and links, each well formed, from being a graph; None if nothing does."""
    if not nodes:
        return "it has no nodes"
    if not links:
        return f"it has {len(nodes)} nodes, but no links between them"
    for node in nodes:
        for name in ("token_prob", "activation"):
            if node.get(name) is not None and not is_number(node[name]):
                return f"the {name} of the node {node['node_id']} is {node[name]}, which is not a finite number"
    for link in links:
        if not is_number(link["weight"]):
            place = f"the link from {link['source']} to {link['target']}"
            return f"the weight of {place} is {link['weight']}, which is not a finite number"
    twice = _name_of_two(nodes)
    if twice is not None:
        return f"two nodes are called {twice}, and nothing tells them apart"
    if not any(node["feature_type"].lower() == "logit" for node in nodes):
        return "it has no logit, which would be its target"
    ids = {node["node_id"] for node in nodes}
    if not any(link["source"] in ids and link["target"] in ids for link in links):
        return "none of its links joins two of its nodes"
    return None


def _name_of_two(nodes: list[dict[str, Any]]) -> str | None:
    """Returns a name of several nodes that type, layer and column do not tell apart; None if there is none.

    An error may share its name with a feature (trap 1), but a name of two features would leave their links unclear.
    """
    known: dict[str, list[tuple[bool, str, int]]] = {}
    for node in nodes:
        place = is_error(node), str(node["layer"]), node["ctx_idx"]
        others = known.setdefault(node["node_id"], [])
        if place in others or (not place[0] and not all(other[0] for other in others)):
            return node["node_id"]
        others.append(place)
    return None
