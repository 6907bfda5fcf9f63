"""The tables of Stable Diffusion 3's transformers: they cover the published sizes, and undo themselves."""

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from converters.mapping import ArraySource, load_tree, save_tree, source_shapes
from converters.sd3 import (
    SD3_DIFFUSERS,
    SD3_RELEASE,
    sd3_config_from_diffusers,
    sd3_config_from_shapes,
    sd3_config_to_diffusers,
    sd3_labels,
)
from difffract_jax.config import UserError
from difffract_jax.models.presets import PRESETS
from difffract_jax.models.sd3 import Sd3MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.storage.checkpoint import leaf_paths
from model_kinds import KINDS, Coverage, coverage
from sd3 import PUBLISHED, TINY, tiny_transformer

SIZES = {
    "sd3-medium": (683, 2_084_951_104),
    "sd3.5-medium": (909, 2_469_663_936),
    "sd3.5-large": (1227, 8_146_280_768),
}
"""Tensors and numbers of each, the table of positions included."""


@pytest.mark.parametrize(
    "name", ["sd3.5-medium", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3-medium", "sd3.5-large"))]
)
def test_every_tensor_makes_one_leaf_and_every_leaf_is_made(name):
    found = coverage(KINDS[name])
    print(f"{name}: {found.tensors} tensors, {found.numbers[0]:,} numbers")
    assert found == Coverage([], True, SIZES[name][0], (SIZES[name][1],) * 2)
    assert sd3_config_from_diffusers(PUBLISHED[name]) == PRESETS[name]


def test_a_conversion_back_gives_the_same_tensors():
    name = "sd3.5-medium"
    tensors = {key: tensor.numpy() for key, tensor in tiny_transformer(name).state_dict().items()}
    config = sd3_config_from_diffusers(TINY[name])
    abstract, labels = abstract_module(Sd3MMDiT, config), sd3_labels(config)
    made = load_tree(ArraySource("tiny", tensors), SD3_DIFFUSERS, abstract, labels=labels)
    back = dict(save_tree(made, SD3_DIFFUSERS, labels))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


def original_shapes(sizes):
    """Shapes of every tensor of the original release."""
    config = sd3_config_from_diffusers(sizes)
    return source_shapes(SD3_RELEASE, abstract_module(Sd3MMDiT, config), sd3_labels(config))


@pytest.mark.parametrize("name", TINY)
def test_the_original_release_is_what_diffusers_reads_of_it(name):
    tensors = {key: tensor.numpy() for key, tensor in tiny_transformer(name).state_dict().items()}
    config = sd3_config_from_diffusers(TINY[name])
    abstract, labels = abstract_module(Sd3MMDiT, config), sd3_labels(config)
    ours = load_tree(ArraySource("tiny", tensors), SD3_DIFFUSERS, abstract, labels=labels)
    made = dict(save_tree(ours, SD3_RELEASE, labels))
    given = {f"model.diffusion_model.{key}": torch.tensor(one) for key, one in made.items()}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(given)
    assert theirs.keys() == tensors.keys()
    assert all(np.array_equal(theirs[key], tensors[key]) for key in tensors)
    again = load_tree(ArraySource("tiny", made), SD3_RELEASE, abstract, labels=labels)
    pairs = zip(leaf_paths(again).values(), leaf_paths(ours).values(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_read_off_a_single_file(name):
    config = sd3_config_from_diffusers(PUBLISHED[name])
    for table in (SD3_RELEASE, SD3_DIFFUSERS):
        shapes = source_shapes(table, abstract_module(Sd3MMDiT, config), sd3_labels(config))
        assert sd3_config_from_shapes(shapes) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_embedder.mlp.0.weight": None}, r"not a Stable Diffusion 3 transformer: it lacks y_emb.* \(pooled width\)"),
        ({"pos_embed": (1, 65, 32)}, "it has 65 positions, which must be a square; give SD3-medium"),
        ({"x_embedder.proj.weight": (32, 4, 4, 4)}, "it has patches of 4 x 4, which must be 2 x 2"),
        (
            {f"joint_blocks.{n}.x_block.attn2.qkv.weight": shape for n, shape in ((0, None), (1, (96, 32)))},
            r"a second attention in the blocks \[1\], which must be the first",
        ),
        ({"joint_blocks.0.x_block.attn.ln_q.weight": (20,)}, "a width of 32, which heads of 20 do not divide"),
    ],
)
def test_a_single_file_that_tells_no_sizes_is_refused(change, message):
    shapes = original_shapes(TINY["sd3.5-medium"]) | change
    with pytest.raises(UserError, match=message) as error:
        sd3_config_from_shapes({key: shape for key, shape in shapes.items() if shape is not None})
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("name", TINY)
def test_the_configuration_is_diffusers_there_and_back(name):
    module = SD3Transformer2DModel(**TINY[name])
    attributes = {key: value for key, value in module.config.items() if key != "_use_default_values"}
    config = sd3_config_from_diffusers(attributes)
    written = sd3_config_to_diffusers(config, TINY[name]["sample_size"])
    assert sd3_config_from_diffusers(written) == config
    assert written.keys() - {"_class_name"} == attributes.keys() - {"_class_name", "_diffusers_version"}
    assert SD3Transformer2DModel.from_config(written).state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dual_attention_layers": [1]}, r"dual_attention_layers=\[1\], which must be the first blocks"),
        ({"dual_attention_layers": [0, 1, 2]}, "and not the last"),
        ({"caption_projection_dim": 48}, "caption_projection_dim=48, which must be heads x columns, 32"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' .supported: None, 'rms_norm'"),
        ({"patch_size": 4}, r"patch_size=4 \(supported: 2\)"),
        ({"num_layers": None}, "missing: num_layers"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(change, message):
    config = {key: value for key, value in (TINY["sd3.5-large"] | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        sd3_config_from_diffusers(config)
