"""Influence by back-substitution is the inverse, the series, and what one can count by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.graphs.influence import column_shares, reach
from difffract_jax.graphs.pruning import node_influence
from random_graphs import random_graph
from tolerances import TOL


def test_a_small_graph_by_hand():
    # 0 and 1 feed 2 with 1 and -3; 1 and 2 feed 3 with 2 and 2.
    source, target = np.array([0, 1, 1, 2]), np.array([2, 2, 3, 3])
    shares = column_shares(target, np.array([1.0, -3.0, 2.0, 2.0]), 4)
    assert shares.tolist() == [0.25, 0.75, 0.5, 0.5]
    found = reach(np.array([0, 0, 1, 2]), source, target, shares, np.array([0.0, 0, 0, 1]))
    assert found.tolist() == [0.125, 0.5 + 0.375, 0.5, 1.0]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_it_is_the_inverse_and_the_series(seed):
    graph = random_graph(seed)
    count = graph.node_kind.size
    matrix_source_target = np.zeros((count, count))
    shares = column_shares(graph.edge_target, graph.edge_attribution, count)
    np.add.at(matrix_source_target, (graph.edge_source, graph.edge_target), shares)
    inverse = (np.linalg.inv(np.eye(count) - matrix_source_target) - np.eye(count))[:, graph.target]
    power, series = np.eye(count), np.zeros((count, count))
    for _ in range(4):
        power = power @ matrix_source_target
        series += power
    ours = node_influence(graph)
    assert np.max(np.abs(ours - inverse)) <= TOL.x64
    assert np.max(np.abs(ours - series[:, graph.target])) <= TOL.x64


def test_weights_add():
    source, target, level = np.array([0, 0, 1]), np.array([1, 2, 2]), np.arange(3)
    share = np.array([1.0, 0.5, 0.5])
    one, other = (reach(level, source, target, share, np.eye(3)[node]) for node in (1, 2))
    assert np.allclose(reach(level, source, target, share, np.array([0, 0.25, 0.75])), 0.25 * one + 0.75 * other)


def test_levels_that_do_not_rise_are_refused():
    with pytest.raises(ValueError, match="must lead from a lower"):
        reach(np.array([0, 0]), np.array([0, 1]), np.array([1, 0]), np.array([1.0, 1.0]), np.array([1.0, 0.0]))
