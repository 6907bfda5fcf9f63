"""Whole pipelines: every part arrives, and whatever is broken is refused in one sentence, all of it together."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from converters.flux import FLUX_SINGLE_FILE
from converters.mapping import ConversionError, save_tree
from converters.pipelines import convert_pipeline, pipeline_config, scheduler_config_from_diffusers
from difffract_jax.config import UserError
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.sharding import make_mesh
from tolerances import REFERENCE

PIPELINE = REFERENCE / "pipeline"
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture(scope="module")
def pipe():
    return convert_pipeline(PIPELINE)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(PIPELINE, tmp_path / "pipeline", copy_function=shutil.copyfile)


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_every_part_of_a_pipeline_arrives(pipe):
    counts = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in pipe[:4]]
    files = [PIPELINE / folder / WEIGHTS[folder] for folder in ("transformer", "text_encoder_2", "text_encoder", "vae")]
    assert counts == [sum(tensor.size for tensor in load_file(file).values()) for file in files]
    assert encode_prompt(pipe.tokenizers, "a red fox", 16).t5_mask.any()


def test_what_a_run_takes_by_default_is_read_off_the_pipeline(pipe, copy):
    defaults = pipe.config.defaults
    assert (defaults.height, defaults.width, defaults.text_tokens, defaults.steps) == (96, 96, 256, 4)
    edit(copy / "transformer" / "config.json", guidance_embeds=True)
    dev = pipeline_config(copy).defaults
    assert (dev.text_tokens, dev.steps, dev.guidance) == (512, 28, 3.5)


def test_parts_go_where_the_sharding_says():
    mesh = make_mesh({"feature": 2})
    whole = NamedSharding(mesh, PartitionSpec())
    pipe = convert_pipeline(PIPELINE, dtype=jnp.bfloat16, sharding=lambda part, abstract: whole)
    assert {leaf.sharding for leaf in jax.tree.leaves(pipe[:4])} == {whole}
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe[:4])} == {jnp.bfloat16.dtype}


def test_a_single_file_is_completed_by_a_base(pipe, tmp_path):
    file = tmp_path / "flux.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in save_tree(pipe.transformer, FLUX_SINGLE_FILE)}, file)
    completed = convert_pipeline(file, base=PIPELINE)
    assert completed.config == pipe.config
    for ours, theirs in zip(jax.tree.leaves(completed[:4]), jax.tree.leaves(pipe[:4]), strict=True):
        assert np.array_equal(ours, theirs)
    wider = dict(save_tree(pipe.transformer, FLUX_SINGLE_FILE))
    wider["txt_in.weight"] = np.ones((64, 48), np.float32)
    save_file({key: np.ascontiguousarray(value) for key, value in wider.items()}, file)
    with pytest.raises(UserError, match="takes text of width 48"):
        convert_pipeline(file, base=PIPELINE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline, but only FluxPipeline"),
        (
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            "transformer is SD3Transformer2DModel instead of Flux",
        ),
        (
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder is CLIPTextModelWithProjection",
        ),
        ({"scheduler": None}, "scheduler is None instead of FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_pipeline_of_another_architecture_is_refused(copy, changes, message):
    edit(copy / "model_index.json", **changes)
    with pytest.raises(UserError, match=message):
        convert_pipeline(copy)


def test_a_directory_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a diffusers pipeline directory"):
        convert_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        convert_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        convert_pipeline(tmp_path)


def test_the_problems_of_all_configurations_are_told_together(copy):
    edit(copy / "transformer" / "config.json", patch_size=2)
    edit(copy / "text_encoder_2" / "config.json", feed_forward_proj="gated-silu")
    edit(copy / "scheduler" / "scheduler_config.json", use_karras_sigmas=True, new_option=1)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(UserError) as caught:
        convert_pipeline(copy)
    for part in (
        "patch_size=2",
        "gated-silu",
        "use_karras_sigmas=True",
        "new_option",
        "vae/config.json does not exist",
    ):
        assert part in str(caught.value)


def test_parts_that_do_not_fit_one_another_are_refused(copy):
    edit(copy / "transformer" / "config.json", joint_attention_dim=40, pooled_projection_dim=25, in_channels=12)
    with pytest.raises(UserError) as caught:
        convert_pipeline(copy)
    assert "joint_attention_dim is 40, but T5's d_model is 32" in str(caught.value)
    assert "pooled_projection_dim is 25, but CLIP's hidden_size is 24" in str(caught.value)
    assert "in_channels is 12, but 4 latent channels is 16" in str(caught.value)


def test_the_problems_of_all_weights_are_told_together(copy):
    def spoil_transformer(tensors):
        del tensors["proj_out.bias"]
        tensors["x_embedder.bias"] = np.ones(3, np.float32)

    def spoil_t5(tensors):
        tensors["encoder.final_layer_norm.weight"][0] = np.nan
        tensors["decoder.weight"] = np.ones(1, np.float32)

    edit_weights(copy / "transformer" / WEIGHTS["transformer"], spoil_transformer)
    edit_weights(copy / "text_encoder_2" / WEIGHTS["text_encoder_2"], spoil_t5)
    vae = copy / "vae" / WEIGHTS["vae"]
    vae.write_bytes(vae.read_bytes()[:-7])
    (copy / "text_encoder" / WEIGHTS["text_encoder"]).unlink()
    with pytest.raises(ConversionError) as caught:
        convert_pipeline(copy)
    told = "\n".join(caught.value.problems)
    for problem in (
        "transformer: missing proj_out.bias",
        "transformer: x_embedder.bias has shape (3,), expected (64,)",
        "text_encoder_2: encoder.final_layer_norm.weight holds values that are not finite",
        "text_encoder_2: unknown decoder.weight",
        "vae: diffusion_pytorch_model.safetensors is truncated, its last 7 bytes are missing",
        "text_encoder holds no diffusion_pytorch_model.safetensors or model.safetensors",
    ):
        assert problem in told


def test_a_missing_shard_is_named(copy):
    folder = copy / "transformer"
    tensors = load_file(folder / WEIGHTS["transformer"])
    (folder / WEIGHTS["transformer"]).unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:40], "two.safetensors": names[40:]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    convert_pipeline(copy)
    (folder / "two.safetensors").unlink()
    with pytest.raises(
        ConversionError, match=r"1 problem: transformer: shard two.safetensors is missing, which holds \d+ tensors"
    ):
        convert_pipeline(copy)


def test_the_scheduler_s_configuration_is_read():
    config = scheduler_config_from_diffusers({"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.2})
    assert (config.shift, config.use_dynamic_shifting, config.max_shift) == (3.0, True, 1.2)
    with pytest.raises(UserError, match="time_shift_type='linear'"):
        scheduler_config_from_diffusers({"time_shift_type": "linear"})
