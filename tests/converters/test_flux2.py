"""The table of FLUX.2's transformer: it covers klein at its published size, and undoes itself."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from transformers import Qwen3Config, Qwen3ForCausalLM

from converters.autoencoder import AUTOENCODER_FLUX2, FLUX2_IGNORED
from converters.flux2 import (
    FLUX2_DIFFUSERS,
    FLUX2_SINGLE_FILE,
    flux2_config_from_diffusers,
    flux2_config_from_shapes,
    flux2_config_to_diffusers,
)
from converters.mapping import ArraySource, check_coverage, is_ignored, load_tree, save_tree, source_shapes
from converters.qwen3 import qwen3_config_from_transformers, qwen3_tables
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import FLUX2_VAE, Flux2Autoencoder
from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.presets import PRESETS
from difffract_jax.models.qwen3 import QWEN3_4B, Qwen3Encoder
from difffract_jax.models.shapes import abstract_module
from difffract_jax.storage.checkpoint import leaf_paths
from klein import PUBLISHED, TINY, tiny_transformer
from model_kinds import KINDS, Coverage, coverage

QWEN3_4B_SIZES = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
QWEN3_READ, AUTOENCODER_NUMBERS = 3_114_088_192, (250, 84_046_371)
TENSORS, PARAMETERS = 169, 3_875_544_576


def test_every_tensor_of_klein_makes_one_leaf_and_every_leaf_is_made():
    assert coverage(KINDS["flux2-klein"]) == Coverage([], True, TENSORS, (PARAMETERS, PARAMETERS))
    assert flux2_config_from_diffusers(PUBLISHED) == PRESETS["flux2-klein"] == PRESETS["flux2-klein-base"]


def test_every_tensor_of_klein_s_text_encoder_is_used_or_left_out_for_a_reason():
    """Qwen3-4B: 27 of its 36 layers are read."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Qwen3ForCausalLM(QWEN3_4B_SIZES).state_dict().items()}
    read = qwen3_config_from_transformers(QWEN3_4B_SIZES.to_dict(), padding_id=151643)
    assert read == QWEN3_4B
    rules, ignored = qwen3_tables(read, shapes)
    abstract = abstract_module(Qwen3Encoder, read)
    assert check_coverage(shapes, rules, abstract, ignored) == []
    left = {name for name in shapes if is_ignored(name, ignored)}
    assert source_shapes(rules, abstract) == {name: shape for name, shape in shapes.items() if name not in left}
    assert (len(shapes), len(left)) == (399, 9 * 11 + 2)
    assert sum(int(np.prod(leaf.shape)) for leaf in leaf_paths(abstract).values()) == QWEN3_READ


def test_every_tensor_of_klein_s_autoencoder_is_used():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in AutoencoderKLFlux2().state_dict().items()}
    abstract = abstract_module(Flux2Autoencoder, FLUX2_VAE)
    assert check_coverage(shapes, AUTOENCODER_FLUX2, abstract, FLUX2_IGNORED) == []
    counter = shapes.pop("bn.num_batches_tracked")
    assert counter == () and source_shapes(AUTOENCODER_FLUX2, abstract) == shapes
    numbers = sum(int(np.prod(leaf.shape)) for leaf in leaf_paths(abstract).values())
    assert (len(shapes), numbers) == AUTOENCODER_NUMBERS


def test_a_conversion_back_gives_the_same_tensors():
    tensors = {name: tensor.numpy() for name, tensor in tiny_transformer().state_dict().items()}
    abstract = abstract_module(Flux2MMDiT, flux2_config_from_diffusers(TINY))
    back = dict(save_tree(load_tree(ArraySource("tiny", tensors), FLUX2_DIFFUSERS, abstract), FLUX2_DIFFUSERS))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_the_original_release_is_what_diffusers_reads_of_it():
    tensors = {name: tensor.numpy() for name, tensor in tiny_transformer().state_dict().items()}
    abstract = abstract_module(Flux2MMDiT, flux2_config_from_diffusers(TINY))
    made = dict(save_tree(load_tree(ArraySource("tiny", tensors), FLUX2_DIFFUSERS, abstract), FLUX2_SINGLE_FILE))
    theirs = convert_flux2_transformer_checkpoint_to_diffusers({key: torch.tensor(made[key]) for key in made})
    assert theirs.keys() == tensors.keys()
    assert all(np.array_equal(theirs[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("table", [FLUX2_SINGLE_FILE, FLUX2_DIFFUSERS], ids=["original", "diffusers"])
@pytest.mark.parametrize("sizes", [PUBLISHED, TINY], ids=["published", "tiny"])
def test_sizes_are_read_off_a_single_file(table, sizes):
    config = flux2_config_from_diffusers(sizes)
    assert flux2_config_from_shapes(source_shapes(table, abstract_module(Flux2MMDiT, config))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_in.in_layer.weight": (32, 256)}, r"takes a guidance scale \(guidance_in.in_layer.weight\)"),
        ({"txt_in.weight": None}, r"not a FLUX.2 transformer: it lacks txt_in.weight \(text width\)"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": (20,)}, "heads of 20 dimensions, which four equal axes"),
    ],
)
def test_a_single_file_that_tells_no_sizes_is_refused(change, message):
    shapes = source_shapes(FLUX2_SINGLE_FILE, abstract_module(Flux2MMDiT, flux2_config_from_diffusers(TINY)))
    with pytest.raises(UserError, match=message) as error:
        flux2_config_from_shapes({key: shape for key, shape in (shapes | change).items() if shape is not None})
    assert str(error.value).count(". ") == 0


def test_the_configuration_is_diffusers_there_and_back():
    module = Flux2Transformer2DModel(**TINY)
    attributes = {name: value for name, value in module.config.items() if name != "_use_default_values"}
    config = flux2_config_from_diffusers(attributes)
    written = flux2_config_to_diffusers(config)
    assert flux2_config_from_diffusers(written) == config
    assert Flux2Transformer2DModel.from_config(written).state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_embeds": True}, "takes a guidance scale .*klein can be converted"),
        ({"patch_size": 2}, r"patch_size=2 \(supported: 1\)"),
        ({"axes_dims_rope": [4, 6, 6]}, "four numbers that add up to attention_head_dim=16"),
        ({"num_layers": None}, "missing: num_layers"),
        ({"timestep_guidance_channels": 128}, "timestep_guidance_channels=128"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(change, message):
    config = {name: value for name, value in (TINY | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        flux2_config_from_diffusers(config)
