"""FLUX's two layouts: round trips on a tiny model, and every tensor of the full size mapped once, without weights.

The oracles are diffusers' own module, and a listing of the original layout's names that is written out here.
"""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.numpy import save_file

from converters.flux import (
    FLUX_DIFFUSERS,
    FLUX_SINGLE_FILE,
    flux_config_from_diffusers,
    flux_config_from_shapes,
    flux_config_to_diffusers,
)
from converters.mapping import ConversionError, Source, check_coverage, load_tree, save_tree, source_shapes
from converters.pipelines import abstract_module, convert_transformer
from difffract_jax.config import UserError
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.presets import PRESETS
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.files import write_tensors

TINY = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "axes_dims_rope": (2, 2, 4),
    "in_channels": 12,
    "out_channels": 8,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 6,
}
AXES = TINY["axes_dims_rope"]
FULL = {"flux-schnell": (1156, 776, 11_891_178_560), "flux-dev": (1160, 780, 11_901_408_320)}


@pytest.fixture(scope="module", params=[False, True], ids=["schnell", "dev"])
def tiny(request):
    """Returns a tiny random diffusers transformer, without and with guidance; every tensor is random."""
    model = FluxTransformer2DModel(**TINY, guidance_embeds=request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def arrays(model):
    return {key: value.detach().numpy() for key, value in model.state_dict().items()}


def abstract_of(directory):
    config = flux_config_from_diffusers(json.loads((directory / "config.json").read_text()))
    return abstract_module(MMDiT, config)


def original_shapes(double, single, width, head, channels, text, pooled, outputs, guidance):
    """Lists the names and shapes of the original release, block by block, as its model.py builds them."""
    shapes = {}

    def linear(name, inputs, out):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inputs), (out,)

    linear("img_in", channels, width)
    linear("txt_in", text, width)
    for name, inputs in [("time_in", 256), ("vector_in", pooled)] + [("guidance_in", 256)] * guidance:
        linear(f"{name}.in_layer", inputs, width)
        linear(f"{name}.out_layer", width, width)
    for i in range(double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{i}.{stream}"
            linear(f"{name}_mod.lin", width, 6 * width)
            linear(f"{name}_attn.qkv", width, 3 * width)
            shapes[f"{name}_attn.norm.query_norm.scale"] = shapes[f"{name}_attn.norm.key_norm.scale"] = (head,)
            linear(f"{name}_attn.proj", width, width)
            linear(f"{name}_mlp.0", width, 4 * width)
            linear(f"{name}_mlp.2", 4 * width, width)
    for i in range(single):
        name = f"single_blocks.{i}"
        linear(f"{name}.modulation.lin", width, 3 * width)
        linear(f"{name}.linear1", width, 7 * width)
        linear(f"{name}.linear2", 5 * width, width)
        shapes[f"{name}.norm.query_norm.scale"] = shapes[f"{name}.norm.key_norm.scale"] = (head,)
    linear("final_layer.adaLN_modulation.1", width, 2 * width)
    linear("final_layer.linear", width, outputs)
    return shapes


def original_tensors(state):
    """Rewrites a diffusers state dict in the original layout, by hand and tensor by tensor."""
    out = {}
    for kind in ("weight", "bias"):

        def move(old, new, kind=kind):
            out[f"{new}.{kind}"] = state[f"{old}.{kind}"]

        def fuse(old, new, kind=kind):
            out[f"{new}.{kind}"] = np.concatenate([state[f"{name}.{kind}"] for name in old])

        move("x_embedder", "img_in")
        move("context_embedder", "txt_in")
        move("proj_out", "final_layer.linear")
        for old, new in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
            if f"time_text_embed.{old}_embedder.linear_1.{kind}" in state:
                move(f"time_text_embed.{old}_embedder.linear_1", f"{new}_in.in_layer")
                move(f"time_text_embed.{old}_embedder.linear_2", f"{new}_in.out_layer")
        scale, shift = np.split(state[f"norm_out.linear.{kind}"], 2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = np.concatenate([shift, scale])
        for i in range(TINY["num_layers"]):
            old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
            move(f"{old}.norm1.linear", f"{new}.img_mod.lin")
            move(f"{old}.norm1_context.linear", f"{new}.txt_mod.lin")
            fuse([f"{old}.attn.to_{name}" for name in "qkv"], f"{new}.img_attn.qkv")
            fuse([f"{old}.attn.add_{name}_proj" for name in "qkv"], f"{new}.txt_attn.qkv")
            move(f"{old}.attn.to_out.0", f"{new}.img_attn.proj")
            move(f"{old}.attn.to_add_out", f"{new}.txt_attn.proj")
            for theirs, stream in (("ff", "img"), ("ff_context", "txt")):
                move(f"{old}.{theirs}.net.0.proj", f"{new}.{stream}_mlp.0")
                move(f"{old}.{theirs}.net.2", f"{new}.{stream}_mlp.2")
            for theirs, stream in (("", "img"), ("added_", "txt")):
                out[f"{new}.{stream}_attn.norm.query_norm.scale"] = state[f"{old}.attn.norm_{theirs}q.weight"]
                out[f"{new}.{stream}_attn.norm.key_norm.scale"] = state[f"{old}.attn.norm_{theirs}k.weight"]
        for i in range(TINY["num_single_layers"]):
            old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            move(f"{old}.norm.linear", f"{new}.modulation.lin")
            fuse([*(f"{old}.attn.to_{name}" for name in "qkv"), f"{old}.proj_mlp"], f"{new}.linear1")
            move(f"{old}.proj_out", f"{new}.linear2")
            out[f"{new}.norm.query_norm.scale"] = state[f"{old}.attn.norm_q.weight"]
            out[f"{new}.norm.key_norm.scale"] = state[f"{old}.attn.norm_k.weight"]
    return out


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_diffusers_weights_come_back_identical(tiny, tmp_path, max_shard_size):
    tiny.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    transformer = load_tree(Source(tmp_path), FLUX_DIFFUSERS, abstract_of(tmp_path))
    back, state = dict(save_tree(transformer, FLUX_DIFFUSERS)), arrays(tiny)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module._orig_mod."])
def test_both_layouts_of_the_same_weights_give_the_same_leaves(tiny, tmp_path, prefix):
    tiny.save_pretrained(tmp_path)
    expected = load_tree(Source(tmp_path), FLUX_DIFFUSERS, abstract_of(tmp_path))
    file = tmp_path / "flux.safetensors"
    original = original_tensors(arrays(tiny))
    save_file({f"{prefix}{key}": np.ascontiguousarray(value) for key, value in original.items()}, file)
    transformer, config = convert_transformer(file, rope_axes=AXES)
    assert config == flux_config_from_diffusers(json.loads((tmp_path / "config.json").read_text()))
    for path, leaf in leaf_paths(expected).items():
        assert np.array_equal(leaf, leaf_paths(transformer)[path]), path
    back = dict(save_tree(transformer, FLUX_SINGLE_FILE))
    assert back.keys() == original.keys()
    assert all(np.array_equal(back[key], original[key]) for key in original)


def test_a_single_file_may_have_the_layout_of_diffusers(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    expected = load_tree(Source(tmp_path), FLUX_DIFFUSERS, abstract_of(tmp_path))
    file = tmp_path / "flux.safetensors"
    others = {"vae.decoder.conv_in.weight": np.ones(2), "text_encoders.t5xxl.shared.weight": np.ones(2, np.int8)}
    save_file({f"transformer.{key}": value for key, value in arrays(tiny).items()} | others, file)
    transformer, config = convert_transformer(file, rope_axes=AXES)
    assert config == flux_config_from_diffusers(json.loads((tmp_path / "config.json").read_text()))
    assert jax.tree.all(jax.tree.map(np.array_equal, leaf_paths(transformer), leaf_paths(expected)))
    # The directory of the transformer says how heads are divided; a directory of the one file does not.
    file.unlink()
    assert convert_transformer(tmp_path)[1] == config


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fp8_weights_are_those_that_widening_them_first_gives(tiny, tmp_path, dtype):
    scaled, wide = {}, {}
    for number, (key, value) in enumerate(original_tensors(arrays(tiny)).items()):
        scaled[key] = wide[key] = np.ascontiguousarray(value)
        if value.ndim == 2:  # some plain, some with one scale, some with one per row
            scale = [None, np.float32(0.03), np.linspace(0.01, 1, len(value), dtype=np.float32)[:, None]][number % 3]
            kind = ml_dtypes.float8_e5m2 if number % 2 else ml_dtypes.float8_e4m3fn
            scaled[key] = (value if scale is None else value / scale).astype(kind)
            wide[key] = scaled[key].astype(np.float32) * np.float32(1 if scale is None else scale)
            if scale is not None:
                scaled[key.replace(".weight", ".scale_weight")] = np.asarray(scale)
    files = tmp_path / "scaled.safetensors", tmp_path / "wide.safetensors"
    for file, tensors in zip(files, (scaled, wide), strict=True):
        write_tensors(file, [(key, np.dtype(v.dtype), v.shape) for key, v in tensors.items()], tensors.values())
    ours, theirs = (convert_transformer(file, rope_axes=AXES, dtype=dtype)[0] for file in files)
    assert jax.tree.all(jax.tree.map(np.array_equal, leaf_paths(ours), leaf_paths(theirs)))


@pytest.mark.parametrize("preset", FULL)
def test_every_tensor_of_the_full_size_is_mapped_once(preset):
    abstract = abstract_module(MMDiT, PRESETS[preset])
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=preset == "flux-dev")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tensors, _, parameters = FULL[preset]
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == parameters
    assert check_coverage(shapes, FLUX_DIFFUSERS, abstract) == []
    assert source_shapes(FLUX_DIFFUSERS, abstract) == shapes
    assert flux_config_from_shapes(shapes) == PRESETS[preset]
    public = {key: value for key, value in model.config.items() if not key.startswith("_")}
    assert flux_config_from_diffusers(public) == PRESETS[preset]


@pytest.mark.parametrize("preset", FULL)
def test_every_tensor_of_the_full_size_single_file_is_mapped_once(preset):
    abstract = abstract_module(MMDiT, PRESETS[preset])
    shapes = original_shapes(19, 38, 3072, 128, 64, 4096, 768, 64, preset == "flux-dev")
    _, tensors, parameters = FULL[preset]
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
    assert check_coverage(shapes, FLUX_SINGLE_FILE, abstract) == []
    assert source_shapes(FLUX_SINGLE_FILE, abstract) == shapes
    assert flux_config_from_shapes(shapes) == PRESETS[preset]


def test_diffusers_takes_the_configuration_that_is_written():
    config = flux_config_to_diffusers(PRESETS["flux-dev"])
    assert flux_config_from_diffusers(config) == PRESETS["flux-dev"]
    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(config).config
    assert all(theirs[key] == value for key, value in config.items() if key != "_class_name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, r"patch_size=2 \(supported: 1\)"),
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name='SD3Transformer2DModel'"),
        ({"dual_attention_layers": [0]}, "not understood: dual_attention_layers"),
        ({"axes_dims_rope": [2, 2, 2]}, "even numbers that add up to attention_head_dim=8"),
        ({"num_layers": None}, "missing: num_layers"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(change, message):
    config = {key: value for key, value in (TINY | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        flux_config_from_diffusers(config)


def test_a_file_that_is_no_transformer_is_refused(tmp_path):
    tensors = {"double_blocks.0.a": np.ones((2, 2), np.float32), "img_in.weight": np.ones(3, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"is not a FLUX.1 transformer: it lacks img_in.weight"):
        convert_transformer(tmp_path / "a.safetensors")


def test_a_single_file_with_other_heads_needs_the_axes_of_position(tiny, tmp_path):
    save_file(
        {k: np.ascontiguousarray(v) for k, v in original_tensors(arrays(tiny)).items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match=r"heads of 8 dimensions.*pass --base"):
        convert_transformer(tmp_path / "a.safetensors")


def test_problems_of_a_single_file_are_told_together(tiny, tmp_path):
    tensors = {key: np.array(value) for key, value in original_tensors(arrays(tiny)).items()}
    del tensors["single_blocks.1.linear2.bias"]
    tensors["double_blocks.0.img_mlp.0.bias"][3] = np.nan
    tensors["single_blocks.0.linear1.bias"] = np.ones(9, np.float32)
    tensors["lora.up"] = np.ones(1, np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert_transformer(tmp_path / "a.safetensors", rope_axes=AXES)
    assert set(caught.value.problems) == {
        "missing single_blocks.1.linear2.bias",
        "unknown lora.up",
        "double_blocks.0.img_mlp.0.bias holds values that are not finite",
        "single_blocks.0.linear1.weight + single_blocks.0.linear1.bias has shape (112, 16) and (9,), "
        "expected (112, 16) and (112,)",
    }
