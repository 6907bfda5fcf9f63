"""Rectified flow: the velocity that is learned is the one that the sampler walks along."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.models.batch import sample_batch
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import plan_run
from difffract_jax.organism import flow
from difffract_jax.organism.recipe import FlowRecipe
from difffract_jax.storage.checkpoint import leaf_paths
from tolerances import TOL, relative_error

SHAPES = flow.EncodedScenes((36, 32), (20, 96), (64,))


def rows(size, latents=None, seed=0):
    rng = np.random.default_rng(seed)
    made = flow.EncodedScenes(*(rng.standard_normal((size, *shape)).astype(np.float32) for shape in SHAPES))
    return made if latents is None else made._replace(latents=np.full_like(made.latents, latents))


@jax.jit
def velocities(model, data, t):
    """The velocity at each of `data`'s latents, all at time t."""
    return jax.vmap(lambda *inputs: model(Inputs(*inputs, t), flow.GRID))(data.latents, data.text, data.pooled)


@pytest.fixture(scope="module")
def towards(stages):
    """Trains a few steps on rows that all hold one value; returns the averaged model and the losses."""

    def fit(value):
        state, losses = stages.flow.init(), []
        for _ in range(stages.flow.steps):
            state, metrics = stages.flow.step(state, rows(8, value), stages.flow.key)
            losses.append(float(metrics["loss"]))
        return state, losses

    return {value: fit(value) for value in (-3.0, 3.0)}


def test_at_the_start_the_velocity_is_zero(stages):
    state = stages.flow.init()
    for model in (state.model, state.average):
        assert not np.any(velocities(model, rows(8), jnp.asarray(0.5)))


@pytest.mark.parametrize("value", [-3.0, 3.0])
def test_a_few_steps_lower_the_loss_on_fixed_rows(towards, value):
    losses = towards[value][1]
    # At the start the velocity is zero, and the loss that of guessing nothing: 1 for the noise, 9 for the data.
    assert losses[0] == pytest.approx(1 + value**2, rel=0.05)  # 9,216 draws of noise
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("value", [-3.0, 3.0])
def test_the_velocity_that_is_learned_points_from_data_to_noise(towards, value):
    velocity = velocities(towards[value][0].model, rows(8, seed=1), jnp.asarray(1.0))
    assert np.sign(np.mean(velocity)) == -np.sign(value)


@pytest.mark.parametrize("value", [-3.0, 3.0])
def test_the_average_follows_the_weights(towards, value, stages):
    state, start = towards[value][0], stages.flow.init()
    for name, average in leaf_paths(state.average).items():
        model, first = (leaf_paths(tree)[name] for tree in (state.model, start.model))
        span = jnp.linalg.norm(model - first)
        assert jnp.linalg.norm(average - first) < 1.01 * span, name  # an average of points on the way
    assert not np.array_equal(state.average.img_in.kernel[...], state.model.img_in.kernel[...])


def planted(params, inputs, step, grid):
    """The velocity of one straight line, whatever the model."""
    noise, data = params
    return noise - data


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_euler_steps_along_noise_minus_data_lead_from_noise_to_data(organism, steps):
    noise, data = (rows(1, seed=seed).latents for seed in (1, 2))
    pair = (noise[0], data[0])
    inputs = map(jnp.asarray, (*rows(1)[1:], noise))
    end = sample_batch(planted, pair, plan_run(organism.config, steps=steps), *inputs)
    assert relative_error(end, data) <= TOL.f32_block


def test_a_step_draws_rows_of_the_pool_that_belong_together():
    pool, recipe = rows(30), FlowRecipe(batch=12)
    first, again, other = (flow.batch(recipe, 3, step, pool) for step in (0, 0, 1))
    for part, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(part, same)
    assert not np.array_equal(first.latents, other.latents)
    for number in range(12):
        (row,) = np.flatnonzero((pool.pooled == first.pooled[number]).all(axis=1))
        np.testing.assert_array_equal(first.latents[number], pool.latents[row])
        np.testing.assert_array_equal(first.text[number], pool.text[row])


