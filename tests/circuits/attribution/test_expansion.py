"""The expansion equals a slow one written from the description, and summing over positions loses nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.circuits.attribution.expansion import compact
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, REST
from random_graphs import expand, random_edges, random_graph, random_table
from tolerances import TOL


def slow_expansion(table, edges, target, max_nodes, batch, smallest):
    """Mode `difffract` by dense float64 matrices over all rows, one node after the other."""
    kept = np.where(np.abs(edges) >= smallest, edges.astype(np.float64), 0)
    kept[:, (table.kind == FEATURE) & (table.value <= smallest)] = 0
    expanded = [target]
    while len(expanded) < max_nodes:
        adjacency = np.abs(kept[np.ix_(expanded, expanded)]).T  # [source, target]
        total = adjacency.sum(axis=0)
        share = np.divide(adjacency, total, out=np.zeros_like(adjacency), where=total > 0)
        reach = np.linalg.inv(np.eye(len(expanded)) - share)[:, 0]
        scores = np.abs(kept[expanded]).T @ reach
        scores[(table.kind != FEATURE) | np.isin(np.arange(scores.size), expanded)] = 0
        best = np.argsort(-scores, kind="stable")[: min(batch, max_nodes - len(expanded))]
        best = best[scores[best] > 0]
        if not best.size:
            break
        expanded += best.tolist()
    return expanded, kept


@pytest.mark.parametrize("seed", range(8))
def test_it_equals_a_slow_one(seed):
    rng = np.random.default_rng(seed)
    table = random_table(rng, layers=4)
    edges = random_edges(rng, table)
    target = int(np.flatnonzero((table.kind == FEATURE) & (table.block == 3) & (table.value > 0))[0])
    state = expand(table, edges, target, max_nodes=17, batch=5, smallest=0.1)
    expanded, kept = slow_expansion(table, edges, target, 17, 5, 0.1)
    assert state.expanded.tolist() == expanded
    graph = compact(state)
    ours = {}
    for source, to, value in zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True):
        ours[name(graph, source), name(graph, to)] = value
    expected = slow_edges(table, kept, expanded, 0.1)
    assert ours.keys() == expected.keys()
    assert max(abs(ours[pair] - expected[pair]) for pair in ours) <= TOL.edge * max(map(abs, expected.values()))


def name(graph, node):
    columns = (graph.node_kind, graph.node_stream, graph.node_block, graph.node_position, graph.node_feature)
    return tuple(int(column[node]) for column in columns)


def slow_edges(table, kept, expanded, smallest):
    edges = {}
    for target in expanded:
        to = tuple(int(c[target]) for c in table[:5])
        for source in np.flatnonzero(kept[target]):
            kind, *place, feature = (int(c[source]) for c in table[:5])
            if kind == FEATURE and source not in expanded:
                kind, feature = REST, -1
            pair = (kind, *place, feature), to
            edges[pair] = edges.get(pair, 0.0) + kept[target, source]
    return {pair: value for pair, value in edges.items() if pair[0][0] != REST or abs(value) >= smallest}


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_totals_are_those_before_any_threshold(seed):
    rng = np.random.default_rng(seed)
    table = random_table(rng)
    edges = random_edges(rng, table)
    target = int(np.flatnonzero((table.kind == FEATURE) & (table.block == 2))[-1])
    state = expand(table, edges, target, max_nodes=9, batch=3, smallest=0.5)
    assert np.allclose(state.totals.sum, edges[state.expanded].sum(axis=1, dtype=np.float64), rtol=0, atol=1e-12)
    assert np.allclose(state.totals.abs_sum, np.abs(edges[state.expanded]).sum(axis=1, dtype=np.float64), rtol=1e-12)
    assert np.allclose(state.totals.sum + state.totals.bias, state.totals.preactivation, rtol=0, atol=1e-12)


def test_without_a_threshold_the_kept_edges_add_up():
    graph = random_graph(3, smallest=0.0)
    incoming = np.bincount(graph.edge_target, graph.edge_attribution.astype(np.float64), graph.node_kind.size)
    assert np.allclose(incoming[graph.target_node], graph.target_sum, rtol=0, atol=1e-5)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_summing_over_positions_keeps_every_sum(seed):
    graph = random_graph(seed)
    summed = aggregate(graph)
    assert not summed.by_position and aggregate(summed) is summed
    for name in ("edge_attribution", "target_sum", "target_bias", "target_preactivation", "target_abs_sum"):
        before, after = (np.sum(getattr(g, name), dtype=np.float64) for g in (graph, summed))
        assert np.isclose(before, after, rtol=1e-5, atol=1e-5)
    for kind in (ERROR, INPUT, REST):
        outgoing = graph.edge_attribution[graph.node_kind[graph.edge_source] == kind].astype(np.float64).sum()
        entries = np.repeat(summed.node_kind == kind, np.diff(summed.map_indptr))
        assert np.isclose(summed.map_value[entries].astype(np.float64).sum(), outgoing, rtol=1e-4, atol=1e-4)


def test_a_feature_s_map_is_its_value_at_every_position():
    rng = np.random.default_rng(5)
    table = random_table(rng)
    edges = random_edges(rng, table)
    target = int(np.flatnonzero((table.kind == FEATURE) & (table.block == 2) & (table.value > 0))[0])
    graph = aggregate(compact(expand(table, edges, target, max_nodes=12, batch=4, smallest=0.05)))
    for node in np.flatnonzero(graph.node_kind == FEATURE):
        entries = slice(graph.map_indptr[node], graph.map_indptr[node + 1])
        mine = (table.kind == FEATURE) & (table.value > 0) & (table.stream == graph.node_stream[node])
        mine &= (table.block == graph.node_block[node]) & (table.feature == graph.node_feature[node])
        if node == graph.target:
            mine &= np.arange(mine.size) == target
        found = dict(zip(graph.map_position[entries].tolist(), graph.map_value[entries].tolist(), strict=True))
        assert found == dict(zip(table.position[mine].tolist(), table.value[mine].tolist(), strict=True))
