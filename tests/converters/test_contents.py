"""A checkpoint's keys say where the transformer is, and what a file is that was given in its place."""

import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.chroma import CHROMA_OF_DIFFUSERS, CHROMA_RELEASE
from converters.contents import (
    check_autoencoder,
    check_weights,
    find_transformer,
    transformer_files,
    transformer_of,
    without_prefix,
)
from converters.flux import DIFFUSERS, ORIGINAL
from converters.flux2 import FLUX2_OF_DIFFUSERS, FLUX2_ORIGINAL
from converters.sd3 import SD3_OF_DIFFUSERS, SD3_ORIGINAL
from converters.source import Source
from difffract_jax.config import UserError

KEYS = {
    ORIGINAL: ["img_in.weight", "txt_in.weight", "double_blocks.0.img_attn.qkv.weight"],
    DIFFUSERS: ["x_embedder.weight", "context_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"],
    FLUX2_ORIGINAL: ["img_in.weight", "double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"],
    FLUX2_OF_DIFFUSERS: [
        *("x_embedder.weight", "double_stream_modulation_img.linear.weight"),
        "transformer_blocks.0.attn.to_q.weight",
    ],
    CHROMA_RELEASE: ["img_in.weight", "distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"],
    CHROMA_OF_DIFFUSERS: [
        *("x_embedder.weight", "distilled_guidance_layer.in_proj.weight"),
        "transformer_blocks.0.attn.to_q.weight",
    ],
    SD3_ORIGINAL: ["x_embedder.proj.weight", "pos_embed", "joint_blocks.0.x_block.attn.qkv.weight"],
    SD3_OF_DIFFUSERS: ["pos_embed.proj.weight", "context_embedder.weight", "transformer_blocks.0.attn.to_q.weight"],
}
NAMES = [f"{model} {layout}" for model in ("flux1", "flux2", "chroma", "sd3") for layout in ("original", "diffusers")]


@pytest.fixture
def source(tmp_path):
    def write(keys, name="some.safetensors", dtype=np.float32):
        save_file({key: np.ones((1, 1), dtype) for key in keys}, tmp_path / name)
        return Source(tmp_path / name)

    return write


@pytest.mark.parametrize("layout", KEYS, ids=NAMES)
@pytest.mark.parametrize(
    "prefix",
    ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.", "module._orig_mod."],
)
def test_the_transformer_is_found_under_any_prefix(source, caplog, layout, prefix):
    others = ["vae.decoder.conv_in.weight", "text_encoders.t5xxl.transformer.shared.weight", "first_stage_model.x"]
    with caplog.at_level(logging.INFO, "converters"):
        part, found = transformer_of(source([*(f"{prefix}{key}" for key in KEYS[layout]), *others]))
    assert found is layout and sorted(part) == sorted(KEYS[layout])
    (note,) = caplog.messages
    assert note.endswith("holds other parts too, which are left aside (first_stage_model, text_encoders, vae).")


def test_what_belongs_to_no_known_part_stays_to_be_refused(source, caplog):
    with caplog.at_level(logging.INFO, "converters"):
        part, _ = transformer_of(source([*KEYS[ORIGINAL], "extra.weight"]))
    assert "extra.weight" in part and not caplog.messages


def test_two_transformers_in_one_file_are_refused_but_averages_are_left_aside(source):
    keys = KEYS[ORIGINAL]
    with pytest.raises(UserError, match="several transformers, under 'a.' and 'b.'"):
        find_transformer(source([f"{prefix}{key}" for prefix in ("a.", "b.") for key in keys]))
    part, _ = transformer_of(source([*keys, *(f"model_ema.{key}" for key in keys)]))
    assert sorted(part) == sorted(keys)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "is a LoRA, .* as --lora FILE"),
        (["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"], "is a LoRA"),
        (["double_blocks.0.img_attn.qkv.lora_B.weight", "img_in.lora_A.weight"], "is a LoRA"),
        (["lycoris_blocks_0.lokr_w1"], "is a LoRA"),
        ([*KEYS[DIFFUSERS], "controlnet_blocks.0.weight", "controlnet_x_embedder.weight"], "is a ControlNet"),
        (["redux_up.weight"], "is an image adapter"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is a part of a Stable Diffusion 3 tran"),
        ([*KEYS[SD3_OF_DIFFUSERS], "controlnet_blocks.0.weight"], "is a ControlNet"),
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"], "is a U-Net"),
        (
            ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"],
            r"is an autoencoder",
        ),
        (
            ["encoder.mid_block.resnets.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"],
            "is an autoencoder",
        ),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "is a T5 text encoder"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "is a CLIP text encoder"),
        (["diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight"], "is a LoRA, changes to a model's weights"),
        (["img_in.kernel", "img_in.bias"], "one file of a directory that difffract wrote"),
        (
            ["a.weight", "img_in.weight"],
            r"neither img_in.weight, x_embedder.weight, .* nor pos_embed.proj.w.*\(its keys begin with a, img_in\)",
        ),
    ],
)
def test_what_is_given_by_mistake_is_told_by_name(source, keys, what):
    with pytest.raises(UserError, match=what):
        transformer_of(source(keys))


def test_quantised_weights_are_refused_also_under_a_prefix(source):
    keys = [*KEYS[ORIGINAL], "double_blocks.0.img_attn.qkv.weight.absmax"]
    with pytest.raises(UserError, match=r"quantised as bitsandbytes in 4 bits .*black-forest-labs has FLUX.1-schnell"):
        transformer_of(source([f"model.diffusion_model.{key}" for key in keys]))
    # Those of another part do not matter.
    part, _ = transformer_of(source([*KEYS[ORIGINAL], "text_encoders.t5xxl.shared.weight.absmax"]))
    assert sorted(part) == sorted(KEYS[ORIGINAL])
    with pytest.raises(UserError, match="quantised as integers of type I8"):
        transformer_of(source(KEYS[DIFFUSERS], dtype=np.int8))


@pytest.mark.parametrize("extra", ["attn.to_q.base_layer.weight", "attn.to_q.lora_A.default.weight"])
def test_adapters_beside_the_weights_are_to_be_merged_first(source, extra):
    with pytest.raises(UserError, match=rf"LoRA adapters \(.*{extra}\) that are not merged .*pipe.fuse_lora\(\)"):
        check_weights(source([*KEYS[DIFFUSERS], f"transformer_blocks.0.{extra}"]))


def test_other_parts_may_have_a_prefix_too(source, caplog):
    clip = ["text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"]
    anchors = clip[0], clip[0].removeprefix("text_model.")
    with caplog.at_level(logging.INFO, "converters"):
        part = without_prefix(source([*(f"clip_l.{key}" for key in clip), "vae.x"]), *anchors)
        plain = without_prefix(source([key.removeprefix("text_model.") for key in clip]), *anchors)
    assert sorted(part) == clip and "embeddings.token_embedding.weight" in plain
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("are left aside (vae).")


def test_an_autoencoder_in_the_original_layout_is_refused(source):
    with pytest.raises(UserError, match="autoencoder in the original layout .*decoder.mid.attn_1.q.weight"):
        check_autoencoder(source(["decoder.conv_in.weight", "decoder.mid.attn_1.q.weight"]))


def test_the_transformer_s_file_is_found_among_others(source, tmp_path):
    source(KEYS[ORIGINAL], "flux1-dev.safetensors")
    source(["decoder.conv_in.weight"], "ae.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    assert transformer_files(tmp_path) == [tmp_path / "flux1-dev.safetensors"]
