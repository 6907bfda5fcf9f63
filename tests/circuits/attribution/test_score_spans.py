"""Attention's scores over several steps, on several devices, with streamed weights: the laws of one step hold on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.carried import after_step, enter
from difffract_jax.circuits.attribution.engine import make_engine, targets_of
from difffract_jax.circuits.attribution.explained import forward_derivatives
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.score_gradients import score_gradients
from difffract_jax.circuits.attribution.score_sides import (
    ScorePlace,
    attention_tokens,
    check_place,
    queries_or_keys,
    score_edges,
)
from difffract_jax.circuits.attribution.selection import strongest_feature, target_row
from difffract_jax.circuits.frozen.replacement import residuals, run_replacement
from difffract_jax.circuits.frozen.targets import preactivations
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.config import ViewerOptions
from difffract_jax.graphs.files import viewer_json
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.frozen_attention import without_scores
from difffract_jax.graphs.graph import SCORE
from difffract_jax.graphs.names import find_nodes, node_names
from difffract_jax.models.stacks import group_slices, slice_layer
from tolerances import TOL, relative_error
from traces import EXPLAINED, make_exact

SETTINGS = {"max_nodes": 12, "expansion_batch": 4, "min_attribution": 1e-6, "attention": "explained"}
EARLY, LATE = ScorePlace(1, 0, ("img", 5), ("txt", 1)), ScorePlace(3, 1, ("txt", 0), ("img", 7), 1)


def spanned(exact):
    """Steps 1 and 2 of the exact pipeline's run."""
    plan = exact.pipe.plan(height=24, width=32, text_tokens=16)
    return capture_steps(exact.pipe, exact.tcs, "a red circle", first=1, last=2, run=plan)


@pytest.fixture(scope="module")
def made():
    """An engine over two steps, with the velocity and the strongest feature of its last step as targets."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        exact = make_exact(**EXPLAINED)
        span = spanned(exact)
        engine = make_engine(span, exact.tcs, (resolve_target(exact.pipe, span, parse_target("velocity:")),))
        feature = strongest_feature(span, exact.tcs, "img", 2)
        yield exact, span, engine, np.array([engine.sources, target_row(engine, feature)])


def reading(engine, row, runs):
    """What a target of the last step reads of the runs of both."""
    if row >= engine.sources:
        output = engine.outputs[0]
        return jnp.sum(output.velocity * runs[-1].velocity) + jnp.sum(output.latents * runs[-1].latents)
    return preactivations(engine.steps[-1], targets_of(engine, np.array([row]), len(runs) - 1), runs[-1].mlp_in)[0]


def run_all(engine, held, latents, text, sources):
    """Runs the frozen map over all steps, with records, first latents, text and sources that are given."""
    runs, z = [], latents
    for number, (prepared, frozen) in enumerate(zip(engine.steps, held, strict=True)):
        record = prepared.record._replace(frozen=frozen)
        own = sources[number]._replace(boundary=enter(record.weights, z, text))
        runs.append(run_replacement(record, prepared.sites, own)._replace(latents=z))
        z = after_step(z, engine.infos[number : number + 1], [runs[-1].velocity])
    return runs


def point(engine):
    """The traced point: what was recorded, first latents, text, and sources."""
    first = engine.steps[0].record
    steps = engine.steps
    return [one.record.frozen for one in steps], first.latents, first.text, [one.sources for one in steps]


@pytest.mark.parametrize("target", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_scores_of_earlier_steps_have_the_gradients_of_their_live_queries(made, target):
    _, _, engine, rows = made
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        held, *rest = point(engine)
        found = list(score_gradients(engine, rows[target : target + 1]))
        assert [one.number for one in found] == sorted([one.number for one in found], reverse=True)

        def value(queries):
            frozen = [
                tuple(one._replace(q=q) for one, q in zip(step, own, strict=True))
                for step, own in zip(held, queries, strict=True)
            ]
            return reading(engine, int(rows[target]), run_all(engine, frozen, *rest))

        expected = jax.jit(jax.grad(value))([[one.q for one in step] for step in held])
        for number in (0, 1):
            for stack in (0, 1):
                ours, theirs = [], []
                for one in (one for one in found if one.number == number):
                    if engine.info.layout.stack_of_block(one.block) == stack:
                        layer = one.block - engine.info.layout.firsts[stack]
                        k = np.asarray(held[number][stack].k)[layer]
                        ours.append(k.shape[-1] ** -0.5 * np.einsum("hqk,khd->qhd", one.gradient[0], k))
                        theirs.append(np.asarray(expected[number][stack])[layer])
                # All blocks of the first step drive the velocity that the second one starts from.
                assert len(ours) == (3, 2)[stack] or (number, target) == (1, 1)
                if ours:
                    assert relative_error(np.stack(ours), np.stack(theirs)) <= TOL.x64
                    assert np.abs(np.stack(theirs)).max() > 0


def test_all_scores_add_up_to_what_scaled_queries_do_and_a_graph_of_them_adds_up(made):
    exact, span, engine, _ = made
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        targets = [(engine.outputs[0], 1.0), (strongest_feature(span, exact.tcs, "img", 2), 1.0)]
        graph = attribute(span, exact.tcs, target=targets, max_scores=40, **SETTINGS)
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    for one in graph.provenance.attention:
        assert abs(one.total - one.forward) <= TOL.conservation_x64 * one.absolute and one.absolute > 0
    # Scores of both steps are nodes, named with their step, with sources of no later step.
    own = np.flatnonzero((graph.node_kind == SCORE) & (graph.node_head >= 0))
    assert {*graph.node_step[own].tolist()} == {1, 2}
    names = node_names(graph)
    assert len({*names}) == len(names) and all(names[node].endswith(f"#{graph.node_step[node]}") for node in own)
    assert find_nodes(graph, [names[own[0]]])[0] == own[0]
    into = np.isin(graph.edge_target, own)
    steps = graph.node_step[graph.edge_source], graph.node_step[graph.edge_target]
    assert np.all(steps[0][into] <= steps[1][into]) and np.any(steps[0][into] < steps[1][into])
    assert without_scores(graph).conservation_error.max() <= TOL.conservation_x64
    document = viewer_json.to_document(graph, "circuit-tracer", ViewerOptions(by_position=True, slug="a"))
    ids = [node["node_id"] for node in document["nodes"]]
    assert len({*ids}) == len(ids) and np.sum(graph_of(document).node_kind == SCORE) == np.sum(graph.node_kind == SCORE)


def shares_on_the_way(engine, place):
    """Every source's mean slope of a score on the straight way from no sources, times itself: it is that half way."""
    number, steps = place.number, engine.steps[: place.number + 1]
    record, layout = steps[number].record, engine.info.layout
    stack = layout.stack_of_block(place.block)
    layer, part = place.block - layout.firsts[stack], group_slices(record.weights.stacks)[stack]
    block, frozen = slice_layer((record.weights.stacks[stack], record.frozen[stack]), layer)
    project = partial(queries_or_keys, block, record.cond, frozen)
    _, i, j = check_place(engine, place)
    assert attention_tokens(engine.info, block, stack)[0].size == frozen.q.shape[0]

    def entering(latents, text, sources):
        z = latents
        for one, info, own in zip(steps, engine.infos, sources, strict=False):
            own = own._replace(boundary=enter(one.record.weights, z, text))
            if one is steps[number]:
                return tuple(h[layer] for h in residuals(one.record, one.sites, own)[part])
            z = after_step(z, (info,), [run_replacement(one.record, one.sites, own).velocity])
        return None

    _, *traced = point(engine)
    traced[2] = traced[2][: number + 1]
    row = frozen.k[:, place.head] @ frozen.q[i, place.head] * frozen.q.shape[-1] ** -0.5
    pattern = jax.nn.softmax(row)

    @jax.jit
    def half_way_and_there(traced):
        held = [project(side, entering(*traced), None)[1] for side in (0, 1)]

        def score(given):
            h = entering(*given)
            q, k = (project(side, h, held[side])[0][:, place.head] for side in (0, 1))
            row = k @ q[i] * q.shape[-1] ** -0.5
            return row[j] - pattern @ row

        return jax.grad(score)(jax.tree.map(lambda leaf: leaf / 2, traced)), score(traced)

    slope, value = half_way_and_there(traced)
    return in_a_row(engine, *jax.tree.map(np.multiply, slope, traced)), float(value)


