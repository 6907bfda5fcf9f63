"""GraphML opens in networkx and CSV in any reader, with every value of the graph."""

import csv
from dataclasses import replace

import networkx
import numpy as np
import pytest

from difffract_jax.address import STREAMS
from difffract_jax.config import UserError
from difffract_jax.graphs.files.tables import COLUMNS, EDGE_COLUMNS, write_csv, write_graphml
from difffract_jax.graphs.graph import KINDS
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.pruning import prune
from random_graphs import random_graph, random_output_graph, with_score


@pytest.fixture(params=[False, True], ids=["whole", "pruned"])
def graph(request):
    made = replace(random_output_graph(3), supernodes={'<a> & "b",': [4, 5]})
    return prune(made, by_position=True) if request.param else made


def test_networkx_reads_the_graph(graph, tmp_path):
    write_graphml(graph, tmp_path / "g.graphml")
    read = networkx.read_graphml(tmp_path / "g.graphml")
    assert read.is_directed() and networkx.is_directed_acyclic_graph(read)
    assert read.number_of_nodes() == graph.node_kind.size and read.number_of_edges() == graph.edge_source.size
    for node, name in enumerate(node_names(graph)):
        found = read.nodes[f"n{node}"]
        assert found["name"] == name and found["kind"] == KINDS[graph.node_kind[node]]
        assert found["stream"] == STREAMS[graph.node_stream[node]] and found["block"] == graph.node_block[node]
        assert np.float32(found["value"]) == graph.node_value[node]
        assert ("influence" in found) == bool(np.isfinite(graph.node_influence[node]))
    for source, target, value in zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True):
        assert np.float32(read.edges[f"n{source}", f"n{target}"]["attribution"]) == value
    groups = {node for node, found in read.nodes.items() if found.get("supernode") == '<a> & "b",'}
    assert groups == {f"n{node}" for group in graph.supernodes.values() for node in group}


def test_tables_hold_every_node_and_edge(graph, tmp_path):
    write_csv(graph, tmp_path / "csv")
    assert sorted(path.name for path in (tmp_path / "csv").iterdir()) == ["edges.csv", "nodes.csv"]
    with (tmp_path / "csv" / "nodes.csv").open(newline="") as stream:
        nodes = list(csv.DictReader(stream))
    with (tmp_path / "csv" / "edges.csv").open(newline="") as stream:
        edges = list(csv.DictReader(stream))
    assert list(nodes[0]) == ["node", *COLUMNS]
    assert [row["name"] for row in nodes] == node_names(graph)
    assert [float(row["target_weight"]) for row in nodes] == graph.root_weights.tolist()
    assert [np.float32(row["influence"] or "nan") for row in nodes] == pytest.approx(graph.node_influence, nan_ok=True)
    assert [int(row["source"]) for row in edges] == graph.edge_source.tolist()
    assert [np.float32(row["attribution"]) for row in edges] == graph.edge_attribution.tolist()
    assert all(row["target_name"] == nodes[int(row["target"])]["name"] for row in edges)
    with pytest.raises(UserError, match="exists already"):
        write_csv(graph, tmp_path / "csv")
    write_csv(graph, tmp_path / "csv", overwrite=True)


def test_scores_of_attention_keep_head_key_and_parts(tmp_path):
    graph, score = with_score(random_graph(3))
    known = {"head": "1", "key_stream": "txt", "key_position": "2", "value": "-2.5"}
    into, out_of = graph.edge_target == score, graph.edge_source == score
    assert into.any() and out_of.any() and not (into & out_of).any()
    write_csv(graph, tmp_path / "csv")
    with (tmp_path / "csv" / "nodes.csv").open(newline="") as stream:
        nodes = list(csv.DictReader(stream))
    with (tmp_path / "csv" / "edges.csv").open(newline="") as stream:
        edges = list(csv.DictReader(stream))
    assert {column: nodes[score][column] for column in known} == known
    assert all(
        row["head"] == row["key_stream"] == row["key_position"] == "" for row in nodes if row is not nodes[score]
    )
    assert [row["query"] for row in edges] == ["0.5" if one else "" for one in into]
    assert [row["remainder"] for row in edges] == ["0.25" if one else "" for one in out_of]
    write_graphml(graph, tmp_path / "g.graphml")
    read, made, names = networkx.read_graphml(tmp_path / "g.graphml"), graph.to_networkx(), node_names(graph)
    for nodes, edges, keys in (
        (read.nodes, read.edges, [f"n{node}" for node in range(len(names))]),
        (made.nodes, made.edges, names),
    ):
        assert {column: str(nodes[keys[score]][column]) for column in known} == known
        assert all("head" not in nodes[key] for node, key in enumerate(keys) if node != score)
        for edge, (source, target) in enumerate(zip(graph.edge_source, graph.edge_target, strict=True)):
            values = {column: float(getattr(graph, f"edge_{column}")[edge]) for column in EDGE_COLUMNS}
            values = {
                c: v for c, v in values.items() if {"query": into, "remainder": out_of}.get(c, [True] * 999)[edge]
            }
            assert edges[keys[source], keys[target]] == pytest.approx(values)
