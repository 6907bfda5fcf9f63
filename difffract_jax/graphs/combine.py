"""Circuits over prompts and seeds: their average, and the difference of two.

1. Every graph is summed over positions: positions of different prompts do not correspond.
2. Nodes are the same if kind, step, stream, block and feature are, and both or neither are targets; several targets
   that differ in position alone become one, and outputs are matched in their order. If a graph came from the
   reference's JSON, which has one name for errors and unexpanded features, these are taken together in all.
3. Values, edges, totals and maps are added up with coefficients: 1/n each for the average, 1 and -1 for the difference.
   What a graph lacks counts as 0, so that edges and bias still add up to the pre-activation at every target.

The result is a graph like any other, without influence until it is pruned. `provenance.combined` tells which graphs
went in, and for every node, by name, in what share of them it occurs. Maps are kept where all graphs have the same
grid of image tokens and length of text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from difffract_jax.config import UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import ERROR, FEATURE, MODULATION, OUTPUT, REST, SCORE, Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.provenance import FILE_KEYS, Combined, KnownRun, Origin, Provenance

_KEY = (
    *("node_kind", "node_step", "node_branch", "node_block", "node_stream", "node_feature"),
    *("node_head", "node_key_stream"),
)
_OF_ONE = (
    "attention",
    "pooled",
    "pruning",
    "scores",
    "grouping",
    "file",
    "run",
    "shared",
    "target_weights",
    "combined",
    "unclear_links",
)
"""Facts that hold for one graph as it is, even where all say the same, or that are combined otherwise."""
_TOTALS = ("target_preactivation", "target_bias", "target_sum")


def average(graphs: Sequence[Graph]) -> Graph:
    """Returns the mean of some circuits.

    Args:
        graphs: at least one, of the same model and transcoders.

    Raises:
        UserError: if there is none, or they are of different models or transcoders.
    """
    if not graphs:
        raise UserError("There is no graph to average; give at least one.")
    return _combine("average", graphs, [1 / len(graphs)] * len(graphs))


def difference(a: Graph, b: Graph) -> Graph:
    """Returns the first circuit minus the second: what is positive is stronger in the first.

    Args:
        a: the first.
        b: the second, of the same model and transcoders.

    Raises:
        UserError: if they are of different models or transcoders.
    """
    return _combine("difference", [a, b], [1.0, -1.0])


class NodeUnion(NamedTuple):
    """The nodes of all graphs.

    Attributes:
        keys: of each node, a column each: 0 for targets and 1 for others, then `_KEY`, then an output's number; targets
            come first.
        places: of every graph's nodes among them.
    """

    keys: Int64[np.ndarray, "key union"]
    places: list[Int64[np.ndarray, "node"]]


def _combine(operation: str, graphs: Sequence[Graph], coefficients: Sequence[float]) -> Graph:
    base = check_origins(graphs, operation)
    record = tuple(_origin(graph.provenance) for graph in graphs)
    summed = summed_alike(graphs)
    union = unite_nodes(summed)
    count = union.keys.shape[1]
    weighted = list(zip(summed, union.places, coefficients, strict=True))
    zeros = np.zeros(count)
    value = sum((c * _largest(graph, place, count) for graph, place, c in weighted), zeros)
    weights = sum((np.bincount(place, graph.root_weights, count) for graph, place, _ in weighted), zeros)
    occurs = sum((np.isin(np.arange(count), place) for place in union.places), zeros) / len(graphs)
    kind, step, branch, block, stream, feature, head, key_stream, _ = union.keys[1:]
    common = _common(graphs, base)
    if operation == "difference":
        common = replace(common, pooled_path=())  # of each graph's own target; of a difference they would say nothing
    combined = Graph(
        node_kind=kind.astype(np.uint8),
        node_step=step.astype(np.int16),
        node_stream=stream.astype(np.uint8),
        node_block=block.astype(np.int16),
        node_position=np.full(count, -1, np.int32),
        node_feature=feature.astype(np.int32),
        node_value=np.where(np.isin(kind, (FEATURE, SCORE, MODULATION)), value, 1).astype(np.float32),
        node_influence=np.full(count, np.nan, np.float32),
        node_branch=branch.astype(np.uint8),
        node_head=head.astype(np.int16),
        node_key_stream=key_stream.astype(np.uint8),
        **_edges(weighted),
        **_totals(weighted, count),
        **_maps(weighted, count),
        supernodes={},
        provenance=replace(common, target_weights=tuple(weights[weights > 0].tolist())),
    )
    shares = dict(zip(node_names(combined), occurs.tolist(), strict=True))
    return combined.with_provenance(combined=Combined(operation=operation, graphs=record, occurs_in=shares))


def summed_alike(graphs: Sequence[Graph]) -> list[Graph]:
    """Returns graphs summed over positions, whose nodes can be matched: see the module."""
    return [aggregate(_merged(graph, graphs)) for graph in graphs]


def _merged(graph: Graph, graphs: Sequence[Graph]) -> Graph:
    """Returns the graph with rest nodes as errors, if any graph cannot tell them apart."""
    if not any(other.provenance.reference_config is not None for other in graphs):
        return graph
    return replace(graph, node_kind=np.where(graph.node_kind == REST, ERROR, graph.node_kind).astype(np.uint8))


def check_origins(graphs: Sequence[Graph], operation: str) -> str | None:
    """Refuses graphs that are known to be of different models or transcoders; of a difference, LoRAs may differ.

    Returns:
        Content hash of the model that LoRAs were merged into, where some were.
    """
    runs = [graph.provenance.known for graph in graphs]
    bases = {run.base_model or run.model for run in runs} - {None}
    apart = operation == "difference" and len(bases) == 1
    origins = {
        "models": bases if apart else {run.model for run in runs} - {None},
        "transcoders": {graph.provenance.transcoders for graph in graphs} - {None},
    }
    for what, known in origins.items():
        if len(known) > 1:
            named = ", ".join(sorted(str(name)[:12] for name in known))
            raise UserError(f"Graphs of different {what} ({named}) have no features in common; combine those of one.")
    return next(iter(bases)) if apart and any(run.base_model for run in runs) else None


def _origin(provenance: Provenance) -> Origin:
    """Returns what tells one graph from another."""
    run = provenance.known
    told = {"pruning": provenance.pruning, "file": provenance.file, "loras": run.loras}
    return Origin(prompt=run.prompt, seed=run.seed, step=run.step, **told)


def _common(graphs: Sequence[Graph], base: str | None) -> Provenance:
    """Returns what all graphs say alike, down to the fields of their runs, and what LoRAs were merged into."""
    provenances = [graph.provenance for graph in graphs]
    same = {name: value for name, value in _alike(provenances).items() if name not in _OF_ONE}
    extra = _alike_entries([one.extra for one in provenances])
    same |= {"extra": {key: value for key, value in extra.items() if key not in FILE_KEYS}}
    shared = _alike([one.known for one in provenances]) | ({} if base is None else {"base_model": base})
    return Provenance(**same, shared=KnownRun(**shared))


def _alike(records: Sequence[Any]) -> dict[str, Any]:
    """Returns the fields in which dataclasses of one kind are equal."""
    return _alike_entries([{one.name: getattr(each, one.name) for one in fields(each)} for each in records])


def _alike_entries(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the entries that dictionaries have in common."""
    first, *others = mappings
    return {key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)}


