"""Training from nothing to a pipeline: interrupted and resumed at any moment, it ends as if it had not been.

The laws of `fit` are tested on a stage of three numbers; the whole training once, with an interruption in every stage.
"""

import itertools
import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.models.pipeline import generate
from difffract_jax.organism.train import (
    DATA_SEED,
    KEY_SEED,
    LOG_EVERY,
    LONGEST_GAP,
    POOL_SEED,
    SCALE_SEED,
    Stage,
    _seed,
    fit,
    minutes_taken,
    train,
)
from difffract_jax.storage.checkpoint import leaf_paths, load_tree, read_config

STEPS = 9


class Toy(NamedTuple):
    """State of the toy stage."""

    weights: jax.Array
    step: jax.Array


def toy_stage(bad_step=None, interrupted_within=None):
    """A stage that depends on data, key and state; at `bad_step` its loss is not finite."""

    @partial(jax.jit, donate_argnums=0)
    def compiled(state, data, key):
        weights = 0.9 * state.weights + data + jax.random.normal(key, (3,))
        return Toy(weights, state.step + 1), {"loss": jnp.sum(weights)}

    def step(state, data, key):
        new = compiled(state, data, key)
        if interrupted_within is not None and new[0].step == interrupted_within:
            raise KeyboardInterrupt
        return new

    def batch(number):
        return np.full(3, np.nan if number == bad_step else number, np.float32)

    return Stage("toy", STEPS, lambda: Toy(jnp.zeros(3), jnp.zeros((), jnp.int32)), batch, step, jax.random.key(1))


def nothing(*_):
    """Reports nothing."""


def interrupt_at(stage, step):
    """A progress that is interrupted after a step."""

    def report(name, done, total, loss):
        if (name, done) == (stage, step):
            raise KeyboardInterrupt

    return report


def assert_same_weights(ours, expected):
    ours, expected = leaf_paths(ours), leaf_paths(expected)
    assert ours.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def parts(pipe):
    return {name: getattr(pipe, name) for name in ("transformer", "t5", "clip", "vae")}


def run_interrupted(recipe, directory, stage, step):
    with pytest.raises(KeyboardInterrupt):
        train(recipe, directory, resume=True, progress=interrupt_at(stage, step))


@pytest.fixture
def expected(tmp_path):
    """Final state of the toy stage without interruption."""
    (tmp_path / "whole").mkdir()
    return fit(toy_stage(), tmp_path / "whole", 4, nothing)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("save_every", [2, 100])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_stage_that_is_interrupted_after_any_step_loses_nothing(home, expected, step, save_every):
    with pytest.raises(KeyboardInterrupt):
        fit(toy_stage(), home, save_every, interrupt_at("toy", step))
    assert read_config(home / "toy")["step"] == step
    steps = []
    result = fit(toy_stage(), home, save_every, lambda _, done, *rest: steps.append(done))
    assert steps == list(range(step + 1, STEPS + 1))
    assert_same_weights(result, expected)


@pytest.mark.parametrize(("step", "kept"), [(1, None), (4, 3), (5, 3), (9, 6)])
def test_a_stage_that_is_interrupted_within_a_step_goes_on_from_its_last_checkpoint(home, expected, step, kept):
    """The step has given its state away by then."""
    with pytest.raises(KeyboardInterrupt):
        fit(toy_stage(interrupted_within=step), home, 3, nothing)
    assert (read_config(home / "toy")["step"] if kept else (home / "toy").exists()) == (kept or False)
    assert_same_weights(fit(toy_stage(), home, 3, nothing), expected)


def test_a_finished_stage_is_loaded_and_takes_no_step(home, expected):
    fit(toy_stage(), home, 100, nothing)
    assert_same_weights(fit(toy_stage(), home, 100, interrupt_at("toy", STEPS)), expected)


def test_an_update_that_is_not_finite_is_not_saved(home):
    """The loss is of the state before the step, so it looks well while the state has gone."""
    stage = toy_stage(bad_step=3)
    careless = stage._replace(step=lambda *given: (stage.step(*given)[0], {"loss": jnp.zeros(())}))
    with pytest.raises(UserError, match="not finite at step 3; .* keeps the last good checkpoint"):
        fit(careless, home, 2, nothing)
    assert read_config(home / "toy")["step"] == 2


def test_a_loss_that_is_not_finite_ends_the_stage_and_keeps_its_last_checkpoint(home, tmp_path):
    with pytest.raises(UserError) as caught:
        fit(toy_stage(bad_step=5), home, 2, nothing)
    assert str(caught.value) == (
        f"The loss of stage toy is not finite at step 5; {home / 'toy'} keeps the last good checkpoint. "
        "Lower the learning rate of that stage."
    )
    assert read_config(home / "toy")["step"] == 4
    (tmp_path / "good").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fit(toy_stage(), tmp_path / "good", 100, interrupt_at("toy", 4))
    abstract = jax.eval_shape(toy_stage().init)
    assert_same_weights(load_tree(home / "toy", abstract), load_tree(tmp_path / "good" / "toy", abstract))


