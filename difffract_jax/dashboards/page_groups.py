"""The groups of features that a page opens with, where nobody gave any (NumPy and SciPy)."""

from dataclasses import replace

from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.names import find_nodes, node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.supernodes import find_supernodes

MOST_GROUPED = 1000
"""Features up to which a page opens with groups that were found; finding them among more takes seconds."""


def grouped(graph: Graph) -> Graph:
    """Returns a graph with the groups that are found in what is left of it after pruning, if it has none.

    Args:
        graph: as a page shows it.
    """
    if graph.supernodes or graph.provenance.grouping is not None:
        return graph
    pruned = graph if graph.provenance.pruning is not None else prune(graph, by_position=True)
    if int((pruned.node_kind == FEATURE).sum()) > MOST_GROUPED:
        return graph
    names, supernodes = node_names(pruned), find_supernodes(pruned).supernodes
    groups = {
        title: find_nodes(graph, [names[node] for node in members]).tolist() for title, members in supernodes.items()
    }
    return replace(graph, supernodes=groups)
