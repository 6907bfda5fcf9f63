"""Numbers that are not finite are refused by the node or edge that they belong to, in files of our own too."""

from dataclasses import replace

import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.graphs.checks import check_values
from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.names import node_names
from random_graphs import random_graph


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_edge_is_named_by_its_ends(tmp_path, value):
    graph = random_graph(0)
    wrong = graph.edge_attribution.copy()
    wrong[[2, 5]] = value
    replace(graph, edge_attribution=wrong).save(tmp_path / "g.npz")
    names = node_names(graph)
    ends = f"{names[graph.edge_source[2]]} to {names[graph.edge_target[2]]}"
    for read in (Graph.load, read_graph):
        with pytest.raises(UserError) as caught:
            read(tmp_path / "g.npz")
        told = str(caught.value)
        assert told.startswith(
            f"In {tmp_path / 'g.npz'}, the edge from {ends} is {value} (and 1 more like it), which is"
        )


@pytest.mark.parametrize(
    ("array", "place", "what"),
    [
        ("node_value", 1, "the value of img/"),
        ("map_value", 0, "the activation map of"),
        ("target_sum", 0, "the sum of edges of img/"),
        ("target_abs_sum", 0, "the sum of absolute edges of img/"),
    ],
)
def test_a_node_is_named(array, place, what):
    graph = random_graph(0)
    changed = getattr(graph, array).copy()
    changed[place] = np.nan
    with pytest.raises(UserError, match=f"In g, {what}.* is nan, which is not a finite number"):
        check_values(replace(graph, **{array: changed}), "g")


def test_what_need_not_be_known_may_be_nan():
    graph = random_graph(0)
    unknown = np.full(graph.target_node.size, np.nan)
    check_values(replace(graph, target_preactivation=unknown, target_bias=unknown), "g")


def test_a_cycle_in_a_file_of_ours_is_refused(tmp_path):
    graph = random_graph(0)
    replace(graph, edge_source=graph.edge_target, edge_target=graph.edge_target).save(tmp_path / "g.npz")
    with pytest.raises(UserError, match="g.npz: The graph has a cycle, img/"):
        read_graph(tmp_path / "g.npz")
