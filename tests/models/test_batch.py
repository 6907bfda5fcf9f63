"""Many images at once are the images of the pipeline, one by one."""

import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.models.batch import generate_batch
from difffract_jax.models.pipeline import generate
from difffract_jax.models.tiny import random_pipeline
from traces import guided_pipeline

PROMPTS = ("a fox", "", "a lighthouse in fog", "a fox", "two robots")
SEEDS = (3, 4, 5, 6, 3)


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def one_by_one(pipe):
    return np.stack([generate(pipe, prompt, seed=seed).image for prompt, seed in zip(PROMPTS, SEEDS, strict=True)])


def largest_difference(images, expected):
    assert images.shape == expected.shape and images.dtype == np.uint8
    return int(np.max(np.abs(images.astype(int) - expected.astype(int))))


@pytest.mark.parametrize("batch", [2, pytest.param(5, marks=pytest.mark.slow), 128])
def test_a_batch_is_its_images_one_by_one(pipe, one_by_one, batch):
    """Also where the last batch is filled up, and where the only batch is larger than what is asked for."""
    assert largest_difference(generate_batch(pipe, PROMPTS, SEEDS, batch=batch), one_by_one) <= 1
    assert len(np.unique(one_by_one, axis=0)) == len(PROMPTS)


def test_steps_are_those_that_were_asked_for(pipe):
    ours = generate_batch(pipe, PROMPTS[:2], SEEDS[:2], steps=2, batch=2)
    expected = np.stack([generate(pipe, PROMPTS[i], seed=SEEDS[i], run=pipe.plan(steps=2)).image for i in range(2)])
    assert largest_difference(ours, expected) <= 1


def negated(model, inputs, step, grid):
    """A velocity of another sign at the first step."""
    velocity = model(inputs, grid)
    return velocity * (1 - 2 * (step == 0))


def test_the_velocity_is_the_one_that_is_given(pipe, one_by_one):
    other = random_pipeline(seed=1).transformer
    ours = generate_batch(pipe, PROMPTS[:2], SEEDS[:2], params=other, batch=2)
    expected = np.stack([generate(pipe._replace(transformer=other), PROMPTS[i], seed=SEEDS[i]).image for i in range(2)])
    assert largest_difference(ours, expected) <= 1
    assert largest_difference(generate_batch(pipe, PROMPTS[:2], SEEDS[:2], velocity=negated, batch=2), ours) > 1


@pytest.mark.parametrize("scale", [2.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_both_branches_of_many_images_are_those_of_each(scale):
    """The pipeline's own loop makes one image; only a scale above 1 has a negative branch."""
    guided, size = guided_pipeline(), {"height": 16, "width": 16, "text_tokens": 16, "steps": 2}
    negative = "a blurred square" if scale > 1 else None
    run = guided.plan(**size, guidance=scale, negative_prompt=negative)
    found = generate_batch(guided, PROMPTS[:3], SEEDS[:3], run=run, batch=2)
    alone = np.stack([generate(guided, PROMPTS[i], seed=SEEDS[i], run=run).image for i in range(3)])
    assert largest_difference(found, alone) <= 1
    other = generate_batch(guided, PROMPTS[:3], SEEDS[:3], run=guided.plan(**size, guidance=4.0), batch=2)
    assert largest_difference(found, other) > 1


def test_steps_and_a_run_are_not_both_given(pipe):
    with pytest.raises(UserError, match="A run has its steps already, but steps were given too"):
        generate_batch(pipe, PROMPTS[:1], SEEDS[:1], steps=2, run=pipe.plan())


def test_progress_is_told_after_every_batch(pipe):
    told = []
    generate_batch(pipe, PROMPTS, SEEDS, batch=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("seeds", [(), (1,), range(3)])
def test_prompts_without_a_seed_each_are_refused(pipe, seeds):
    with pytest.raises(UserError, match=f"Every prompt needs one seed, but got 2 prompts and {len(seeds)} seeds"):
        generate_batch(pipe, ("a fox", "a robot"), seeds)
