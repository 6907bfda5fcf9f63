"""A graph with the modulations of the pooled path, and the words behind them, as nodes (NumPy).

Edges from modulations lead into the graph's own targets, those from words into modulations. What modulations add to a
target stands in its bias with the opposite sign, so that it adds up as before.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import TXT
from difffract_jax.graphs.arrays import DTYPES, OF_SCORES
from difffract_jax.graphs.graph import MODULATION, WORD, Graph


class PooledNodes(NamedTuple):
    """Modulations and words, and their edges.

    Attributes:
        step: denoising step of each modulation.
        branch: of guidance, of each.
        block: of each; the number of all blocks for the last norm.
        stream: code of its stream.
        row: of the modulations of its block's group.
        change: norm of what the exchange of the pooled embedding changes in it.
        edges: of each modulation into every target.
        remainder: by how much more the target falls when the modulation alone is exchanged.
        word_branch: of each word: whose prompt it is of.
        place: of each in CLIP's sequence.
        words: of each word into every modulation.
        bias: of every modulation: what no word makes.
    """

    step: Int64[np.ndarray, "modulation"]
    branch: Int64[np.ndarray, "modulation"]
    block: Int64[np.ndarray, "modulation"]
    stream: Int64[np.ndarray, "modulation"]
    row: Int64[np.ndarray, "modulation"]
    change: Float64[np.ndarray, "modulation"]
    edges: Float64[np.ndarray, "target modulation"]
    remainder: Float64[np.ndarray, "target modulation"]
    word_branch: Int64[np.ndarray, "word"]
    place: Int64[np.ndarray, "word"]
    words: Float64[np.ndarray, "modulation word"]
    bias: Float64[np.ndarray, "modulation"]


def with_pooled_nodes(graph: Graph, nodes: PooledNodes, first_step: int, min_attribution: float) -> Graph:
    """Returns a graph with modulations and words behind its other nodes.

    Args:
        graph: position by position.
        nodes: of its targets.
        first_step: of the run that was traced: words, which all its steps share, count to it.
        min_attribution: smallest edge that is kept. Modulations and words without one are left out, but are part of
            what targets and modulations add up to.
    """
    least = max(min_attribution, float(np.finfo(np.float32).tiny))
    some = np.flatnonzero((np.abs(nodes.edges) >= least).any(axis=0))
    order = (nodes.row, nodes.stream, nodes.block, nodes.branch, nodes.step)
    some = some[np.lexsort([column[some] for column in order])]
    strong = np.flatnonzero((np.abs(nodes.words[some]) >= least).any(axis=0))
    first = graph.node_kind.size
    arrays = _node_arrays(graph, nodes, some, strong, first_step) | _edge_arrays(graph, nodes, some, strong, least)
    sums, bias, sizes = (column.copy() for column in (graph.target_sum, graph.target_bias, graph.target_abs_sum))
    sums[graph.targets] += nodes.edges.sum(axis=1)
    bias[graph.targets] -= nodes.edges.sum(axis=1)
    sizes[graph.targets] += np.abs(nodes.edges).sum(axis=1)
    expanded = some if nodes.place.size else some[:0]
    accounts = {
        "target_preactivation": (graph.target_preactivation, graph.root_weights[graph.targets] @ nodes.edges),
        "target_bias": (bias, nodes.bias),
        "target_sum": (sums, nodes.words.sum(axis=1)),
        "target_abs_sum": (sizes, np.abs(nodes.words).sum(axis=1)),
    }
    arrays |= {name: np.concatenate([old, new[expanded]]) for name, (old, new) in accounts.items()}
    numbers = (first + np.arange(expanded.size)).astype(np.int32)
    return replace(graph, target_node=np.concatenate([graph.target_node, numbers]), **arrays)


def _node_arrays(
    graph: Graph,
    nodes: PooledNodes,
    some: Int64[np.ndarray, "kept"],
    strong: Int64[np.ndarray, "word"],
    first_step: int,
) -> dict[str, np.ndarray]:
    """Returns a graph's columns of nodes with some modulations and words at their end."""
    mine, words = np.ones(some.size, np.int64), np.ones(strong.size, np.int64)
    more = {
        "node_kind": (MODULATION * mine, WORD * words),
        "node_step": (nodes.step[some], first_step * words),
        "node_stream": (nodes.stream[some], TXT * words),
        "node_block": (nodes.block[some], -words),
        "node_position": (-mine, -words),
        "node_feature": (nodes.row[some], nodes.place[strong]),
        "node_value": (nodes.change[some], words),
        "node_influence": (np.nan * mine, np.nan * words),
        "node_cumulative": (np.nan * mine, np.nan * words),
        "node_branch": (nodes.branch[some], nodes.word_branch[strong]),
    }
    more |= {name: (mine * int(value), words * int(value)) for name, value in OF_SCORES.items() if name[:4] == "node"}
    arrays = {name: _appended(graph, name, *parts) for name, parts in more.items()}
    end = np.full(some.size + strong.size, graph.map_indptr[-1])
    return arrays | {"map_indptr": np.concatenate([graph.map_indptr, end])}


def _edge_arrays(
    graph: Graph,
    nodes: PooledNodes,
    some: Int64[np.ndarray, "kept"],
    strong: Int64[np.ndarray, "word"],
    least: float,
) -> dict[str, np.ndarray]:
    """Returns a graph's columns of edges with those from modulations and words."""
    first = graph.node_kind.size
    edges, words = nodes.edges[:, some], nodes.words[np.ix_(some, strong)]
    target, modulation = np.nonzero(np.abs(edges) >= least)
    into, word = np.nonzero(np.abs(words) >= least)
    attribution = np.concatenate([edges[target, modulation], words[into, word]])
    remainder = np.concatenate([nodes.remainder[:, some][target, modulation], np.zeros(into.size)])
    columns = {
        "edge_source": _appended(graph, "edge_source", first + modulation, first + some.size + word),
        "edge_target": _appended(graph, "edge_target", graph.targets[target], first + into),
        "edge_attribution": _appended(graph, "edge_attribution", attribution),
        "edge_query": _appended(graph, "edge_query", np.zeros(attribution.size)),
        "edge_remainder": _appended(graph, "edge_remainder", remainder),
    }
    order = np.lexsort((columns["edge_source"], columns["edge_target"]))
    return {name: column[order] for name, column in columns.items()}


def _appended(graph: Graph, name: str, *parts: np.ndarray) -> np.ndarray:
    """Returns a column of a graph with parts at its end, in its own type."""
    return np.concatenate([getattr(graph, name), *(part.astype(DTYPES[name]) for part in parts)])
