"""Ways to pull targets back: several devices give one graph, bfloat16 products nearly the same one, and say so."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine, pull_rows
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pullback import PullOptions
from difffract_jax.circuits.attribution.rounding import rounded
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.cli.graph_tables import graph_summary
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.sharding import make_mesh
from tolerances import TOL, relative_error
from traces import cast, make_exact, make_transcoders, same_graph

SIZE = {"height": 24, "width": 32, "text_tokens": 16}


@pytest.fixture(scope="module")
def small():
    """A trace through to the velocity in float32, and a target of each kind."""
    exact = make_exact(img=(0, 2), txt=(), joint=(1,), output=True, dtype=jnp.float32)
    output = resolve_target(exact.pipe, exact.trace, parse_target("pixels:color=red,box=8,8,24,20"))
    return exact, [(output, 2.0), (strongest_feature(exact.trace, exact.tcs, "img", 2), 1.0)]


@pytest.mark.slow
def test_eight_devices_give_the_graph_of_one(small):
    exact, targets = small
    settings = {"target": targets, "max_nodes": 30, "expansion_batch": 11}
    alone = attribute(exact.trace, exact.tcs, **settings)
    shared = attribute(exact.trace, exact.tcs, **settings, mesh=make_mesh({"data": 8}))
    same_graph(shared, alone, TOL.edge)
    assert shared.largest_conservation_error <= TOL.conservation_f32
    assert relative_error(shared.target_sum, alone.target_sum) <= TOL.sharded


@pytest.mark.slow
def test_rows_on_several_devices_are_the_rows_of_one_over_several_steps(x64):
    pipe = random_pipeline(seed=3, dtype=jnp.float64)
    tcs = make_transcoders(pipe.config.transformer, img=(0, 2), txt=(), joint=(1,))
    span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=pipe.plan(**SIZE))
    output = resolve_target(pipe, span, parse_target("velocity:"))
    one, four = (make_engine(span, tcs, (output,), way) for way in (PullOptions(), PullOptions(make_mesh({"data": 4}))))
    features = np.flatnonzero((one.table.kind == FEATURE) & (one.table.value > 0))
    rows = np.array([one.sources, *features[[-1, -5, 40, 3, 0]]], np.int64)
    ours, expected = (pull_rows(engine, rows, 8) for engine in (four, one))
    scale = np.abs(expected.edges).max(axis=1, keepdims=True)
    assert np.max(np.abs(ours.edges - expected.edges) / np.where(scale > 0, scale, 1)) <= 1e-12
    assert len(ours.spares[0].sharding.device_set) == 4
    again = pull_rows(four, rows[::-1].copy(), 8, ours.spares)
    assert relative_error(again.edges[::-1], expected.edges) <= 1e-12


def test_bfloat16_products_tell_their_error_and_keep_what_was_recorded(small):
    exact, targets = small
    settings = {"target": targets[1][0], "max_nodes": 10, "expansion_batch": 11}
    full = attribute(exact.trace, exact.tcs, **settings)
    half = attribute(exact.trace, exact.tcs, **settings, precision="bf16")
    told = half.provenance.precision
    assert full.provenance == replace(half.provenance, precision=None)
    # Each factor is rounded to 8 bits; float32 would be a thousand times closer.
    assert 1e-4 < told.edge_error <= TOL.bf16
    assert 1e-5 < told.conservation_error <= TOL.bf16
    assert graph_summary(half)["bfloat16 error"] == f"{told.edge_error:.2g} of the largest edge"
    assert half.target_preactivation[0] == full.target_preactivation[0] and half.target_bias[0] == full.target_bias[0]


def test_rounding_reaches_every_product_and_nothing_else():
    a, b = (jax.random.normal(jax.random.key(i), (16, 16)) for i in range(2))

    def program(product):
        def f(a, b):
            body = jax.checkpoint(lambda x: jnp.tanh(product(x, b)))
            c = jax.lax.fori_loop(0, a[0, 0].astype(jnp.int32) + 3, lambda _, c: c + jax.vjp(body, c)[1](c)[0], a)
            c, _ = jax.lax.scan(lambda c, _: (product(c, b) / 4, None), c, None, length=3)
            return jax.lax.cond(a[0, 0] > 9, lambda c: c, lambda c: jax.jit(product)(c, b), c), jnp.exp(c)

        return jax.jit(f)

    def by_hand(x, y):
        return jnp.matmul(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    def backward(kept, cotangent):
        x, y = kept
        return by_hand(cotangent, y.T), by_hand(x.T, cotangent)

    by_hand_and_back = jax.custom_vjp(by_hand)
    by_hand_and_back.defvjp(lambda x, y: (by_hand(x, y), (x, y)), backward)
    with jax.default_matmul_precision("default"):
        ours = jax.jit(rounded(program(jnp.matmul)))(a, b)
        for found, expected, whole in zip(
            ours, program(by_hand_and_back)(a, b), program(jnp.matmul)(a, b), strict=True
        ):
            assert relative_error(found, expected) <= TOL.f32_block < relative_error(found, whole)
        exact = rounded(lambda a, b: jnp.matmul(a, b, precision="highest"))(a, b)
    assert np.array_equal(exact, jnp.matmul(a, b, precision="highest"))


def test_bfloat16_weights_are_traced_as_their_values_in_float32():
    pipe = random_pipeline(seed=3)
    tcs = make_transcoders(pipe.config.transformer, img=(0, 1), txt=(), dtype=jnp.float32)
    halves = tcs._replace(stacks=cast(tcs.stacks, jnp.bfloat16))
    halved = pipe._replace(transformer=cast(pipe.transformer, jnp.bfloat16))
    trace = capture(halved, halves, "a red circle", run=pipe.plan(**SIZE))
    assert {leaf.dtype for leaf in jax.tree.leaves(trace.record.weights)} == {jnp.dtype(jnp.bfloat16)}
    widened = cast(trace.record.weights, jnp.float32)
    settings = {"target": strongest_feature(trace, halves, "img", 1), "max_nodes": 1, "expansion_batch": 1}
    graph = attribute(trace, halves, **settings)
    assert graph.largest_conservation_error <= TOL.conservation_f32
    same = attribute(trace._replace(record=trace.record._replace(weights=widened)), halves, **settings)
    assert relative_error(graph.target_sum[0], same.target_sum[0]) <= TOL.sharded
