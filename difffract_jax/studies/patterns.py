"""What of a difference between two runs lies in where attention goes, and what in what it passes on.

Two captions are run side by side from the same noise. In every block of every step the first one's attention takes the
pattern that the second's has there, of its own latents; values, and all else, stay the first one's.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from difffract_jax.models.batch import pixels, sample_batch
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import Pipeline, encode, initial_noise
from difffract_jax.models.stacks import depth_of, sequences, slice_layer, streams
from difffract_jax.studies.evaluations import plain_run


def with_patterns_of(
    pipe: Pipeline, prompts: Sequence[str], others: Sequence[str], seeds: Sequence[int]
) -> UInt8[np.ndarray, "image H W rgb"]:
    """Generates images whose attention goes where it goes in the runs of other captions from the same noise.

    Args:
        pipe: the organism.
        prompts: one per image: what attention passes on.
        others: likewise: where it goes.
        seeds: of the starting noise, alike.

    Raises:
        UserError: if the pipeline's guidance makes two evaluations a step.
    """
    run = plain_run(pipe)
    encoded = {text: encode(pipe, text, run.text_tokens) for text in {*prompts, *others}}
    text, pooled = (
        jnp.stack(
            [jnp.stack([getattr(encoded[one], name) for one in pair]) for pair in zip(prompts, others, strict=True)]
        )
        for name in ("text", "pooled")
    )
    noise = jnp.stack([jnp.stack([initial_noise(pipe, run, seed)] * 2) for seed in seeds])
    latents = sample_batch(_two_velocities, pipe.transformer, run, text, pooled, noise)
    return np.asarray(pixels(pipe.vae, latents[:, 0], run.grid))


def _two_velocities(model: Any, inputs: Inputs, step: Array, grid: tuple[int, int]) -> Float[Array, "two img outputs"]:
    """Returns the velocity of the first run with the patterns of the second, and the second's own.

    Args:
        model: the transformer.
        inputs: of both, with a leading axis.
        step: number of the denoising step.
        grid: rows and columns of image tokens.
    """
    del step
    both = [
        model.embed(inputs._replace(latents=inputs.latents[i], text=inputs.text[i], pooled=inputs.pooled[i]), grid)
        for i in (0, 1)
    ]
    (h, cond), (other, other_cond) = both
    for stack in model.stacks:
        mine, theirs = (sequences(one, stack.groups) for one in (h, other))
        for layer in range(depth_of(stack)):
            block = slice_layer(stack, layer)
            _, acts = block(mine, cond)
            theirs, other_acts = block(theirs, other_cond)
            change = _scores(block, other_acts.frozen) - _scores(block, acts.frozen)
            mine, _ = block(mine, cond, scores=change)
        h, other = (streams(tuple(one), stack.groups, before) for one, before in ((mine, h), (theirs, other)))
    return jnp.stack([model.final(h.img, cond), model.final(other.img, other_cond)])


def _scores(block: Any, frozen: Any) -> Float[Array, "heads queries keys"]:
    q, k = block.queries_and_keys(frozen)
    return jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
