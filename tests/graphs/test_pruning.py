"""Pruning at 1 keeps what matters, less keeps less, and the rules are those of circuit-tracer and of the reference.

That `difffract` prunes the reference's graphs as the reference does is tested with the golden graphs, in
test_attribution. `standard` is compared here with circuit-tracer's rule, written out with dense matrices.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from difffract_jax.config import UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT, REST
from difffract_jax.graphs.pruning import cumulative_shares, largest, node_influence, prune, top_share
from difffract_jax.graphs.reduction import PruningSettings
from random_graphs import random_graph, random_output_graph
from tolerances import TOL

SHARE = st.floats(0.05, 1.0)


def nodes(graph):
    columns = (graph.node_kind, graph.node_stream, graph.node_block, graph.node_position, graph.node_feature)
    return {tuple(map(int, row)) for row in zip(*columns, strict=True)}


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_pruning_at_one_keeps_everything(seed, by_position):
    graph = random_graph(seed)
    whole = graph if by_position else aggregate(graph)
    pruned = prune(graph, mode="difffract", node_threshold=1.0, edge_threshold=1.0, by_position=by_position)
    assert nodes(pruned) == nodes(whole)
    assert np.array_equal(pruned.edge_attribution, whole.edge_attribution)


@given(st.integers(0, 10_000), SHARE, SHARE, st.sampled_from(["standard", "difffract"]))
@settings(max_examples=40, deadline=None)
def test_a_smaller_share_keeps_fewer_features(seed, a, b, mode):
    graph = random_graph(seed)
    few, many = (prune(graph, mode=mode, node_threshold=share, edge_threshold=1.0) for share in sorted((a, b)))
    assert nodes(few) <= nodes(many)
    fewer, more = (prune(graph, mode=mode, node_threshold=0.9, edge_threshold=share) for share in sorted((a, b)))
    assert fewer.edge_source.size <= more.edge_source.size


@given(st.integers(0, 10_000), SHARE)
@settings(max_examples=25, deadline=None)
def test_the_target_and_what_is_no_feature_stay(seed, share):
    graph = aggregate(random_graph(seed))
    pruned = prune(graph, mode="difffract", node_threshold=share, edge_threshold=share)
    assert nodes(pruned) >= {node for node in nodes(graph) if node[0] != FEATURE}
    assert pruned.target == 0 and pruned.node_feature[0] == graph.node_feature[0]
    assert pruned.target_sum[0] == graph.target_sum[0]


@pytest.mark.parametrize("mode", ["standard", "difffract"])
def test_influence_is_recorded(mode):
    graph = aggregate(random_graph(1))
    pruned = prune(graph, mode=mode, node_threshold=1.0, edge_threshold=1.0)
    assert np.allclose(pruned.node_influence, node_influence(graph), rtol=1e-6)
    assert np.allclose(pruned.node_cumulative, cumulative_shares(node_influence(graph)), rtol=1e-6)
    assert pruned.provenance.pruning == PruningSettings(mode=mode, node_threshold=1.0, edge_threshold=1.0)


def dense(graph):
    """Attributions [target, source] and the weights of the targets."""
    matrix = np.zeros((graph.node_kind.size,) * 2)
    matrix[graph.edge_target, graph.edge_source] = graph.edge_attribution
    weights = np.zeros(graph.node_kind.size)
    weights[graph.targets] = graph.provenance.target_weights
    return matrix, weights / weights.sum()


def influence_of(matrix, weights):
    """Row-normalised influence by inversion, as circuit-tracer defines it."""
    shares = np.abs(matrix) / np.maximum(np.abs(matrix).sum(axis=1, keepdims=True), 1e-10)
    identity = np.eye(len(matrix))
    return shares, weights @ (np.linalg.inv(identity - shares) - identity)


def at_least(scores, threshold):
    """Circuit-tracer's cut: the score at which the cumulative share reaches the threshold, and all not below it.

    Equal up to rounding is equal: a chain's scores come out of the inverse and of the back-substitution with other
    last digits.
    """
    ranked = np.sort(scores.ravel())[::-1]
    place = np.searchsorted(np.cumsum(ranked), (threshold - 1e-9) * ranked.sum())
    return scores >= ranked[min(place, ranked.size - 1)] * (1 - 1e-9)


def circuit_tracer(graph, node_threshold, edge_threshold):
    """`prune_graph` of circuit-tracer on dense matrices (docs/method.md, section 5): masks of nodes and of edges."""
    matrix, weights = dense(graph)
    _, influence = influence_of(matrix, weights)
    fixed = (graph.node_kind == INPUT) | (weights > 0)
    kept = at_least(influence, node_threshold) | fixed
    matrix = matrix * kept[None, :] * kept[:, None]
    shares, left = influence_of(matrix, weights)
    edges = at_least(shares * (left + weights)[:, None], edge_threshold) & (matrix != 0)
    while True:
        edges &= kept[None, :] & kept[:, None]
        lonely = ~edges.any(axis=0) | ((graph.node_kind == FEATURE) & ~edges.any(axis=1))
        again = kept & (fixed | ~lonely)
        if (again == kept).all():
            return kept, edges
        kept = again


@given(st.integers(0, 10_000), st.booleans(), SHARE.filter(lambda s: s < 1), SHARE.filter(lambda s: s < 1))
@example(0, True, 0.99609375, 0.7734375)  # two edges of a chain share one score at the cut
@example(230, True, 0.0625, 0.5)  # no edge is left between the nodes that are
@settings(max_examples=60, deadline=None)
def test_the_standard_rule_is_circuit_tracer_s(seed, several, node_threshold, edge_threshold):
    graph = random_output_graph(seed) if several else aggregate(random_graph(seed))
    pruned = prune(graph, node_threshold=node_threshold, edge_threshold=edge_threshold, by_position=True)
    kept, edges = circuit_tracer(graph, node_threshold, edge_threshold)
    assert nodes(pruned) == {row for row, stays in zip(rows_of(graph), kept, strict=True) if stays}
    assert pruned.node_kind.size == kept.sum() and pruned.edge_source.size == edges.sum()
    assert sorted(pruned.edge_attribution) == sorted(
        graph.edge_attribution[edges[graph.edge_target, graph.edge_source]]
    )


def rows_of(graph):
    columns = (graph.node_kind, graph.node_stream, graph.node_block, graph.node_position, graph.node_feature)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_influence_on_several_targets_is_the_weighted_inverse(seed):
    graph = random_output_graph(seed)
    assert np.max(np.abs(node_influence(graph) - influence_of(*dense(graph))[1])) <= TOL.x64


@given(st.integers(0, 10_000), SHARE)
@settings(max_examples=25, deadline=None)
def test_nothing_dangles_and_targets_and_inputs_stay(seed, share):
    graph = random_output_graph(seed)
    pruned = prune(graph, node_threshold=share, edge_threshold=share, by_position=True)
    out, into = np.unique(pruned.edge_source), np.unique(pruned.edge_target)
    free = np.setdiff1d(np.arange(pruned.node_kind.size), pruned.targets)
    assert np.isin(free[np.isin(pruned.node_kind[free], (FEATURE, ERROR, REST))], out).all()
    assert np.isin(free[pruned.node_kind[free] == FEATURE], into).all()
    assert np.sum(pruned.node_kind == INPUT) == np.sum(graph.node_kind == INPUT)
    assert pruned.provenance.target_weights == (2.0, 1.0, 0.5)
    assert [int(k) for k in pruned.node_kind[:3]] == [OUTPUT, OUTPUT, FEATURE]
    assert pruned.target_node[:3].tolist() == [0, 1, 2]


def test_summing_over_positions_keeps_every_target_apart():
    graph = random_output_graph(3)
    summed = aggregate(graph)
    assert summed.targets.tolist() == [0, 1, 2] and summed.target_node[:3].tolist() == [0, 1, 2]
    assert [int(k) for k in summed.node_kind[:3]] == [OUTPUT, OUTPUT, FEATURE]
    for target in range(3):
        into = [g.edge_attribution[g.edge_target == target].sum() for g in (graph, summed)]
        assert into[0] == pytest.approx(into[1], abs=1e-5)
    assert not np.diff(summed.map_indptr)[:2].any()


def test_errors_can_go_and_the_reference_s_rule_keeps_them():
    graph = random_output_graph(5)
    errors = [np.sum(np.isin(prune(graph, mode=mode).node_kind, (ERROR, REST))) for mode in ("standard", "difffract")]
    assert errors[0] < errors[1] == np.sum(np.isin(aggregate(graph).node_kind, (ERROR, REST)))


def test_the_fewest_that_hold_a_share_are_chosen_and_ties_with_them():
    assert largest(np.array([1.0, 4.0, 2.0, 3.0]), 0.7).tolist() == [False, True, False, True]
    assert largest(np.array([2.0, 4.0, 2.0, 2.0]), 0.5).tolist() == [True, True, True, True]
    assert largest(np.array([0.0, 1.0]), 1.0).tolist() == [True, True]
    assert cumulative_shares(np.array([1.0, 4.0, 2.0, 3.0])).tolist() == [1.0, 0.4, 0.9, 0.7]
    assert cumulative_shares(np.zeros(2)).tolist() == [0.0, 0.0]


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
    with pytest.raises(UserError, match="must be one of standard, difffract, but got 'other'"):
        prune(random_graph(0), mode="other")
