"""Levels that every edge leads up, in layers or without; a cycle is named, node by node."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.config import UserError
from difffract_jax.graphs.order import levels, node_levels
from difffract_jax.graphs.pruning import node_influence
from random_graphs import random_graph, random_output_graph


def test_steps_come_before_blocks():
    level = levels(np.array([0, 0, 1, 1], np.int16), np.array([-1, 5, -1, 0], np.int16))
    assert np.all(np.diff(level) > 0)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_influence_does_not_hang_on_layers(seed):
    graph = random_output_graph(seed)
    flat = replace(graph, node_block=np.zeros_like(graph.node_block), node_step=np.zeros_like(graph.node_step))
    level = node_levels(flat)
    assert level.min(initial=0) == 0 and np.all(level[flat.edge_source] < level[flat.edge_target])
    assert np.allclose(node_influence(flat), node_influence(graph))


def with_edge(graph, source, target):
    """The graph with one more edge."""
    ends = {"edge_source": source, "edge_target": target}
    arrays = {name: np.append(getattr(graph, name), np.int32(node)) for name, node in ends.items()}
    return replace(graph, **arrays, edge_attribution=np.append(graph.edge_attribution, np.float32(1)))


def test_a_cycle_is_named():
    graph = random_graph(0)
    edge = int(np.flatnonzero(graph.edge_target == graph.target)[0])
    source, target = int(graph.edge_source[edge]), graph.target
    names = [f"n{node}" for node in range(graph.node_kind.size)]
    looped = with_edge(graph, target, source)
    with pytest.raises(UserError, match=f"a cycle, .*n{target} -> .*take one of these edges out") as caught:
        node_levels(looped, names)
    circle = [int(name[1:]) for name in str(caught.value).split(", ")[1].split(" -> ")]
    assert circle[0] == circle[-1]
    assert {*pairwise(circle)} <= {*zip(looped.edge_source.tolist(), looped.edge_target.tolist(), strict=True)}
    with pytest.raises(UserError, match="a cycle, n3 -> n3, but"):
        node_levels(with_edge(graph, 3, 3), names)
    with pytest.raises(UserError, match="a cycle, .*img/"):
        node_influence(with_edge(graph, target, source))


def test_of_a_long_cycle_the_first_nodes_are_named():
    graph = random_graph(0)
    chain = np.arange(12, dtype=np.int32)
    ring = replace(graph, edge_source=chain, edge_target=np.roll(chain, -1), edge_attribution=np.ones(12, np.float32))
    with pytest.raises(UserError, match=r"a cycle, (n\d+ -> ){6}\.\.\., but"):
        node_levels(ring, [f"n{node}" for node in range(graph.node_kind.size)])
