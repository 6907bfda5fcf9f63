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
from jaxtyping import Array, Float, Float32

from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.sampler import pack
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.models.tokenizers import Tokenizers
from difffract_jax.organism.flow import EncodedScenes
from difffract_jax.organism.text import encode_all, tokenise
from difffract_jax.organism.world import scenes

AT_ONCE = 128
"""Scenes encoded at a time."""


@jax.jit
def encode_images(vae: Autoencoder, images: Float[Array, "scene row column rgb"]) -> Float[Array, "scene h w latent"]:
    """Returns the posterior means of images in [0, 1], not shifted and not scaled."""
    return jax.vmap(lambda image: vae.encode(2 * image - 1)[0])(images)


def measure_latents(vae: Autoencoder, seed: int, batches: int = 8) -> tuple[float, float]:
    """Returns scaling and shift factor: one over the standard deviation, and the mean, of all latents together."""
    latents = [np.asarray(encode_images(vae, scenes(seed, i, AT_ONCE).images()), np.float64) for i in range(batches)]
    joined = np.concatenate(latents)
    return 1 / float(joined.std()), float(joined.mean())


def build_pool(
    vae: Autoencoder,
    t5: T5Encoder,
    clip: CLIPTextEncoder,
    tokenizers: Tokenizers,
    seed: int,
    size: int,
    progress: Callable[[int, int], None] | None = None,
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
    """
    parts = []
    for number in range(-(-size // AT_ONCE)):
        drawn = scenes(seed, number, AT_ONCE)
        latents = _scaled(vae, encode_images(vae, drawn.images()))
        parts.append(
            EncodedScenes(latents, *map(np.asarray, encode_all(t5, clip, tokenise(tokenizers, drawn.captions))))
        )
        if progress is not None:
            progress((number + 1) * AT_ONCE, size)
    return EncodedScenes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _scaled(vae: Autoencoder, latents: Float[Array, "scene h w latent"]) -> Float32[np.ndarray, "scene img channels"]:
    unit = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return np.asarray(_pack_all(unit))


_pack_all = jax.jit(jax.vmap(lambda latent: pack(jnp.asarray(latent))))
