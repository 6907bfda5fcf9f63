"""The pool of training data: scenes drawn, and encoded by the frozen autoencoder and text encoders.

1. Draw batches of scenes and their captions.
2. Images -> posterior means -> latents, shifted and scaled to unit variance, packed into tokens.
3. Captions -> T5's states and CLIP's pooled state.

The shift and the scale are measured on scenes of their own by `measure_latents`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from difffract_jax.generators import random_generator
from difffract_jax.models.autoencoder import Autoencoder, Flux2Autoencoder, Flux2AutoencoderConfig
from difffract_jax.models.sampler import pack
from difffract_jax.models.tokenizers import Tokenizers
from difffract_jax.organism.flow import EncodedScenes
from difffract_jax.organism.text import PooledEncoder, TextEncoder, encode_all, tokenise
from difffract_jax.organism.world import scenes

AT_ONCE = 128
"""Scenes encoded at a time."""
DROPPING = 3
"""Tells the draw of captions that are dropped from others of a seed."""


@jax.jit
def encode_images(vae: Autoencoder, images: Float[Array, "scene row column rgb"]) -> Float[Array, "scene h w latent"]:
    """Returns the posterior means of images in [0, 1], not shifted and not scaled."""
    return jax.vmap(lambda image: vae.encode(2 * image - 1)[0])(images)


def measure_latents(vae: Autoencoder, seed: int, batches: int = 8) -> tuple[float, float]:
    """Returns scaling and shift factor: one over the standard deviation, and the mean, of all latents together."""
    latents = [np.asarray(encode_images(vae, scenes(seed, i, AT_ONCE).images()), np.float64) for i in range(batches)]
    joined = np.concatenate(latents)
    return 1 / float(joined.std()), float(joined.mean())


def with_statistics(vae: Autoencoder, seed: int, batches: int = 8) -> Flux2Autoencoder:
    """Returns an autoencoder as FLUX.2 has it: with mean and variance of every channel of its packed latents.

    Args:
        vae: whose weights are taken.
        seed: of the scenes on which the statistics are measured.
        batches: how many times `AT_ONCE` of them.
    """
    kept = {name: getattr(vae.config, name) for name in ("in_channels", "latent_channels", "widths", "norm_groups")}
    convolutions = {name: getattr(vae.config, name) for name in ("quant_conv", "post_quant_conv", "mid_attention")}
    config = Flux2AutoencoderConfig(layers_per_block=vae.config.layers_per_block, **kept, **convolutions)
    made = Flux2Autoencoder(config, rngs=nnx.Rngs(0))
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        setattr(made, name, getattr(vae, name))
    packed = [np.asarray(_pack_all(encode_images(vae, scenes(seed, i, AT_ONCE).images()))) for i in range(batches)]
    rows = np.concatenate(packed).astype(np.float64).reshape(-1, packed[0].shape[-1])
    made.latents.mean[...] = jnp.asarray(rows.mean(axis=0), jnp.float32)
    made.latents.variance[...] = jnp.asarray(rows.var(axis=0), jnp.float32)
    return made


def build_pool(
    vae: Autoencoder,
    t5: TextEncoder,
    clip: PooledEncoder,
    tokenizers: Tokenizers,
    seed: int,
    size: int,
    progress: Callable[[int, int], None] | None = None,
    dropped: float = 0.0,
) -> EncodedScenes:
    """Draws and encodes scenes.

    Args:
        vae: the autoencoder; its configuration holds scaling and shift factor.
        t5: encoder of the text stream.
        clip: encoder of the pooled vector.
        tokenizers: the organism's.
        seed: of the scenes.
        size: how many; rounded up to whole batches.
        progress: called with (scenes done, scenes in all).
        dropped: share of scenes whose caption is the empty one.
    """
    parts = []
    for number in range(-(-size // AT_ONCE)):
        drawn = scenes(seed, number, AT_ONCE)
        latents = _scaled(vae, encode_images(vae, drawn.images()))
        kept = random_generator(seed, number, DROPPING).random(AT_ONCE) >= dropped
        captions = tuple(text if keep else "" for text, keep in zip(drawn.captions, kept, strict=True))
        parts.append(EncodedScenes(latents, *map(np.asarray, encode_all(t5, clip, tokenise(tokenizers, captions)))))
        if progress is not None:
            progress((number + 1) * AT_ONCE, size)
    return EncodedScenes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _scaled(vae: Autoencoder, latents: Float[Array, "scene h w latent"]) -> Float32[np.ndarray, "scene img channels"]:
    if isinstance(vae, Flux2Autoencoder):
        mean, variance = (np.asarray(one[...]) for one in (vae.latents.mean, vae.latents.variance))
        return (np.asarray(_pack_all(latents)) - mean) / np.sqrt(variance + vae.eps)
    unit = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return np.asarray(_pack_all(unit))


_pack_all = jax.jit(jax.vmap(lambda latent: pack(jnp.asarray(latent))))