def test_the_learning_rate_hits_its_corners():
    recipe = FlowRecipe(steps=1000, learning_rate=0.5, warm_up=50, flat_share=0.6, adam=1.0)
    rate = jax.jit(flow.learning_rate(recipe))
    corners = {0: 0, 25: 0.25, 50: 0.5, 300: 0.5, 600: 0.5, 700: 0.375, 800: 0.25, 1000: 0}
    for step, expected in corners.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), step  # float32 interpolation


@pytest.mark.parametrize("steps", [10, 30, 100, 1000])
def test_the_learning_rate_of_short_runs_stays_in_bounds_and_ends_low(steps):
    recipe = FlowRecipe(steps=steps)
    rates = np.asarray(jax.vmap(flow.learning_rate(recipe))(jnp.arange(steps)))
    assert np.all(rates >= 0) and rates.max() == pytest.approx(recipe.learning_rate)
    assert rates[-1] <= recipe.learning_rate / 4


def test_muon_has_the_matrices_of_the_blocks_and_adam_the_rest():
    """Muon keeps one moment per weight, Adam two."""
    state = jax.eval_shape(partial(flow.init, FlowRecipe(), 0))
    weights, moments = leaf_paths(state.model), leaf_paths(state.optimizer)
    blocks = {name for name in weights if name.split(".")[0] in ("double", "single") and name.endswith(".kernel")}
    counts = {name: sum(path.endswith(f".{name}") for path in moments) for name in weights}
    assert {name for name, count in counts.items() if count == 1} == blocks
    assert {name for name, count in counts.items() if count == 2} == set(weights) - blocks
    assert all(len(weights[name].shape) == 3 for name in blocks)


def test_muons_updates_are_orthogonal_and_adams_all_of_one_size():
    recipe = FlowRecipe(depth_double=1, depth_single=1, heads=1, steps=100, warm_up=1)
    rng = np.random.default_rng(0)
    # A gradient far from orthogonal: one direction a hundred times the others.
    spread = np.geomspace(1, 100, 32).astype(np.float32)
    weights = {
        "double.img.attn.proj.kernel": jnp.zeros((1, 32, 32)),
        "img_in.kernel": jnp.zeros((32, 32)),
    }
    basis = [np.linalg.qr(rng.standard_normal((32, 32)))[0].astype(np.float32) for _ in range(2)]
    gradient = (basis[0] * spread) @ basis[1]
    gradients = {name: jnp.broadcast_to(gradient, leaf.shape) for name, leaf in weights.items()}
    optimizer = flow._optimizer(recipe)

    @jax.jit
    def second_update():
        state = optimizer.update(gradients, optimizer.init(weights), weights)[1]
        return optimizer.update(gradients, state, weights)[0]

    updates = second_update()
    singular = np.linalg.svd(np.asarray(updates["double.img.attn.proj.kernel"][0]), compute_uv=False)
    assert singular[0] / singular[-1] < 2  # Newton and Schulz bring all within 0.7 and 1.2, up to their scale
    sizes = np.abs(updates["img_in.kernel"])
    assert sizes.min() == pytest.approx(sizes.max(), rel=1e-2)  # Adam's epsilon
    # Nesterov's momentum is a little ahead of the rate.
    assert np.median(sizes) == pytest.approx(recipe.adam * recipe.learning_rate, rel=0.25)


def test_the_shape_of_the_transformer_follows_the_recipe():
    config = flow.transformer_config(FlowRecipe(depth_double=3, depth_single=4, heads=2))
    assert (config.depth_double, config.depth_single, config.d_model) == (3, 4, 64)
    assert dataclasses.replace(config, depth_double=2, depth_single=2) == flow.transformer_config(FlowRecipe(heads=2))
    assert sum(config.rope_axes) == config.head_dim
