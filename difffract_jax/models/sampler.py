"""Flow-matching sampling with Euler steps, and the packing of latents, both as diffusers has them for FLUX.1.

1. `sigmas`: a schedule from 1 (noise) down to 0; FLUX.1-schnell takes equal steps, FLUX.1-dev shifts them towards
   noise, the more the larger the image.
2. One step: z <- z + (sigma_next - sigma) v, where v is the velocity at (z, sigma).
3. `pack`: 2 x 2 patches of a latent become one token; `unpack` undoes it.
4. `scale_for_decoder`: what the autoencoder decodes is z / scaling + shift.

The transformer is fed sigma itself as its time t in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from difffract_jax.config import UserError
from difffract_jax.models.streaming import stack_trees
from difffract_jax.seeds import random_key

PATCH = 2
"""Side of the patch of latents that becomes one token."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """A schedule of noise levels.

    Attributes:
        shift: s in s x / (1 + (s - 1) x); 1 leaves the steps equal.
        use_dynamic_shifting: shift by image size instead, between the two points below.
        base_shift: logarithm of the shift at `base_image_seq_len` image tokens.
        max_shift: the same at `max_image_seq_len`.
        base_image_seq_len: image tokens of the first point.
        max_image_seq_len: image tokens of the second point.
        num_train_timesteps: noise levels in training; the time fed to the model is in [0, 1] whatever it is.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    num_train_timesteps: int = 1000


def sigmas(config: SchedulerConfig, steps: int, image_tokens: int) -> Float32[np.ndarray, "step_and_end"]:
    """Returns the noise level entering every step, and the final 0.

    Args:
        config: the schedule.
        steps: number of denoising steps.
        image_tokens: length of the image sequence, which dynamic shifting depends on.

    Raises:
        UserError: if there is no step.

    Example:
        >>> sigmas(SchedulerConfig(), 4, 36).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if steps < 1:
        raise UserError(
            f"steps must be at least 1, but got {steps}; FLUX.1-schnell was made for 4, FLUX.1-dev for 28 to 50."
        )
    levels = np.linspace(1.0, 1 / steps, steps)
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        factor = math.exp(config.base_shift + slope * (image_tokens - config.base_image_seq_len))
        levels = factor / (factor + (1 / levels - 1))
    else:
        levels = config.shift * levels / (1 + (config.shift - 1) * levels)
    return np.append(levels, 0.0).astype(np.float32)


def pack(latent: Float[Array | np.ndarray, "h w latent"]) -> Float[Array, "img channels"]:
    """Turns a latent into tokens, row by row; a token's channels are latent channel, then row, then column."""
    h, w, channels = latent.shape
    patches = jnp.reshape(jnp.asarray(latent), (h // PATCH, PATCH, w // PATCH, PATCH, channels))
    return patches.transpose(0, 2, 4, 1, 3).reshape(h // PATCH * (w // PATCH), channels * PATCH**2)


def unpack(tokens: Float[Array, "img channels"], grid: tuple[int, int]) -> Float[Array, "h w latent"]:
    """Turns tokens back into a latent.

    Args:
        tokens: as `pack` makes them.
        grid: rows and columns of tokens.
    """
    patches = tokens.reshape(*grid, -1, PATCH, PATCH).transpose(0, 3, 1, 4, 2)
    return patches.reshape(grid[0] * PATCH, grid[1] * PATCH, -1)


def draw_noise(seed: int, grid: tuple[int, int], channels: int) -> Float32[Array, "img channels"]:
    """Draws packed starting noise from a seed; the same on every device and mesh.

    Args:
        seed: in [0, 2**64), of JAX's generator; diffusers' noise of the same seed is another one.
        grid: rows and columns of tokens.
        channels: channels of a token.
    """
    return jax.random.normal(random_key(seed), (grid[0] * grid[1], channels), jnp.float32)


def euler_scan(
    evaluate: Callable[[Array, Array, Array, Any], tuple[Array, Any]],
    noise: Float[Array, "*batch img channels"],
    levels: Float[Array, "step_and_end"],
    per_step: Any = None,
    *,
    streamed: bool = False,
) -> tuple[Float[Array, "*batch img channels"], Any]:
    """Takes all Euler steps in one scan, of one example or of many together; for use inside compiled programs.

    Args:
        evaluate: from latents entering a step, its noise level, its number, and its slice of `per_step`, to the
            velocity and anything to report.
        noise: packed starting noise.
        levels: noise level entering every step, and the final 0.
        per_step: tree with a leading step axis.
        streamed: whether `evaluate` runs a streamed model; then the steps are a loop on the host.

    Returns:
        Packed latents after the last step, and the reports, stacked on a leading step axis.
    """

    def step(z: Array, now: tuple[Array, Array, Array, Any]) -> tuple[Array, Any]:
        sigma, after, number, extra = now
        v, report = evaluate(z, sigma, number, extra)
        return z + (after - sigma) * v.astype(z.dtype), report

    numbers = jnp.arange(levels.shape[0] - 1)
    over = levels[:-1], levels[1:], numbers, per_step
    if not streamed:
        return jax.lax.scan(step, noise, over)
    reports = []
    for number in range(numbers.size):
        noise, report = step(noise, jax.tree.map(lambda leaf, i=number: leaf[i], over))
        reports.append(report)
    return noise, stack_trees(reports)


def scale_for_decoder(latent: Float[Array, "h w latent"], scaling: float, shift: float) -> Float[Array, "h w latent"]:
    """Undoes the scaling that makes latents standard normal."""
    return latent / scaling + shift
