"""Attention's scores as nodes: their gradients are those of the live softmax, and their sides add up to them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.engine import make_engine, pull_rows, targets_of
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pullback import layout_of
from difffract_jax.circuits.attribution.score_gradients import choose_scores, removal_effects, score_gradients
from difffract_jax.circuits.attribution.score_sides import ScorePlace, attention_tokens, queries_or_keys, score_edges
from difffract_jax.circuits.effects.attention import score_parts
from difffract_jax.circuits.effects.live_scores import LiveScores
from difffract_jax.circuits.frozen.replacement import residuals, run_replacement, write
from difffract_jax.circuits.frozen.targets import preactivations
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.models.stacks import group_slices, sequences, slice_layer, streams
from tolerances import TOL, relative_error
from traces import EXPLAINED, make_exact

KINDS = ("double", "single", "velocity:")


@pytest.fixture
def exact(x64, traced):
    return traced


def engine_of(exact, kind):
    """An engine, and the row of a target: the strongest feature of the last block of a stack, or the velocity."""
    outputs = (resolve_target(exact.pipe, exact.trace, parse_target(kind)),) if ":" in kind else ()
    engine = make_engine(exact.trace, exact.tcs, outputs)
    if outputs:
        return engine, engine.sources
    table = engine.table
    rows = np.flatnonzero((table.kind == FEATURE) & (table.value > 0) & ((table.block >= 3) == (kind == "single")))
    rows = rows[table.block[rows] == table.block[rows].max()]
    return engine, int(rows[np.argmax(table.value[rows])])


def reading(engine, row, run):
    """What a target reads in a run."""
    if row >= engine.sources:
        return jnp.sum(engine.outputs[0].velocity * run.velocity)
    return preactivations(engine.steps[0], targets_of(engine, np.array([row]), 0), run.mlp_in)[0]


def gradients(engine, row):
    """Every block's scores, by the block's number."""
    return {found.block: found for found in score_gradients(engine, np.array([row]))}


def frozen_parts(engine, block):
    """The stack and the layer of a block, and its recorded queries and keys."""
    prepared, first = engine.steps[0], engine.infos[0].recorded[0]
    counts = layout_of(prepared).layers
    stack = int(block - first >= counts[0])
    layer = block - first - (counts[0] if stack else 0)
    held = prepared.record.frozen[stack]
    return stack, layer, held.q[layer], held.k[layer]


def with_queries(prepared, stack, q, k=None):
    """The record with other queries, and keys, of a stack."""
    held = [
        one if i != stack else one._replace(q=q, k=one.k if k is None else k)
        for i, one in enumerate(prepared.record.frozen)
    ]
    return prepared.record._replace(frozen=tuple(held))


@pytest.mark.parametrize("kind", ["velocity:", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:2])])
def test_gradients_are_those_of_live_queries_and_keys_and_sum_to_nothing_over_keys(exact, kind):
    engine, row = engine_of(exact, kind)
    prepared, found = engine.steps[0], gradients(engine, row)
    for stack in (0, 1):
        held = prepared.record.frozen[stack]

        def value(q, k, stack=stack):
            record = with_queries(prepared, stack, q, k)
            return reading(engine, row, run_replacement(record, *prepared[1:]))

        by_q, by_k = jax.jit(jax.grad(value, (0, 1)))(held.q, held.k)
        expected, ours = [], []
        for block, one in found.items():
            of_stack, layer, q, k = frozen_parts(engine, block)
            if of_stack == stack:
                g, scale = one.gradient[0], q.shape[-1] ** -0.5
                assert np.abs(jnp.sum(g, axis=-1)).max() <= 1e-12 * np.abs(g).max()
                ours += [scale * jnp.einsum("hqk,khd->qhd", g, k), scale * jnp.einsum("hqk,qhd->khd", g, q)]
                expected += [by_q[layer], by_k[layer]]
        if stack == 0 or kind != "double":  # nothing of the other stack bears on a feature of the first
            assert relative_error(jnp.stack(ours), jnp.stack(expected)) <= TOL.x64
    # Whatever lies above a target's block is not in the result, and its own block is where attention feeds its MLP.
    assert max(found) == (4 if row >= engine.sources else engine.table.block[row])


def sums_and_forward(engine, row):
    """Of every block the sum of g s, and the derivative by eps of the target with q scaled by 1 + eps."""
    prepared = engine.steps[0]
    ours, forward, size = [], [], []
    for block, one in gradients(engine, row).items():
        stack, layer, _, _ = frozen_parts(engine, block)
        q = prepared.record.frozen[stack].q

        def value(q, stack=stack):
            return reading(engine, row, run_replacement(with_queries(prepared, stack, q), *prepared[1:]))

        forward.append(
            jax.jit(lambda q, t, f=value: jax.jvp(f, (q,), (t,))[1])(q, jnp.zeros_like(q).at[layer].set(q[layer]))
        )
        ours.append(np.sum(np.asarray(one.gradient[0] * one.value, np.float64)))
        size.append(np.sum(np.abs(np.asarray(one.gradient[0] * one.value, np.float64))))
    edges = pull_rows(engine, np.array([row]), 1)
    return (
        np.array(ours),
        np.array(forward, np.float64),
        np.abs(edges.edges).sum() + np.abs(edges.bias[0]),
        np.array(size),
    )


@pytest.mark.parametrize("kind", ["velocity:", pytest.param("double", marks=pytest.mark.slow)])
def test_a_blocks_edges_add_up_to_what_scaled_queries_do(exact, kind):
    engine, row = engine_of(exact, kind)
    ours, forward, whole, size = sums_and_forward(engine, row)
    assert np.all(np.abs(ours - forward) <= TOL.conservation_x64 * size)
    assert np.abs(ours).max() > 1e-4 * whole


@pytest.mark.slow
def test_in_float32_edges_and_sides_add_up_too():
    exact = make_exact(**EXPLAINED, dtype=jnp.float32)
    engine, row = engine_of(exact, "velocity:")
    ours, forward, whole, _ = sums_and_forward(engine, row)
    assert np.max(np.abs(ours - forward)) <= TOL.conservation_f32 * whole
    found = score_edges(engine, PLACES)
    total, scale = added_up(found)
    assert np.all(np.abs(total - found.value) <= TOL.conservation_f32 * scale)


def moved(engine, row, block, added):
    """The target in the frozen map with numbers added to a block's scores, by a loop of its own over the blocks."""
    prepared, info = engine.steps[0], engine.infos[0]
    record, sites, sources = prepared
    h, x = sources.boundary, []
    for stack, part in enumerate(group_slices(record.weights.stacks)):
        weights, first = record.weights.stacks[stack], info.layout.firsts[stack]
        for layer in range(layout_of(prepared).layers[stack]):
            one, frozen = slice_layer((weights, record.frozen[stack]), layer)
            own = []
            for one_site, values, errors in zip(sites[part], sources.values[part], sources.errors[part], strict=True):
                mine = slice_layer((one_site.layers, values, errors), layer)
                own.append((None if one_site.stack is None else slice_layer(one_site.stack, mine[0].slot), *mine))
            scores = {"scores": added} if first + layer == block else {}
            joined = sequences(h, one.groups)
            after, acts = one(joined, record.cond, frozen=frozen, mlp=lambda i, x, own=own: write(*own[i], x), **scores)
            x.append(acts.mlp_in)
            h = streams(after, one.groups, h)
    double, single = x[:3], x[3:]
    mlp_in = (
        jnp.stack([one[0] for one in double]),
        jnp.stack([one[1] for one in double]),
        jnp.stack([one[0] for one in single]),
    )
    velocity = record.weights.final(h.img, record.cond, record.inv_std)
    return reading(engine, row, run_replacement(*prepared)._replace(mlp_in=mlp_in, velocity=velocity))


