"""Graphs for everyone else: GraphML, which network programs read, and CSV, which spreadsheets and pandas read.

csv        a directory with nodes.csv and edges.csv; both name nodes by number and by name
graphml    one file; attributes of nodes are the columns of nodes.csv, that of edges is `attribution`
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from difffract_jax.address import STREAMS
from difffract_jax.graphs.graph import KINDS, SCORE, Graph
from difffract_jax.graphs.names import branch_name, node_names
from difffract_jax.storage.files import atomic_directory, atomic_file

COLUMNS = {
    "name": "string",
    "kind": "string",
    "step": "int",
    "stream": "string",
    "block": "int",
    "position": "int",
    "feature": "int",
    "head": "int",
    "key_stream": "string",
    "key_position": "int",
    "value": "double",
    "target_weight": "double",
    "influence": "double",
    "cumulative": "double",
    "supernode": "string",
}
"""Columns of a node, and their types in GraphML. What is not known is left empty, or out.

The stream and position of an attention score are its query's.
"""
EDGE_COLUMNS = ("attribution", "query", "remainder")
"""Numbers of an edge; `query` of one into an attention score, `remainder` of one from a score, see `GraphArrays`."""


def write_csv(graph: Graph, directory: str | Path, *, overwrite: bool = False) -> None:
    """Writes a graph as two tables.

    Args:
        graph: any graph.
        directory: to write; it appears only when it is complete.
        overwrite: replace the directory if it exists.
    """
    names = node_names(graph)
    with atomic_directory(directory, overwrite=overwrite) as partial:
        with (partial / "nodes.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["node", *_columns(graph)])
            table.writerows([node, *row] for node, row in enumerate(_rows(graph)))
        with (partial / "edges.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["source", "target", "source_name", "target_name", *EDGE_COLUMNS])
            for source, target, *values in _edges(graph):
                table.writerow([source, target, names[source], names[target], *values])


def write_graphml(graph: Graph, path: str | Path) -> None:
    """Writes a graph as GraphML.

    Args:
        graph: any graph.
        path: file to write; it appears only when it is complete.
    """
    root = ElementTree.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
    for column, form in _columns(graph).items():
        _add(root, "key", {"id": column, "for": "node", "attr.name": column, "attr.type": form})
    for column in EDGE_COLUMNS:
        _add(root, "key", {"id": column, "for": "edge", "attr.name": column, "attr.type": "double"})
    body = _add(root, "graph", {"edgedefault": "directed"})
    for node, row in enumerate(_rows(graph)):
        element = _add(body, "node", {"id": f"n{node}"})
        for column, value in zip(_columns(graph), row, strict=True):
            if value != "":
                _add(element, "data", {"key": column}).text = str(value)
    for source, target, *values in _edges(graph):
        element = _add(body, "edge", {"source": f"n{source}", "target": f"n{target}"})
        for column, value in zip(EDGE_COLUMNS, values, strict=True):
            if value != "":
                _add(element, "data", {"key": column}).text = value
    with atomic_file(path) as partial:
        ElementTree.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)


def _add(parent: ElementTree.Element, name: str, attributes: dict[str, str]) -> ElementTree.Element:
    return ElementTree.SubElement(parent, name, attributes)


def _rows(graph: Graph) -> Iterator[tuple[object, ...]]:
    """Yields every node's values for `COLUMNS`; "" where one is not known."""
    groups = {node: name for name, members in graph.supernodes.items() for node in members}
    weights = graph.root_weights
    for node, name in enumerate(node_names(graph)):
        yield (
            name,
            KINDS[graph.node_kind[node]],
            int(graph.node_step[node]),
            STREAMS[graph.node_stream[node]],
            int(graph.node_block[node]),
            int(graph.node_position[node]),
            int(graph.node_feature[node]),
            *_score(graph, node),
            *(_number(values[node]) for values in (graph.node_value, weights, graph.node_influence)),
            _number(graph.node_cumulative[node]),
            groups.get(node, ""),
            *((branch_name(graph, node),) if graph.node_branch.any() else ()),
        )


def _columns(graph: Graph) -> dict[str, str]:
    """Returns the columns of nodes: with the negative branch of guidance their branch, too, unless they are of both."""
    return COLUMNS | ({"branch": "string"} if graph.node_branch.any() else {})


def _score(graph: Graph, node: int) -> tuple[object, object, object]:
    """Returns head, key's stream and key's position of an attention score; "" of the rest of a block's, and others."""
    if graph.node_kind[node] != SCORE or graph.node_head[node] < 0:
        return "", "", ""
    head, position = int(graph.node_head[node]), int(graph.node_key_position[node])
    return head, STREAMS[graph.node_key_stream[node]], position


def _edges(graph: Graph) -> Iterator[tuple[int, int, str, str, str]]:
    """Yields every edge's ends and its values for `EDGE_COLUMNS`; "" where one is not of its kind."""
    is_score = graph.node_kind == SCORE
    for edge, (source, target) in enumerate(zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True)):
        query = _number(graph.edge_query[edge]) if is_score[target] else ""
        remainder = _number(graph.edge_remainder[edge]) if is_score[source] else ""
        yield source, target, _number(graph.edge_attribution[edge]), query, remainder


def _number(value: np.floating) -> str:
    """Returns the shortest decimal number of a float's own precision; "" for NaN."""
    return "" if np.isnan(value) else str(value)
