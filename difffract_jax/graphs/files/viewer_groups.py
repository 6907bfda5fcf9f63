"""Groups, names and pins that people made in circuit-tracer's viewer or on Neuronpedia, taken for groups of ours.

What these save comes in three forms, told apart by content; `read_any_groups` takes each, and files of ours.

1. A document with its view, as circuit-tracer's server saves it, or as Neuronpedia hands a graph out, which then leaves
   labels in the address that its metadata name, `neuronpedia_link`. Its nodes tell what we call them; those of other
   tools are called as `viewer_graph` does.
2. A view alone, as Neuronpedia keeps a subgraph: JSON with `pinnedIds`, `supernodes` and `clerps`.
3. The address at which either shows a view, in a text file.

The last two name nodes by their place in a document, so that they need the graph that was exported, or what the same
pruning left of it. Lists in a view may be strings (trap 8). circuit-tracer names a feature by its integer, Neuronpedia
by layer, integer and column.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.graphs.files.json_text import load_json
from difffract_jax.graphs.files.viewer_document import checked_document
from difffract_jax.graphs.files.viewer_graph import documented_order, graph_of, unused_name
from difffract_jax.graphs.files.viewer_json import to_document
from difffract_jax.graphs.files.viewer_nodes import FEATURE_TYPE
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import (
    FORMAT,
    SUFFIX,
    GraphIdentity,
    Groups,
    check_about,
    identity,
    read_groups,
    without_position,
)
from difffract_jax.graphs.names import node_names
from difffract_jax.storage.remote.cache import local_file
from difffract_jax.text_files import unicode_replaced

WHAT = f"give a {SUFFIX} that the viewer saved, or what circuit-tracer's viewer or Neuronpedia saved"
UNLIMITED = 2**31
PARTS = ("pinnedIds", "supernodes", "clerps")
"""What of a view is taken."""


class _Called(NamedTuple):
    """How nodes of a document are called.

    Attributes:
        by_id: name of a node by its id in the document.
        by_clerp: names by the key under which a viewer keeps a label.
    """

    by_id: Mapping[str, str]
    by_clerp: Mapping[str, Sequence[str]]


def read_any_groups(path: Path, graph: Graph | None = None) -> Groups:
    """Reads groups that our viewer saved, or another.

    Args:
        path: the file: a `.groups.json`, a document, a view, or text that is an address.
        graph: that it must be about; any if left out, but views and addresses need one.

    Raises:
        UserError: if it is none of these, names nodes that are not there, or is about another graph.
    """
    path = local_file(path)
    if not is_foreign(path):
        return read_groups(path, graph)
    groups = _foreign(path, graph)
    if graph is not None:
        check_about(groups, graph, str(path))
    return groups


def is_foreign(path: Path) -> bool:
    """Says whether a file holds something else than groups of ours, so that none may be saved over it.

    Args:
        path: the file, which need not exist.
    """
    if not path.is_file():
        return False
    stored = _stored(path)
    return isinstance(stored, str) or (
        isinstance(stored, dict)
        and stored.get("format") != FORMAT
        and ("nodes" in stored or any(part in stored for part in PARTS))
    )


def _stored(path: Path) -> Any:
    """Returns the JSON value of a file, or the address that its text is; None if it is neither."""
    with suppress(UnicodeDecodeError):
        text = path.read_bytes()[: 2**20].decode("utf-8").strip()
        if text.startswith(("http://", "https://")):
            return text
    try:
        return load_json(path)
    except UserError:
        return None  # `read_groups` says what is wrong


def _foreign(path: Path, graph: Graph | None) -> Groups:
    stored = _stored(path)
    if isinstance(stored, dict) and "nodes" in stored:
        return groups_of_document(stored, str(path))
    if graph is None:
        raise UserError(
            f"{path} names nodes by their place in a document, which it does not hold; give the document itself, saved "
            "in the viewer, or open the groups with `difffract view` and save them."
        )
    view = _view_of_address(stored) if isinstance(stored, str) else stored
    if not any(view.get(part) for part in PARTS):
        raise UserError(f"{path} holds no pinnedIds, supernodes or clerps, so no groups; {WHAT}.")
    if graph.provenance.viewer is not None:
        raise UserError(f"{path} holds groups without their graph, which is another tool's; give the saved document.")
    called = _called_in(graph)
    return _groups(view, called, identity(graph), str(path))


def groups_of_document(document: Any, source: str) -> Groups:
    """Returns the groups, names and pins in the view of a document.

    Args:
        document: JSON value, of our export or another tool's.
        source: what it was read from, for messages.

    Raises:
        UserError: if it is no document of a graph, or its view names nodes that it does not have.
    """
    document = checked_document(document, source)
    stamp = document["metadata"].get("difffract")
    about = None
    if isinstance(stamp, dict):
        with suppress(ValidationError):
            about = GraphIdentity.model_validate(stamp)
    nodes = documented_order(document)
    names = [node.get("name") for node in nodes]
    if about is None or not all(isinstance(name, str) for name in names):
        graph = graph_of(document, source)
        about, names = identity(graph), node_names(graph)
    view = dict(document["qParams"])
    info = document["metadata"].get("info")
    link = info.get("neuronpedia_link") if isinstance(info, dict) else None
    if not view.get("clerps") and isinstance(link, str):
        view["clerps"] = _view_of_address(link).get("clerps")
    return _groups(view, _called(nodes, names), about, source)


def _called_in(graph: Graph) -> _Called:
    """Returns how the documents of a graph call its nodes: summed over positions, and position by position."""
    by_id: dict[str, str] = {}
    by_clerp: dict[str, Sequence[str]] = {}
    for by_position in (True, False) if graph.by_position else (False,):
        options = ViewerOptions(by_position=by_position, max_nodes=UNLIMITED, max_links=UNLIMITED)
        nodes = to_document(graph, "circuit-tracer", options)["nodes"]
        called = _called(nodes, [node["name"] for node in nodes])
        by_id |= called.by_id
        by_clerp |= called.by_clerp
    return _Called(by_id, by_clerp)


def _called(nodes: Sequence[Mapping[str, Any]], names: Sequence[str]) -> _Called:
    by_id: dict[str, str] = {}
    by_clerp: dict[str, list[str]] = {}
    for node, name in zip(nodes, names, strict=True):
        # A feature may share its name with an error (trap 1), and is what the viewers take it for.
        if node["node_id"] not in by_id or "error" not in node["feature_type"].lower():
            by_id[node["node_id"]] = name
        by_clerp[f"{node['layer']}_{node['feature']}_{node['ctx_idx']}"] = [name]
        if node["feature_type"] == FEATURE_TYPE:
            mine = by_clerp.setdefault(str(node["feature"]), [])
            mine += [one for one in (without_position(name),) if one not in mine]
    return _Called(by_id, by_clerp)


def _view_of_address(address: str) -> dict[str, Any]:
    """Returns the view that an address shows; an empty one of what is no address."""
    query: dict[str, list[str]] = {}
    with suppress(ValueError):  # as of [ without ]
        query = parse_qs(urlsplit(address).query)
    return {name: values[-1] for name, values in query.items() if name in PARTS}


def _groups(view: Mapping[str, Any], called: _Called, about: GraphIdentity, source: str) -> Groups:
    """Returns groups of a view."""
    parts = {part: _listed(view.get(part), part, source) for part in PARTS}
    pinned = _names(parts["pinnedIds"], called, source)
    groups: dict[str, tuple[str, ...]] = {}
    for one in parts["supernodes"]:
        if not isinstance(one, list) or not one or not isinstance(one[0], str):
            raise UserError(f"The supernodes of {source} are not lists of a name and nodes; save the view again.")
        members = _names(one[1:], called, source)
        if members:
            groups[unused_name(unicode_replaced(one[0]) or "supernode", groups)] = members
    names: dict[str, str] = {}
    for one in parts["clerps"]:
        if not isinstance(one, list) or len(one) != 2 or not isinstance(one[0], str):
            raise UserError(f"The clerps of {source} are not pairs of a feature and its label; save the view again.")
        if isinstance(one[1], str) and one[1]:
            if one[0] not in called.by_clerp:
                raise UserError(_unknown(source, [one[0]], "labels"))
            names |= dict.fromkeys(called.by_clerp[one[0]], unicode_replaced(one[1]))
    return Groups(graph=about, groups=groups, names=names, pinned=pinned)


def _listed(value: Any, part: str, source: str) -> list[Any]:
    """Returns a part of a view as a list; saving may have made a string of it."""
    if isinstance(value, str):
        if part == "pinnedIds":
            return [name for name in value.split(",") if name]
        with suppress(ValueError, RecursionError):
            value = json.loads(value or "[]")
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"The {part} of {source} are not a list, so they hold no groups; save the view again.")
    return value


def _names(ids: Sequence[Any], called: _Called, source: str) -> tuple[str, ...]:
    """Returns what nodes of a view are called, each once."""
    unknown = [one for one in ids if not isinstance(one, str) or one not in called.by_id]
    if unknown:
        raise UserError(_unknown(source, unknown, "names"))
    return tuple(dict.fromkeys(called.by_id[one] for one in ids))


def _unknown(source: str, found: Sequence[Any], does: str) -> str:
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{source} {does} the node {str(found[0])[:60]!r}{more}, which the graph does not have; give the graph that "
        "was exported, or the document that the viewer saved."
    )
