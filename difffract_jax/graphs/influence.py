"""How much every node bears on one target, or on several weighted ones, along all paths (docs/method.md, section 5).

    A   |attribution|, each column (target) divided by its sum: the share of a target's edges that a source holds
    B   A + A^2 + A^3 + ... = (I - A)^-1 - I, over paths of every length

Edges lead from lower levels to higher (`order`), in graphs of ours those of (step, block), so that A is triangular:
B w comes from walking the levels from the highest down, each edge once; no matrix is inverted. Inputs come before all
blocks of their step, outputs after them.

Symbols: w holds the targets' weights and 0 elsewhere; reach = w + B w, influence = B w.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from difffract_jax.graphs.arrays import GraphArrays
from difffract_jax.graphs.order import node_levels


def column_shares(
    target: NDArray[np.integer], attribution: NDArray[np.floating], nodes: int
) -> Float64[np.ndarray, "edge"]:
    """Divides each edge's absolute attribution by the sum of those into its target.

    Args:
        target: target node of each edge.
        attribution: of each edge.
        nodes: how many nodes there are.
    """
    size = np.abs(attribution).astype(np.float64)
    total = np.bincount(target, size, nodes)[target]
    return np.divide(size, total, out=np.zeros_like(size), where=total > 0)


def reach(
    level: Int64[np.ndarray, "node"],
    source: NDArray[np.integer],
    target: NDArray[np.integer],
    share: Float64[np.ndarray, "edge"],
    roots: Float64[np.ndarray, "node"],
) -> Float64[np.ndarray, "node"]:
    """Returns w + B w.

    Args:
        level: of each node; every edge leads to a higher one.
        source: node of each edge.
        target: node of each edge.
        share: entry of A of each edge.
        roots: w, the weight of every node that influence is on; 0 for the others.

    Raises:
        ValueError: if an edge does not lead to a higher level.
    """
    if np.any(level[source] >= level[target]):
        raise ValueError("An edge must lead from a lower level to a higher one, but one does not.")
    result = roots.copy()
    order = np.argsort(-level[target], kind="stable")
    source, target, share = source[order], target[order], share[order]
    changes = np.flatnonzero(np.diff(level[target], prepend=np.iinfo(np.int64).max))
    for begin, end in pairwise(np.append(changes, source.size)):
        # Everything above this level is done, hence the reach of these targets is final.
        part = slice(begin, end)
        result += np.bincount(source[part], share[part] * result[target[part]], level.size)
    return result


def graph_reach(graph: GraphArrays, attribution: NDArray[np.floating]) -> Float64[np.ndarray, "node"]:
    """Returns w + B w of a graph.

    Args:
        graph: the graph.
        attribution: of its edges; 0 for those that are taken for absent.

    Raises:
        UserError: naming the nodes, if edges run in a circle.
    """
    shares = column_shares(graph.edge_target, attribution, graph.node_kind.size)
    return reach(node_levels(graph), graph.edge_source, graph.edge_target, shares, graph.root_weights)


def node_influence(graph: GraphArrays) -> Float64[np.ndarray, "node"]:
    """Returns B w: every node's influence on a graph's weighted targets, over all paths."""
    return graph_reach(graph, graph.edge_attribution) - graph.root_weights
