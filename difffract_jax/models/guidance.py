"""Classifier-free guidance by two branches: a step evaluates the model with the prompt, and with a negative prompt.

    v = v_neg + s (v_pos - v_neg) = s v_pos + (1 - s) v_neg

1. Both branches read the same latents; what differs is the text. s = 1 is the prompt alone, and one evaluation a step.
2. An *evaluation* is one branch of one step. Evaluations of a run are numbered step by step, the prompt's branch first:
   number = step x branches + branch. Where a step is one evaluation, this is the step.
3. In a trace every evaluation is recorded alone, `TraceInfo.velocity_weight` is the factor of its velocity: s of the
   prompt's, 1 - s of the negative one (docs/method.md, section 12).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.config import UserError


def guided(
    velocity: Sequence[Float[Array, "*shape"]] | Float[Array, "branch *shape"], scale: Any
) -> Float[Array, "*shape"]:
    """Returns the velocity of a step from those of its branches, v_neg + s (v_pos - v_neg).

    Args:
        velocity: of the prompt's branch, then of the negative one.
        scale: guidance scale s.
    """
    positive, negative = velocity
    return negative + scale * (positive - negative)


class NegativeBranch(NamedTuple):
    """What guidance by two branches needs besides the prompts.

    Attributes:
        text: embedding of the negative prompt.
        pooled: its pooled embedding.
        scale: guidance scale.
    """

    text: Float[Any, "txt text_width"]
    pooled: Float[Any, "pooled_width"]
    scale: Float[Any, ""]


Evaluate = Callable[[Any, Array, Array], tuple[Array, Any]]
"""`evaluate(number, text, pooled)`: the velocity of one evaluation, and anything to report of it."""


def step_velocity(
    evaluate: Evaluate,
    text: Float[Array, "*runs txt text_width"],
    pooled: Float[Array, "*runs pooled_width"],
    negative: NegativeBranch | None,
    step: Any,
    dtype: DTypeLike,
) -> tuple[Float[Array, "*runs img outputs"], Any]:
    """Returns the velocity of a step of one example, and what its evaluations report, on a leading axis of branches.

    Args:
        evaluate: one evaluation.
        text: text embedding of the prompt.
        pooled: its pooled embedding.
        negative: with guidance by two branches; None where a step is one evaluation.
        step: number of the step.
        dtype: of the latents, in which the branches' velocities are put together.
    """
    if negative is None:
        velocity, report = evaluate(step, text, pooled)
        return velocity.astype(dtype), jax.tree.map(lambda a: a[None], report)
    both = [
        jnp.stack([own, jnp.broadcast_to(jnp.asarray(other, own.dtype), own.shape)])
        for own, other in ((text, negative.text), (pooled, negative.pooled))
    ]
    velocity, reports = jax.vmap(evaluate)(2 * step + jnp.arange(2), *both)
    return guided(velocity.astype(dtype), negative.scale), reports


def check_branches(guidance: float | None, default: float, negative_prompt: str | None) -> float:
    """Returns the guidance scale of a run of a model that takes two branches.

    Args:
        guidance: as given; None for the default.
        default: scale of a run that names none.
        negative_prompt: as given; None for the empty one.

    Raises:
        UserError: if the scale is below 1 or not finite, or there is a negative prompt without guidance.
    """
    scale = default if guidance is None else guidance
    if not 1 <= scale < math.inf:
        raise UserError(
            f"The guidance scale of this model must be at least 1, and finite, but got {scale}; 1 takes the prompt "
            f"alone, {default:g} is usual."
        )
    if negative_prompt is not None and scale == 1:
        raise UserError(
            "A negative prompt is read by guidance alone, and a guidance scale of 1 is none; give a larger scale with "
            "--guidance, or leave --negative-prompt out."
        )
    return scale
