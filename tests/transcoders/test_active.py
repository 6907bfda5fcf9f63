"""Products at active features alone: the dense path's numbers, forward and backward, and when they are used."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import active
from difffract_jax.transcoders.objective import ActivationRows, Objective, site_loss
from difffract_jax.transcoders.recipe import multiplies_sparsely, recipe_of, row_flops, shape_of
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.state import init_params, init_state, measure_moments, place, state_shardings
from difffract_jax.transcoders.step import Recipe, jit_step, optimizer, train_step
from difffract_jax.transcoders.transcoder import TranscoderConfig, batch_cutoff
from tolerances import TOL, relative_error

SITES, ROWS, WIDTH, FEATURES, K = 2, 48, 12, 160, 4
KINDS = ("topk", "batchtopk")


@cache
def make(kind):
    """A state with dead features, rows whose features differ much in how often they fire, and constants."""
    config = TranscoderConfig(d_model=WIDTH, features=FEATURES, time_embed=8, activation=kind, k=K, skip=kind == "topk")
    recipe = Recipe(
        objective=Objective(aux_weight=1 / 4, aux_k=8, dead_after=100),
        lr=1e-2,
        clip=1.0,
        project_decoder=True,
        steps=12,
    )
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (SITES, ROWS, WIDTH)) + 1
    rows = ActivationRows(x, jnp.tanh(x[..., ::-1]) * 3, jax.random.choice(keys[1], jnp.array([1, 0.5]), (SITES, ROWS)))
    moments = measure_moments(rows, scaled=True)
    params = init_params(keys[2], config, "tied", moments)
    params.film.kernel[...] = jax.random.normal(keys[3], params.film.kernel.shape) / 8
    params.enc.bias[...] = params.enc.bias[...] + jax.random.normal(keys[4], (SITES, FEATURES)) ** 3 / 8
    state = init_state(params, optimizer(recipe), moments, jnp.ones(SITES))
    state = state._replace(silent=jnp.arange(SITES * FEATURES, dtype=jnp.int32).reshape(SITES, -1) % 130)
    return state, recipe, rows


def as_float64(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def losses(state, rows, recipe, sparse, revive):
    objective = replace(recipe.objective, sparse=sparse)

    def loss(tc, rows, silent, sparsity):
        pressure = jnp.ones((), rows.x.dtype)
        return site_loss(tc, rows, silent, sparsity, jnp.asarray(revive), pressure, objective)

    return jax.vmap(jax.value_and_grad(loss, has_aux=True))(state.params, rows, state.silent, state.sparsity)


def same_losses(state, recipe, rows, revive, bound):
    dense, sparse = (
        jax.jit(partial(losses, recipe=recipe, sparse=s, revive=revive))(state, rows) for s in (False, True)
    )
    for (path, expected), ours in zip(jax.tree.leaves_with_path(dense), jax.tree.leaves(sparse), strict=True):
        assert ours.dtype == expected.dtype
        if np.any(expected):
            assert relative_error(ours, expected) <= bound, jax.tree_util.keystr(path)
        else:
            assert not np.any(ours), jax.tree_util.keystr(path)
    assert np.array_equal(dense[0][1].fired, sparse[0][1].fired)


@pytest.mark.parametrize(
    ("kind", "revive"),
    [
        ("topk", True),
        ("batchtopk", False),
        pytest.param("topk", False, marks=pytest.mark.slow),
        pytest.param("batchtopk", True, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_those_of_dense_products(kind, revive):
    same_losses(*make(kind), revive, TOL.f32_block)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_loss_and_gradient_are_exact_in_float64(kind, x64):
    with jax.enable_x64(False):
        state, recipe, rows = make(kind)
    with jax.numpy_dtype_promotion("standard"):  # training mixes float32 with integers
        same_losses(as_float64(state), recipe, as_float64(rows), True, TOL.x64)


@pytest.mark.parametrize("features", [160, 37])
def test_the_largest_of_each_row_are_top_k_s_even_where_entries_are_equal(features):
    u = jnp.round(jax.random.normal(jax.random.key(1), (ROWS, features)) * 2)
    pairs = jax.jit(active.largest_per_row, static_argnums=1)(u, K)
    expected = np.sort(np.asarray(jax.lax.top_k(u, K)[1]), axis=1)
    assert np.array_equal(np.sort(np.asarray(pairs.feature).reshape(ROWS, K), axis=1), expected)


@pytest.mark.parametrize("shift", [0.0, -4.0, -9.0])
def test_the_largest_of_a_batch_are_those_above_its_cutoff(shift):
    u = jax.random.normal(jax.random.key(2), (ROWS, FEATURES)) * jnp.linspace(0.1, 4, ROWS)[:, None] + shift
    pairs, cutoff = jax.jit(active.largest_of_batch, static_argnums=1)(u, K)
    assert cutoff == batch_cutoff(u, K)
    real = np.asarray(pairs.real)
    found = np.stack([np.asarray(pairs.row)[real], np.asarray(pairs.feature)[real]], axis=1)
    assert np.array_equal(found, np.argwhere(np.asarray(u > cutoff)))


def test_pairs_are_sorted_alike_by_one_number_and_by_two(monkeypatch):
    u = jax.random.normal(jax.random.key(3), (ROWS, FEATURES)) - 3
    one = jax.jit(lambda u: active.largest_of_batch(u, K)[0])(u)
    monkeypatch.setattr(active, "LARGEST_KEY", 0)
    two = jax.jit(lambda u: active.largest_of_batch(u, K)[0])(u)
    real = int(one.real.sum())
    assert real < ROWS * K and np.array_equal(one.by_feature.order[:real], two.by_feature.order[:real])
    assert all(map(np.array_equal, jax.tree.leaves(one.by_feature)[1:], jax.tree.leaves(two.by_feature)[1:]))


def test_blocks_hold_every_segment_once():
    for count in (1, 8, 9, 100, 5000):
        rank = jnp.arange(count, dtype=jnp.int32)
        members = np.concatenate([np.ravel(block) for block in active.blocks(rank)])
        assert np.array_equal(members[members >= 0], rank)


def test_sums_are_those_of_a_scatter_whatever_the_lengths():
    rng = np.random.default_rng(0)
    key = np.sort(np.minimum(rng.zipf(1.3, 3000) - 1, 699)).astype(np.int32)
    item, weight = rng.integers(0, 50, 3000).astype(np.int32), rng.standard_normal(3000, np.float32)
    table = rng.standard_normal((50, WIDTH), np.float32)
    by = active.segments(jnp.arange(3000, dtype=jnp.int32), jnp.asarray(key), 600)  # the last hundred are padding
    ours = jax.jit(active.weighted_sums)(jnp.asarray(table), jnp.asarray(item), jnp.asarray(weight), by)
    expected = np.zeros((700, WIDTH))
    np.add.at(expected, key, weight[:, None] * table[item])
    assert relative_error(ours, expected[:600]) <= TOL.f32_block


@pytest.mark.parametrize("kind", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_steps_are_the_dense_ones_and_compile_once(kind):
    state, recipe, rows = make(kind)
    sparse = replace(recipe, objective=replace(recipe.objective, sparse=True))
    dense_step, sparse_step = (jax.jit(partial(train_step, recipe=r)) for r in (recipe, sparse))
    one, other = state, state
    for _ in range(5):
        (one, expected), (other, metrics) = dense_step(one, rows), sparse_step(other, rows)
        for ours, wanted in zip(metrics, expected, strict=True):
            assert relative_error(ours, wanted) <= TOL.sharded
    assert np.array_equal(one.silent, other.silent)
    for wanted, ours in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        assert relative_error(ours, wanted) <= TOL.f32_run
    assert sparse_step._cache_size() == 1


def test_on_several_devices_the_step_is_dense():
    state, recipe, rows = make("topk")
    sparse = replace(recipe, objective=replace(recipe.objective, sparse=True))
    mesh = make_mesh({"data": 2, "feature": 2})
    texts = [
        jit_step(r, mesh, state).lower(place(state, state_shardings(state, mesh)), rows).as_text()
        for r in (recipe, sparse)
    ]
    assert texts[0] == texts[1]


def settings(**more):
    return TrainConfig(model="m", prompts="p", out="out", **more)


def test_it_is_used_where_it_wins():
    one, two = make_mesh({}), make_mesh({"data": 2})

    def used(width, mesh=one, **more):
        given = settings(**more)
        return multiplies_sparsely(given, shape_of(given, width), mesh)

    assert used(512) and used(128) and not used(64)  # 16 features per channel, k = 32
    assert not used(512, activation="relu") and not used(512, sparse_code="off") and not used(512, two)
    assert used(64, sparse_code="on")
    with pytest.raises(UserError, match="needs a single device, but the mesh has 2"):
        used(512, two, sparse_code="on")
    with pytest.raises(ValueError, match="is for topk and batchtopk, but activation is relu"):
        settings(activation="relu", sparse_code="on")


def test_the_log_counts_the_products_that_are_taken():
    given = settings(expansion=16, time_embed=256)
    shape = shape_of(given, 512)
    sparse = recipe_of(given, shape, make_mesh({}), 1)
    dense = replace(sparse, objective=replace(sparse.objective, sparse=False))
    assert row_flops(shape, sparse) == 2 * 512 * (8192 + 6 * 32)
    assert row_flops(shape, dense) == 6 * 2 * 512 * 8192
