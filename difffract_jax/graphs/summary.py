"""What one wants to see of a graph: a summary, its most influential nodes, and the graph for networkx (NumPy)."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from difffract_jax.address import STREAMS
from difffract_jax.config import UserError
from difffract_jax.display import hash_text, html_of, html_table, number_text, size_text, text_of, text_table
from difffract_jax.graphs.arrays import DTYPES, FEATURE, KINDS, SCORE, GraphArrays
from difffract_jax.graphs.influence import node_influence
from difffract_jax.graphs.names import branch_name, node_name, node_names
from difffract_jax.graphs.provenance import Provenance
from difffract_jax.graphs.reduction import PruningScores, PruningSettings

SHOWN_TARGETS = 3
"""Targets that a summary names."""


class TargetSummary(NamedTuple):
    """One of the targets that a graph explains.

    Attributes:
        name: as `node_names` calls it, but for what tells it from another node of the same name.
        weight: its share in what is explained; the shares add up to 1.
        value: its pre-activation; None where it is not known.
        conservation_error: by how much its edges and bias miss that, see `arrays`; None where it is not known.
    """

    name: str
    weight: float
    value: float | None
    conservation_error: float | None


@dataclass(frozen=True, kw_only=True)
class GraphSummary:
    """What one wants to know of a graph first.

    Attributes:
        targets: what it explains.
        nodes: how many of each kind.
        edges: how many.
        expanded: nodes whose edges were computed.
        conservation_error: the largest among these; None where pre-activations are not known.
        steps: denoising steps that it spans.
        by_position: whether nodes stand for single positions, rather than sums over them.
        supernodes: groups of features.
        bytes: of its arrays.
        pruning: how it was pruned; None if it was not.
        scores: before and after pruning.
        provenance: where it comes from.
    """

    targets: tuple[TargetSummary, ...]
    nodes: dict[str, int]
    edges: int
    expanded: int
    conservation_error: float | None
    steps: tuple[int, ...]
    by_position: bool
    supernodes: int
    bytes: int
    pruning: PruningSettings | None
    scores: PruningScores | None
    provenance: Provenance

    def __repr__(self) -> str:
        return text_of(*self._page())

    def _repr_html_(self) -> str:
        return html_of(*self._page())

    def _page(self) -> tuple[str, dict[str, str | None]]:
        """Returns title and facts."""
        nodes = ", ".join(f"{kind} {count:,}" for kind, count in self.nodes.items())
        error = "" if self.conservation_error is None else f", largest conservation error {self.conservation_error:.2g}"
        place = "position by position" if self.by_position else "summed over positions"
        facts = {
            "nodes": f"{sum(self.nodes.values()):,} ({nodes}), {place}",
            "edges": f"{self.edges:,} into {self.expanded:,} expanded nodes{error}",
            "steps": ", ".join(map(str, self.steps)),
            **self._origin(),
            "pruned": self._pruned(),
            "grade": self.provenance.grade and str(self.provenance.grade),
            "supernodes": str(self.supernodes) if self.supernodes else None,
            "memory": size_text(self.bytes),
        }
        names = [one.name for one in self.targets[:SHOWN_TARGETS]]
        more = len(self.targets) - len(names)
        return f"Graph of {' and '.join(names)}{f' and {more} more' if more else ''}", facts

    def _origin(self) -> dict[str, str | None]:
        """Returns the lines on where the graph comes from."""
        origin, run = self.provenance, self.provenance.known
        combined = origin.combined and f"{origin.combined.operation} of {len(origin.combined.graphs)} graphs"
        prompt = None if run.prompt is None else f'"{run.prompt}", seed {run.seed}'
        return {
            "combined": combined,
            "prompt": prompt,
            "model": run.model and hash_text(run.model),
            "transcoders": origin.transcoders and hash_text(origin.transcoders),
            "products": origin.precision and origin.precision.products,
            "document": origin.unclear_links and " ".join(origin.unclear_links.sentences()),
        }

    def _pruned(self) -> str:
        if self.pruning is None:
            return "no"
        rule = f"{self.pruning.mode}, nodes {self.pruning.node_threshold:g}, edges {self.pruning.edge_threshold:g}"
        if self.scores is None:
            return rule
        replacement, completeness = (number_text(score) for score in self.scores.pruned)
        return f"{rule}; replacement {replacement}, completeness {completeness}"


def summarise(graph: GraphArrays) -> GraphSummary:
    """Returns a graph's summary."""
    counts = np.bincount(graph.node_kind, minlength=len(KINDS))
    arrays = sum(getattr(graph, name).nbytes for name in DTYPES)
    origin = graph.provenance
    return GraphSummary(
        targets=tuple(_targets(graph)),
        nodes={kind: int(count) for kind, count in zip(KINDS, counts, strict=True) if count},
        edges=int(graph.edge_source.size),
        expanded=int(graph.target_node.size),
        conservation_error=graph.largest_conservation_error,
        steps=origin.steps or tuple(np.unique(graph.node_step).tolist()),
        by_position=graph.by_position,
        supernodes=len(graph.supernodes),
        bytes=arrays,
        pruning=origin.pruning,
        scores=origin.scores,
        provenance=origin,
    )


def _targets(graph: GraphArrays) -> Iterator[TargetSummary]:
    columns = graph.root_weights, graph.target_preactivation, graph.conservation_error
    for node in graph.targets.tolist():
        weight, value, error = (float(column[node]) for column in columns)
        known = not np.isnan(value)
        yield TargetSummary(node_name(graph, node), weight, value if known else None, error if known else None)


