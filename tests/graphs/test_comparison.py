"""Comparing tells what two graphs share, whatever they are read from."""

from dataclasses import replace

import numpy as np
import pytest

from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.graph import subgraph
from difffract_jax.graphs.unclear_links import UnclearLinks
from random_graphs import random_graph


def test_a_graph_equals_itself():
    graph = random_graph(0)
    found = compare(graph, graph)
    assert found.nodes_in_both == graph.node_kind.size and found.edges_in_both == graph.edge_source.size
    assert found.largest_error == 0 and found.pearson == pytest.approx(1) and found.spearman == pytest.approx(1)
    assert not found.summed_over_positions


def test_what_is_missing_is_named():
    graph = random_graph(0)
    nodes = np.arange(graph.node_kind.size) != 1
    found = compare(graph, subgraph(graph, nodes, np.ones(graph.edge_source.size, bool)))
    assert len(found.nodes_only_in_a) == 1 and found.nodes_only_in_a[0].startswith("feature ")
    assert found.edges_only_in_a == np.sum((graph.edge_source == 1) | (graph.edge_target == 1))
    assert found.edges_only_in_b == 0 and not found.nodes_only_in_b


def test_the_largest_error_is_a_share_of_the_largest_edge():
    graph = random_graph(0)
    changed = graph.edge_attribution.copy()
    changed[3] += 0.25 * np.abs(changed).max()
    found = compare(graph, replace(graph, edge_attribution=changed))
    largest = max(np.abs(changed).max(), np.abs(graph.edge_attribution).max())
    assert found.largest_error == pytest.approx(0.25 * np.abs(graph.edge_attribution).max() / largest, rel=1e-6)


def test_a_summed_graph_is_compared_with_the_sums():
    graph = random_graph(0)
    found = compare(graph, aggregate(graph))
    assert found.summed_over_positions and found.largest_error == 0 and not found.nodes_only_in_a


def test_links_left_out_of_a_document_are_counted():
    graph = random_graph(0)
    other = graph.with_provenance(unclear_links=UnclearLinks(left_out=3, absent=("9_9_9",)))
    found = compare(graph, other)
    assert (found.links_left_out_of_a, found.links_left_out_of_b) == (0, 3)
    assert "links left out of b  3" in repr(found) and "links left out of a" not in repr(found)


def test_too_few_common_edges_have_no_correlation():
    graph = random_graph(0)
    edges = np.arange(graph.edge_source.size) == 0
    one = subgraph(graph, np.ones(graph.node_kind.size, bool), edges)
    assert compare(one, graph).pearson is None
