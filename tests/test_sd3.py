"""Stable Diffusion 3 from a diffusers directory to an image: diffusers' own pipeline is the measure."""

import dataclasses
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.numpy import save_file

from changed_copies import changed_copy
from converters.mapping import save_tree
from converters.pipelines import convert_pipeline
from converters.sd3 import SD3_RELEASE, sd3_labels
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_model
from difffract_jax.directories import ORGANISM
from difffract_jax.loading import described_pipeline, load_pipeline
from difffract_jax.models.pipeline import encode, generate, plan_run
from difffract_jax.models.presets import preset_config
from difffract_jax.models.sampler import Sd3SchedulerConfig, sigmas, unpack
from difffract_jax.models.sd3_text import NoText
from difffract_jax.storage.checkpoint import leaf_paths
from sd3 import CLIP_LENGTH, tiny_pipeline
from tolerances import TOL, relative_error

PROMPT = "a red fox"
GRID, T5_TOKENS = (3, 4), 20
SIZE = {"height": 24, "width": 32, "text_tokens": CLIP_LENGTH + T5_TOKENS, "steps": 4}
NEGATIVE = "a dog"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("sd3") / "diffusers"
    tiny_pipeline("sd3.5-medium").save_pretrained(made)
    return made


def noise():
    return np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32)


