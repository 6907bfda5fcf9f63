"""What a graph says will happen when a feature is taken off, and how well what happened agrees (NumPy only).

Two predictions, from the graph's edges alone:

    influence   B = A + A^2 + ..., A the column shares of |attribution|: how strongly a node bears on another, without
                sign (docs/method.md, section 5). The reference compares it with the size of the change.
    change      edges along all paths, each step relative to the value of the node passed (reading `propagated` of
                docs/method.md, section 7), the feature at 0: the change itself, with its sign, in units of the node's u

On a graph of all active features and edges the second is the propagated reading exactly. `agreement` correlates.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy import sparse

from difffract_jax.graphs.correlation import pearson, spearman
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.influence import column_shares
from difffract_jax.graphs.order import levels

NOTHING = 1e-12
"""Pairs whose prediction and change are both smaller are left out, as in the reference."""


def predicted_influence(graph: Graph, sources: Int64[np.ndarray, "source"]) -> Float64[np.ndarray, "source node"]:
    """Returns B from some nodes to all.

    Args:
        graph: position by position.
        sources: nodes.
    """
    shares = column_shares(graph.edge_target, graph.edge_attribution, graph.node_kind.size)
    reached = np.zeros((graph.node_kind.size, sources.size))
    reached[sources, np.arange(sources.size)] = 1
    for targets, weights in _by_level(graph, shares):
        reached[targets] += (weights @ reached)[targets]
    reached[sources, np.arange(sources.size)] -= 1
    return reached.T


def predicted_change(graph: Graph, sources: Int64[np.ndarray, "source"]) -> Float64[np.ndarray, "source node"]:
    """Returns by how much every node's u, or output's value, moves when each source is taken off alone.

    Args:
        graph: position by position.
        sources: feature nodes.
    """
    nodes, number = graph.node_kind.size, np.arange(sources.size)
    moved, share = np.zeros((nodes, sources.size)), np.zeros((nodes, sources.size))
    share[sources, number] = -1
    own = share != 0
    feature = (graph.node_kind == FEATURE)[:, None]
    value = np.where(graph.node_kind == FEATURE, graph.node_value, 1).astype(np.float64)[:, None]
    for targets, weights in _by_level(graph, graph.edge_attribution.astype(np.float64)):
        moved[targets] += (weights @ share)[targets]
        follows = np.where(feature[targets] & ~own[targets], moved[targets] / value[targets], share[targets])
        share[targets] = follows
    return moved.T


def _by_level(graph: Graph, weight: Float64[np.ndarray, "edge"]) -> list[tuple[np.ndarray, sparse.csr_array]]:
    """Returns, level by level upwards, the nodes that edges enter and the matrix [target, source] of these edges."""
    level, nodes = levels(graph.node_step, graph.node_block), graph.node_kind.size
    found = []
    for height in np.unique(level[graph.edge_target]):
        here = level[graph.edge_target] == height
        ends = graph.edge_target[here], graph.edge_source[here]
        found.append((np.unique(ends[0]), sparse.csr_array((weight[here], ends), shape=(nodes, nodes))))
    return found


def downstream(
    graph: Graph, sources: Int64[np.ndarray, "source"], readouts: Int64[np.ndarray, "readout"]
) -> Bool[np.ndarray, "source readout"]:
    """Marks the pairs in which the readout lies in a higher block or later step than the source.

    With guidance by two branches, features of one do not reach those of the other within a step.
    """
    level, step, branch = levels(graph.node_step, graph.node_block), graph.node_step, graph.node_branch
    apart = (step[sources][:, None] == step[readouts]) & (branch[sources][:, None] != branch[readouts])
    return (level[sources][:, None] < level[readouts]) & ~(apart & (graph.node_kind[readouts] == FEATURE))


def agreement(predicted: np.ndarray, changed: np.ndarray, pairs: Bool[np.ndarray, "*shape"]) -> dict[str, Any]:
    """Returns the correlations of predictions with changes, over the pairs that either moves.

    Args:
        predicted: of each pair.
        changed: what happened.
        pairs: which count.

    Returns:
        `spearman` and `pearson`, None where there are fewer than 3 pairs or all are alike; `pairs`, their number.
    """
    counted = pairs & ((np.abs(predicted) > NOTHING) | (np.abs(changed) > NOTHING))
    x, y = predicted[counted], changed[counted]
    if x.size < 3:
        return {"spearman": None, "pearson": None, "pairs": int(x.size)}
    return {"spearman": spearman(x, y), "pearson": pearson(x, y), "pairs": int(x.size)}