class NodeRow(NamedTuple):
    """A node, as `top` lists it.

    Attributes:
        node: its number.
        name: as commands take it.
        kind: feature, error, input, output, rest or score.
        influence: on the graph's targets.
        value: a feature's or a score's value; 1 for other kinds.
    """

    node: int
    name: str
    kind: str
    influence: float
    value: float


@dataclass(frozen=True)
class TopNodes:
    """A graph's most influential nodes, the most influential first.

    Attributes:
        rows: one per node.
        of: how many nodes there are, the targets left out.
    """

    rows: tuple[NodeRow, ...]
    of: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[NodeRow]:
        return iter(self.rows)

    def __getitem__(self, place: int) -> NodeRow:
        return self.rows[place]

    def __repr__(self) -> str:
        return text_table(self._title(), NodeRow._fields, self.rows)

    def _repr_html_(self) -> str:
        return html_table(self._title(), NodeRow._fields, self.rows)

    def _title(self) -> str:
        return f"The {len(self.rows)} most influential of {self.of} nodes"


def top_nodes(graph: GraphArrays, n: int) -> TopNodes:
    """Returns the most influential nodes, the targets left out.

    Args:
        graph: with influence from pruning, or without; then it is computed over all edges.
        n: how many at most.

    Raises:
        UserError: if `n` is not positive.
    """
    if n < 1:
        raise UserError(f"The number of nodes to list must be at least 1, but got {n}.")
    influence = graph.node_influence.astype(np.float64)
    if np.isnan(influence).any():
        influence = node_influence(graph)
    inside = np.setdiff1d(np.arange(graph.node_kind.size), graph.targets)
    best = inside[np.argsort(-influence[inside], kind="stable")][:n].tolist()
    names = node_names(graph)
    rows = [
        NodeRow(i, names[i], KINDS[graph.node_kind[i]], float(influence[i]), float(graph.node_value[i])) for i in best
    ]
    return TopNodes(tuple(rows), int(inside.size))


def to_networkx(graph: GraphArrays) -> Any:
    """Returns a graph as a `networkx.DiGraph`; keys of nodes are their names.

    Nodes carry `node`, their number, and the columns of the CSV tables that are known: kind, step, stream, block,
    position, feature, value, target_weight, influence, cumulative, supernode; attention scores also head, key_stream
    and key_position. Edges carry `attribution`, those into scores `query`, those from scores `remainder`, see
    `GraphArrays`. Supernodes are in the graph's own attributes, and so is its provenance, as JSON values.

    Args:
        graph: any graph.

    Raises:
        UserError: if networkx is not installed.
    """
    try:
        networkx = import_module("networkx")
    except ImportError:
        raise UserError("A graph for networkx needs that package: pip install networkx.") from None
    names = node_names(graph)
    made = networkx.DiGraph(provenance=graph.provenance.to_json(), supernodes=_supernodes(graph, names))
    made.add_nodes_from(zip(names, _columns(graph), strict=True))
    ends, place = np.unique(np.stack([graph.edge_source, graph.edge_target]), axis=1, return_inverse=True)
    # Documents of the reference may hold two edges between the same nodes; a `DiGraph` holds one.
    score = graph.node_kind == SCORE
    columns = {"attribution": np.full(ends.shape[1], True), "query": score[ends[1]], "remainder": score[ends[0]]}
    for column, known in columns.items():
        values = np.bincount(place.ravel(), getattr(graph, f"edge_{column}").astype(np.float64), ends.shape[1])
        edges = zip(*ends[:, known].tolist(), values[known].tolist(), strict=True)
        made.add_weighted_edges_from(((names[s], names[t], value) for s, t, value in edges), weight=column)
    return made


def _supernodes(graph: GraphArrays, names: list[str]) -> dict[str, list[str]]:
    return {name: [names[node] for node in members] for name, members in graph.supernodes.items()}


def _columns(graph: GraphArrays) -> Iterator[dict[str, Any]]:
    """Yields the attributes of every node, those left out that are not known."""
    groups = {node: name for name, members in graph.supernodes.items() for node in members}
    weights = graph.root_weights.tolist()
    for node in range(graph.node_kind.size):
        attributes: dict[str, Any] = {
            "node": node,
            "kind": KINDS[graph.node_kind[node]],
            "step": int(graph.node_step[node]),
            "stream": STREAMS[graph.node_stream[node]],
            "block": int(graph.node_block[node]),
            "position": int(graph.node_position[node]),
            "feature": int(graph.node_feature[node]),
            "value": float(graph.node_value[node]),
            "target_weight": weights[node],
        }
        if graph.node_branch.any() and branch_name(graph, node):
            attributes["branch"] = branch_name(graph, node)
        if graph.node_kind[node] != FEATURE:
            del attributes["feature"]
        if graph.node_kind[node] == SCORE and graph.node_head[node] >= 0:
            attributes["head"] = int(graph.node_head[node])
            attributes["key_stream"] = STREAMS[graph.node_key_stream[node]]
            attributes["key_position"] = int(graph.node_key_position[node])
        for name, column in (("influence", graph.node_influence), ("cumulative", graph.node_cumulative)):
            if not np.isnan(column[node]):
                attributes[name] = float(column[node])
        if node in groups:
            attributes["supernode"] = groups[node]
        yield attributes
