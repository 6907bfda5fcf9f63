"""Z-Image from a diffusers directory to an image: diffusers' own pipeline is the measure."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zimage import GRID, draw_text, run_pipeline, run_theirs, tiny_pipeline, tiny_transformer

from changed_copies import changed_copy
from converters.pipelines import convert_pipeline, convert_transformer
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_model
from difffract_jax.loading import load_pipeline
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import encode, generate, plan_run
from difffract_jax.models.presets import preset_config
from difffract_jax.storage.checkpoint import leaf_paths
from tolerances import TOL, relative_error

PROMPT = "a red fox"
SIZE = {"height": 32, "width": 64, "text_tokens": 64, "steps": 4}
OWN = 28
"""Tokens of the prompt: its nine bytes and the template's, without an end of thinking."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("zimage") / "diffusers"
    tiny_pipeline().save_pretrained(made)
    return made


def noise():
    return np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)


def held_to_theirs(pipe, theirs):
    run = plan_run(pipe.config, **SIZE)
    pixels, latents, times = run_pipeline(theirs, PROMPT, noise())
    assert np.allclose(run.sigmas[:-1], times, rtol=1e-6)
    (states,), _ = theirs.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=64)
    encoded = encode(pipe, PROMPT, run.text_tokens)
    assert encoded.mask.sum() == OWN == len(states)
    states = states.detach().numpy()
    normed = states / np.sqrt(np.mean(np.square(states), axis=1, keepdims=True) + 1e-5)
    assert relative_error(encoded.text[:OWN, :-1], normed) <= TOL.f32_block
    assert np.array_equal(np.flatnonzero(encoded.text[:, -1]), range(OWN, 32)) and not np.any(encoded.text[32:])
    made = generate(pipe, PROMPT, run=run, latents=noise())
    levels = np.max(np.abs(made.image.astype(int) - np.round(255 * pixels).astype(int)))
    error = relative_error(made.latents, latents)
    print(f"latents {error:.1e}, {levels} grey levels")
    assert error <= TOL.f32_run and levels <= 1


def test_an_image_is_diffusers(home):
    held_to_theirs(convert_pipeline(home), tiny_pipeline())


@pytest.mark.slow
def test_a_converted_directory_is_the_one_that_is_converted_in_memory_with_a_head_too(tmp_path):
    tiny_pipeline(headed=True).save_pretrained(tmp_path / "theirs")
    made = convert_model(tmp_path / "theirs", tmp_path / "ours")
    ours, theirs = load_pipeline(tmp_path / "ours"), load_pipeline(tmp_path / "theirs", weights="disk")
    assert ours.config == theirs.config and ours.source == theirs.source == made.source
    pairs = zip(leaf_paths(ours.vae).items(), leaf_paths(theirs.vae).items(), strict=True)
    assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)
    images = [generate(pipe, PROMPT, run=plan_run(ours.config, **SIZE), latents=noise()) for pipe in (ours, theirs)]
    assert relative_error(*(image.latents for image in images)) <= TOL.f32_run
    held_to_theirs(ours, tiny_pipeline())


@pytest.mark.parametrize(
    "own", [pytest.param(20, marks=pytest.mark.slow), pytest.param(32, marks=pytest.mark.slow), 40]
)
def test_a_velocity_is_diffusers_however_far_the_text_is_filled_up(tmp_path, own):
    theirs, rng = tiny_transformer(), np.random.default_rng(own)
    theirs.save_pretrained(tmp_path / "transformer")
    model, config = convert_transformer(tmp_path / "transformer")
    text = draw_text(rng, 96, config.text_width, own)
    inputs = Inputs(jnp.asarray(noise()), jnp.asarray(text), jnp.zeros(0), jnp.float32(0.3))
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(type(model).__call__, static_argnums=2)(model, inputs, GRID)
    assert relative_error(ours, run_theirs(theirs, noise(), text, 0.3, GRID)) <= TOL.f32_run


def test_what_a_run_cannot_have_is_one_sentence(home):
    config = convert_pipeline(home).config
    for given, message in (
        ({"guidance": 5.0}, "takes no guidance scale"),
        ({"negative_prompt": "a dog"}, "takes no negative prompt"),
        ({"text_tokens": 40}, "multiples of 32 tokens, but text_tokens is 40; take 32"),
        ({"height": 40, "width": 40}, "images of multiples of 32 tokens, .* the next width that fits is 256"),
    ):
        with pytest.raises(UserError, match=message) as error:
            plan_run(config, **SIZE | given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "ZImageOmniPipeline"}, "is a ZImageOmniPipeline, .*did you"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel instead of Qwen3M"),
        ("text_encoder/config.json", {"hidden_size": 64}, "cap_feat_dim is 16, but Qwen3's hidden_size is 64"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "must have more than 1"),
        ("transformer/config.json", {"qk_norm": False}, "qk_norm=False"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas=True"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(home, tmp_path, file, values, message):
    with pytest.raises(UserError, match=message) as error:
        convert_pipeline(changed_copy(home, tmp_path, file, **values))
    assert "\n" not in str(error.value)


def test_a_transformer_alone_is_no_pipeline_and_a_single_file_no_transformer(home, tmp_path):
    alone = shutil.copytree(home / "transformer", tmp_path / "alone")
    with pytest.raises(UserError, match="is Z-Image's transformer alone, which --base cannot complete"):
        load_pipeline(alone)
    file = shutil.copyfile(next(alone.glob("*.safetensors")), tmp_path / "zimage.safetensors")
    with pytest.raises(UserError, match="is a Z-Image transformer in one file, but Z-Image is read from diffusers'"):
        load_pipeline(file)


def test_the_preset_has_the_published_sizes():
    config = preset_config("z-image-turbo")
    shape = config.transformer
    assert (shape.d_model, shape.d_ff, shape.layout.depth, config.t5.layers) == (3840, 10240, 34, 35)
    run = plan_run(config)
    assert (run.branches, run.guidance, run.steps, run.tokens.img) == (1, None, 8, 4096)