def in_a_row(engine, latents, text, sources):
    """Sums what is held by source in the order of a row of edges; sources of later steps have none."""
    found = []
    for number, one in enumerate(engine.steps):
        own = sources[number] if number < len(sources) else jax.tree.map(np.zeros_like, one.sources)
        for stack, part in zip(engine.info.layout.stacks, group_slices(one.record.weights.stacks), strict=True):
            for layer in range(stack.depth):
                found += [values[layer].ravel() for values in own.values[part]]
                found += [errors[layer].sum(axis=-1) for errors in own.errors[part]]
    return np.concatenate([*found, text.sum(axis=-1), latents.sum(axis=-1)])


@pytest.mark.parametrize("place", [LATE, pytest.param(EARLY, marks=pytest.mark.slow)])
def test_both_sides_of_a_later_steps_score_add_up_and_are_shares_of_the_way(made, place):
    _, _, engine, _ = made
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = score_edges(engine, [EARLY, LATE])
        expected, value = shares_on_the_way(engine, place)
    total = found.query.sum(axis=1) + found.key.sum(axis=1) + found.constant
    scale = np.abs(found.query).sum(axis=1) + np.abs(found.key).sum(axis=1) + np.abs(found.constant)
    assert np.all(np.abs(total - found.value) <= TOL.conservation_x64 * scale)
    mine = place.number
    assert found.value[mine] == pytest.approx(value, rel=1e-9)
    assert relative_error(found.query[mine] + found.key[mine], expected) <= TOL.x64


@pytest.mark.slow
def test_in_float32_too():
    exact = make_exact(**EXPLAINED, dtype=jnp.float32)
    span = spanned(exact)
    target = resolve_target(exact.pipe, span, parse_target("velocity:"))
    graph = attribute(span, exact.tcs, target=target, max_scores=20, **SETTINGS)
    (told,) = graph.provenance.attention
    assert abs(told.total - told.forward) <= TOL.conservation_f32 * (
        graph.target_abs_sum[0] + abs(graph.target_bias[0])
    )
    assert np.max(graph.conservation_error) <= TOL.conservation_f32
    engine = make_engine(span, exact.tcs, (target,))
    assert forward_derivatives(engine, np.array([engine.sources]))[0] == pytest.approx(told.forward, rel=1e-6)
