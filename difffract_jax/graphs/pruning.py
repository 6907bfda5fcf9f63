"""Which nodes and edges of a circuit to keep (docs/method.md, section 5).

Both modes sum over positions first, unless asked not to, and take the influence of every node on the weighted targets
over column shares of all edges. Inputs and targets are always kept.

Mode `standard` (circuit-tracer's `prune_graph`):

1. All nodes in one list: the fewest that hold `node_threshold` of all influence stay; ties with the last one too.
2. Shares and influence anew on what is left. All edges in one list, by share times the reach of their target, cut in
   the same way at `edge_threshold`.
3. Until nothing changes: features, errors, rest and attention scores without an edge out go, and features without an
   edge in.

Mode `difffract`, the reference's rule, so that graphs can be compared with its own:

1. Per stream: feature nodes by influence, until they hold `node_threshold` of the stream's total. Errors, rest and
   attention scores are always kept.
2. Shares and influence anew. Per stream of the source: edges, until they hold `edge_threshold` of the stream's total.
   Features that have lost all their edges go too.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import NDArray

from difffract_jax.config import UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE, INPUT, Graph, subgraph
from difffract_jax.graphs.groups import nodes_of
from difffract_jax.graphs.influence import column_shares, graph_reach, node_influence
from difffract_jax.graphs.order import check_sum
from difffract_jax.graphs.reduction import PruningScores, PruningSettings
from difffract_jax.graphs.scoring import scores

MODES = ("standard", "difffract")

# Relative; float64 sums over a graph's nodes and edges are off by less.
ROUNDING = 1e-9


def check_pruning(mode: str, node_threshold: float, edge_threshold: float) -> None:
    """Refuses settings that `prune` knows nothing of.

    Args:
        mode: one of `MODES`.
        node_threshold: see `prune`.
        edge_threshold: see `prune`.

    Raises:
        UserError: if the mode is unknown or a threshold out of range.
    """
    if mode not in MODES:
        raise UserError(f"The pruning mode must be one of {', '.join(MODES)}, but got {mode!r}.")
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise UserError(f"{name} is a share of influence to keep and must lie in (0, 1], but got {value}.")


def prune(
    graph: Graph,
    *,
    mode: str = "standard",
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    by_position: bool = False,
    keep: Sequence[str] = (),
) -> Graph:
    """Keeps the most influential nodes and edges.

    Args:
        graph: from `attribute`.
        mode: whose rule, one of `MODES`.
        node_threshold: share of influence that the kept nodes hold, in (0, 1]: of all of it, or in mode `difffract` of
            each stream's features.
        edge_threshold: share of the edge scores that the kept edges hold, in (0, 1], likewise.
        by_position: prune single positions instead of sums over positions.
        keep: nodes that stay in any case, by their names in the graph summed over positions.

    Returns:
        The pruned graph, with `node_influence` and `node_cumulative` as computed before any node was dropped. Its
        provenance tells the settings, `pruning`, and `scores`: of the graph before pruning (`unpruned`), of the same
        graph with every feature that was dropped counted as error (`pinned`), and of the result (`pruned`).

    Raises:
        UserError: if the mode is unknown or a threshold out of range, or if the sums over positions would run in
            circles.
    """
    check_pruning(mode, node_threshold, edge_threshold)
    if not by_position and graph.by_position:
        graph = aggregate(graph)
        check_sum(graph)
    influence = node_influence(graph)
    cumulative = cumulative_shares(influence).astype(np.float32)
    graph = replace(graph, node_influence=influence.astype(np.float32), node_cumulative=cumulative)
    rule = {"standard": _standard, "difffract": _difffract}[mode]
    kept = np.zeros(influence.size, bool)
    kept[nodes_of(graph, keep)] = True
    nodes, edges = rule(graph, influence, node_threshold, edge_threshold, kept)
    pruned = subgraph(graph, nodes, edges)
    settings = PruningSettings(mode=mode, node_threshold=node_threshold, edge_threshold=edge_threshold)
    told = PruningScores(unpruned=scores(graph), pinned=scores(graph, pinned=nodes), pruned=scores(pruned))
    return pruned.with_provenance(pruning=settings, scores=told, grade=None)  # a grade is of the graph that was tried


Masks = tuple[Bool[np.ndarray, "node"], Bool[np.ndarray, "edge"]]


def _standard(
    graph: Graph,
    influence: Float64[np.ndarray, "node"],
    node_threshold: float,
    edge_threshold: float,
    kept: Bool[np.ndarray, "node"],
) -> Masks:
    """Marks what circuit-tracer's rule keeps, and the nodes that are to be kept in any case."""
    fixed = (graph.node_kind == INPUT) | kept
    fixed[graph.targets] = True
    nodes = fixed | largest(influence, node_threshold)
    edges = nodes[graph.edge_source] & nodes[graph.edge_target]
    ranked = np.flatnonzero(edges)
    edges[ranked] = largest(edge_scores(graph, edges)[ranked], edge_threshold)
    features = (graph.node_kind == FEATURE) & ~fixed
    while True:
        has_out, has_in = (np.zeros(nodes.size, bool) for _ in range(2))
        has_out[graph.edge_source[edges]] = has_in[graph.edge_target[edges]] = True
        joined = nodes & (fixed | has_out) & (~features | has_in)
        if np.array_equal(joined, nodes):
            return nodes, edges
        nodes = joined
        edges &= nodes[graph.edge_source] & nodes[graph.edge_target]


