"""The image of a graph's run is the one that `generate` makes, and a step's prediction is z - sigma v."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.dashboards.run_images import run_images
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.models.pipeline import decode_latents, encode, generate, initial_noise, step_inputs
from difffract_jax.models.tiny import random_pipeline


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()._replace(source="m")


@pytest.fixture(scope="module")
def run(pipe):
    plan = pipe.plan(steps=3)
    return TraceInfo(
        prompt="a red fox",
        cut="",
        seed=7,
        step=1,
        sigmas=tuple(map(float, plan.sigmas)),
        grid=plan.grid,
        text_tokens=plan.text_tokens,
        tokens=(),
        guidance=plan.guidance,
        recorded=(),
        layout=pipe.config.transformer.layout,
        include_padding=False,
        latents_given=False,
        model="m",
    )


def test_the_finished_image_is_that_of_generate(pipe, run):
    seen = []
    images = run_images(pipe, run, (0, 2), lambda done, of: seen.append((done, of)))
    assert images.shape[0] == 3 and seen == [(1, 3), (2, 3), (3, 3)]
    same = generate(pipe, run.prompt, seed=run.seed, run=pipe.plan(steps=3)).image
    # Rounding to whole colours may differ by one where programs are compiled apart.
    assert np.abs(images[0].astype(int) - same.astype(int)).max() <= 1
    assert np.abs(images[2].astype(int) - same.astype(int)).max() <= 1  # the last step ends where it predicts


def test_a_step_s_image_is_the_clean_one_that_its_velocity_predicts(pipe, run):
    plan, prompt = pipe.plan(steps=3), encode(pipe, run.prompt, run.text_tokens)
    latents = initial_noise(pipe, plan, run.seed)
    velocity = pipe.transformer(step_inputs(plan, prompt, latents, 0), plan.grid)
    clean = decode_latents(pipe, latents - jnp.asarray(plan.sigmas[0]) * velocity, plan.grid)
    assert np.abs(run_images(pipe, run, (0,))[1].astype(int) - clean.astype(int)).max() <= 1


def test_another_model_and_given_noise_are_refused(pipe, run):
    with pytest.raises(UserError, match="traced in another model: its content hash is m"):
        run_images(pipe._replace(source="n"), run, ())
    with pytest.raises(UserError, match="cannot be made again"):
        run_images(pipe, replace(run, latents_given=True), ())
