"""Flow-matching sampling with Euler steps, and the packing of latents, both as diffusers has them for FLUX.1.

1. `sigmas`: a schedule from 1 (noise) down to 0; FLUX.1-schnell takes equal steps, FLUX.1-dev shifts them towards
   noise, the more the larger the image, FLUX.2 by the number of steps as well.
2. One step: z <- z + (sigma_next - sigma) v, where v is the velocity at (z, sigma).
3. `pack`: 2 x 2 patches of a latent become one token; `unpack` undoes it.
4. `scale_for_decoder`: what the autoencoder decodes is z / scaling + shift.

The transformer is fed sigma itself as its time t in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64
from scipy.special import betaincinv

from difffract_jax.config import UserError
from difffract_jax.models.streaming import stack_trees
from difffract_jax.seeds import random_key

PATCH = 2
"""Side of the patch of latents that becomes one token."""
BETA = 0.6
"""Both parameters of the beta distribution of beta sigmas, as in diffusers."""
RHO = 7.0
"""Exponent of Karras sigmas (Karras et al. 2022, equation 5)."""


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
        use_beta_sigmas: put the levels, once shifted, between their ends as a beta distribution's quantiles lie.
        use_karras_sigmas: the same, evenly in their `RHO`th root.
        use_exponential_sigmas: the same, evenly in their logarithm. At most one of the three may be set.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    num_train_timesteps: int = 1000
    use_beta_sigmas: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False

    def levels(self, steps: int) -> Float64[np.ndarray, "step"]:
        """Returns the noise level entering every step, before it is shifted."""
        return np.linspace(1.0, 1 / steps, steps)

    def log_shift(self, steps: int, image_tokens: int) -> float:
        """Returns the logarithm of the shift where it is dynamic.

        Args:
            steps: denoising steps.
            image_tokens: length of the image sequence.
        """
        del steps
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (image_tokens - self.base_image_seq_len)

    def respaced(self, levels: Float64[np.ndarray, "step"]) -> Float64[np.ndarray, "step"]:
        """Returns the noise level entering every step, from those that are shifted, as diffusers respaces them."""
        high, low, places = levels[0], levels[-1], np.linspace(0, 1, levels.size)
        if self.use_beta_sigmas:
            return low + betaincinv(BETA, BETA, 1 - places) * (high - low)
        if self.use_karras_sigmas:
            return (high ** (1 / RHO) + places * (low ** (1 / RHO) - high ** (1 / RHO))) ** RHO
        if self.use_exponential_sigmas:
            return np.exp(np.linspace(np.log(high), np.log(low), levels.size))
        return levels


@dataclass(frozen=True, kw_only=True)
class Flux2SchedulerConfig(SchedulerConfig):
    """FLUX.2's schedule: how far it is shifted was fitted, as a function of image tokens and steps.

    Attributes:
        family: what `config.json` of a directory tells this schedule by.
    """

    family: Literal["flux2"] = "flux2"

    def log_shift(self, steps: int, image_tokens: int) -> float:
        """Returns the logarithm of the shift: linear in the tokens at 10 and at 200 steps, and in the steps between.

        Args:
            steps: denoising steps.
            image_tokens: length of the image sequence; above 4300 that of 200 steps counts whatever the steps.
        """
        many = 0.00016927 * image_tokens + 0.45666666
        few = 8.73809524e-05 * image_tokens + 1.89833333
        return many if image_tokens > 4300 else many + (many - few) / 190 * (steps - 200)


@dataclass(frozen=True, kw_only=True)
class Sd3SchedulerConfig(SchedulerConfig):
    """Stable Diffusion 3's schedule: its last step starts from the lowest level of training, whatever the steps.

    That level is shifted already, and shifted again as the others are.

    Attributes:
        family: what `config.json` of a directory tells this schedule by.
    """

    family: Literal["sd3"] = "sd3"

    def levels(self, steps: int) -> Float64[np.ndarray, "step"]:
        """Returns the noise level entering every step, before it is shifted."""
        lowest = 1 / self.num_train_timesteps
        if not self.use_dynamic_shifting:
            lowest = self.shift * lowest / (1 + (self.shift - 1) * lowest)
        return np.linspace(1.0, lowest, steps)


@dataclass(frozen=True, kw_only=True)
class ChromaSchedulerConfig(SchedulerConfig):
    """Chroma's schedule: FLUX.1's.

    Attributes:
        family: what `config.json` of a directory tells this schedule by.
    """

    family: Literal["chroma"] = "chroma"


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
            f"steps must be at least 1, but got {steps}; FLUX.1-schnell and FLUX.2-klein were made for 4, FLUX.1-dev "
            "for 28 to 50."
        )
    levels = config.levels(steps)
    if config.use_dynamic_shifting:
        factor = math.exp(config.log_shift(steps, image_tokens))
        levels = factor / (factor + (1 / levels - 1))
    else:
        levels = config.shift * levels / (1 + (config.shift - 1) * levels)
    return np.append(config.respaced(levels), 0.0).astype(np.float32)


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
