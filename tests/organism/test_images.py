"""The autoencoder trains on scenes of all numbers of objects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.organism import images
from difffract_jax.organism.recipe import ImageRecipe
from difffract_jax.organism.render import SIDE
from difffract_jax.organism.scorer import read_scenes


@pytest.fixture(scope="module")
def metrics(stages):
    """Metrics of a few steps on the same images with the same noise."""
    state, data, measured = stages.images.init(), stages.images.batch(0), []
    for _ in range(stages.images.steps):
        state, step = stages.images.step(state, data, stages.images.key)
        measured.append({name: float(value) for name, value in step.items()})
    assert int(state.step) == stages.images.steps
    return measured


def test_a_few_steps_lower_the_loss_on_fixed_images(metrics):
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert metrics[-1]["mse"] < 0.9 * metrics[0]["mse"]


def test_the_loss_adds_up(metrics, recipe):
    for step in metrics:
        absolute = step["loss"] - step["mse"] - recipe.images.kl * step["kl"]
        # The mean absolute error lies between the mean square over the largest error, and its root.
        assert step["mse"] / 4 < absolute <= np.sqrt(step["mse"])


def test_the_parts_of_the_loss_are_those_of_an_autoencoder_that_knows_nothing(organism):
    """Without weights everything is encoded as a standard normal and decoded as mid grey."""
    vae = jax.tree.map(jnp.zeros_like, organism.vae)
    image = jnp.full((SIDE, SIDE, 3), 0.5)
    absolute, squared, divergence = jax.jit(images._losses)(vae, image, jax.random.key(0))
    assert (float(absolute), float(squared), float(divergence)) == (0.5, 0.25, 0)


def test_a_step_has_its_own_images_of_one_to_three_objects():
    recipe = ImageRecipe(batch=32)
    first, again, other = (images.batch(recipe, 4, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (32, SIDE, SIDE, 3) and first.min() < 0 and abs(first).max() <= 1
    assert set(read_scenes((first + 1) / 2).count) == {1, 2, 3}


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_the_shortest_runs_have_a_schedule_too(steps):
    weights = np.ones(3, np.float32)
    optimizer = images._optimizer(ImageRecipe(steps=steps))
    assert np.all(np.isfinite(optimizer.update(weights, optimizer.init(weights))[0]))
