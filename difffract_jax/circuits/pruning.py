"""Which nodes and edges of a circuit to keep (METHOD section 5), mode `difffract`: the reference's rule.

1. Sum over positions, unless asked not to.
2. Influence of every node on the target, over column shares of all edges.
3. Per stream: feature nodes by influence, until they hold `node_threshold` of the stream's total. Errors, rest, inputs
   and the target are always kept.
4. Shares and influence anew on what is left. Per stream of the source: edges by share times the reach of their target,
   until they hold `edge_threshold` of the stream's total. Features that have lost all their edges go too.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import NDArray

from difffract_jax.circuits.expansion import aggregate
from difffract_jax.circuits.graph import FEATURE, Graph, keep
from difffract_jax.circuits.influence import column_shares, levels, reach
from difffract_jax.config import UserError

MODES = ("difffract",)


def prune(
    graph: Graph,
    *,
    mode: str = "difffract",
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    by_position: bool = False,
) -> Graph:
    """Keeps the most influential features and edges.

    Args:
        graph: from `attribute`.
        mode: whose rule; `difffract` is the only one of this release.
        node_threshold: share of each stream's feature influence to keep, in (0, 1].
        edge_threshold: share of each stream's edge scores to keep, in (0, 1].
        by_position: prune single positions instead of sums over positions.

    Returns:
        The pruned graph, with `node_influence` as computed before any node was dropped.

    Raises:
        UserError: if the mode is unknown or a threshold out of range.
    """
    if mode not in MODES:
        raise UserError(f"The pruning mode must be one of {', '.join(MODES)}, but got {mode!r}.")
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise UserError(f"{name} is a share of influence to keep and must lie in (0, 1], but got {value}.")
    graph = graph if by_position else aggregate(graph)
    influence = node_influence(graph)
    graph = replace(graph, node_influence=influence.astype(np.float32))
    features = graph.node_kind == FEATURE
    features[graph.target] = False
    nodes = ~features
    for stream in np.unique(graph.node_stream):
        mine = np.flatnonzero(features & (graph.node_stream == stream))
        nodes[mine[top_share(influence[mine], node_threshold)]] = True
    graph = keep(graph, nodes, np.ones(graph.edge_source.size, bool))
    scores = edge_scores(graph)
    edges = np.zeros(scores.size, bool)
    for stream in np.unique(graph.node_stream):
        mine = np.flatnonzero(graph.node_stream[graph.edge_source] == stream)
        edges[mine[top_share(scores[mine], edge_threshold)]] = True
    graph = keep(graph, np.ones(graph.node_kind.size, bool), edges)
    joined = np.zeros(graph.node_kind.size, bool)
    joined[graph.edge_source] = joined[graph.edge_target] = True
    graph = keep(graph, joined | (graph.node_kind != FEATURE), np.ones(graph.edge_source.size, bool))
    settings = {"mode": mode, "node_threshold": node_threshold, "edge_threshold": edge_threshold}
    return graph.with_metadata({"pruning": settings})


def node_influence(graph: Graph) -> Float64[np.ndarray, "node"]:
    """Returns B e_target: every node's influence on the graph's target, over all paths; 0 for the target."""
    influence = _reach(graph)
    influence[graph.target] = 0.0
    return influence


def edge_scores(graph: Graph) -> Float64[np.ndarray, "edge"]:
    """Returns each edge's share of its target times the target's reach."""
    shares = column_shares(graph.edge_target, graph.edge_attribution, graph.node_kind.size)
    return shares * _reach(graph)[graph.edge_target]


def _reach(graph: Graph) -> Float64[np.ndarray, "node"]:
    level = levels(graph.node_step, graph.node_block)
    shares = column_shares(graph.edge_target, graph.edge_attribution, graph.node_kind.size)
    return reach(level, graph.edge_source, graph.edge_target, shares, graph.root_weights)


def top_share(scores: NDArray[np.floating], threshold: float) -> Bool[np.ndarray, "item"]:
    """Marks the largest scores, as few as hold the threshold's share of their sum; all at threshold 1.

    Args:
        scores: not negative.
        threshold: share in (0, 1].
    """
    order = np.argsort(-scores, kind="stable")
    total = np.cumsum(scores[order], dtype=np.float64)
    chosen = np.ones(scores.size, bool)
    if threshold < 1 and scores.size:
        chosen[order[int(np.searchsorted(total, threshold * total[-1])) + 1 :]] = False
    return chosen