def _difffract(
    graph: Graph,
    influence: Float64[np.ndarray, "node"],
    node_threshold: float,
    edge_threshold: float,
    kept: Bool[np.ndarray, "node"],
) -> Masks:
    """Marks what the reference's rule keeps, and the nodes that are to be kept in any case."""
    features = graph.node_kind == FEATURE
    features[graph.targets] = False
    nodes = ~features
    for stream in np.unique(graph.node_stream):
        mine = np.flatnonzero(features & (graph.node_stream == stream))
        nodes[mine[top_share(influence[mine], node_threshold)]] = True
    nodes |= kept
    left = nodes[graph.edge_source] & nodes[graph.edge_target]
    values = edge_scores(graph, left)
    edges = np.zeros(values.size, bool)
    for stream in np.unique(graph.node_stream):
        mine = np.flatnonzero(left & (graph.node_stream[graph.edge_source] == stream))
        edges[mine[top_share(values[mine], edge_threshold)]] = True
    joined = np.zeros(nodes.size, bool)
    joined[graph.edge_source[edges]] = joined[graph.edge_target[edges]] = True
    return nodes & (joined | kept | (graph.node_kind != FEATURE)), edges


def edge_scores(graph: Graph, edges: Bool[np.ndarray, "edge"] | None = None) -> Float64[np.ndarray, "edge"]:
    """Returns each edge's share of its target times the target's reach.

    Args:
        graph: the graph.
        edges: mask of those that are there; the others score 0. All if left out.
    """
    attribution = graph.edge_attribution if edges is None else np.where(edges, graph.edge_attribution, 0)
    shares = column_shares(graph.edge_target, attribution, graph.node_kind.size)
    return shares * graph_reach(graph, attribution)[graph.edge_target]


def cumulative_shares(scores: NDArray[np.floating]) -> Float64[np.ndarray, "item"]:
    """Returns for each score the share of the sum that it holds together with those ranked above it; 0 if all are 0.

    Args:
        scores: not negative.
    """
    order = np.argsort(-scores, kind="stable")
    total = np.cumsum(scores[order], dtype=np.float64)
    shares = np.zeros(scores.size)
    if scores.size and total[-1] > 0:
        shares[order] = total / total[-1]
    return shares


def largest(scores: NDArray[np.floating], threshold: float) -> Bool[np.ndarray, "item"]:
    """Marks the largest scores: the fewest that hold the threshold's share of their sum, and ties with the last.

    Scores and shares that differ by no more than `ROUNDING` count as equal: along a chain of single edges all scores
    are the same number, computed in different ways, and what is kept must not hang on its last digit.

    Args:
        scores: not negative.
        threshold: share in (0, 1]; all are marked at 1.
    """
    if threshold == 1 or not scores.size:
        return np.ones(scores.size, bool)
    descending = -np.sort(-scores)
    total = np.cumsum(descending, dtype=np.float64)
    last = min(int(np.searchsorted(total, (threshold - ROUNDING) * total[-1])), scores.size - 1)
    return scores >= descending[last] * (1 - ROUNDING)


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