def unite_nodes(graphs: Sequence[Graph]) -> NodeUnion:
    """Returns the distinct nodes of some graphs, and where each graph's nodes are among them."""
    keys = []
    for graph in graphs:
        columns = [getattr(graph, name).astype(np.int64) for name in _KEY]
        other = np.ones(graph.node_kind.size, np.int64)
        other[graph.targets] = 0
        outputs = graph.node_kind == OUTPUT
        keys.append(np.stack([other, *columns, np.where(outputs, np.cumsum(outputs) - 1, 0)]))
    union, places = np.unique(np.concatenate(keys, axis=1), axis=1, return_inverse=True)
    ends = np.cumsum([part.shape[1] for part in keys])[:-1]
    return NodeUnion(union, [place.astype(np.int64) for place in np.split(places.ravel(), ends)])


_Weighted = list[tuple[Graph, NDArray[np.int64], float]]


def _largest(graph: Graph, place: Int64[np.ndarray, "node"], count: int) -> Float64[np.ndarray, "union"]:
    """Returns the values of a graph's nodes; of several that become one the largest, 0 for those it lacks."""
    values = np.full(count, -np.inf)  # scores of attention may all be negative
    np.maximum.at(values, place, graph.node_value.astype(np.float64))
    return np.where(np.isneginf(values), 0, values)


