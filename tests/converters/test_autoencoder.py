"""The autoencoder's table: the way back, full size, old checkpoints, and configurations that are refused."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from flax import nnx
from safetensors.numpy import load_file, save_file

from converters.autoencoder import AUTOENCODER_DIFFUSERS, autoencoder_config_from_diffusers
from converters.mapping import ConversionError, Source, check_coverage, load_tree, save_tree
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import FLUX_VAE, Autoencoder
from tolerances import REFERENCE

HOME = REFERENCE / "pipeline" / "vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# The config.json of the FLUX.1 releases.
FLUX = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def abstract(config):
    return jax.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))


def load(home):
    config = autoencoder_config_from_diffusers(json.loads((HOME / "config.json").read_text()))
    return load_tree(Source(home / WEIGHTS), AUTOENCODER_DIFFUSERS, abstract(config))


def test_the_autoencoder_comes_back_tensor_for_tensor():
    expected = load_file(HOME / WEIGHTS)
    pairs = list(save_tree(load(HOME), AUTOENCODER_DIFFUSERS))
    assert len(pairs) == len(expected) == len(dict(pairs))
    for key, tensor in pairs:
        np.testing.assert_array_equal(tensor, expected[key])


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("post_quant", [True, False])
def test_the_autoencoder_of_flux_maps_one_to_one_without_weights(quant, post_quant):
    attributes = {**FLUX, "use_quant_conv": quant, "use_post_quant_conv": post_quant}
    with torch.device("meta"):
        model = AutoencoderKL.from_config(attributes)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config = autoencoder_config_from_diffusers(attributes)
    assert check_coverage(shapes, AUTOENCODER_DIFFUSERS, abstract(config)) == []


def test_old_names_of_the_attention_are_refused_by_key(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(HOME / WEIGHTS)
    for new, name in old.items():
        tensors = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in tensors.items()
        }
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ConversionError) as error:
        load(tmp_path)
    assert "missing encoder.mid_block.attentions.0.to_q.weight" in error.value.problems
    assert "unknown decoder.mid_block.attentions.0.proj_attn.bias" in error.value.problems


def test_attention_stored_as_convolutions_is_refused_by_shape(tmp_path):
    tensors = load_file(HOME / WEIGHTS)
    key = "encoder.mid_block.attentions.0.to_q.weight"
    save_file(tensors | {key: tensors[key][:, :, None, None]}, tmp_path / WEIGHTS)
    with pytest.raises(ConversionError, match=r"to_q.weight .*\(16, 16, 1, 1\)"):
        load(tmp_path)


def test_the_configuration_of_flux_is_the_preset():
    assert autoencoder_config_from_diffusers(FLUX) == FLUX_VAE


def test_what_old_configurations_leave_out_has_the_value_it_had_then():
    names = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "shift_factor")
    config = autoencoder_config_from_diffusers({name: value for name, value in FLUX.items() if name not in names})
    assert (config.quant_conv, config.post_quant_conv, config.mid_attention, config.shift_factor) == (
        True,
        True,
        True,
        0,
    )


def test_everything_wrong_with_a_configuration_is_named_at_once():
    attributes = {**FLUX, "act_fn": "relu", "latents_mean": [0.0], "use_tiling_v2": True}
    del attributes["block_out_channels"]
    with pytest.raises(UserError) as error:
        autoencoder_config_from_diffusers(attributes)
    for part in ("missing: block_out_channels", "not understood: use_tiling_v2", "act_fn='relu'", "latents_mean=[0.0]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"out_channels": 4},
        {"down_block_types": ["AttnDownEncoderBlock2D"] * 4},
        {"up_block_types": ["UpDecoderBlock2D"]},
    ],
)
def test_levels_of_another_kind_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        autoencoder_config_from_diffusers({**FLUX, **change})
