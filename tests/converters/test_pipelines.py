"""Whole pipelines: every part arrives, and whatever is broken is refused in one sentence, all of it together."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from converters.configurations import pipeline_config
from converters.flux import FLUX_SINGLE_FILE
from converters.mapping import ConversionError, save_tree
from converters.pipelines import convert_pipeline
from difffract_jax.config import UserError
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.sharding import make_mesh
from difffract_jax.storage.files import write_tensors
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
    with pytest.raises(UserError, match="the transformer's joint_attention_dim is 48, but T5's d_model is 32"):
        convert_pipeline(file, base=PIPELINE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "is a StableDiffusionXLPipeline, but only FluxPipeline"),
        (
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            "transformer is SD3Transformer2DModel instead of Flux",
        ),
        (
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder is CLIPTextModelWithProjection",
        ),
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
    edit(copy / "scheduler" / "scheduler_config.json", invert_sigmas=True, new_option=1)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(UserError) as caught:
        convert_pipeline(copy)
    for part in (
        "patch_size=2",
        "gated-silu",
        "invert_sigmas=True",
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


def rename(copy, change):
    """Gives the weights of every part another name, `change` of the old one."""
    for folder, name in WEIGHTS.items():
        (copy / folder / name).rename(copy / folder / change(name))


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours[:4]), jax.tree.leaves(theirs[:4]), strict=True):
        assert np.array_equal(a, b)


def test_the_only_variant_is_read_and_of_several_the_named_one(pipe, copy):
    rename(copy, lambda name: name.replace(".safetensors", ".fp16.safetensors"))
    assert_same(convert_pipeline(copy), pipe)
    for folder in WEIGHTS:
        (half,) = (copy / folder).glob("*.fp16.safetensors")
        if folder != "vae":  # has one variant only
            shutil.copyfile(half, half.with_name(half.name.replace("fp16", "ema")))
    edit_weights(
        copy / "transformer" / "diffusion_pytorch_model.ema.safetensors",
        lambda tensors: tensors["proj_out.bias"].fill(7),
    )
    with pytest.raises(ConversionError, match="in the variants ema and fp16; choose one with --variant ema"):
        convert_pipeline(copy)
    assert_same(convert_pipeline(copy, variant="fp16"), pipe)
    (copy / "vae" / "diffusion_pytorch_model.fp16.safetensors").rename(copy / "vae" / WEIGHTS["vae"])
    assert np.all(np.asarray(convert_pipeline(copy, variant="ema").transformer.final.proj.bias) == 7)
    with pytest.raises(UserError, match="no files of the variant bf16, but those of ema and fp16; leave --variant out"):
        convert_pipeline(copy, variant="bf16")


def test_fp8_text_encoders_are_those_that_widening_them_first_gives(copy):
    path = copy / "text_encoder_2" / WEIGHTS["text_encoder_2"]
    narrow = {key: value.astype(ml_dtypes.float8_e4m3fn) for key, value in load_file(path).items()}
    save_file({key: value.astype(np.float32) for key, value in narrow.items()}, path)
    expected = convert_pipeline(copy)
    path.unlink()
    kinds = [(key, value.dtype, value.shape) for key, value in narrow.items()]
    write_tensors(path.with_name("t5xxl_fp8_e4m3fn.safetensors"), kinds, narrow.values())
    assert_same(convert_pipeline(copy), expected)


def test_a_transformer_s_folder_may_hold_the_original_layout(pipe, copy):
    path = copy / "transformer" / WEIGHTS["transformer"]
    tensors = {f"module.{key}": np.ascontiguousarray(v) for key, v in save_tree(pipe.transformer, FLUX_SINGLE_FILE)}
    save_file(tensors, path)
    assert_same(convert_pipeline(copy), pipe)


def test_quantised_parts_and_unmerged_adapters_are_refused_in_one_sentence(copy):
    edit(
        copy / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    with pytest.raises(UserError, match=r"FLUX transformer is quantised \(bitsandbytes, load_in_4bit\), as its config"):
        convert_pipeline(copy)
    edit(copy / "transformer" / "config.json", quantization_config=None)

    def spoil(tensors):
        tensors["transformer_blocks.0.attn.to_q.base_layer.weight"] = tensors.pop(
            "transformer_blocks.0.attn.to_q.weight"
        )

    edit_weights(copy / "transformer" / WEIGHTS["transformer"], spoil)
    edit_weights(
        copy / "text_encoder_2" / WEIGHTS["text_encoder_2"], lambda tensors: tensors.update({"a.SCB": np.ones(1)})
    )
    with pytest.raises(ConversionError, match="2 problems") as caught:
        convert_pipeline(copy)
    assert "to_q.base_layer.weight) that are not merged" in caught.value.problems[0]
    assert "text_encoder_2 is quantised as bitsandbytes in 8 bits" in caught.value.problems[1]


def test_a_transformer_that_reads_an_image_besides_is_named(copy, tmp_path):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["x_embedder.weight"] = np.repeat(weights["x_embedder.weight"], 6, axis=1)
    save_file(weights, tmp_path / "fill.safetensors")
    edit(copy / "transformer" / "config.json", in_channels=96, out_channels=16)
    for source, base in ((copy, None), (tmp_path / "fill.safetensors", PIPELINE)):
        with pytest.raises(UserError, match="reads 96 channels and gives 16, as FLUX.1-Fill"):
            convert_pipeline(source, base=base)


def test_a_base_needs_no_transformer_and_no_scheduler(pipe, copy, tmp_path):
    shutil.move(copy / "transformer", tmp_path / "finetuned")
    with pytest.raises(UserError, match=r"lacks the transformer; give its file .* this directory with --base"):
        convert_pipeline(copy)
    (copy / "model_index.json").unlink()
    shutil.rmtree(copy / "scheduler")
    completed = convert_pipeline(tmp_path / "finetuned", base=copy)
    assert completed.config == pipe.config
    assert_same(completed, pipe)
    # Without a config.json, no tensor tells how heads other than FLUX.1's are divided.
    (tmp_path / "finetuned" / "config.json").unlink()
    with pytest.raises(
        UserError, match="heads of 16 dimensions, .* that has this transformer's own transformer/config"
    ):
        convert_pipeline(tmp_path / "finetuned", base=copy)
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(UserError, match="lacks text_encoder, so that it cannot be a base"):
        convert_pipeline(tmp_path / "finetuned", base=copy)


def test_a_pipeline_without_text_encoders_says_so_and_a_base_gives_them(pipe, copy):
    for folder in ("text_encoder", "text_encoder_2", "tokenizer"):
        shutil.rmtree(copy / folder)
    edit(copy / "model_index.json", text_encoder=[None, None], text_encoder_2=[None, None])
    with pytest.raises(UserError, match=r"lacks text_encoder, text_encoder_2, tokenizer; copy these folders.*--base"):
        convert_pipeline(copy)
    assert_same(convert_pipeline(copy, base=PIPELINE), pipe)


def test_configurations_may_begin_with_a_mark_and_end_lines_as_windows_does(pipe, copy):
    for path in copy.rglob("config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert convert_pipeline(copy).config == pipe.config
