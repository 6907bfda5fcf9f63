"""An order of nodes in which every edge leads up, or the circle of edges because of which there is none (NumPy).

1. Graphs of ours are laid in layers: edges lead from a lower (step, block) to a higher one, which is an order already.
   A block's attention scores and modulations come before its features, those of the last norm before outputs.
2. Graphs of other tools may have edges within a layer, as from attention features to those of the MLP after it. There a
   node's level is the number of edges on the longest path to it.
3. Where edges run in a circle, that number does not exist, and the circle is named.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from difffract_jax.config import UserError
from difffract_jax.graphs.arrays import MODULATION, SCORE, GraphArrays
from difffract_jax.graphs.names import node_names

SHOWN = 6
"""Nodes of a circle that a message names."""


def levels(step: NDArray[np.integer], block: NDArray[np.integer]) -> Int64[np.ndarray, "node"]:
    """Returns one number per node that orders (step, block); inputs have block -1, outputs the number of blocks."""
    step, block = step.astype(np.int64), block.astype(np.int64)
    return step * (int(block.max(initial=0)) + 2) + block + 1


def levels_of(
    kind: NDArray[np.integer], step: NDArray[np.integer], block: NDArray[np.integer]
) -> Int64[np.ndarray, "node"]:
    """Returns what `levels` does, with a block's attention scores and modulations before all else of the block.

    Args:
        kind: of each node.
        step: denoising step.
        block: of the model.
    """
    level = levels(step, block)
    before = np.isin(kind, (SCORE, MODULATION))
    return 2 * level + ~before if before.any() else level


def node_levels(graph: GraphArrays, names: Sequence[str] | None = None) -> Int64[np.ndarray, "node"]:
    """Returns a number per node, not negative; the source of every edge has a lower one than its target.

    Args:
        graph: any graph.
        names: what to call its nodes in a message; as `node_names` does if left out.

    Raises:
        UserError: naming the nodes of a circle, if edges run in one.
    """
    level = levels_of(graph.node_kind, graph.node_step, graph.node_block)
    if np.all(level[graph.edge_source] < level[graph.edge_target]):
        return level
    level, left = _peel(graph.edge_source, graph.edge_target, level.size)
    if left.any():
        raise UserError(
            f"The graph has a cycle, {_circle_text(graph, left, names)}, but edges of a circuit only lead forward; "
            "take one of these edges out, or export the graph again."
        )
    return level


def check_sum(summed: GraphArrays) -> None:
    """Refuses a sum over positions whose edges run in a circle, as that of a graph without circles may.

    Args:
        summed: sum of a graph over positions.

    Raises:
        UserError: naming the nodes of a circle, and what to do.
    """
    level = levels(summed.node_step, summed.node_block)
    if np.all(level[summed.edge_source] < level[summed.edge_target]):
        return
    _, left = _peel(summed.edge_source, summed.edge_target, level.size)
    if left.any():
        raise UserError(
            f"Summed over positions, edges of the graph run in a circle, {_circle_text(summed, left)}; leave single "
            "positions apart with by_position."
        )


def _circle_text(graph: GraphArrays, left: NDArray[np.bool_], names: Sequence[str] | None = None) -> str:
    """Returns a circle among the nodes that are left, by their names."""
    circle = _circle(graph.edge_source, graph.edge_target, left)
    called = node_names(graph) if names is None else names
    shown = [called[node] for node in circle[:SHOWN]] + (["..."] if len(circle) > SHOWN else [called[circle[0]]])
    return " -> ".join(shown)


def _peel(
    source: NDArray[np.integer], target: NDArray[np.integer], nodes: int
) -> tuple[Int64[np.ndarray, "node"], Bool[np.ndarray, "node"]]:
    """Returns how many edges the longest path to each node has, and which nodes lie on a circle or behind one."""
    level, left = np.zeros(nodes, np.int64), np.ones(nodes, bool)
    for number in range(nodes):
        waiting = np.zeros(nodes, bool)
        waiting[target[left[source]]] = True
        free = left & ~waiting
        if not free.any():
            break
        level[free] = number
        left &= ~free
    return level, left


def _circle(source: NDArray[np.integer], target: NDArray[np.integer], left: Bool[np.ndarray, "node"]) -> list[int]:
    """Returns nodes that edges join in a circle, in the order of the edges.

    Args:
        source: node of each edge.
        target: node of each edge.
        left: nodes each of which has an edge from another of them.
    """
    before = {int(t): int(s) for s, t in zip(source, target, strict=True) if left[s] and left[t]}
    path = [min(before)]
    while before[path[-1]] not in path:
        path.append(before[path[-1]])
    return path[path.index(before[path[-1]]) :][::-1]
