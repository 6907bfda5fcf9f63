"""The autoencoder against PyTorch's on random weights, against the golden data, and its own laws."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from flax import nnx

from converters.autoencoder import AUTOENCODER_DIFFUSERS, autoencoder_config_from_diffusers
from converters.mapping import Source, load_tree
from difffract_jax.models import autoencoder
from difffract_jax.models.autoencoder import FLUX_VAE, Autoencoder, AutoencoderConfig, PixelAttention
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tiny import random_weights
from tolerances import REFERENCE, TOL, relative_error

TINY = AutoencoderConfig(
    latent_channels=3, widths=(4, 8), layers_per_block=1, norm_groups=2, scaling_factor=1.0, shift_factor=0.0
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(home):
    config = autoencoder_config_from_diffusers(json.loads((home / "config.json").read_text()))
    abstract = jax.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    return load_tree(Source(home / WEIGHTS), AUTOENCODER_DIFFUSERS, abstract)


def tiny(seed, dtype=jnp.float32):
    """A small random model."""
    return random_weights(abstract_module(Autoencoder, TINY, dtype), seed)


def random_torch(widths, layers, quant, attention):
    torch.manual_seed(sum(widths))
    model = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=layers,
        latent_channels=3,
        norm_num_groups=2,
        sample_size=16,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=attention,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return model


CASES = [((4, 8), 1, True, True), ((4, 4, 6), 2, False, True), ((8, 4, 6, 6), 1, True, False)]


@pytest.mark.parametrize(("widths", "layers", "quant", "attention"), CASES)
@pytest.mark.parametrize("size", [(2, 3), pytest.param((5, 1), marks=pytest.mark.slow)])
def test_random_weights_decode_and_encode_as_pytorch_does(tmp_path, widths, layers, quant, attention, size):
    model = random_torch(widths, layers, quant, attention)
    model.save_pretrained(tmp_path)
    ours = load(tmp_path)
    random = np.random.default_rng(0)
    latent = random.normal(size=(*size, 3)).astype(np.float32)
    image = random.normal(size=(size[0] * ours.config.factor, size[1] * ours.config.factor, 3)).astype(np.float32)
    with torch.no_grad():
        decoded = model.decode(torch.from_numpy(latent).permute(2, 0, 1)[None]).sample[0].permute(1, 2, 0)
        encoded = model.encode(torch.from_numpy(image).permute(2, 0, 1)[None]).latent_dist
    mean, logvar = jax.jit(Autoencoder.encode)(ours, jnp.asarray(image))
    assert relative_error(jax.jit(Autoencoder.decode)(ours, jnp.asarray(latent)), decoded) <= TOL.f32_block
    assert relative_error(mean, encoded.mean[0].permute(1, 2, 0)) <= TOL.f32_block
    assert relative_error(logvar, encoded.logvar[0].permute(1, 2, 0)) <= TOL.f32_block


@pytest.mark.parametrize("prompt", ["p0", "p1"])
def test_golden_images_are_met(prompt):
    golden = np.load(REFERENCE / "golden_forward.npz")
    latent = jnp.asarray(golden[f"{prompt}_vae_in"].transpose(1, 2, 0))
    decoded = jax.jit(Autoencoder.decode)(load(REFERENCE / "pipeline" / "vae"), latent)
    assert relative_error(decoded, golden[f"{prompt}_vae_raw"].transpose(1, 2, 0)) <= TOL.f32_block


def test_attention_in_pieces_equals_attention_at_once(monkeypatch):
    attention = PixelAttention(8, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 3, 8))
    whole = jax.jit(lambda attention, x: attention(x))(attention, x)
    # 15 pixels in pieces of 4: the last one is short.
    monkeypatch.setattr(autoencoder, "QUERIES_AT_ONCE", 4)
    assert relative_error(jax.jit(lambda attention, x: attention(x))(attention, x), whole) <= TOL.f32_block


@pytest.mark.slow
def test_a_batch_is_a_vmap():
    vae = tiny(1)
    latents = jax.random.normal(jax.random.key(0), (2, 4, 3, 3))
    decode = jax.jit(Autoencoder.decode)
    batch = jax.jit(jax.vmap(Autoencoder.decode, in_axes=(None, 0)))(vae, latents)
    assert relative_error(batch[1], decode(vae, latents[1])) <= TOL.f32_block


def test_log_variances_are_clipped():
    vae = tiny(0)
    vae.encoder.conv_out.bias[...] = jnp.array([0.0, 0.0, 0.0, 1e3, -1e3, 0.0])
    _, logvar = jax.jit(Autoencoder.encode)(vae, jnp.zeros((4, 4, 3)))
    assert (logvar.min(), logvar.max()) == (-30, 20)


def test_float64_weights_compute_in_float64(x64):
    vae = jax.eval_shape(lambda: Autoencoder(TINY, rngs=nnx.Rngs(0), dtype=jnp.float64))
    image = jax.eval_shape(Autoencoder.decode, vae, jax.ShapeDtypeStruct((2, 2, 3), jnp.float64))
    assert image.dtype == jax.eval_shape(Autoencoder.encode, vae, image)[0].dtype == jnp.float64


def test_bfloat16_weights_stay_close_to_float32_under_strict_promotion():
    rounded = tiny(2, jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, np.float32)), rounded)
    latent = jax.random.normal(jax.random.key(0), (3, 3, 3))
    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(Autoencoder.decode)(rounded, latent.astype(jnp.bfloat16))
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours.astype(jnp.float32), jax.jit(Autoencoder.decode)(exact, latent)) <= TOL.bf16


def test_an_image_of_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="5 x 4 pixels, but both sides must be divisible by 2"):
        tiny(0).encode(jnp.zeros((5, 4, 3)))


def test_the_autoencoder_of_flux_has_its_known_number_of_parameters():
    leaves = jax.tree.leaves(jax.eval_shape(lambda: Autoencoder(FLUX_VAE, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in leaves) == 83_819_683
    assert FLUX_VAE.factor == 8
