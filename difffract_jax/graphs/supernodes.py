"""Groups of features that do the same: found by clustering, named, edited, and kept in the graph file.

1. Every feature has a profile: its signed edges in, and its signed edges out, each scaled to length 1 as sparse
   vectors over nodes. Two features are alike in their edges by the mean cosine of these.
2. They are alike in place by the cosine of their activation maps; features of different streams, whose positions do not
   correspond, count as unlike.
3. similarity = (1 - map_weight) * edges + map_weight * place, in [-1, 1].
4. Complete linkage, cut where similarity falls below the threshold: in a group every two are at least that alike.
   Groups of one are left out, and so are the graph's targets.

The same graph gives the same groups. A group is named by its strongest member, by influence, or where the graph has
none by the sum of its absolute edges.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from difffract_jax.config import Settings, UserError
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.names import find_nodes, node_names
from difffract_jax.graphs.reduction import GroupingSettings

MAX_FEATURES = 5_000
"""Features that are clustered together; every pair costs about 25 bytes of memory, measured at 3,000."""


def find_supernodes(graph: Graph, *, threshold: float = 0.5, map_weight: float = 0.25) -> Graph:
    """Groups the features that are alike, in place of the supernodes that the graph had.

    Args:
        graph: the graph; summed over positions or not.
        threshold: least similarity of any two in a group, in (0, 1].
        map_weight: share of the activation maps in the similarity, in [0, 1]; the rest are the edges.

    Raises:
        UserError: if a number is out of range, or the graph has more than `MAX_FEATURES` features.
    """
    if not 0 < threshold <= 1 or not 0 <= map_weight <= 1:
        raise UserError(f"threshold must lie in (0, 1] and map_weight in [0, 1], but got {threshold} and {map_weight}.")
    features = np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets)
    if features.size > MAX_FEATURES:
        raise UserError(
            f"The graph has {features.size} features, more than the {MAX_FEATURES} that are clustered together; "
            "prune it first."
        )
    settings = GroupingSettings(threshold=threshold, map_weight=map_weight)
    graph = replace(graph, supernodes={}).with_provenance(grouping=settings)
    if features.size < 2:
        return graph
    distance = np.clip(1 - similarity(graph, features, map_weight), 0, 2)
    np.fill_diagonal(distance, 0)
    # Two features with the same edges differ by a rounding or two, which must not decide.
    tree = linkage(squareform(np.round(distance, 9), checks=False), "complete")
    labels = fcluster(tree, 1 - threshold + 1e-9, "distance")
    groups = [features[labels == label] for label in np.unique(labels)]
    return replace(graph, supernodes=_named(graph, [group for group in groups if group.size > 1]))


def similarity(
    graph: Graph, features: Int64[np.ndarray, "feature"], map_weight: float = 0.25
) -> Float64[np.ndarray, "feature feature"]:
    """Returns how alike every two features are, in [-1, 1].

    Args:
        graph: the graph.
        features: nodes.
        map_weight: share of the activation maps, in [0, 1].
    """
    nodes = graph.node_kind.size
    source, target, value = graph.edge_source, graph.edge_target, graph.edge_attribution.astype(np.float64)
    incoming, outgoing = (
        sparse.csr_array((value, ends), shape=(nodes, nodes)) for ends in ((target, source), (source, target))
    )
    edges = (_cosines(incoming[features]) + _cosines(outgoing[features])) / 2
    # One column per stream and position, so that maps of different streams do not meet.
    owner = np.repeat(np.arange(nodes), np.diff(graph.map_indptr))
    width = int(graph.map_position.max(initial=0)) + 1
    column = graph.node_stream[owner].astype(np.int64) * width + graph.map_position
    values = graph.map_value.astype(np.float64)
    maps = sparse.csr_array((values, (owner, column)), shape=(nodes, 3 * width))[features]
    return (1 - map_weight) * edges + map_weight * _cosines(maps)


def _cosines(rows: sparse.csr_array) -> Float64[np.ndarray, "row row"]:
    """Returns the cosine of every two rows; 0 with a row of zeros."""
    length = np.sqrt(rows.power(2).sum(axis=1))
    scale = np.divide(1.0, length, out=np.zeros(length.size), where=length > 0)
    scaled = sparse.diags_array(scale) @ rows
    return sparse.csr_array(scaled @ scaled.T).toarray()


def _named(graph: Graph, groups: Sequence[NDArray[np.integer]]) -> dict[str, list[int]]:
    """Names groups by their strongest members, the strongest group first."""
    strength = graph.node_influence.astype(np.float64)
    if np.isnan(strength).any():
        size = np.abs(graph.edge_attribution.astype(np.float64))
        leaving, entering = (np.bincount(end, size, strength.size) for end in (graph.edge_source, graph.edge_target))
        strength = leaving + entering
    names = node_names(graph)
    ranked = sorted(groups, key=lambda group: (-strength[group].sum(), group[0]))
    best = [int(group[np.argmax(strength[group])]) for group in ranked]
    return {
        f"{names[top]} and {group.size - 1} more": [int(node) for node in group]
        for top, group in zip(best, ranked, strict=True)
    }


class Edits(Settings):
    """Changes to a graph's supernodes; applied in this order. A JSON or YAML file holds the same."""

    remove: list[str] = []
    """Names of groups to take apart."""
    rename: dict[str, str] = {}
    """Old name -> new name."""
    set: dict[str, list[str]] = {}
    """Name -> names of its nodes, which leave the groups that they were in."""


def edit_supernodes(graph: Graph, edits: Edits) -> Graph:
    """Changes a graph's supernodes by hand; a group left empty goes.

    Args:
        graph: the graph.
        edits: what to change.

    Raises:
        UserError: if an edit names a supernode or node that is not there, or two groups would share a name.
    """
    groups = dict(graph.supernodes)
    for name in (*edits.remove, *edits.rename):
        if name not in groups:
            raise UserError(f"The graph has no supernode {name!r}; it has {', '.join(map(repr, groups)) or 'none'}.")
    groups = {name: group for name, group in groups.items() if name not in edits.remove}
    renamed = [edits.rename.get(name, name) for name in groups]
    if len({*renamed}) < len(renamed):
        raise UserError(f"Two supernodes would get the same name, among {', '.join(map(repr, renamed))}.")
    groups = dict(zip(renamed, groups.values(), strict=True))
    for name, members in edits.set.items():
        nodes = find_nodes(graph, members).tolist()
        groups = {other: [node for node in group if node not in nodes] for other, group in groups.items()}
        groups[name] = sorted({*nodes})
    return replace(graph, supernodes={name: group for name, group in groups.items() if group})


def parse_assignment(text: str) -> tuple[str, list[str]]:
    """Reads NAME=node,node, as on the command line; raises `UserError` if it is not of that form."""
    name, separator, nodes = text.partition("=")
    members = [node.strip() for node in nodes.split(",") if node.strip()]
    if not separator or not name.strip() or not members:
        raise UserError(f"{text!r} is not of the form NAME=node,node; write for example red=img/2/f401,img/3/f17.")
    return name.strip(), members
