"""Two graphs side by side: which nodes and edges both have, and how far their edges differ.

1. If either graph is summed over positions, so is the other.
2. If either came from the reference's JSON, which has one name for errors and unexpanded features, they are taken
   together in both.
3. Nodes are the same if kind, step, stream, block, position and feature are, and head and key of an attention score;
   edges, if both ends are.
"""

from typing import NamedTuple

import numpy as np

from difffract_jax.address import BRANCHES, STREAMS
from difffract_jax.display import number_text, text_of
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.correlation import pearson, spearman
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, KINDS, REST, Graph

Node = tuple[int, ...]
"""Kind, step, stream, block, position and feature; head, and stream and position of the key, of an attention score."""


class Comparison(NamedTuple):
    """What `compare` finds; JSON values.

    Attributes:
        nodes_in_both: nodes that both graphs have.
        nodes_only_in_a: names of those that only the first has.
        nodes_only_in_b: names of those that only the second has.
        edges_in_both: edges that both have.
        edges_only_in_a: how many only the first has.
        edges_only_in_b: how many only the second has.
        largest_edge: largest absolute attribution in either.
        largest_error: largest difference of an edge, absent edges counting as 0, over `largest_edge`.
        pearson: correlation of the attributions of common edges; None for fewer than 2, or where all are alike.
        spearman: their rank correlation.
        summed_over_positions: whether sums over positions were compared.
        links_left_out_of_a: links in the document of the first that name no node of it, and are in neither count.
        links_left_out_of_b: likewise of the second.
    """

    nodes_in_both: int
    nodes_only_in_a: list[str]
    nodes_only_in_b: list[str]
    edges_in_both: int
    edges_only_in_a: int
    edges_only_in_b: int
    largest_edge: float
    largest_error: float
    pearson: float | None
    spearman: float | None
    summed_over_positions: bool
    links_left_out_of_a: int = 0
    links_left_out_of_b: int = 0

    def __repr__(self) -> str:
        only = {name: f"{count:,}" for name, count in self._counts().items()}
        return text_of("Comparison of graph a with graph b", only | self._errors())

    def _counts(self) -> dict[str, int]:
        return {
            "nodes in both": self.nodes_in_both,
            "nodes only in a": len(self.nodes_only_in_a),
            "nodes only in b": len(self.nodes_only_in_b),
            "edges in both": self.edges_in_both,
            "edges only in a": self.edges_only_in_a,
            "edges only in b": self.edges_only_in_b,
        }

    def _errors(self) -> dict[str, str]:
        return {
            "largest error": f"{self.largest_error:.3g} of the largest edge, {self.largest_edge:.4g}",
            "correlation": f"Pearson {number_text(self.pearson)}, Spearman {number_text(self.spearman)}",
            "compared": "sums over positions" if self.summed_over_positions else "position by position",
            **{f"links left out of {name}": f"{count:,}" for name, count in self._left_out().items() if count},
        }

    def _left_out(self) -> dict[str, int]:
        return {"a": self.links_left_out_of_a, "b": self.links_left_out_of_b}


def compare(a: Graph, b: Graph) -> Comparison:
    """Compares two graphs.

    Args:
        a: the first.
        b: the second.
    """
    summed = not (a.by_position and b.by_position)
    if summed:
        a, b = aggregate(a), aggregate(b)
    merged = any(graph.provenance.reference_config is not None for graph in (a, b))
    nodes_a, nodes_b = _nodes(a, merged), _nodes(b, merged)
    edges_a, edges_b = _edges(a, nodes_a), _edges(b, nodes_b)
    common = sorted(edges_a.keys() & edges_b.keys())
    x, y = (np.array([edges[pair] for pair in common]) for edges in (edges_a, edges_b))
    largest = max(map(abs, (*edges_a.values(), *edges_b.values())), default=0.0)
    error = max((abs(edges_a.get(p, 0.0) - edges_b.get(p, 0.0)) for p in edges_a.keys() | edges_b.keys()), default=0.0)
    return Comparison(
        nodes_in_both=len({*nodes_a} & {*nodes_b}),
        nodes_only_in_a=sorted(map(_name, {*nodes_a} - {*nodes_b})),
        nodes_only_in_b=sorted(map(_name, {*nodes_b} - {*nodes_a})),
        edges_in_both=len(common),
        edges_only_in_a=len(edges_a) - len(common),
        edges_only_in_b=len(edges_b) - len(common),
        largest_edge=largest,
        largest_error=error / largest if largest else 0.0,
        pearson=pearson(x, y),
        spearman=spearman(x, y),
        summed_over_positions=summed,
        links_left_out_of_a=_left_out(a),
        links_left_out_of_b=_left_out(b),
    )


def _left_out(graph: Graph) -> int:
    unclear = graph.provenance.unclear_links
    return 0 if unclear is None else unclear.left_out


def _nodes(graph: Graph, merged: bool) -> list[Node]:
    kind = np.where(merged & (graph.node_kind == REST), ERROR, graph.node_kind)
    # Files disagree on the block of inputs; there is one input per stream and position.
    block = np.where(kind == INPUT, -1, graph.node_block)
    columns = (kind, graph.node_step, graph.node_branch, graph.node_stream, block, graph.node_position)
    of_score = (graph.node_head, graph.node_key_stream, graph.node_key_position)
    return list(zip(*(column.tolist() for column in (*columns, graph.node_feature, *of_score)), strict=True))


def _edges(graph: Graph, nodes: list[Node]) -> dict[tuple[Node, Node], float]:
    edges: dict[tuple[Node, Node], float] = {}
    for source, target, value in zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True):
        pair = nodes[source], nodes[target]
        edges[pair] = edges.get(pair, 0.0) + float(value)
    return edges


def _name(node: Node) -> str:
    kind, step, branch, stream, block, position, feature, head, key_stream, key_position = node
    evaluation = f"#{step}" + (f"~{BRANCHES[branch]}" if branch else "")
    if head >= 0:
        query, key = ((STREAMS[stream], position), (STREAMS[key_stream], key_position))
        tokens = ",".join(name + (f"{number}" if number >= 0 else "") for name, number in (query, key))
        return f"score block {block}/h{head}@{tokens}{evaluation}"
    place = (
        STREAMS[stream]
        + ("" if kind == INPUT else f"/{block}")
        + (f"/{'f' * (kind == FEATURE)}{feature}" if feature >= 0 else "")
    )
    return f"{KINDS[kind]} {place}{f'@{position}' if position >= 0 else ''}{evaluation}"
