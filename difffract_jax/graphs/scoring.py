"""How much of a circuit is explained by features rather than left in errors (circuit-tracer's two scores).

Symbols: A[s, t] is the share of source s in the edges into target t, by absolute value; w the targets' weights;
I = B w the influence (`influence`). Errors are the nodes of kind error and rest, and the rest of a block's attention
scores: what the features and scores in the graph miss.

    replacement    sum of I over inputs / (sum of I over inputs + sum of I over errors)
    completeness   sum over nodes t of (1 - sum over errors s of A[s, t]) (I[t] + w[t]) / sum over t of (I[t] + w[t])

Replacement asks how much of the influence reaches the inputs, words of the pooled path among them, rather than ending
in an error; completeness, how much of what enters the nodes that matter comes from no error. Both are shares; 1 means
no errors.

A subset of the features is scored by treating the others as error, as Neuronpedia does for pinned nodes: their edges
are taken to leave from the error of the same step, site and position, and what enters them is dropped.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, REST, SCORE, WORD, Graph
from difffract_jax.graphs.influence import column_shares, reach
from difffract_jax.graphs.order import node_levels
from difffract_jax.graphs.reduction import Scores


def scores(graph: Graph, *, pinned: Bool[np.ndarray, "node"] | None = None) -> Scores:
    """Scores a graph as it is: a pruned one misses what was dropped, so say which was scored.

    Args:
        graph: the graph.
        pinned: mask of the features that count; the others are treated as error, targets excepted. All if left out.

    Raises:
        UserError: naming the nodes, if edges run in a circle.
    """
    edges = Links(graph.edge_source.astype(np.int64), graph.edge_target.astype(np.int64), graph.edge_attribution)
    level, errors = node_levels(graph), np.isin(graph.node_kind, (ERROR, REST))
    errors |= (graph.node_kind == SCORE) & (graph.node_head < 0)
    if pinned is not None:
        folded = (graph.node_kind == FEATURE) & ~pinned
        folded[graph.targets] = False
        stand_in, places = _stand_ins(graph)
        # Places without an error node get one, past the end of the nodes, and below all: no edge leads into it.
        level = np.pad(level, (0, places), constant_values=-1)
        errors = np.pad(errors, (0, places), constant_values=True)
        edges = _fold(edges, folded, stand_in)
    more = level.size - graph.node_kind.size
    inputs = np.pad(np.isin(graph.node_kind, (INPUT, WORD)), (0, more))
    roots = np.pad(graph.root_weights, (0, more))
    shares = column_shares(edges.target, edges.attribution, level.size)
    reached = reach(level, edges.source, edges.target, shares, roots)
    influence = reached - roots
    explained = float(influence[inputs].sum())
    ending = explained + float(influence[errors].sum())
    from_errors = np.bincount(edges.target, shares * errors[edges.source], level.size)
    return Scores(
        replacement=explained / ending if ending > 0 else None,
        completeness=float(((1 - from_errors) * reached).sum() / reached.sum()),
    )


class Links(NamedTuple):
    """Edges by node."""

    source: Int64[np.ndarray, "edge"]
    target: Int64[np.ndarray, "edge"]
    attribution: NDArray[Any]


def _stand_ins(graph: Graph) -> tuple[Int64[np.ndarray, "node"], int]:
    """Returns the error that stands for each node, the one of its place, and how many places there are.

    Where a place (step, branch, stream, block, position) has no error, the stand-in is numbered past the end of the
    nodes.
    """
    columns = (graph.node_step, graph.node_branch, graph.node_stream, graph.node_block, graph.node_position)
    place = np.stack([column.astype(np.int64) for column in columns])
    distinct, places = np.unique(place, axis=1, return_inverse=True)
    places, count = places.ravel(), distinct.shape[1]
    stand_in = np.arange(count) + places.size
    own = np.flatnonzero(graph.node_kind == ERROR)
    stand_in[places[own]] = own
    return stand_in[places], count


def _fold(edges: Links, folded: Bool[np.ndarray, "node"], stand_in: Int64[np.ndarray, "node"]) -> Links:
    """Lets the edges of some nodes leave from their stand-ins, added to theirs, and drops the edges into them."""
    left = ~folded[edges.target]
    source = np.where(folded[edges.source], stand_in[edges.source], edges.source)
    pairs, place = np.unique(np.stack([edges.target, source])[:, left], axis=1, return_inverse=True)
    sums = np.bincount(place.ravel(), edges.attribution[left].astype(np.float64), pairs.shape[1])
    return Links(pairs[1], pairs[0], sums.astype(np.float64))  # without edges `bincount` counts in whole numbers
