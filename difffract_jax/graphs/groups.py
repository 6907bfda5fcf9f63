"""What people put into a graph by hand, in the viewer: groups, names, notes, pins; a file of its own (plain Python).

The file, `NAME.groups.json`, names nodes as `node_names` does of the graph summed over positions, so that it holds for
a graph as it was traced and for what pruning left of it; saved from a page of single positions, it names those, and in
a sum over positions they stand for the sum. `graph` says which graph it is about: a hash of what was traced, not of the
arrays, and in words what the hash is of.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64
from pydantic import ValidationError

from difffract_jax.config import Settings, UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE, SCORE, WORD, Graph
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.graphs.names import evaluation_marks, node_names, place_name, score_name
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.cache import local_file
from difffract_jax.text_files import decoded, unicode_replaced

FORMAT = "difffract-groups"
SUFFIX = ".groups.json"


class GraphIdentity(Settings):
    """Which graph a groups file is about."""

    fingerprint: str
    """Hash of the run, the targets and the transcoders; the same for a graph and for what pruning leaves of it."""
    targets: tuple[str, ...] = ()
    """What the graph explains."""
    prompt: str | None = None
    """The prompt of its run."""
    model: str | None = None
    """Content hash of the model."""
    transcoders: str | None = None
    """Content hash of the transcoders."""


class Groups(Settings):
    """What was put into a graph by hand."""

    format: Literal["difffract-groups"] = FORMAT
    """Tells the file from other JSON."""
    format_version: Literal[1] = 1
    """Of the file."""
    graph: GraphIdentity
    """What it is about."""
    groups: dict[str, tuple[str, ...]] = {}
    """Name of a group -> names of its nodes."""
    names: dict[str, str] = {}
    """Name of a node -> what to call it."""
    notes: dict[str, str] = {}
    """Name of a node -> a note on it."""
    pinned: tuple[str, ...] = ()
    """Names of nodes that stay, however the graph is pruned."""


def identity(graph: Graph) -> GraphIdentity:
    """Returns which graph this is, the same before and after pruning.

    Args:
        graph: any graph.
    """
    told = graph.provenance
    run, traced = told.known, told.attribution
    if traced is not None:
        targets = traced.targets
    else:
        summed = aggregate(graph)
        targets = tuple(node_names(summed)[node] for node in summed.targets)
    combined = None if told.combined is None else [told.combined.operation, to_json_values(told.combined.graphs)]
    shown = {key: (told.viewer or {}).get(key) for key in ("slug", "scan", "prompt")}
    facts = [targets, run.prompt, run.seed, run.sigmas, told.steps, run.model, told.transcoders, combined, shown]
    # Graphs without guidance by two branches do not name it, and keep the fingerprint that their files have.
    facts += [] if run.negative_prompt is None else [run.negative_prompt, run.guidance]
    text = json.dumps(to_json_values(facts), sort_keys=True)
    return GraphIdentity(
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        targets=tuple(map(unicode_replaced, targets)),
        prompt=run.prompt and unicode_replaced(run.prompt),
        model=run.model,
        transcoders=told.transcoders,
    )


def parse_groups(text: str, source: str) -> Groups:
    """Reads the text of a groups file.

    Args:
        text: of the file.
        source: what it was read from, for messages.

    Raises:
        UserError: if it is not a groups file of this version.
    """
    try:
        stored = json.loads(text)
        stored = json.loads(unicode_replaced(json.dumps(stored, ensure_ascii=False)))  # \ud800 is no character
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise UserError(f"{source} is not JSON ({error}); give a {SUFFIX} that the viewer saved.") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(f"{source} is not a file of groups; give a {SUFFIX} that the viewer saved.")
    try:
        return Groups.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{source} is damaged at `{where}`: {first['msg']}; save it from the viewer again.") from None


def read_groups(path: str | Path, graph: Graph | None = None) -> Groups:
    """Reads a groups file.

    Args:
        path: the file.
        graph: that it must be about; any if left out.

    Raises:
        UserError: if it is not a groups file, or one of another graph.
    """
    path = local_file(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a {SUFFIX} that the viewer saved.")
    try:
        groups = parse_groups(decoded(path.read_bytes()), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; give a {SUFFIX} that the viewer saved.") from None
    if graph is not None:
        check_about(groups, graph, str(path))
    return groups


def check_about(groups: Groups, graph: Graph, source: str) -> None:
    """Refuses groups of another graph.

    Args:
        groups: from a file.
        graph: that they must be about.
        source: the file, for messages.

    Raises:
        UserError: if they are about another graph.
    """
    ours, theirs = identity(graph), groups.graph
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"{source} holds groups of another graph, of {_words(theirs)}, but this one is of {_words(ours)}; give "
            "the groups that were saved from this graph."
        )


def _words(of: GraphIdentity) -> str:
    prompt = "" if of.prompt is None else f' on "{of.prompt[:60]}"'
    return f"{', '.join(of.targets[:2]) or 'no target'}{prompt}"


def write_groups(groups: Groups, path: str | Path) -> None:
    """Writes a groups file, whole or not at all."""
    with atomic_file(Path(path)) as partial:
        partial.write_text(json.dumps(groups.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


def nodes_of(graph: Graph, names: Sequence[str]) -> Int64[np.ndarray, "node"]:
    """Returns the nodes that names of a groups file stand for; what pruning took away is left out.

    Args:
        graph: the graph, summed over positions or not; then a name without a position stands for all of them.
        names: as `node_names` has them, of the graph or of its sum over positions; of a summed graph also with
            positions, which then stand for the sum.
    """
    wanted = {*names} if graph.by_position else {*names, *map(without_position, names)}
    if not wanted:
        return np.zeros(0, np.int64)
    pairs = zip(node_names(graph), summed_names(graph), strict=True)
    return np.array([node for node, (name, summed) in enumerate(pairs) if name in wanted or summed in wanted], np.int64)


def without_position(name: str) -> str:
    """Returns the name of a node as if positions were summed over: img/2/f401 for img/2/f401@12.

    Args:
        name: as `node_names` has it.
    """
    name = re.sub(r"@(img|txt)\d+,(img|txt)\d+(?=[#~]|$)", r"@\1,\2", name)  # of an attention score
    return re.sub(r"@(img|txt)?\d+(?=[#~]|$)", lambda found: f"@{found[1]}" if found[1] else "", name)


def summed_names(graph: Graph) -> list[str]:
    """Returns the name of every node as if positions were summed over."""
    if not graph.by_position:
        return node_names(graph)
    layout, called = graph.provenance.known.layout, []
    for node, (name, mark) in enumerate(zip(node_names(graph), evaluation_marks(graph), strict=True)):
        kind, stream, block, feature = (
            int(column[node]) for column in (graph.node_kind, graph.node_stream, graph.node_block, graph.node_feature)
        )
        if node < graph.targets.size or kind == WORD:
            called.append(name)
            continue
        if kind == SCORE:
            called.append(score_name(graph, node, summed=True) + mark)
        else:
            called.append(place_name(kind, stream, block, -1, feature, layout) + mark)
    return called


def given_names(graph: Graph, groups: Groups) -> dict[str, str]:
    """Returns what a groups file calls the nodes of a graph, by `node_names`.

    Args:
        graph: the graph, summed over positions or not.
        groups: of it.
    """
    pairs = zip(node_names(graph), summed_names(graph), strict=True)
    of_sums = {} if graph.by_position else {without_position(name): given for name, given in groups.names.items()}
    asked = of_sums | groups.names
    called = {name: asked.get(name) or asked.get(summed) for name, summed in pairs}
    return {name: given for name, given in called.items() if given}


def with_groups(graph: Graph, groups: Groups) -> Graph:
    """Returns a graph with the groups of a file as its supernodes, features alone.

    Args:
        graph: the graph.
        groups: of it; groups of which it has no feature are left out.
    """
    found = {name: nodes_of(graph, members) for name, members in groups.groups.items()}
    features = {name: nodes[graph.node_kind[nodes] == FEATURE].tolist() for name, nodes in found.items()}
    return replace(graph, supernodes={name: nodes for name, nodes in features.items() if nodes})
