"""What is read from files must add up: finite numbers alone, and no edges in a circle (NumPy).

A graph checks its lengths, types and indices when it is made (`arrays`); these are checks of its values, which code
that makes graphs holds to, and files need not.
"""

from collections.abc import Sequence

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.graphs.arrays import FEATURE, GraphArrays
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.order import node_levels


def check_values(graph: GraphArrays, source: str, names: Sequence[str] | None = None) -> None:
    """Refuses a graph that influence, scores and comparisons cannot be computed of.

    Args:
        graph: as it was read.
        source: what it was read from, for messages.
        names: what to call its nodes; as `node_names` does if left out.

    Raises:
        UserError: naming the first edge, node or target with a number that is not finite, or the nodes of a circle.
    """
    wrong = ~np.isfinite(graph.edge_attribution)
    if wrong.any():
        called = node_names(graph) if names is None else names
        edge = int(np.argmax(wrong))
        ends = f"{called[graph.edge_source[edge]]} to {called[graph.edge_target[edge]]}"
        raise UserError(_sentence(source, f"the edge from {ends} is", graph.edge_attribution, wrong))
    values = np.where(graph.node_kind == FEATURE, graph.node_value, 1.0)
    owners = np.repeat(np.arange(graph.node_kind.size), np.diff(graph.map_indptr))
    for array, nodes, what in (
        (values, np.arange(values.size), "value"),
        (graph.map_value, owners, "activation map"),
        (graph.target_sum, graph.target_node, "sum of edges"),
        (graph.target_abs_sum, graph.target_node, "sum of absolute edges"),
    ):
        wrong = ~np.isfinite(array)
        if wrong.any():
            called = node_names(graph) if names is None else names
            raise UserError(_sentence(source, f"the {what} of {called[nodes[np.argmax(wrong)]]} is", array, wrong))
    try:
        node_levels(graph, names)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _sentence(source: str, place: str, values: np.ndarray, wrong: np.ndarray) -> str:
    """Says what is not finite, and how many more are not."""
    more = int(wrong.sum()) - 1
    rest = f" (and {more} more like it)" if more else ""
    return (
        f"In {source}, {place} {values[np.argmax(wrong)]}{rest}, which is not a finite number; "
        "trace or export the graph again."
    )
