"""The scores are circuit-tracer's formulas, those of a subset Neuronpedia's, written out with dense matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, REST, subgraph
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.scoring import scores
from random_graphs import random_graph, random_output_graph
from tolerances import TOL


def by_hand(matrix_target_source, weights, inputs, errors):
    """The two formulas of the module's docstring, on dense matrices."""
    matrix = matrix_target_source
    shares = np.abs(matrix) / np.maximum(np.abs(matrix).sum(axis=1, keepdims=True), 1e-10)
    influence = weights @ np.linalg.inv(np.eye(len(matrix)) - shares) - weights
    replacement = influence[inputs].sum() / (influence[inputs].sum() + influence[errors].sum())
    reached = influence + weights
    return replacement, ((1 - shares[:, errors].sum(axis=1)) * reached).sum() / reached.sum()


def dense(graph):
    matrix = np.zeros((graph.node_kind.size,) * 2)
    matrix[graph.edge_target, graph.edge_source] = graph.edge_attribution
    weights = np.zeros(graph.node_kind.size)
    weights[graph.targets] = graph.provenance.target_weights
    return matrix, weights / weights.sum(), graph.node_kind == INPUT, np.isin(graph.node_kind, (ERROR, REST))


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_they_are_circuit_tracer_s(seed, summed):
    graph = random_output_graph(seed)
    graph = aggregate(graph) if summed else graph
    assert np.max(np.abs(np.array(scores(graph)) - by_hand(*dense(graph)))) <= TOL.x64


@given(st.integers(0, 10_000), st.integers(0, 2**30))
@settings(max_examples=40, deadline=None)
def test_what_is_not_pinned_counts_as_the_error_of_its_place(seed, choice):
    graph = random_output_graph(seed)
    pinned = np.random.default_rng(choice).random(graph.node_kind.size) < 0.5
    matrix, weights, inputs, errors = dense(graph)
    columns = (graph.node_step, graph.node_stream, graph.node_block, graph.node_position)
    places = list(zip(*(column.tolist() for column in columns), strict=True))
    for node in np.flatnonzero((graph.node_kind == FEATURE) & ~pinned & (weights == 0)):
        same = [n for n, place in enumerate(places) if place == places[node] and errors[n]]
        own = [n for n in same if n >= graph.node_kind.size or graph.node_kind[n] == ERROR]
        if not own:
            matrix = np.pad(matrix, (0, 1))
            weights, inputs, errors = np.append(weights, 0), np.append(inputs, False), np.append(errors, True)
            places.append(places[node])
            own = [len(places) - 1]
        matrix[:, own[0]] += matrix[:, node]
        matrix[:, node] = matrix[node, :] = 0
    expected = by_hand(matrix, weights, inputs, errors)
    assert np.max(np.abs(np.array(scores(graph, pinned=pinned)) - expected)) <= TOL.x64


def test_pinning_everything_changes_nothing_and_nothing_leaves_no_feature():
    graph = aggregate(random_graph(2))
    everything = np.ones(graph.node_kind.size, bool)
    assert scores(graph, pinned=everything) == pytest.approx(scores(graph), abs=TOL.x64)
    bare = scores(graph, pinned=~everything)
    assert bare.replacement < scores(graph).replacement and bare.completeness < scores(graph).completeness


def test_without_errors_both_are_one_and_without_edges_there_is_no_replacement():
    graph = random_output_graph(1)
    edges = np.ones(graph.edge_source.size, bool)
    clean = subgraph(graph, ~np.isin(graph.node_kind, (ERROR, REST)), edges)
    assert scores(clean) == (1.0, 1.0)
    assert scores(subgraph(graph, np.ones(graph.node_kind.size, bool), ~edges)) == (None, 1.0)


def test_a_graph_without_edges_can_be_scored_with_features_pinned():
    graph = random_graph(1)
    bare = subgraph(graph, np.arange(graph.node_kind.size) < 1, np.zeros(graph.edge_source.size, bool))
    found = scores(bare, pinned=np.zeros(bare.node_kind.size, bool))
    assert found.replacement is None and found.completeness == 1


def test_pruning_stores_the_scores_of_all_three_readings():
    graph = aggregate(random_graph(2))
    pruned = prune(graph)
    told = pruned.provenance.scores
    assert told.unpruned == scores(graph) and told.pruned == scores(pruned)
    names = {tuple(row) for row in node_rows(pruned)}
    pinned = np.array([tuple(row) in names for row in node_rows(graph)])
    assert told.pinned == pytest.approx(scores(graph, pinned=pinned))


def node_rows(graph):
    columns = (graph.node_kind, graph.node_step, graph.node_stream, graph.node_block, graph.node_feature)
    return np.stack([column.astype(int) for column in columns], axis=1)
