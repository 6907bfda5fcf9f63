"""Guidance by two branches: FLUX.2-klein's base model from a diffusers directory to an image, diffusers the measure."""

import numpy as np
import pytest
import torch

from converters.configurations import pipeline_config
from converters.pipelines import convert_pipeline
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_model
from difffract_jax.loading import load_pipeline
from difffract_jax.models.pipeline import generate, plan_run
from difffract_jax.models.presets import preset_config
from klein import tiny_pipeline
from tolerances import TOL, relative_error

PROMPT = "a red fox at dawn"
GRID = (3, 4)
SIZE = {"height": 24, "width": 32, "text_tokens": 64, "steps": 3}
SCALE = 2.5
DISTILLED = preset_config("flux2-klein").defaults


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("klein") / "base"
    tiny_pipeline(distilled=False).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def pipe(home):
    return convert_pipeline(home)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32)


def theirs(noise, scale, negative=None):
    """diffusers' latents after the last step."""
    pipe, seen = tiny_pipeline(distilled=False), {}
    pipe.set_progress_bar_config(disable=True)

    def keep(pipe, step, t, values):
        seen["latents"] = values["latents"][0].numpy()
        return values

    given = {"max_sequence_length": SIZE["text_tokens"]}
    embeds = None if negative is None else pipe.encode_prompt(prompt=negative, **given)[0]
    pipe(
        prompt=PROMPT,
        latents=torch.tensor(noise).T.reshape(1, 16, *GRID),
        height=SIZE["height"],
        width=SIZE["width"],
        num_inference_steps=SIZE["steps"],
        guidance_scale=scale,
        negative_prompt_embeds=embeds,
        callback_on_step_end=keep,
        output_type="latent",
        **given,
    )
    return seen["latents"]


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "negative"), [(SCALE, "blurred"), (1.0, None)])
def test_latents_are_diffusers(pipe, noise, scale, negative):
    run = pipe.plan(**SIZE, guidance=scale, negative_prompt=negative)
    assert run.branches == (1 if scale == 1 else 2)
    made = generate(pipe, PROMPT, run=run, latents=noise)
    assert relative_error(made.latents, theirs(noise, scale, negative)) <= TOL.f32_run


@pytest.mark.slow
def test_blocks_on_disk_are_read_once_for_both_branches(home, pipe, noise):
    run = pipe.plan(**SIZE, guidance=SCALE)
    there, streamed = (
        generate(one, PROMPT, run=run, latents=noise).latents for one in (pipe, load_pipeline(home, weights="disk"))
    )
    assert relative_error(streamed, there) <= TOL.f32_run


def test_the_directory_says_that_the_model_is_a_base(home, pipe, tmp_path):
    convert_model(home, tmp_path / "ours")
    for config in (pipe.config, pipeline_config(home), load_pipeline(tmp_path / "ours").config):
        assert config.defaults.two_branches and (config.defaults.steps, config.defaults.guidance) == (50, 4.0)
    preset = preset_config("flux2-klein-base").defaults
    assert (preset.two_branches, preset.steps, preset.guidance) == (True, 50, 4.0)
    assert not DISTILLED.two_branches


@pytest.mark.parametrize(
    ("base", "given", "message"),
    [
        (True, {"guidance": 0.5}, "must be at least 1, and finite, but got 0.5; 1 takes the prompt alone, 4 is usual"),
        (True, {"guidance": 1.0, "negative_prompt": "blur"}, "A negative prompt is read by guidance alone"),
        (False, {"negative_prompt": "blur"}, "This model takes no negative prompt, .* leave --negative-prompt out"),
        (False, {"guidance": 4.0}, "takes no guidance scale"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(base, given, message):
    config = preset_config("flux2-klein-base" if base else "flux2-klein")
    with pytest.raises(UserError, match=message) as error:
        plan_run(config, **given)
    assert "\n" not in str(error.value)
