"""The tables of T5 and CLIP: every way a checkpoint may be stored, the way back, full size, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel
from transformers import T5Config as TorchT5Config

from converters.mapping import ConversionError, Source, check_coverage, load_tree, save_tree
from converters.text_encoders import (
    CLIP_TRANSFORMERS,
    T5_TRANSFORMERS,
    clip_config_from_transformers,
    clip_tables,
    t5_config_from_transformers,
    t5_tables,
)
from difffract_jax.config import UserError
from difffract_jax.models.clip import CLIP_L, CLIPTextEncoder
from difffract_jax.models.t5 import T5_XXL, T5Encoder
from tolerances import REFERENCE

T5_HOME, CLIP_HOME = REFERENCE / "pipeline" / "text_encoder_2", REFERENCE / "pipeline" / "text_encoder"
T5_ATTRIBUTES = json.loads((T5_HOME / "config.json").read_text())
CLIP_ATTRIBUTES = json.loads((CLIP_HOME / "config.json").read_text())

# The config.json files of the FLUX.1 releases.
FLUX_T5 = {
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 32128,
}
FLUX_CLIP = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "vocab_size": 49408,
}


def abstract_t5(config):
    return jax.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))


def abstract_clip(config):
    return jax.eval_shape(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0)))


def load_t5(path):
    rules, ignored = t5_tables(Source(path).shapes())
    return load_tree(Source(path), rules, abstract_t5(t5_config_from_transformers(T5_ATTRIBUTES)), ignored=ignored)


def load_clip(path):
    rules, ignored = clip_tables(Source(path).shapes())
    abstract = abstract_clip(clip_config_from_transformers(CLIP_ATTRIBUTES))
    return load_tree(Source(path), rules, abstract, ignored=ignored)


def same_tree(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def same_tensors(pairs, expected):
    pairs = list(pairs)
    assert len(pairs) == len(expected) == len(dict(pairs))
    for key, tensor in pairs:
        np.testing.assert_array_equal(tensor, expected[key])


def test_t5_comes_back_tensor_for_tensor():
    same_tensors(save_tree(load_t5(T5_HOME), T5_TRANSFORMERS), load_file(T5_HOME / "model.safetensors"))


def test_clip_comes_back_tensor_for_tensor():
    same_tensors(save_tree(load_clip(CLIP_HOME), CLIP_TRANSFORMERS), load_file(CLIP_HOME / "model.safetensors"))


@pytest.mark.parametrize(
    "stored_as", [["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]]
)
def test_the_t5_embedding_is_found_under_either_name(tmp_path, stored_as):
    tensors = load_file(T5_HOME / "model.safetensors")
    embedding = tensors.pop("shared.weight")
    save_file(tensors | dict.fromkeys(stored_as, embedding), tmp_path / "model.safetensors")
    same_tree(load_t5(tmp_path), load_t5(T5_HOME))


def test_clip_keys_of_the_flux_releases_are_read(tmp_path):
    tensors = load_file(CLIP_HOME / "model.safetensors")
    classic = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    classic["text_model.embeddings.position_ids"] = np.arange(32)[None]
    save_file(classic, tmp_path / "model.safetensors")
    same_tree(load_clip(tmp_path), load_clip(CLIP_HOME))


def test_a_t5_that_lacks_a_layer_is_refused_by_key(tmp_path):
    tensors = load_file(T5_HOME / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "block.1.layer.1" not in key}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing encoder.block.1.layer.1.DenseReluDense.wi_0.weight"):
        load_t5(tmp_path)


@pytest.mark.parametrize("twin", [True, False])
def test_the_t5_of_flux_maps_one_to_one_without_weights(twin):
    with torch.device("meta"):
        model = T5EncoderModel(TorchT5Config(**{**FLUX_T5, "tie_word_embeddings": True}))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if not twin:
        shapes.pop("encoder.embed_tokens.weight", None)
    rules, ignored = t5_tables(shapes)
    assert check_coverage(shapes, rules, abstract_t5(T5_XXL), ignored) == []


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_clip_of_flux_maps_one_to_one_without_weights(prefix):
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**FLUX_CLIP))
    shapes = {prefix + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    rules, ignored = clip_tables(shapes)
    assert check_coverage(shapes, rules, abstract_clip(CLIP_L), ignored) == []


def test_the_configurations_of_flux_are_the_presets():
    assert t5_config_from_transformers(FLUX_T5) == T5_XXL
    assert clip_config_from_transformers(FLUX_CLIP) == CLIP_L


def test_everything_wrong_with_a_t5_configuration_is_named_at_once():
    attributes = {**FLUX_T5, "is_decoder": True, "feed_forward_proj": "gated-silu", "rope": 1, "flash": 2}
    del attributes["d_kv"]
    with pytest.raises(UserError) as error:
        t5_config_from_transformers(attributes)
    for part in ("missing: d_kv", "not understood: rope, flash", "is_decoder=True", "feed_forward_proj='gated-silu'"):
        assert part in str(error.value)


def test_a_t5_configuration_that_contradicts_itself_is_refused():
    with pytest.raises(UserError, match="'gated-gelu' but is_gated_act=False and dense_act_fn='relu'"):
        t5_config_from_transformers({**FLUX_T5, "is_gated_act": False, "dense_act_fn": "relu"})


def test_everything_wrong_with_a_clip_configuration_is_named_at_once():
    with pytest.raises(
        UserError, match=r"not understood: use_rotary; unsupported: model_type='bert'.*hidden_act='relu'"
    ):
        clip_config_from_transformers({**FLUX_CLIP, "use_rotary": True, "model_type": "bert", "hidden_act": "relu"})
    with pytest.raises(UserError, match=r"eos_token_id=\[1, 2\]"):
        clip_config_from_transformers({**FLUX_CLIP, "eos_token_id": [1, 2]})


def test_weights_can_be_loaded_in_bfloat16():
    rules, ignored = t5_tables(Source(T5_HOME).shapes())
    abstract = abstract_t5(t5_config_from_transformers(T5_ATTRIBUTES))
    ours = load_tree(Source(T5_HOME), rules, abstract, ignored=ignored, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
