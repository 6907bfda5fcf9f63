"""FLUX.2-klein from a diffusers directory to an image: diffusers' own pipeline is the measure."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from changed_copies import changed_copy
from converters.configurations import pipeline_config
from converters.flux2 import FLUX2_SINGLE_FILE
from converters.mapping import save_tree
from converters.pipelines import convert_pipeline
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_model
from difffract_jax.directories import ORGANISM
from difffract_jax.loading import load_pipeline
from difffract_jax.models.pipeline import encode, generate, plan_run
from difffract_jax.models.presets import preset_config
from difffract_jax.models.sampler import sigmas
from difffract_jax.sharding import make_mesh, traced_pipeline
from difffract_jax.storage.checkpoint import leaf_paths
from klein import tiny_pipeline
from tolerances import TOL, relative_error

PROMPT = "a red fox at dawn"
GRID = (3, 4)
SIZE = {"height": 24, "width": 32, "text_tokens": 64, "steps": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("klein") / "diffusers"
    tiny_pipeline().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def theirs(noise):
    """diffusers' pixels and latents of the noise."""
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    packed = torch.tensor(noise).T.reshape(1, 16, *GRID)
    seen = {}

    def keep(pipe, step, t, values):
        seen["latents"] = values["latents"][0].numpy()
        seen.setdefault("t", []).append(float(t))
        return values

    pixels = pipe(
        prompt=PROMPT,
        latents=packed,
        height=SIZE["height"],
        width=SIZE["width"],
        num_inference_steps=SIZE["steps"],
        max_sequence_length=SIZE["text_tokens"],
        output_type="np",
        callback_on_step_end=keep,
    ).images[0]
    return pixels, seen


def test_an_image_is_diffusers(home, noise, theirs):
    pipe = convert_pipeline(home)
    run = plan_run(pipe.config, **SIZE)
    pixels, seen = theirs
    assert np.allclose(run.sigmas[:-1] * 1000, seen["t"], rtol=1e-6)
    made = generate(pipe, PROMPT, run=run, latents=noise)
    assert relative_error(made.latents, seen["latents"]) <= TOL.f32_run
    assert np.max(np.abs(made.image / 255 - pixels)) <= 1 / 255


def test_a_converted_directory_is_the_one_that_is_converted_in_memory(home, tmp_path):
    made = convert_model(home, tmp_path / "ours")
    ours, theirs = load_pipeline(tmp_path / "ours"), load_pipeline(home)
    assert ours.config == theirs.config
    assert ours.source == theirs.source == made.source
    for name in ("transformer", "t5", "vae"):
        pairs = zip(leaf_paths(getattr(ours, name)).items(), leaf_paths(getattr(theirs, name)).items(), strict=True)
        assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)
    assert made.parameters["clip"] == 0
    tokens = [encode(pipe, "été", 32) for pipe in (ours, theirs)]
    assert np.array_equal(tokens[0].text, tokens[1].text)
    assert tokens[0].pooled.shape == (0,)


@pytest.mark.slow
def test_blocks_on_disk_give_the_same_image(home, noise, theirs):
    pipe = load_pipeline(home, weights="disk")
    made = generate(pipe, PROMPT, run=plan_run(pipe.config, **SIZE), latents=noise)
    assert relative_error(made.latents, theirs[1]["latents"]) <= TOL.f32_run


@pytest.mark.slow
def test_in_bfloat16_an_image_is_as_near_as_diffusers(home, noise, theirs):
    pipe = load_pipeline(home, dtype=jnp.bfloat16)
    made = generate(pipe, PROMPT, run=plan_run(pipe.config, **SIZE), latents=noise)
    narrow = tiny_pipeline().to(torch.bfloat16)
    narrow.set_progress_bar_config(disable=True)
    latents = {}

    def keep(pipe, step, t, values):
        latents["last"] = values["latents"][0].float().numpy()
        return values

    sizes = {"height": SIZE["height"], "width": SIZE["width"], "num_inference_steps": SIZE["steps"]}
    given = torch.tensor(noise).T.reshape(1, 16, *GRID).to(torch.bfloat16)
    narrow(prompt=PROMPT, latents=given, max_sequence_length=64, callback_on_step_end=keep, output_type="np", **sizes)
    error, their_error = (relative_error(one, theirs[1]["latents"]) for one in (made.latents, latents["last"]))
    print(f"bfloat16 against float32 after 4 steps: ours {error:.1e}, diffusers' {their_error:.1e}")
    assert error <= max(TOL.bf16, their_error)


@pytest.mark.parametrize(("steps", "tokens"), [(4, 36), (4, 4096), (28, 1024), (50, 4301)])
def test_the_shift_is_diffusers(steps, tokens):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    schedule = preset_config("flux2-klein").scheduler
    assert schedule.log_shift(steps, tokens) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)
    assert sigmas(schedule, steps, tokens).shape == (steps + 1,)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "Flux2KleinKVPipeline"},
            "is a Flux2KleinKVPipeline, .*did you mean `Flux2KleinPipeli",
        ),
        ("transformer/config.json", {"joint_attention_dim": 60}, "joint_attention_dim is 60, but 3 times Qwen3's"),
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 27},
            "is 27, but its states after layers 9, 18, 27",
        ),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act='gelu' .supported: 'silu'"),
        ("vae/config.json", {"decoder_block_out_channels": [8, 8, 8]}, "decoder_block_out_channels=.8, 8, 8."),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "does not say which token fills prompts up"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(home, tmp_path, file, values, message):
    with pytest.raises(UserError, match=message) as error:
        convert_pipeline(changed_copy(home, tmp_path, file, **values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "tokenizer"])