@pytest.mark.parametrize("block", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_score_taken_away_moves_the_target_as_told_and_a_small_change_by_its_gradient(exact, block):
    engine, row = engine_of(exact, "velocity:")
    one = gradients(engine, row)[block]
    edges = np.asarray(one.gradient[0] * one.value)
    places = np.argsort(-np.abs(edges).ravel())[:: edges.size // 12][:12]
    places = np.concatenate([np.argsort(-np.abs(edges).ravel())[:12], places])
    run = jax.jit(jax.vmap(partial(moved, engine, row, block)))
    value, pattern, gradient = (
        np.asarray(array).ravel()[places] for array in (one.value, one.pattern, one.gradient[0])
    )

    def changed(size):
        added = np.zeros((places.size, edges.size))
        added[np.arange(places.size), places] = size
        after = run(jnp.asarray(added.reshape(-1, *edges.shape)))
        return np.asarray(after) - float(moved(engine, row, block, jnp.zeros(edges.shape)))

    told = removal_effects(gradient * value, value, pattern)
    assert np.max(np.abs(changed(-value) + told)) <= 1e-10 * np.abs(told).max()
    small = 1e-5
    slope = (changed(np.full(places.size, small)) - changed(np.full(places.size, -small))) / (2 * small)
    assert np.max(np.abs(slope - gradient)) <= 1e-7 * np.abs(gradient).max()


PLACES = [
    ScorePlace(1, 0, ("img", 5), ("txt", 1)),
    ScorePlace(1, 1, ("txt", 0), ("txt", 0)),
    ScorePlace(2, 1, ("txt", 0), ("img", 7)),
    ScorePlace(4, 1, ("img", 3), ("img", 4)),
    ScorePlace(0, 0, ("img", 3), ("txt", 15)),
]


def centred(exact, place):
    """A score minus its query's mean, from the recorded queries and keys alone."""
    text, record = exact.trace.info.text_tokens, exact.trace.record
    frozen, layer = (record.frozen[0], place.block) if place.block < 3 else (record.frozen[1], place.block - 3)
    i, j = (position + (text if stream == "img" else 0) for stream, position in (place.query, place.key))
    scores = frozen.k[layer, :, place.head] @ frozen.q[layer, i, place.head] * frozen.q.shape[-1] ** -0.5
    return float(scores[j] - jax.nn.softmax(scores) @ scores)


def added_up(found):
    """What all parts of scores add up to, and the sum of their absolute values."""
    parts = found.query, found.key, found.constant[:, None]
    return (sum(each(part).sum(axis=1) for part in parts) for each in (np.asarray, np.abs))


def test_both_sides_and_the_constant_add_up_to_the_score(exact):
    found = score_edges(make_engine(exact.trace, exact.tcs), PLACES)
    assert np.allclose(found.value, [centred(exact, place) for place in PLACES], rtol=1e-9)
    total, scale = added_up(found)
    assert np.all(np.abs(total - found.value) <= TOL.conservation_x64 * scale)
    assert np.all(np.abs(found.query).max(axis=1) > 0) and np.all(np.abs(found.key).max(axis=1) > 0)


def by_source(prepared, product):
    """Sums what `product` holds by source, in the order of a row of edges."""
    record, found = prepared.record, []
    for stack, part in enumerate(group_slices(record.weights.stacks)):
        for layer in range(layout_of(prepared).layers[stack]):
            found += [values[layer].ravel() for values in product.values[part]]
            found += [errors[layer].sum(axis=-1) for errors in product.errors[part]]
    found += [product.boundary.img.sum(axis=-1), product.boundary.txt.sum(axis=-1)]
    return np.concatenate([*found, np.zeros(record.latents.shape[0])])


@pytest.mark.parametrize("place", [PLACES[0], pytest.param(PLACES[3], marks=pytest.mark.slow)])
def test_a_sources_part_is_its_share_of_the_way_from_no_sources(exact, place):
    """The score is of second degree in the sources, so that its mean slope on the way is that half way."""
    engine = make_engine(exact.trace, exact.tcs)
    prepared, record = engine.steps[0], engine.steps[0].record
    stack, layer, _, _ = frozen_parts(engine, place.block)
    part = group_slices(record.weights.stacks)[stack]
    block, frozen = slice_layer((record.weights.stacks[stack], record.frozen[stack]), layer)
    project = partial(queries_or_keys, block, record.cond, frozen)
    tokens = attention_tokens(exact.trace.info, block, stack)
    i, j = (
        int(np.flatnonzero((tokens[0] == ("img", "txt").index(stream)) & (tokens[1] == position))[0])
        for stream, position in (place.query, place.key)
    )
    entering = lambda sources: tuple(h[layer] for h in residuals(record, prepared.sites, sources)[part])  # noqa: E731
    held = [project(side, entering(prepared.sources), None)[1] for side in (0, 1)]

    def score(sources, pattern=None):
        h = entering(sources)
        q, k = (project(side, h, held[side])[0][:, place.head] for side in (0, 1))
        row = k @ q[i] * q.shape[-1] ** -0.5
        pattern = jax.nn.softmax(row) if pattern is None else pattern
        return row[j] - pattern @ row, pattern

    pattern = score(prepared.sources)[1]
    half = jax.tree.map(lambda leaf: leaf / 2, prepared.sources)
    slope = jax.jit(jax.grad(lambda sources: score(sources, pattern)[0]))(half)
    expected = by_source(prepared, jax.tree.map(jnp.multiply, slope, prepared.sources))
    found = score_edges(engine, [place])
    assert relative_error(found.query[0] + found.key[0], expected) <= TOL.x64


def test_the_querys_side_is_that_of_pairs_and_terms(exact):
    """With one key's parts for another's, a query's part differs by what `score_parts` tells of pairs."""
    engine = make_engine(exact.trace, exact.tcs)
    first, second = PLACES[0], PLACES[0]._replace(key=("img", 2))
    a, b = (score_parts(engine, *place[:4]) for place in (first, second))
    found = score_edges(engine, [first, second])
    own = [(one.keys.sum(axis=1) / 2 + one.key_constant) @ one.queries for one in (a, b)]
    assert relative_error(found.query[0] - found.query[1], own[0] - own[1]) <= 1e-9


@pytest.mark.parametrize("place", [PLACES[0], pytest.param(PLACES[3], marks=pytest.mark.slow)])
def test_pairs_and_terms_of_a_centred_score_make_its_value_and_both_sides(exact, place):
    """Half of every pair goes to either side, and each linear term to its own."""
    engine = make_engine(exact.trace, exact.tcs)
    parts, found = score_parts(engine, *place[:4], centred=True), score_edges(engine, [place])
    every = np.arange(engine.sources)
    pairs = parts.pairs(every, every)
    total = pairs.sum() + parts.query_terms.sum() + parts.key_terms.sum() + parts.constant
    scale = np.abs(pairs).sum() + np.abs(parts.query_terms).sum() + np.abs(parts.key_terms).sum()
    assert abs(total - found.value[0]) <= TOL.conservation_x64 * scale
    assert parts.score == pytest.approx(found.value[0], rel=1e-9)
    assert parts.constant == pytest.approx(found.constant[0], rel=1e-9)
    assert relative_error(pairs.sum(axis=1) / 2 + parts.query_terms, found.query[0]) <= TOL.x64
    assert relative_error(pairs.sum(axis=0) / 2 + parts.key_terms, found.key[0]) <= TOL.x64


def test_the_strongest_scores_are_chosen_and_what_is_left_is_told_by_block(exact):
    engine, row = engine_of(exact, "velocity:")
    chosen = choose_scores(engine, np.array([row]), np.ones(1), 20)
    found = gradients(engine, row)
    every = np.sort(np.concatenate([np.abs(one.gradient[0] * one.value).ravel() for one in found.values()]))[::-1]
    assert np.allclose(np.abs(chosen.edges[0]), every[:20], rtol=1e-9)
    assert chosen.rest_block.tolist() == list(found)
    for block, rest, total in zip(chosen.rest_block, chosen.rest[0], chosen.total[0], strict=True):
        one = found[int(block)]
        mine = chosen.block == block
        at = chosen.head[mine], chosen.query[mine], chosen.key[mine]
        assert np.allclose(chosen.edges[0, mine], np.asarray(one.gradient[0] * one.value)[at], rtol=1e-9)
        assert np.allclose(chosen.value[mine], np.asarray(one.value)[at])
        assert total == pytest.approx(float(jnp.sum(one.gradient[0] * one.value)), rel=1e-9)
        assert rest == pytest.approx(total - chosen.edges[0, mine].sum(), rel=1e-9)
    none = choose_scores(engine, np.array([row]), np.ones(1), 0)
    assert not none.block.size and np.array_equal(none.rest, none.total)
    with pytest.raises(UserError, match="max_scores must be 0 or more, but got -1"):
        choose_scores(engine, np.array([row]), np.ones(1), -1)


def test_removals_of_scores_that_are_nothing_are_nothing():
    told = removal_effects(np.array([[0.0, 0.2]]), np.array([0.0, 0.5]), np.array([0.5, 1.0]))
    # Where the pattern is 1 a real gradient is 0; the formula holds for any that is given.
    assert told[0, 0] == 0 and told[0, 1] == pytest.approx(0.4 * (1 - np.exp(-0.5)) / np.exp(-0.5))


def test_scores_that_are_not_there_are_refused(exact):
    engine = make_engine(exact.trace, exact.tcs)
    for place, sentence in (
        (PLACES[0]._replace(block=9), "recorded the blocks double/0 to single/1, but not single/6"),
        (PLACES[0]._replace(head=7), "The block double/1 has heads 0 to 1, but got 7"),
        (PLACES[0]._replace(query=("img", 99)), "There is no token img99"),
    ):
        with pytest.raises(UserError, match=sentence):
            score_edges(engine, [place])


def test_live_scores_add_to_the_frozen_paths_those_through_queries_and_keys(exact):
    record, rng = exact.trace.record, np.random.default_rng(0)
    block, frozen = slice_layer((record.weights.stacks[1], record.frozen[1]), 1)
    h, change = (jnp.asarray(rng.standard_normal((frozen.q.shape[0], record.boundary.img.shape[1]))) for _ in range(2))
    project = partial(queries_or_keys, block, record.cond, frozen)
    held = [project(side, (h,), None)[1] for side in (0, 1)]

    def scores(h):
        q, k = (project(side, (h,), held[side])[0] for side in (0, 1))
        return jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5

    def run(h, scores):
        return block((h,), record.cond, frozen=frozen, mlp=lambda _, x: 0 * x, scores=scores)[0][0]

    # Scores are of second degree in h, so that the difference of both sides is their derivative.
    moved = (scores(h + change) - scores(h - change)) / 2
    expected = jax.jvp(run, (h, jnp.zeros_like(moved)), (change, moved))[1]
    live = lambda h: LiveScores(block)((h,), record.cond, frozen=frozen, mlp=lambda _, x: 0 * x)[0][0]  # noqa: E731
    found = jax.jvp(live, (h,), (change,))[1]
    assert relative_error(found, expected) <= TOL.x64
    alone = jax.jvp(lambda h: run(h, jnp.zeros_like(moved)), (h,), (change,))[1]
    assert relative_error(alone, expected) > 0.01
