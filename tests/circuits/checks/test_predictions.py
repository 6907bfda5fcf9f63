"""What a graph predicts of taking features off: the reference's influence, and the signed change along edges."""

import json

import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.checks.predictions import agreement, downstream, predicted_change, predicted_influence
from difffract_jax.circuits.effects.readings import predict
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.graphs.graph import FEATURE
from random_graphs import random_graph
from tolerances import REFERENCE, relative_error
from traces import golden_trace

LIMITS = {"max_nodes": 80, "expansion_batch": 10, "min_attribution": 1e-4}


@pytest.mark.parametrize("number", (0, 2))
def test_influence_and_its_correlation_with_changes_are_the_reference_s(golden, number):
    trace, target = golden_trace(golden, number)
    feature = Feature(target["stream"], target["layer"], target["feat_idx"], (target["position"],))
    graph = attribute(trace, golden.tcs, target=feature, **LIMITS)
    data = np.load(REFERENCE / f"golden_graph_{number}.npz")
    keys = zip(*(data[f"pert_{name}"].tolist() for name in ("stream", "layer", "pos", "feat")), strict=True)
    columns = (graph.node_stream, graph.node_block, graph.node_position, graph.node_feature)
    known = {key: node for node, key in enumerate(zip(*(c.tolist() for c in columns), strict=True))}
    nodes = np.array([known[key] for key in keys], np.int64)
    assert np.array_equal(np.sort(nodes), np.flatnonzero(graph.node_kind == FEATURE))
    influence = predicted_influence(graph, nodes)[:, nodes]
    assert relative_error(influence, data["pert_influence"]) <= 1e-5
    # The reference correlates what it measured, over all pairs of different nodes.
    changed = np.abs(data["pert_h_pre"][1:].astype(np.float64) - data["pert_h_pre"][:1])
    found = agreement(influence, changed, downstream(graph, nodes, nodes))
    theirs = json.loads((REFERENCE / f"golden_graph_{number}.json").read_text())["perturbation_pairwise"]
    assert found["pairs"] == theirs["n_pairs"]
    # Ranks of nearly equal changes depend on the last bits of a float32.
    assert found["spearman"] == pytest.approx(theirs["spearman_r"], abs=1e-3)
    assert found["pearson"] == pytest.approx(theirs["pearson_r"], abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_change_is_what_the_readings_predict_of_a_factor_of_zero(seed):
    graph = random_graph(seed)
    features = np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets).astype(np.int64)
    found = predicted_change(graph, features)
    for row, node in zip(found, features, strict=True):
        factors = np.ones(graph.node_kind.size)
        factors[node] = 0.0
        assert row[graph.targets] == pytest.approx(predict(graph, factors), rel=1e-9, abs=1e-12)


def test_correlations_that_mean_nothing_are_not_told():
    alike = np.ones((2, 4))
    everything = np.ones((2, 4), bool)
    assert agreement(alike, np.arange(8.0).reshape(2, 4), everything)["spearman"] is None
    nothing = agreement(np.zeros((2, 4)), np.zeros((2, 4)), everything)
    assert nothing == {"spearman": None, "pearson": None, "pairs": 0}
