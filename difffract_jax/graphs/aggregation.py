"""Sums of a graph over positions, so that a node is a feature of a site (NumPy)."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from difffract_jax.graphs.graph import FEATURE, OUTPUT, Graph


def aggregate(graph: Graph) -> Graph:
    """Sums a graph over positions: a node becomes a feature, the error, the rest or the input of a site.

    Scores become a head's attention from one stream to another. Modulations and words have no positions, and stay.

    Args:
        graph: position by position; one that is summed already is returned as it is.

    Returns:
        The sums. A feature's map stays; the map of another node is its attribution from each position, to all targets.
    """
    if not graph.by_position:
        return graph
    of_score = (graph.node_head, graph.node_key_stream)
    of_site = (graph.node_block, graph.node_stream, graph.node_feature)
    columns = (graph.node_kind, graph.node_step, graph.node_branch, *of_site, *of_score)
    # Every target stays a node of its own; then come the others.
    which_target = np.minimum(np.arange(graph.node_kind.size), graph.targets.size)
    keys = np.stack([which_target, *(c.astype(np.int64) for c in columns)])

    _, first, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    group = group.ravel().astype(np.int64)
    count = first.size
    pairs, place = np.unique(
        np.stack([group[graph.edge_target], group[graph.edge_source]]), axis=1, return_inverse=True
    )
    sums = {
        name: np.bincount(place.ravel(), getattr(graph, name).astype(np.float64), pairs.shape[1]).astype(np.float32)
        for name in ("edge_attribution", "edge_query", "edge_remainder")
    }
    targets, which = np.unique(group[graph.target_node], return_inverse=True)
    totals = {
        name: np.bincount(which, getattr(graph, name), targets.size)
        for name in ("target_preactivation", "target_bias", "target_sum", "target_abs_sum")
    }
    indptr, position, value = _summed_maps(graph, group, first)
    top = np.full(count, -np.inf)
    np.maximum.at(top, group, graph.node_value)
    return replace(
        graph,
        **{name: getattr(graph, name)[first] for name in _SAME},
        node_position=np.full(count, -1, np.int32),
        node_key_position=np.full(count, -1, np.int32),
        node_value=top.astype(np.float32),
        edge_source=pairs[1].astype(np.int32),
        edge_target=pairs[0].astype(np.int32),
        **sums,
        target_node=targets.astype(np.int32),
        **totals,
        map_indptr=indptr,
        map_position=position,
        map_value=value,
        supernodes={},
    )


_SAME = (
    *("node_kind", "node_step", "node_stream", "node_block", "node_feature", "node_influence", "node_cumulative"),
    *("node_branch", "node_head", "node_key_stream"),
)


def _summed_maps(
    graph: Graph, group: Int64[np.ndarray, "node"], first: Int64[np.ndarray, "group"]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Returns the maps of summed nodes: a feature's own, else what leaves each position."""
    leaving = np.bincount(graph.edge_source, graph.edge_attribution.astype(np.float64), graph.node_kind.size)
    placed = graph.node_position >= 0
    other = np.flatnonzero((graph.node_kind != FEATURE) & (graph.node_kind != OUTPUT) & placed)
    lengths = np.diff(graph.map_indptr)
    own = np.repeat(np.isin(np.arange(lengths.size), first) & (graph.node_kind == FEATURE), lengths)
    owner = np.repeat(group, lengths)[own]
    owners = np.concatenate([owner, group[other]])
    positions = np.concatenate([graph.map_position[own], graph.node_position[other]])
    values = np.concatenate([graph.map_value[own], leaving[other].astype(np.float32)])
    order = np.lexsort((positions, owners))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=first.size))]).astype(np.int64)
    return indptr, positions[order].astype(np.int32), values[order].astype(np.float32)
