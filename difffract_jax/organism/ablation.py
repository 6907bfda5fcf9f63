"""Ablating the organism's MLPs, to see how much each matters (docs/method.md, section 9).

1. `mean_outputs` runs prompts through the sampler and returns the mean output of every MLP per site and denoising step,
   over prompts and tokens.
2. `ablated_velocity` is the model's velocity with the outputs of chosen MLPs replaced: by those means, or by zero.
3. A site is one MLP sublayer, a group's in one block of its stack. Which sites are ablated is data, so that all of them
   share one compiled program.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.models.guidance import NegativeBranch, step_velocity
from difffract_jax.models.mmdit import FluxConfig, Inputs, MMDiT, forward
from difffract_jax.models.pipeline import Run
from difffract_jax.models.sampler import euler_scan
from difffract_jax.models.stacks import Visit, per_group

SiteValues = tuple[Float[Array, "_ ..."], ...]
"""One array per group, stacked over its stack's blocks."""


class Ablation(NamedTuple):
    """Which MLPs are replaced, and by what.

    Attributes:
        replaced: 1 where a site's output is replaced, else 0; per group, [layer].
        value: what it is replaced by, per group, [layer evaluation d_model].
    """

    replaced: SiteValues
    value: SiteValues


def sites(config: FluxConfig) -> list[tuple[int, int]]:
    """Returns every site of a model in the order of the forward pass: number of its group, and block of the stack."""
    layout = config.layout
    return [
        (group, layer)
        for stack, one in enumerate(layout.stacks)
        for layer in range(one.depth)
        for group, home in enumerate(layout.stack_of_group)
        if home == stack
    ]


def ablation(config: FluxConfig, site: tuple[int, int] | None, value: SiteValues) -> Ablation:
    """Returns the ablation of one site, or of none.

    Args:
        config: of the model.
        site: one of `sites`.
        value: what outputs are replaced by, per group, [layer evaluation d_model].
    """
    layout = config.layout
    depths = (len(layout.blocks_of(group)) for group in range(len(layout.groups)))
    chosen = (
        jnp.array([(group, layer) == site for layer in range(depth)], jnp.float32) for group, depth in enumerate(depths)
    )
    return Ablation(tuple(chosen), value)


def ablated_velocity(
    params: tuple[MMDiT, Ablation], inputs: Inputs, step: Array, grid: tuple[int, int]
) -> Float[Array, "img outputs"]:
    """The velocity with some MLPs replaced; see `pipeline.Velocity`."""
    model, change = params
    value = jax.tree.map(lambda mean: mean[:, step], change.value)

    def write(
        fixed: None, site: tuple[Array, Array], x: Array, true: Callable[[], Array]
    ) -> tuple[Float[Array, "rows d_model"], None]:
        del fixed, x
        (on, mean), y = site, true()
        return y + on * (mean[None, :] - y), None

    layers = tuple(zip(change.replaced, value, strict=True))
    return forward(model, inputs, grid, write=write, layers=layers)[0]


def mean_outputs(
    model: MMDiT,
    run: Run,
    text: Float[Array, "image txt text_width"],
    pooled: Float[Array, "image pooled_width"],
    noise: Float[Array, "image img channels"],
    negative: NegativeBranch | None = None,
) -> SiteValues:
    """Returns the mean output of every MLP per evaluation, over images and tokens, padding included.

    Args:
        model: the transformer.
        run: sizes and schedule.
        text: text embeddings.
        pooled: pooled prompt embeddings.
        noise: packed starting noise.
        negative: with guidance by two branches, from `pipeline.negative_branch`.

    Returns:
        Per group, [layer evaluation d_model].
    """
    return _mean_outputs(model, text, pooled, noise, jnp.asarray(run.sigmas), negative, run.grid)


@partial(jax.jit, static_argnames="grid")
def _mean_outputs(
    model: MMDiT,
    text: Array,
    pooled: Array,
    noise: Array,
    sigmas: Array,
    negative: NegativeBranch | None,
    grid: tuple[int, int],
) -> SiteValues:
    def evaluate(latents: Array, sigma: Array, number: Array, _: None) -> tuple[Array, SiteValues]:
        def one(z: Array, txt: Array, vec: Array) -> tuple[Array, SiteValues]:
            def branch(number: Array, txt: Array, vec: Array) -> tuple[Array, SiteValues]:
                del number
                velocity, reports = forward(model, Inputs(z, txt, vec, sigma), grid, tap=_token_means)
                return velocity, per_group(reports)

            return step_velocity(branch, txt, vec, negative, number, z.dtype)

        velocity, means = jax.vmap(one)(latents, text, pooled)
        return velocity, jax.tree.map(lambda mean: mean.mean(axis=0), means)

    _, means = euler_scan(evaluate, noise, sigmas)
    # [step branch layer d_model]: evaluations are numbered step by step.
    return jax.tree.map(lambda mean: jnp.swapaxes(mean.reshape(-1, *mean.shape[2:]), 0, 1), means)


def _token_means(visit: Visit) -> SiteValues:
    return tuple(jnp.mean(y, axis=0) for y in visit.acts.mlp_out)