def run_theirs(pipe, scale=1.0):
    """Returns diffusers' pixels of the noise, its embeddings, and the times it fed."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.tensor(np.array(unpack(jnp.asarray(noise()), GRID)).transpose(2, 0, 1))[None]
    times = []

    def keep(pipe, step, t, values):
        times.append(float(t))
        return values

    sizes = {"height": SIZE["height"], "width": SIZE["width"], "num_inference_steps": SIZE["steps"]}
    given = {
        "latents": latents,
        "guidance_scale": scale,
        "negative_prompt": NEGATIVE,
        "max_sequence_length": T5_TOKENS,
        "output_type": "np",
    }
    pixels = pipe(prompt=PROMPT, callback_on_step_end=keep, **sizes, **given).images[0]
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(
            PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
    return pixels, text[0].numpy(), pooled[0].numpy(), times


def held_to_theirs(pipe, theirs, scale=1.0):
    negative = None if scale == 1 else NEGATIVE
    run = plan_run(pipe.config, **SIZE, guidance=scale, negative_prompt=negative)
    pixels, text, pooled, times = theirs
    assert np.allclose(run.sigmas[:-1] * 1000, times, rtol=1e-6)
    encoded = encode(pipe, PROMPT, run.text_tokens)
    assert relative_error(encoded.text, text) <= TOL.f32_block
    assert relative_error(encoded.pooled, pooled) <= TOL.f32_block
    made = generate(pipe, PROMPT, run=run, latents=noise())
    assert np.max(np.abs(made.image / 255 - pixels)) <= 1 / 255
    return encoded


def test_an_image_is_diffusers(home):
    pipe = convert_pipeline(home)
    encoded = held_to_theirs(pipe, run_theirs(tiny_pipeline("sd3.5-medium"), 4.5), 4.5)
    # 9 letters and spaces: seven letters between start and end for CLIP, and for T5 spaces count.
    assert (encoded.mask[:CLIP_LENGTH].sum(), encoded.mask[CLIP_LENGTH:].sum()) == (9, 11)


@pytest.mark.slow
def test_without_t5_zeros_stand_for_its_states(tmp_path):
    theirs = tiny_pipeline("sd3-medium", t5=False)
    theirs.save_pretrained(tmp_path / "diffusers")
    convert_model(tmp_path / "diffusers", tmp_path / "ours")
    pipe = load_pipeline(tmp_path / "ours")
    assert isinstance(pipe.t5, NoText) and pipe.tokenizers.t5 is None
    encoded = held_to_theirs(pipe, run_theirs(theirs))
    assert not np.any(encoded.text[CLIP_LENGTH:]) and not np.any(encoded.mask[CLIP_LENGTH:])
    pieces = pipe.tokenizers.pieces(np.array([53, 27, 18, 5, *[54] * 8, 0, 0], np.int32))
    assert pieces == ["<|startoftext|>", "\u2581a", "\u2581r", "e", "<|endoftext|>", *["<pad>"] * 9]


@pytest.mark.slow
def test_a_converted_directory_is_the_one_that_is_converted_in_memory(home, tmp_path):
    made = convert_model(home, tmp_path / "ours")
    ours, theirs = load_pipeline(tmp_path / "ours"), load_pipeline(home, weights="disk")
    assert ours.config == theirs.config
    assert ours.source == theirs.source == made.source
    for name in ("clip", "vae"):
        pairs = zip(leaf_paths(getattr(ours, name)).items(), leaf_paths(getattr(theirs, name)).items(), strict=True)
        assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)
    run = plan_run(ours.config, **SIZE)
    images = [generate(pipe, PROMPT, run=run, latents=noise()).latents for pipe in (ours, theirs)]
    assert relative_error(*images) <= TOL.f32_run


REPOSITORY = "stabilityai/stable-diffusion-3.5-medium"


def test_a_gated_repository_is_explained_step_by_step(hub, home):
    hub.add_folder(REPOSITORY, home, gated=True)
    told = rf"{REPOSITORY} is gated, and access was refused: \(1\) sign in and accept its licence at .*{REPOSITORY}"
    for name in (f"hf:{REPOSITORY}", REPOSITORY):
        with pytest.raises(UserError, match=told):
            load_pipeline(name)
    with pytest.raises(UserError, match=told):
        load_pipeline(home / "transformer", base=f"hf:{REPOSITORY}")


@pytest.mark.slow
def test_a_repository_and_a_single_file_in_it_are_what_they_are_here(hub, home, tmp_path):
    pipe = load_pipeline(home)
    single_file(pipe, tmp_path / "x.safetensors", **BESIDE)
    files = {path.relative_to(home).as_posix(): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    hub.add(REPOSITORY, files | {"sd3.5_medium_incl_clips.safetensors": (tmp_path / "x.safetensors").read_bytes()})
    there = load_pipeline(f"hf:{REPOSITORY}")
    same(there, pipe)
    assert there.source == pipe.source and "sd3.5_medium_incl_clips.safetensors" not in hub.downloaded
    same(load_pipeline(f"hf:{REPOSITORY}/sd3.5_medium_incl_clips.safetensors", base=f"hf:{REPOSITORY}"), pipe)


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"shift": 3.0, "use_beta_sigmas": True}], ids=["as it is", "beta"])
@pytest.mark.parametrize("steps", [4, 28])
def test_the_schedule_is_diffusers(steps, options):
    theirs = FlowMatchEulerDiscreteScheduler(**options)
    theirs.set_timesteps(steps)
    assert np.allclose(sigmas(Sd3SchedulerConfig(**options), steps, 36), theirs.sigmas.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline"},
            "is a StableDiffusionPipeline, .*did you",
        ),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "CLIPTextModel instead of CLIPTextM"),
        ("text_encoder_3/config.json", {"d_model": 64}, "joint_attention_dim is 48, but T5's d_model is 64"),
        ("text_encoder/config.json", {"projection_dim": 12}, "pooled_projection_dim is 24, but both CLIPs' is 26"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas=True"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(home, tmp_path, file, values, message):
    with pytest.raises(UserError, match=message) as error:
        convert_pipeline(changed_copy(home, tmp_path, file, **values))
    assert "\n" not in str(error.value)


def test_a_part_that_is_missing_is_named_and_a_base_gives_it(home, tmp_path):
    copy = shutil.copytree(home, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UserError, match="lacks text_encoder_2; copy these folders, .*3.5-medium.*, with --base"):
        load_pipeline(copy)
    same(load_pipeline(copy, base=home), load_pipeline(home))


def same(one, other):
    """Two pipelines have one configuration and the same weights."""
    assert one.config == other.config
    for name in ("transformer", "t5", "clip", "vae"):
        pairs = zip(*(leaf_paths(getattr(pipe, name)).items() for pipe in (one, other)), strict=True)
        assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs), name


def single_file(pipe, path, prefix="model.diffusion_model.", **others):
    """Writes a pipeline's transformer in the original release's layout, and other parts beside it."""
    tensors = save_tree(pipe.transformer, SD3_RELEASE, sd3_labels(pipe.config.transformer))
    save_file({f"{prefix}{key}": np.ascontiguousarray(one) for key, one in tensors} | others, path)
    return path


BESIDE = {
    "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight": np.ones((77, 8), np.float32),
    "text_encoders.t5xxl.transformer.shared.weight": np.ones((4, 4), ml_dtypes.bfloat16),
    "first_stage_model.decoder.conv_in.weight": np.ones((8, 4, 3, 3), np.float32),
    "first_stage_model.decoder.mid.block_1.conv1.weight": np.ones((8, 8, 3, 3), np.float32),
}
"""Some of what files with text encoders and an autoencoder hold."""


@pytest.mark.parametrize("beside", [{}, BESIDE], ids=["alone", "with encoders"])
def test_the_original_release_s_single_file_is_completed_by_a_base(home, tmp_path, caplog, beside):
    pipe = load_pipeline(home)
    file = single_file(pipe, tmp_path / "sd3.safetensors", **beside)
    base = shutil.copytree(home, tmp_path / "base", ignore=shutil.ignore_patterns("transformer", "scheduler"))
    with caplog.at_level("INFO", "converters"):
        completed = load_pipeline(file, base=base)
    # Without a transformer's configuration and a scheduler the releases' sizes are taken, and their shift.
    defaults = dataclasses.replace(completed.config.defaults, height=1, width=1)
    assert completed.config.defaults.height == 128 * 4 and completed.config.scheduler.shift == 3.0
    same(
        completed._replace(config=dataclasses.replace(completed.config, defaults=defaults)),
        pipe._replace(config=dataclasses.replace(pipe.config, defaults=defaults)),
    )
    assert completed.config == described_pipeline(file, base=base)
    told = [one for one in caplog.messages if "left aside (first_stage_model, text_encoders)" in one]
    assert bool(told) == bool(beside)


@pytest.mark.slow
def test_a_single_file_is_converted_with_a_base_and_alone(home, tmp_path):
    pipe = load_pipeline(home)
    file = single_file(pipe, tmp_path / "sd3.safetensors", prefix="")
    convert_model(file, tmp_path / "whole", base=home)
    same(load_pipeline(tmp_path / "whole"), pipe)
    alone = convert_model(file, tmp_path / "alone")
    assert alone.config == pipe.config.transformer
    folder = convert_model(home / "transformer", tmp_path / "folder")
    assert folder.source == alone.source


@pytest.mark.slow
def test_heads_that_no_tensor_tells_are_those_of_the_base_or_of_the_releases(tmp_path):
    tiny_pipeline("sd3-medium").save_pretrained(tmp_path / "diffusers")
    pipe = load_pipeline(tmp_path / "diffusers")
    file = single_file(pipe, tmp_path / "sd3.safetensors")
    same(load_pipeline(file, base=tmp_path / "diffusers"), pipe)
    shutil.rmtree(tmp_path / "diffusers" / "transformer")
    with pytest.raises(UserError, match="a width of 32, which heads of 64 do not divide"):
        load_pipeline(file, base=tmp_path / "diffusers")


def test_a_base_of_another_model_is_refused_with_both_named(home, tmp_path):
    with pytest.raises(UserError, match="a transformer of Stable Diffusion 3, but the base .* is a pipeline of FLUX.1"):
        load_pipeline(home / "transformer", base="organism")
    with pytest.raises(UserError, match="a transformer of FLUX.1, but the base .* is a pipeline of Stable Diffusion 3"):
        load_pipeline(ORGANISM / "transformer", base=home)
    with pytest.raises(UserError, match="is a transformer alone; name a diffusers directory with the other parts"):
        load_pipeline(shutil.copytree(home / "transformer", tmp_path / "alone"))


def test_a_text_without_room_for_t5_is_one_sentence(home):
    pipe = load_pipeline(home)
    with pytest.raises(UserError, match="text_tokens must be above 12, as many as CLIP gives, but got 12; 268 leave"):
        encode(pipe, PROMPT, 12)


def test_presets_have_the_published_sizes():
    sizes = {name: preset_config(name) for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large")}
    assert [one.transformer.d_model for one in sizes.values()] == [1536, 1536, 2432]
    assert [one.transformer.layout.depth for one in sizes.values()] == [24, 24, 38]
    assert [plan_run(one).branch_scale for one in sizes.values()] == [7.0, 4.5, 3.5]
    assert {(one.clip.d_model, one.defaults.text_tokens, one.vae.factor) for one in sizes.values()} == {(2048, 333, 8)}
    # SD3.5-large-turbo, which has SD3.5-large's shape, as its card says that it is run.
    turbo = plan_run(sizes["sd3.5-large"], steps=4, guidance=1.0)
    assert (turbo.steps, turbo.branches, turbo.fed_guidance) == (4, 1, None)
    with pytest.raises(UserError, match="must be at least 1, and finite, but got 0.0; 1 takes the prompt alone"):
        plan_run(sizes["sd3.5-large"], steps=4, guidance=0.0)
