"""A graph that explains attention or the pooled path, as it would be with them frozen (NumPy)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.graphs.graph import MODULATION, SCORE, WORD, Graph, subgraph
from difffract_jax.graphs.held_paths import ExplainedAttention, ExplainedPooled


def without_scores(graph: Graph) -> Graph:
    """Returns a graph without its attention scores; one that has none as it is.

    What scores add to a target stands in its bias with the opposite sign, and is taken out of both. Features that were
    expanded for a score's sake stay, and influence and graph scores remain those of the graph with scores.

    Args:
        graph: any graph.

    Raises:
        UserError: if it has scores but does not say what they add, as graphs that were combined.
    """
    if not np.any(graph.node_kind == SCORE):
        return graph
    frozen = _without(graph, (SCORE,), graph.provenance.attention, "attention scores")
    attribution = graph.provenance.attribution
    if attribution is not None:
        attribution = replace(attribution, max_scores=None)
    return frozen.with_provenance(attention=(), attribution=attribution)


def without_pooled(graph: Graph) -> Graph:
    """Returns a graph without its modulations and words; one that has none as it is.

    What modulations add to a target stands in its bias with the opposite sign, and is taken out of both. Influence and
    graph scores remain those of the graph with them.

    Args:
        graph: any graph.

    Raises:
        UserError: if it has modulations but does not say what they add, as graphs that were combined.
    """
    if not np.any(graph.node_kind == MODULATION):
        return graph
    frozen = _without(graph, (MODULATION, WORD), graph.provenance.pooled, "modulations")
    return frozen.with_provenance(pooled=(), words=(), negative_words=())


def _without(
    graph: Graph, kinds: Sequence[int], told: Sequence[ExplainedAttention | ExplainedPooled], what: str
) -> Graph:
    """Returns a graph without nodes of some kinds, and its targets' accounts without what these add."""
    if len(told) != graph.targets.size:
        raise UserError(
            f"The graph has {what} as nodes but does not say what they add to its targets, since it combines several "
            "graphs; give one of these."
        )
    frozen = subgraph(graph, ~np.isin(graph.node_kind, kinds), np.ones(graph.edge_source.size, bool))
    sums, bias, sizes = (column.copy() for column in (frozen.target_sum, frozen.target_bias, frozen.target_abs_sum))
    for number, one in enumerate(told):
        sums[number] -= one.total
        bias[number] += one.total
        sizes[number] -= one.absolute
    return replace(frozen, target_sum=sums, target_bias=bias, target_abs_sum=np.maximum(sizes, 0))
