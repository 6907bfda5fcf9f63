"""Averages and differences of circuits add up edge by edge, and say what they are made of."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.config import UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.combine import average, difference
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.graph import ERROR, OUTPUT, REST, SCORE, Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.provenance import KnownRun, Origin, PooledPath, Provenance
from difffract_jax.graphs.pruning import prune
from random_graphs import random_graph, random_output_graph


def edges_of(graph):
    """Edges by what their ends are, summed over positions; targets and outputs are told apart."""
    columns = (graph.node_kind, graph.node_step, graph.node_stream, graph.node_block, graph.node_feature)
    keys = [tuple(map(int, row)) for row in zip(*columns, strict=True)]
    number = np.cumsum(graph.node_kind == OUTPUT) * (graph.node_kind == OUTPUT)
    keys = [(node < graph.targets.size, int(number[node]), *key) for node, key in enumerate(keys)]
    edges = {}
    for source, target, value in zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True):
        pair = keys[source], keys[target]
        edges[pair] = edges.get(pair, 0.0) + float(value)
    return edges


SEED = st.integers(0, 10_000)


@given(SEED, SEED, st.booleans())
@settings(max_examples=15, deadline=None)
def test_edges_are_averaged_and_subtracted_one_by_one(a, b, several):
    make = random_output_graph if several else random_graph
    graphs = [make(seed) for seed in (a, b)]
    x, y = map(edges_of, graphs)
    for found, expected in (
        (average(graphs), {pair: (x.get(pair, 0) + y.get(pair, 0)) / 2 for pair in x.keys() | y.keys()}),
        (difference(*graphs), {pair: x.get(pair, 0) - y.get(pair, 0) for pair in x.keys() | y.keys()}),
    ):
        ours = edges_of(found)
        assert all(ours.get(pair, 0.0) == pytest.approx(value, abs=1e-5) for pair, value in expected.items())
        assert ours.keys() <= expected.keys()


def test_targets_still_add_up():
    graphs = [random_graph(seed) for seed in range(4)]
    for combined in (average(graphs), difference(*graphs[:2])):
        assert combined.largest_conservation_error < 1e-12
        assert combined.targets.tolist() == list(range(len(combined.provenance.target_weights)))
        assert np.isfinite(combined.target_abs_sum).all() and (combined.target_abs_sum > 0).all()


def test_a_difference_does_not_tell_the_pooled_path_of_its_graphs():
    path = PooledPath(value=2.0, without=1.0, share=0.5)
    graphs = [random_graph(3).with_provenance(pooled_path=(path,))] * 2
    assert average(graphs).provenance.pooled_path == (path,)
    assert difference(*graphs).provenance.pooled_path == ()


def test_the_average_of_one_and_of_twice_the_same_is_the_graph_itself():
    graph = random_graph(3)
    for combined in (average([graph]), average([graph, graph])):
        found = compare(graph, combined)
        assert not found.nodes_only_in_a + found.nodes_only_in_b and found.largest_error <= 1e-6
        summed = aggregate(graph)
        assert np.array_equal(combined.map_value, summed.map_value)
        assert np.allclose(combined.node_value, summed.node_value)
        assert set(combined.provenance.combined.occurs_in.values()) == {1.0}
    nothing = difference(graph, graph)
    assert not nothing.edge_attribution.size and nothing.node_kind.size == aggregate(graph).node_kind.size


def test_scores_below_their_mean_stay_negative():
    graph = random_graph(3)
    score = np.arange(graph.node_kind.size) == np.flatnonzero(graph.node_kind == REST)[0]
    graph = replace(
        graph,
        node_kind=np.where(score, SCORE, graph.node_kind).astype(np.uint8),
        node_value=np.where(score, -2.5, graph.node_value).astype(np.float32),
        node_head=np.where(score, 0, -1).astype(np.int16),
    )
    found = average([graph, graph])
    assert found.node_value[found.node_kind == SCORE].tolist() == [-2.5]


def test_it_tells_which_graphs_went_in_and_where_each_node_occurs(tmp_path):
    graphs = [
        random_graph(seed).with_provenance(shared=KnownRun(prompt=f"p{seed}", seed=7, model="m"), transcoders="t")
        for seed in range(3)
    ]
    combined = average(graphs)
    told = combined.provenance.combined
    assert told.operation == "average"
    assert told.graphs == tuple(Origin(prompt=f"p{seed}", seed=7) for seed in range(3))
    assert combined.provenance.known == KnownRun(seed=7, model="m") and combined.provenance.transcoders == "t"
    names = [set(node_names(aggregate(graph))) for graph in graphs]
    plain = [name for name in node_names(combined) if "(" not in name]
    for name in plain:
        if all(f"{name} (target)" not in known for known in names):
            share = sum(name in known for known in names) / 3
            assert told.occurs_in[name] == pytest.approx(share)
    combined.save(tmp_path / "g.npz")
    assert Graph.load(tmp_path / "g.npz").provenance.combined == told


def test_targets_that_differ_become_the_targets_of_the_result():
    a, b = random_output_graph(1), random_output_graph(2, weights=(1.0,))
    combined = average([a, b])
    assert combined.root_weights[: combined.targets.size].sum() == pytest.approx(1)
    # The first output of `a` and that of `b` are the same node.
    shares = [0.5 / 7, 1 / 7, 0.5 * 2 / 3.5 + 0.5]
    assert sorted(combined.root_weights[combined.targets]) == pytest.approx(shares)
    assert prune(combined).provenance.scores.unpruned.completeness <= 1


def test_maps_are_dropped_where_positions_do_not_correspond():
    graphs = [random_graph(0).with_provenance(shared=KnownRun(grid=grid)) for grid in ((2, 2), (2, 4))]
    assert average(graphs[:1]).map_value.size and not average(graphs).map_value.size


def test_errors_are_taken_together_where_a_graph_cannot_tell_them_apart():
    graph = random_graph(4)
    assert np.any(graph.node_kind == REST) and np.any(graph.node_kind == ERROR)
    combined = average([graph, graph.with_provenance(reference_config={})])
    assert not np.any(combined.node_kind == REST)


def test_what_documents_of_the_reference_say_of_themselves_does_not_spoil_the_file(tmp_path):
    words = {"pruning": {"kept": 3}, "note": "same in both"}
    graphs = [
        random_graph(0).with_provenance(reference_config={"seed": seed}, extra=words, file=f"{seed}.json")
        for seed in range(2)
    ]
    average(graphs).save(tmp_path / "g.npz")
    told = Graph.load(tmp_path / "g.npz").provenance
    assert told.extra == {"note": "same in both"} and [one.file for one in told.combined.graphs] == ["0.json", "1.json"]


@pytest.mark.parametrize("facts", [{"shared": KnownRun(model="other")}, {"transcoders": "other"}])
def test_graphs_of_different_models_or_transcoders_are_refused(facts):
    a = random_graph(0).with_provenance(shared=KnownRun(model="m"), transcoders="t")
    b = a.with_provenance(**facts)
    with pytest.raises(UserError, match="Graphs of different (models|transcoders) .* have no features in common"):
        difference(a, b)
    assert average([a, replace(b, provenance=Provenance())]).node_kind.size
    with pytest.raises(UserError, match="no graph to average"):
        average([])
