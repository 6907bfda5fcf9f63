"""What one sees of a graph agrees with its arrays, fits a screen, and is escaped in a notebook."""

from dataclasses import replace
from pathlib import Path

import networkx
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.graphs import summary
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.reference_json import from_document, to_document
from difffract_jax.graphs.graph import FEATURE, KINDS, Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.provenance import Combined, KnownRun
from difffract_jax.graphs.pruning import node_influence, prune
from difffract_jax.graphs.unclear_links import UnclearLinks
from random_graphs import random_graph, random_output_graph

FORMATS = Path(__file__).parents[1] / "data" / "formats"
HOSTILE = '<script>alert("1")</script>\n' * 20


def test_a_summary_counts_what_is_there():
    graph = random_output_graph(1)
    overview = graph.summary()
    assert sum(overview.nodes.values()) == graph.node_kind.size and overview.nodes["feature"] == np.sum(
        graph.node_kind == 0
    )
    assert overview.edges == graph.edge_source.size and overview.expanded == graph.target_node.size
    assert [one.name for one in overview.targets] == node_names(graph)[:3]
    assert [one.weight for one in overview.targets] == pytest.approx([2 / 3.5, 1 / 3.5, 0.5 / 3.5])
    assert [one.value for one in overview.targets] == graph.target_preactivation[:3].tolist()
    assert overview.conservation_error == graph.conservation_error.max()
    assert overview.steps == (0, 1) and overview.by_position and not overview.supernodes and overview.pruning is None


def test_a_summary_says_how_a_graph_was_pruned():
    overview = prune(random_graph(2), node_threshold=0.7).summary()
    assert overview.pruning.node_threshold == 0.7 and overview.scores.pruned.completeness <= 1
    assert "standard, nodes 0.7, edges 0.98; replacement 0." in str(overview) and "summed over positions" in str(
        overview
    )


def test_documents_of_other_tools_have_no_value_to_tell():
    overview = Graph.load(FORMATS / "graph-v1-viewer.npz").summary()
    assert overview.targets[0].value is None and overview.targets[0].conservation_error is None
    assert overview.conservation_error is None and "conservation" not in str(overview)


def test_a_summary_says_which_links_of_a_document_were_left_out():
    graph = random_graph(0)
    unclear = UnclearLinks(left_out=2, absent=("9_9_9",))
    assert "document" not in str(graph.summary())
    shown = str(graph.with_provenance(unclear_links=unclear).summary())
    assert "2 links were left out, as the document has no node 9_9_9." in shown


def test_a_graph_shows_itself_in_a_few_lines():
    graph = Graph.load(FORMATS / "graph-v1.npz")
    lines = repr(graph).splitlines()
    assert lines[0] == "Graph of img/1/f159@9" and len(lines) <= 15 and max(map(len, lines)) <= 120
    assert any("92 (feature 4, error 18, input 56, rest 14), position by position" in line for line in lines)
    assert any('"a red circle above a blue square", seed 0' in line for line in lines)
    assert any("7132c2f37ef1..." in line for line in lines)


def test_what_comes_from_outside_neither_breaks_lines_nor_runs_in_a_notebook():
    many = Combined(operation=HOSTILE, graphs=(), occurs_in={})
    graph = random_graph(0).with_provenance(shared=KnownRun(prompt=HOSTILE, model=HOSTILE), combined=many)
    assert len(repr(graph).splitlines()) <= 15
    for page in (graph._repr_html_(), graph.top(3)._repr_html_()):
        assert "<script>" not in page
    assert "&lt;script&gt;" in graph._repr_html_()


@pytest.mark.parametrize("pruned", [False, True])
def test_the_top_nodes_are_the_most_influential_ones(pruned):
    graph = prune(random_graph(3)) if pruned else random_graph(3)
    influence = graph.node_influence if pruned else node_influence(graph)
    top = graph.top(5)
    assert len(top) == 5 and top.of == graph.node_kind.size - 1 and 0 not in [row.node for row in top]
    assert [row.influence for row in top] == pytest.approx(sorted(influence[1:], reverse=True)[:5], rel=1e-6)
    names = node_names(graph)
    for row in top:
        assert (row.name, row.kind) == (names[row.node], KINDS[graph.node_kind[row.node]])
        assert row.value == graph.node_value[row.node]
    assert top[0].name in repr(top).splitlines()[2]


def test_a_long_list_says_how_much_more_there_is():
    top = random_graph(3).top(30)
    lines = repr(top).splitlines()
    assert len(top) == 30 and len(lines) <= 15 and lines[-1] == "... and 20 more"


def test_there_is_no_top_of_nothing():
    with pytest.raises(UserError, match="must be at least 1, but got 0"):
        random_graph(0).top(0)


def test_the_graph_for_networkx_has_its_nodes_edges_and_names():
    graph = replace(random_output_graph(2), supernodes={"both": [3, 4]})
    made, names = graph.to_networkx(), node_names(graph)
    assert isinstance(made, networkx.DiGraph) and list(made.nodes) == names
    assert made.number_of_edges() == graph.edge_source.size
    for source, target, value in zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True):
        assert made.edges[names[source], names[target]]["attribution"] == value
    for node, name in enumerate(names):
        attributes = made.nodes[name]
        assert attributes["node"] == node and attributes["kind"] == KINDS[graph.node_kind[node]]
        assert ("feature" in attributes) == (graph.node_kind[node] == FEATURE) and "influence" not in attributes
        assert attributes["target_weight"] == graph.root_weights[node]
        assert attributes.get("supernode") == ("both" if node in (3, 4) else None)
    assert made.graph["supernodes"] == {"both": names[3:5]}
    assert made.graph["provenance"] == {"target_weights": [2.0, 1.0, 0.5]}
    assert "influence" in prune(graph).to_networkx().nodes[node_names(prune(graph))[0]]


def test_edges_between_the_same_nodes_are_added_up_for_networkx():
    graph = from_document(to_document(aggregate(random_graph(2))))
    pairs = set(zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True))
    made = graph.to_networkx()
    assert made.number_of_edges() == len(pairs) < graph.edge_source.size
    total = sum(value for _, _, value in made.edges.data("attribution"))
    assert total == pytest.approx(float(graph.edge_attribution.sum(dtype=np.float64)))


def test_without_networkx_the_error_says_what_to_install(monkeypatch):
    def absent(name, *_):
        raise ImportError(name)

    monkeypatch.setattr(summary, "import_module", absent)
    with pytest.raises(UserError, match="pip install networkx"):
        random_graph(0).to_networkx()
