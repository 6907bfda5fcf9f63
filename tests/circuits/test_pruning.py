"""Pruning at 1 changes nothing, less keeps less, and the reference's graphs are pruned as the reference does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.circuits.expansion import aggregate
from difffract_jax.circuits.graph import FEATURE
from difffract_jax.circuits.pruning import node_influence, prune, top_share
from difffract_jax.config import UserError
from random_graphs import random_graph

SHARE = st.floats(0.05, 1.0)


def nodes(graph):
    columns = (graph.node_kind, graph.node_stream, graph.node_block, graph.node_position, graph.node_feature)
    return {tuple(map(int, row)) for row in zip(*columns, strict=True)}


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_pruning_at_one_keeps_everything(seed, by_position):
    graph = random_graph(seed)
    whole = graph if by_position else aggregate(graph)
    pruned = prune(graph, node_threshold=1.0, edge_threshold=1.0, by_position=by_position)
    assert nodes(pruned) == nodes(whole)
    assert np.array_equal(pruned.edge_attribution, whole.edge_attribution)


@given(st.integers(0, 10_000), SHARE, SHARE)
@settings(max_examples=25, deadline=None)
def test_a_smaller_share_keeps_fewer_features(seed, a, b):
    graph = random_graph(seed)
    few, many = (prune(graph, node_threshold=share, edge_threshold=1.0) for share in sorted((a, b)))
    assert nodes(few) <= nodes(many)
    fewer, more = (prune(graph, node_threshold=0.9, edge_threshold=share) for share in sorted((a, b)))
    assert fewer.edge_source.size <= more.edge_source.size


@given(st.integers(0, 10_000), SHARE)
@settings(max_examples=25, deadline=None)
def test_the_target_and_what_is_no_feature_stay(seed, share):
    graph = aggregate(random_graph(seed))
    pruned = prune(graph, node_threshold=share, edge_threshold=share)
    assert nodes(pruned) >= {node for node in nodes(graph) if node[0] != FEATURE}
    assert pruned.target == 0 and pruned.node_feature[0] == graph.node_feature[0]
    assert pruned.target_sum[0] == graph.target_sum[0]


def test_influence_is_recorded():
    graph = aggregate(random_graph(1))
    pruned = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    assert np.allclose(pruned.node_influence, node_influence(graph), rtol=1e-6)
    assert pruned.metadata["pruning"] == {"mode": "difffract", "node_threshold": 1.0, "edge_threshold": 1.0}


def test_the_largest_that_hold_a_share_are_chosen():
    assert top_share(np.array([1.0, 4.0, 2.0, 3.0]), 0.7).tolist() == [False, True, False, True]
    assert top_share(np.array([1.0, 4.0, 2.0, 3.0]), 0.71).tolist() == [False, True, True, True]
    assert top_share(np.zeros(0), 0.5).size == 0


@pytest.mark.parametrize("name", ["node_threshold", "edge_threshold"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(name, value):
    with pytest.raises(UserError, match=rf"{name} is a share .* must lie in \(0, 1\]"):
        prune(random_graph(0), **{name: value})


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="must be one of difffract, but got 'standard'"):
        prune(random_graph(0), mode="standard")
