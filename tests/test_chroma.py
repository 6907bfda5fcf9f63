"""Chroma from a diffusers directory to an image: diffusers' own pipeline is the measure.

Its pipeline makes masks of floating point numbers, which PyTorch adds to the scores: padding is not hidden then, its
scores are 1 lower. The model was trained with padding hidden, and the measure is the pipeline with boolean masks.
"""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.numpy import save_file

from changed_copies import changed_copy
from chroma import tiny_pipeline
from converters.chroma import CHROMA_ORIGINAL, NUMBER
from converters.mapping import save_tree
from converters.pipelines import convert_pipeline
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_model
from difffract_jax.directories import ORGANISM
from difffract_jax.loading import load_pipeline
from difffract_jax.models.pipeline import encode, generate, plan_run
from difffract_jax.models.presets import preset_config
from difffract_jax.models.sampler import ChromaSchedulerConfig, sigmas
from difffract_jax.storage.checkpoint import leaf_paths
from tolerances import TOL, relative_error

PROMPT, NEGATIVE, WORDS = "a red fox", "a dog", 20
SIZE = {"height": 24, "width": 32, "text_tokens": WORDS, "steps": 4}
OWN = 11
"""Tokens of the prompt: nine letters and spaces, a space before, and the closing one."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("chroma") / "diffusers"
    tiny_pipeline(use_beta_sigmas=True).save_pretrained(made)
    return made


def noise():
    return np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32)


def run_theirs(pipe, scale):
    """Returns diffusers' pixels of the noise, its embedding of the prompt, and the times it fed."""
    pipe.set_progress_bar_config(disable=True)
    times = []

    def keep(pipe, step, t, values):
        times.append(float(t))
        return values

    with torch.no_grad():
        text, _, mask, negative, _, negative_mask = pipe.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=WORDS)
    given = {
        "prompt_embeds": text,
        "prompt_attention_mask": mask.bool(),
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask.bool(),
    }
    made = pipe(
        **given,
        height=SIZE["height"],
        width=SIZE["width"],
        num_inference_steps=SIZE["steps"],
        guidance_scale=scale,
        latents=torch.tensor(noise())[None],
        output_type="np",
        callback_on_step_end=keep,
    )
    return made.images[0], text[0].numpy(), times


def held_to_theirs(pipe, theirs, scale):
    run = plan_run(pipe.config, **SIZE, guidance=scale, negative_prompt=None if scale == 1 else NEGATIVE)
    pixels, text, times = theirs
    assert np.allclose(run.sigmas[:-1] * 1000, times, rtol=1e-6)
    encoded = encode(pipe, PROMPT, run.text_tokens)
    assert relative_error(encoded.text[: OWN + 1], text[: OWN + 1]) <= TOL.f32_block
    assert not np.any(encoded.text[OWN + 1 :]) and encoded.mask.sum() == OWN
    made = generate(pipe, PROMPT, run=run, latents=noise())
    assert np.max(np.abs(made.image / 255 - pixels)) <= 1 / 255


def test_an_image_is_diffusers(home):
    held_to_theirs(convert_pipeline(home), run_theirs(tiny_pipeline(use_beta_sigmas=True), 5.0), 5.0)


@pytest.mark.slow
def test_a_converted_directory_is_the_one_that_is_converted_in_memory(home, tmp_path):
    made = convert_model(home, tmp_path / "ours")
    ours, theirs = load_pipeline(tmp_path / "ours"), load_pipeline(home, weights="disk")
    assert ours.config == theirs.config
    assert ours.source == theirs.source == made.source
    pairs = zip(leaf_paths(ours.vae).items(), leaf_paths(theirs.vae).items(), strict=True)
    assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)
    run = plan_run(ours.config, **SIZE)
    images = [generate(pipe, PROMPT, run=run, latents=noise()).latents for pipe in (ours, theirs)]
    assert relative_error(*images) <= TOL.f32_run
    held_to_theirs(ours, run_theirs(tiny_pipeline(use_beta_sigmas=True), 1.0), 1.0)


@pytest.mark.parametrize(
    "options", [{}, {"use_beta_sigmas": True}, {"use_dynamic_shifting": True, "use_beta_sigmas": True}, {"shift": 3.0}]
)
def test_the_schedule_is_diffusers(options):
    for steps in (1, 4, 35):
        theirs, config = FlowMatchEulerDiscreteScheduler(**options), ChromaSchedulerConfig(**options)
        mu = config.log_shift(steps, 36) if config.use_dynamic_shifting else None
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        assert np.allclose(sigmas(config, steps, 36), theirs.sigmas.numpy(), rtol=1e-6)