def test_metrics_are_logged_every_so_often_and_at_the_end(home):
    steps = 2 * LOG_EVERY + 3
    fit(toy_stage()._replace(steps=steps), home, 1000, nothing)
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("toy", step) for step in (LOG_EVERY, 2 * LOG_EVERY, steps)
    ]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_the_result_is_a_pipeline_that_draws(trained, recipe):
    pipe = trained.pipeline
    image = generate(pipe, "A red circle left of a lemon.").image
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8
    assert pipe.config.vae == pipe.vae.config and pipe.config.vae.scaling_factor != 1
    assert pipe.config.transformer == pipe.transformer.config
    assert pipe.config.transformer.depth_double == recipe.flow.depth_double


def test_the_directory_tells_recipe_metrics_and_how_far_each_stage_is(trained, recipe):
    assert json.loads((trained.directory / "recipe.json").read_text()) == recipe.model_dump(mode="json")
    steps = {"text": recipe.text.steps, "images": recipe.images.steps, "flow": recipe.flow.steps}
    assert {stage: read_config(trained.directory / stage)["step"] for stage in steps} == steps
    lines = [json.loads(line) for line in (trained.directory / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"]: line["step"] for line in lines} == steps


def test_every_step_is_traced_once(trained, stages):
    assert stages.traces == {"text": 1, "images": 1, "flow": 1}


@pytest.mark.slow
def test_a_training_that_is_interrupted_in_every_stage_ends_with_the_very_same_weights(trained, recipe, tmp_path):
    run_interrupted(recipe, tmp_path / "run", "text", 7)
    run_interrupted(recipe, tmp_path / "run", "images", 3)
    run_interrupted(recipe, tmp_path / "run", "pool", 16)
    run_interrupted(recipe, tmp_path / "run", "flow", 8)
    told = []
    pipe = train(
        recipe, tmp_path / "run", resume=True, progress=lambda stage, done, total, loss: told.append((stage, done))
    )
    # Finished stages take no step, the last one goes on where it was.
    assert [entry for entry in told if entry[0] != "pool"] == [
        ("flow", step) for step in range(9, recipe.flow.steps + 1)
    ]
    assert_same_weights(parts(pipe), parts(trained.pipeline))
    assert pipe.config == trained.pipeline.config


def test_a_finished_run_is_loaded_without_a_step_or_a_pool(trained, recipe):
    told = []
    pipe = train(recipe, trained.directory, resume=True, progress=lambda *what: told.append(what))
    assert not told
    assert_same_weights(parts(pipe), parts(trained.pipeline))


def test_the_minutes_of_a_run_leave_out_interruptions_and_what_lies_between_stages(tmp_path):
    times = [("text", 0), ("text", 30), ("text", 30 + 2 * LONGEST_GAP), ("images", 400), ("images", 490), ("flow", 499)]
    lines = [json.dumps({"stage": stage, "step": 1, "time": 1e9 + time}) for stage, time in times]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert minutes_taken(tmp_path) == pytest.approx(2)


def test_every_stream_of_randomness_has_a_seed_of_its_own(recipe):
    recipes = (recipe, recipe.model_copy(update={"seed": 1}))
    streams = list(itertools.product(recipes, range(3), (SCALE_SEED, POOL_SEED, DATA_SEED, KEY_SEED)))
    assert len({_seed(*stream) for stream in streams}) == len(streams) == 24


def test_a_second_run_in_the_same_directory_is_refused(trained, recipe):
    before = sorted(trained.directory.rglob("*"))
    with pytest.raises(UserError, match="holds a run already; add --resume to go on with it"):
        train(recipe, trained.directory)
    assert sorted(trained.directory.rglob("*")) == before


def test_resuming_with_another_recipe_names_what_changed(trained, recipe):
    changed = recipe.model_copy(
        update={
            "seed": 1,
            "flow": recipe.flow.model_copy(update={"steps": 13, "heads": 2}),
            "images": recipe.images.model_copy(update={"kl": 0.5}),
        }
    )
    with pytest.raises(UserError) as caught:
        train(changed, trained.directory, resume=True)
    assert "started with other values of seed, images.kl, flow.heads, flow.steps; resume it with the same" in str(
        caught.value
    )


def test_a_directory_with_other_files_is_refused_and_left_alone(recipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="holds other files; give a new directory for the run"):
            train(recipe, tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
