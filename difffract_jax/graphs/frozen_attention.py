"""A graph whose attention is explained, as it would be with attention frozen (NumPy)."""

from dataclasses import replace

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.graphs.graph import SCORE, Graph, subgraph


def without_scores(graph: Graph) -> Graph:
    """Returns a graph without its attention scores; one that has none as it is.

    What scores add to a target stands in its bias with the opposite sign, and is taken out of both. Features that were
    expanded for a score's sake stay, and influence and graph scores remain those of the graph with scores.

    Args:
        graph: any graph.

    Raises:
        UserError: if it has scores but does not say what they add, as graphs that were combined.
    """
    scores, told = graph.node_kind == SCORE, graph.provenance.attention
    if not scores.any():
        return graph
    if len(told) != graph.targets.size:
        raise UserError(
            "The graph has attention scores as nodes but does not say what they add to its targets, since it combines "
            "several graphs; give one of these."
        )
    frozen = subgraph(graph, ~scores, np.ones(graph.edge_source.size, bool))
    sums, bias, sizes = (column.copy() for column in (frozen.target_sum, frozen.target_bias, frozen.target_abs_sum))
    for number, one in enumerate(told):
        sums[number] -= one.total
        bias[number] += one.total
        sizes[number] -= one.absolute
    attribution = graph.provenance.attribution
    if attribution is not None:
        attribution = replace(attribution, max_scores=None)
    frozen = replace(frozen, target_sum=sums, target_bias=bias, target_abs_sum=np.maximum(sizes, 0))
    return frozen.with_provenance(attention=(), attribution=attribution)