def test_a_prompt_that_fills_the_text_has_nothing_to_hide(home):
    pipe = convert_pipeline(home)
    assert np.all(np.any(np.asarray(encode(pipe, PROMPT, OWN).text) != 0, axis=-1))
    cut = encode(pipe, PROMPT, 6)
    assert cut.cut == "d fox" and cut.mask.all() and np.all(np.any(np.asarray(cut.text) != 0, axis=-1))
    empty = np.any(np.asarray(encode(pipe, "", 6).text) != 0, axis=-1)
    assert empty.tolist() == [True, True, False, False, False, False]
    assert jnp.all(pipe.tokenizers.encode(PROMPT, 12).t5_ids[OWN:] == 0)
    assert pipe.tokenizers.pieces(np.array([3, 4, 1, 0], np.int32)) == ["\u2581", "a", "</s>", "<pad>"]


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "ChromaImg2ImgPipeline"}, "is a ChromaImg2ImgPipeline, .*did you"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "CLIPTextModel instead of T5Encoder"),
        ("text_encoder/config.json", {"d_model": 64}, "joint_attention_dim is 24, but T5's d_model is 64"),
        ("text_encoder/config.json", {"pad_token_id": None}, "pad_token_id=None, but a whole number is needed"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds=True"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(home, tmp_path, file, values, message):
    with pytest.raises(UserError, match=message) as error:
        convert_pipeline(changed_copy(home, tmp_path, file, **values))
    assert "\n" not in str(error.value)


def test_a_part_that_is_missing_is_named(home, tmp_path):
    copy = shutil.copytree(home, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(UserError, match="lacks text_encoder; copy these folders, .*lodestones/Chroma1-HD.*--base"):
        load_pipeline(copy)
    pipe = load_pipeline(home)
    assert repr(pipe).startswith("Chroma pipeline") and "T5 encoder" in repr(pipe)


@pytest.fixture(scope="module")
def single_file(home, tmp_path_factory):
    """The transformer in the original release's layout, beside a base with neither its weights nor a scheduler."""
    folder = tmp_path_factory.mktemp("single")
    shutil.copytree(home, folder / "base", ignore=shutil.ignore_patterns("scheduler", "diffusion_pytorch_model*"))
    shutil.copytree(home / "vae", folder / "base" / "vae", dirs_exist_ok=True)
    tensors = save_tree(load_pipeline(home).transformer, CHROMA_ORIGINAL)
    tensors = {f"model.diffusion_model.{key}": value for key, value in tensors if not key.endswith(NUMBER)}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "chroma.safetensors")
    return folder / "chroma.safetensors"


def test_a_single_file_and_a_base_are_the_pipeline(home, single_file, tmp_path):
    whole, base = load_pipeline(home), single_file.parent / "base"
    for given in (single_file, home / "transformer"):
        for weights in ("device", "disk"):
            completed = load_pipeline(given, base=base, weights=weights)
            assert completed.source == whole.source and completed.config == whole.config
    made = convert_model(single_file, tmp_path / "ours", base=base)
    assert made.source == whole.source and load_pipeline(tmp_path / "ours").config == whole.config


def test_a_single_file_is_converted_alone_too(home, single_file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="heads of 16 dimensions, which the axes .* pass --base with a diffusers dir"):
        convert_model(single_file, tmp_path / "alone")
    monkeypatch.setattr("converters.alone.ROPE_AXES", load_pipeline(home).config.transformer.rope_axes)
    made = convert_model(single_file, tmp_path / "alone")
    assert made.config == load_pipeline(home).config.transformer and [*made.parameters] == ["transformer"]


def test_a_transformer_alone_is_said_to_need_a_base_of_its_own_kind(home, single_file, tmp_path):
    alone = shutil.copytree(home / "transformer", tmp_path / "alone")
    for given in (alone, single_file):
        with pytest.raises(UserError, match="is a transformer alone; name a diffusers directory with .*--base DIR"):
            load_pipeline(given)
        with pytest.raises(UserError, match="a transformer of Chroma, but the base .* is a pipeline of FLUX.1; "):
            load_pipeline(given, base="organism")
    with pytest.raises(UserError, match="a transformer of FLUX.1, but the base .* is a pipeline of Chroma; give"):
        load_pipeline(ORGANISM / "transformer", base=home)


def test_the_preset_has_the_published_sizes():
    config = preset_config("chroma1-hd")
    shape = config.transformer
    assert (shape.d_model, shape.layout.depth, shape.modulation_rows) == (3072, 57, 344)
    assert (plan_run(config).branch_scale, config.defaults.steps, config.defaults.text_tokens) == (5.0, 35, 512)
