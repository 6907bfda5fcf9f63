"""Training of the autoencoder on the world's scenes.

1. Loss of one image x in [-1, 1]: mean |x - x^| + mean (x - x^)^2 + `kl` * mean KL(posterior || N(0, 1)), x^ decoded
   from a sample of the posterior. The first term keeps edges sharp, the second outliers rare, the third latents smooth.
2. Adam, linear warm-up, then a cosine to zero.
3. Afterwards the latents' mean and standard deviation over all channels are measured: shift factor and one over scaling
   factor, so that the transformer sees latents of about unit variance, as FLUX's does.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Key

from difffract_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from difffract_jax.organism.recipe import ImageRecipe
from difffract_jax.organism.world import scenes
from difffract_jax.seeds import random_key


class ImageState(NamedTuple):
    """State of the training.

    Attributes:
        vae: the autoencoder.
        optimizer: Adam's moments.
        step: steps taken.
    """

    vae: Autoencoder
    optimizer: optax.OptState
    step: Array


def autoencoder_config(scaling: float = 1.0, shift: float = 0.0) -> AutoencoderConfig:
    """Returns the organism's autoencoder: 48 x 48 pixels to 12 x 12 latents of 8 channels."""
    return AutoencoderConfig(
        latent_channels=8,
        widths=(12, 24, 48),
        layers_per_block=1,
        norm_groups=4,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def _optimizer(recipe: ImageRecipe) -> optax.GradientTransformation:
    warm_up = min(recipe.warm_up, recipe.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warm_up, recipe.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def init(recipe: ImageRecipe, seed: int) -> ImageState:
    """Returns the state before the first step."""
    vae = Autoencoder(autoencoder_config(), rngs=nnx.Rngs(random_key(seed)))
    # optax's types do not know that modules are trees, here and below.
    return ImageState(vae, _optimizer(recipe).init(cast(Any, vae)), jnp.zeros((), jnp.int32))


def batch(recipe: ImageRecipe, seed: int, step: int) -> Float32[np.ndarray, "scene row column rgb"]:
    """Returns the images of one step, in [-1, 1]: scenes of one to three objects, scattered as widely as may be."""
    drawn = scenes(seed, step, recipe.batch - recipe.batch // 4, scatter=1.0)
    triples = scenes(seed, step, recipe.batch // 4, "held out", (3,), scatter=1.0)
    return 2 * np.concatenate([drawn.images(), triples.images()]) - 1


def train_step(
    recipe: ImageRecipe, state: ImageState, images: Float[Array, "scene row column rgb"], key: Key[Array, ""]
) -> tuple[ImageState, dict[str, Array]]:
    """Takes one step; returns the new state and the loss with its parts."""

    def loss(vae: Autoencoder) -> tuple[Array, dict[str, Array]]:
        keys = jax.random.split(key, len(images))
        absolute, squared, divergence = jax.tree.map(jnp.mean, jax.vmap(_losses, (None, 0, 0))(vae, images, keys))
        total = absolute + squared + recipe.kl * divergence
        return total, {"loss": total, "mse": squared, "kl": divergence}

    gradients, metrics = jax.grad(loss, has_aux=True)(state.vae)
    updates, optimizer = _optimizer(recipe).update(gradients, state.optimizer)
    vae = cast(Autoencoder, optax.apply_updates(cast(Any, state.vae), updates))
    return ImageState(vae, optimizer, state.step + 1), metrics


def _losses(vae: Autoencoder, image: Array, key: Key[Array, ""]) -> tuple[Array, Array, Array]:
    mean, logvar = vae.encode(image)
    latent = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    difference = vae.decode(latent) - image
    divergence = (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / 2
    return jnp.mean(jnp.abs(difference)), jnp.mean(jnp.square(difference)), jnp.mean(divergence)