def test_a_part_that_is_missing_is_named_and_what_completes_it(home, tmp_path, part):
    copy = shutil.copytree(home, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(copy / part)
    told = "lacks the transformer; give its file" if part == "transformer" else f"lacks {part}; copy .*FLUX.2-klein-4B"
    with pytest.raises(UserError, match=f"{told}.*--base"):
        load_pipeline(copy)


def test_guidance_is_refused(home):
    with pytest.raises(UserError, match="takes no guidance scale"):
        plan_run(pipeline_config(home), guidance=4.0)


def test_the_preset_has_klein_s_sizes():
    config = preset_config("flux2-klein")
    assert (config.transformer.d_model, config.transformer.d_ff, config.t5.d_model) == (3072, 9216, 7680)
    assert (config.transformer.layout.depth, config.vae.factor, config.vae.latent_channels) == (25, 8, 32)
    assert (config.defaults.steps, config.defaults.text_tokens) == (4, 512)


@pytest.fixture(scope="module")
def single_file(home, tmp_path_factory):
    """The transformer in the original release's layout, beside a base without a transformer or a scheduler."""
    folder = tmp_path_factory.mktemp("single")
    model = load_pipeline(home).transformer
    tensors = {f"model.diffusion_model.{key}": value for key, value in save_tree(model, FLUX2_SINGLE_FILE)}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "klein.safetensors")
    shutil.copytree(home, folder / "base", ignore=shutil.ignore_patterns("transformer", "scheduler"))
    return folder / "klein.safetensors"


def test_a_single_file_and_a_base_are_the_pipeline(home, single_file, tmp_path):
    whole, base = load_pipeline(home), single_file.parent / "base"
    for given in (single_file, home / "transformer"):
        completed = load_pipeline(given, base=base)
        assert completed.source == whole.source
        assert completed.config.transformer == whole.config.transformer
        assert completed.config.scheduler.log_shift(4, 36) == whole.config.scheduler.log_shift(4, 36)
    made = convert_model(single_file, tmp_path / "ours", base=base)
    assert made.source == whole.source and load_pipeline(tmp_path / "ours").config == completed.config
    assert convert_model(single_file, tmp_path / "alone").parameters == {"transformer": made.parameters["transformer"]}


def test_a_base_completes_its_own_kind_alone(home, single_file, tmp_path):
    for given in (single_file, home / "transformer"):
        with pytest.raises(UserError, match="a transformer of FLUX.2-klein, but the base .* is a pipeline of FLUX.1; "):
            load_pipeline(given, base="organism")
    with pytest.raises(UserError, match="a transformer of FLUX.1, but the base .* is a pipeline of FLUX.2-klein; give"):
        load_pipeline(ORGANISM / "transformer", base=home)
    with pytest.raises(UserError, match="--base completes a transformer, but .* is a directory with all parts"):
        load_pipeline(home, base="organism")
    shutil.copytree(home, tmp_path / "base", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(UserError, match="lacks vae, so that it cannot be a base; give a .* of FLUX.2-klein, as from"):
        load_pipeline(single_file, base=tmp_path / "base")


def test_a_transformer_alone_is_said_to_need_a_base(home, single_file, tmp_path):
    copy = shutil.copytree(home / "transformer", tmp_path / "alone", copy_function=shutil.copyfile)
    for given in (copy, single_file):
        with pytest.raises(UserError, match="is a transformer alone; name a diffusers directory with .*--base DIR"):
            load_pipeline(given)
    convert_model(copy, tmp_path / "ours")
    with pytest.raises(UserError, match="holds a transformer alone; convert the single file again with --base DIR"):
        load_pipeline(tmp_path / "ours")


def test_a_transformer_of_another_class_names_it_and_what_is_near(home, tmp_path):
    copy = shutil.copytree(home / "transformer", tmp_path / "transformer", copy_function=shutil.copyfile)
    (copy / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer3DModel"}))
    with pytest.raises(UserError, match="holds a FluxTransformer3DModel, .* did you mean `FluxTransformer2DModel`"):
        convert_model(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_that_two_devices_hold_makes_the_same_image(home, noise, theirs):
    pipe = load_pipeline(home, sharding=traced_pipeline(make_mesh({"feature": 2})))
    kernel = pipe.transformer.double.img.mlp.gate.kernel[...]
    assert kernel.addressable_shards[0].data.shape[-1] == kernel.shape[-1] // 2
    made = generate(pipe, PROMPT, run=plan_run(pipe.config, **SIZE), latents=noise)
    assert relative_error(made.latents, theirs[1]["latents"]) <= TOL.f32_run