def _edges(graphs: _Weighted) -> dict[str, np.ndarray]:
    """Adds up the edges; those that cancel exactly are left out."""
    ends = [np.stack([place[graph.edge_target], place[graph.edge_source]]) for graph, place, _ in graphs]
    pairs, place = np.unique(np.concatenate(ends, axis=1), axis=1, return_inverse=True)
    sums = {}
    for name in ("edge_attribution", "edge_query", "edge_remainder"):
        values = [c * getattr(graph, name).astype(np.float64) for graph, _, c in graphs]
        sums[name] = np.bincount(place.ravel(), np.concatenate(values), pairs.shape[1])
    left = sums["edge_attribution"] != 0
    ends_left = {"edge_source": pairs[1, left].astype(np.int32), "edge_target": pairs[0, left].astype(np.int32)}
    return ends_left | {name: values[left].astype(np.float32) for name, values in sums.items()}


def _totals(graphs: _Weighted, count: int) -> dict[str, np.ndarray]:
    """Adds up the totals of the expanded nodes; absolute sums are added as absolute values, as bounds of rounding."""
    nodes = np.unique(np.concatenate([place[graph.target_node] for graph, place, _ in graphs]))
    nodes_of = [(graph, place[graph.target_node], c) for graph, place, c in graphs]
    zeros = np.zeros(count)
    sums = {
        name: sum((c * np.bincount(place, getattr(graph, name), count) for graph, place, c in nodes_of), zeros)
        for name in _TOTALS
    }
    sums["target_abs_sum"] = sum(
        (abs(c) * np.bincount(place, graph.target_abs_sum, count) for graph, place, c in nodes_of), zeros
    )
    return {"target_node": nodes.astype(np.int32)} | {name: total[nodes] for name, total in sums.items()}


def _maps(graphs: _Weighted, count: int) -> dict[str, np.ndarray]:
    """Adds up the maps, position by position; none where positions do not correspond."""
    shapes = [(graph.provenance.known.grid, graph.provenance.known.text_tokens) for graph, _, _ in graphs]
    if any(shape != shapes[0] for shape in shapes):
        graphs = []
    owners = [np.repeat(place, np.diff(graph.map_indptr)) for graph, place, _ in graphs]
    positions = [graph.map_position.astype(np.int64) for graph, _, _ in graphs]
    values = [c * graph.map_value.astype(np.float64) for graph, _, c in graphs]
    none = np.zeros((2, 0), np.int64)
    entries = np.concatenate([none, *(np.stack(pair) for pair in zip(owners, positions, strict=True))], axis=1)
    keys, place = np.unique(entries, axis=1, return_inverse=True)
    sums = np.bincount(place.ravel(), np.concatenate([np.zeros(0), *values]), keys.shape[1])
    return {
        "map_indptr": np.concatenate([[0], np.cumsum(np.bincount(keys[0], minlength=count))]).astype(np.int64),
        "map_position": keys[1].astype(np.int32),
        "map_value": sums.astype(np.float32),
    }
