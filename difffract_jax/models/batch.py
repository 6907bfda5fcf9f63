"""Many images at once: the loop of `pipeline`, vectorised over prompts and seeds, compiled once per size.

1. Encode every prompt; draw every seed's noise. Both are what `pipeline.generate` uses for one.
2. Scan over the steps; one step evaluates the velocity of all examples by `jax.vmap`, with guidance by two branches
   both evaluations of each, of which the negative one has the same negative prompt for all.
3. Decode all latents.

The velocity is an argument, as in the pipeline: the model's own, or that of an edited or ablated model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from difffract_jax.config import UserError
from difffract_jax.models import sampler
from difffract_jax.models.guidance import NegativeBranch, step_velocity
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import (
    Pipeline,
    Run,
    Velocity,
    decode_raw,
    encode,
    model_velocity,
    negative_branch,
    plan_run,
)
from difffract_jax.models.streaming import jit_resident, streams_layers


def generate_batch(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    run: Run | None = None,
    velocity: Velocity = model_velocity,
    params: Any = None,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> UInt8[np.ndarray, "image H W rgb"]:
    """Generates one image per prompt and seed.

    Args:
        pipe: the pipeline.
        prompts: one per image.
        seeds: of the starting noise, one per image.
        steps: denoising steps; the pipeline's default if left out.
        run: sizes, schedule and guidance, from `pipe.plan`; the pipeline's defaults, with these steps, if left out.
        velocity: whose velocity, see `pipeline.Velocity`.
        params: its first argument; the pipeline's transformer if left out.
        batch: images computed together.
        progress: called with (images done, images in all).

    Returns:
        Pixels.

    Raises:
        UserError: if there are not as many seeds as prompts, or both steps and a run are given.
    """
    if run is not None and steps is not None:
        raise UserError("A run has its steps already, but steps were given too; leave one of them out.")
    if len(prompts) != len(seeds):
        raise UserError(f"Every prompt needs one seed, but got {len(prompts)} prompts and {len(seeds)} seeds.")
    run = run or plan_run(pipe.config, steps=steps)
    encoded = {prompt: encode(pipe, prompt, run.text_tokens) for prompt in dict.fromkeys(prompts)}
    text, pooled = (jnp.stack([getattr(encoded[prompt], name) for prompt in prompts]) for name in ("text", "pooled"))
    channels = pipe.config.transformer.in_channels
    noise = jnp.stack([sampler.draw_noise(seed, run.grid, channels) for seed in seeds])
    return draw(pipe, run, text, pooled, noise, velocity=velocity, params=params, batch=batch, progress=progress)


def draw(
    pipe: Pipeline,
    run: Run,
    text: Float[Array, "image txt text_width"],
    pooled: Float[Array, "image pooled_width"],
    noise: Float[Array, "image img channels"],
    *,
    velocity: Velocity = model_velocity,
    params: Any = None,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> UInt8[np.ndarray, "image H W rgb"]:
    """Generates one image per row of embeddings and noise; see `generate_batch`."""
    weights = pipe.transformer if params is None else params
    images, negative = [], negative_branch(pipe, run, noise.dtype)
    for first in range(0, len(noise), batch):
        rows = np.arange(first, min(first + batch, len(noise)))
        # The last batch is filled up, so that every batch has the compiled size.
        filled = np.resize(rows, batch) if first else rows
        latents = sample_batch(velocity, weights, run, text[filled], pooled[filled], noise[filled], negative)
        images.append(np.asarray(pixels(pipe.vae, latents, run.grid))[: len(rows)])
        if progress is not None:
            progress(int(rows[-1]) + 1, len(noise))
    return np.concatenate(images)


def sample_batch(
    velocity: Velocity,
    params: Any,
    run: Run,
    text: Float[Array, "image *runs txt text_width"],
    pooled: Float[Array, "image *runs pooled_width"],
    noise: Float[Array, "image *runs img channels"],
    negative: NegativeBranch | None = None,
) -> Float[Array, "image *runs img channels"]:
    """Takes all Euler steps of many examples.

    Args:
        velocity: whose velocity; of several runs side by side, where the arrays have an axis of them behind images.
        params: its first argument.
        run: sizes and schedule.
        text: text embeddings.
        pooled: pooled prompt embeddings.
        noise: packed starting noise.
        negative: of all images, from `pipeline.negative_branch`; needed where the run has guidance by two branches.

    Returns:
        Packed latents after the last step.

    Raises:
        ValueError: if the run has guidance by two branches and there is no negative prompt, or the other way round.
    """
    if (negative is None) == (run.branches > 1):
        raise ValueError(f"The run has {run.branches} evaluations a step, but `negative` is {negative}.")
    sigmas = jnp.asarray(run.sigmas)
    return _sample(velocity, params, text, pooled, noise, sigmas, negative, run.grid, run.fed_guidance)


@partial(jit_resident, static_argnames=("velocity", "grid", "guidance"))
def _sample(
    velocity: Velocity,
    params: Any,
    text: Array,
    pooled: Array,
    noise: Array,
    sigmas: Array,
    negative: NegativeBranch | None,
    grid: tuple[int, int],
    guidance: float | None,
) -> Array:
    scale = None if guidance is None else jnp.asarray(guidance, noise.dtype)

    def evaluate(latents: Array, sigma: Array, number: Array, _: None) -> tuple[Array, None]:
        def one(z: Array, txt: Array, vec: Array) -> Array:
            def branch(number: Array, txt: Array, vec: Array) -> tuple[Array, None]:
                return velocity(params, Inputs(z, txt, vec, sigma, scale), number, grid), None

            return step_velocity(branch, txt, vec, negative, number, z.dtype)[0]

        return jax.vmap(one)(latents, text, pooled), None

    return sampler.euler_scan(evaluate, noise, sigmas, streamed=streams_layers(params))[0]


@partial(jax.jit, static_argnames="grid")
def pixels(
    vae: Any, latents: Float[Array, "image img channels"], grid: tuple[int, int]
) -> UInt8[Array, "image H W rgb"]:
    """Decodes packed latents of many images.

    Args:
        vae: the autoencoder.
        latents: after the last step.
        grid: rows and columns of image tokens.
    """
    raw = jax.vmap(lambda z: decode_raw(vae, z, grid))(latents)
    return jnp.round(255 * jnp.clip(raw / 2 + 0.5, 0, 1)).astype(jnp.uint8)
