"""Scaling features: the readings agree where they must, and a whole graph predicts the propagated one exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine, read_targets
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.effects.readings import factors_for, predict, scaled
from difffract_jax.graphs.graph import FEATURE
from tolerances import TOL, relative_error
from traces import IMAGE, layer_of, make_exact

MODES = ("direct", "propagated", "live", "full")


@pytest.fixture(scope="module")
def made():
    jax.config.update("jax_enable_x64", True)
    exact = make_exact(seed=2, text_tokens=8, img=(0, 1, 2), txt=(1,), joint=(0, 1), skip=True, output=True)
    output = resolve_target(exact.pipe, exact.trace, parse_target("pixels:color=red,box=0,0,16,16"))
    graph = attribute(exact.trace, exact.tcs, target=output, max_nodes=10_000, expansion_batch=200, min_attribution=0.0)
    yield exact, output, graph
    jax.config.update("jax_enable_x64", False)


def value(exact, output, reading):
    engine = make_engine(exact.trace, exact.tcs, (output,))
    return read_targets(engine, np.array([engine.sources], np.int64), (reading,))[0]


@pytest.mark.parametrize("mode", MODES)
def test_without_a_change_every_reading_is_the_trace(made, mode):
    exact, _, graph = made
    ones = factors_for(exact.replacement, graph, np.array([], int), 1.0)
    found = scaled(exact.replacement, ones, mode)
    assert relative_error(found.velocity, exact.trace.record.velocity) <= TOL.x64


def test_a_whole_graph_predicts_the_propagated_reading(made):
    exact, output, graph = made
    leaving = np.bincount(graph.edge_source, np.abs(graph.edge_attribution), graph.node_kind.size)
    total: dict[tuple[int, ...], float] = {}
    for node in np.flatnonzero((graph.node_kind == FEATURE) & (graph.node_block <= 3)):
        name = tuple(int(c[node]) for c in (graph.node_stream, graph.node_block, graph.node_feature))
        total[name] = total.get(name, 0.0) + leaving[node]
    strongest = sorted(total, key=lambda name: -total[name])
    for chosen in ([strongest[0]], [strongest[1]], strongest[:6]):
        columns = zip(graph.node_stream, graph.node_block, graph.node_feature, graph.node_kind, strict=True)
        keys = [tuple(map(int, key)) for key in columns]
        nodes = np.array([n for n, key in enumerate(keys) if key[3] == FEATURE and key[:3] in chosen])
        factors = np.ones(graph.node_kind.size)
        factors[nodes] = 1.2
        moved = value(
            exact, output, scaled(exact.replacement, factors_for(exact.replacement, graph, nodes, 1.2), "propagated")
        ) - value(exact, output, exact.trace.record.reading)
        # Edges and values are kept in float32, and paths of either sign cancel.
        assert abs(predict(graph, factors)[0] - moved) <= 1e-4 * abs(moved)


def test_the_full_reading_is_the_model_with_its_edit(made):
    """One feature of the first block, scaled: what the model's own blocks make of the changed MLP output."""
    exact, _, graph = made
    node = next(
        n for n in np.flatnonzero(graph.node_kind == FEATURE) if graph.node_block[n] == 0 and graph.node_stream[n] == 0
    )
    feature = int(graph.node_feature[node])
    factors = factors_for(exact.replacement, graph, np.array([node]), -1.0)
    found = scaled(exact.replacement, factors, "full")
    record = exact.trace.record
    tc = layer_of(exact.tcs.stacks["img"], 0)
    code = tc.encode(record.mlp_in[IMAGE][0], record.t)[:, feature]
    added = jnp.zeros_like(record.mlp_out[IMAGE]).at[0].set(-2 * code[:, None] * tc.dec.kernel[feature][None])
    from difffract_jax.circuits.checks.faithfulness import live_reading

    change = (added, *jax.tree.map(jnp.zeros_like, record.mlp_out[1:]))
    expected = live_reading(exact.replacement, change)
    assert relative_error(found.velocity, expected.velocity) <= TOL.x64


def test_direct_and_live_readings_differ_where_features_follow(made):
    exact, output, graph = made
    node = int(np.flatnonzero((graph.node_kind == FEATURE) & (graph.node_block == 0))[0])
    factors = factors_for(exact.replacement, graph, np.array([node]), 3.0)
    values = {mode: value(exact, output, scaled(exact.replacement, factors, mode)) for mode in MODES}
    for a, b in (("direct", "propagated"), ("propagated", "full"), ("live", "full")):
        assert abs(values[a] - values[b]) > 1e-6 * abs(values[a])
