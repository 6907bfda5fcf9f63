"""Ablating the organism's MLPs, to see how much each matters (docs/method.md, section 9).

1. `mean_outputs` runs prompts through the sampler and returns the mean output of every MLP per site and denoising step,
   over prompts and tokens.
2. `ablated_velocity` is the model's velocity with the outputs of chosen MLPs replaced: by those means, or by zero.
3. A site is one MLP sublayer: `img` or `txt` of a double-stream block, `joint` of a single-stream block. Which sites
   are ablated is data, so that all of them share one compiled program.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.models.blocks import Streams, both, join, run_mlp, run_mlps, split
from difffract_jax.models.mmdit import FluxConfig, Inputs, MMDiT, run_double, run_single
from difffract_jax.models.pipeline import Run


class SiteValues(NamedTuple):
    """One thing per site, stacked over layers.

    Attributes:
        img: of the double-stream blocks' image MLPs.
        txt: of their text MLPs.
        joint: of the single-stream blocks' MLPs.
    """

    img: Array
    txt: Array
    joint: Array


class Ablation(NamedTuple):
    """Which MLPs are replaced, and by what.

    Attributes:
        replaced: 1 where a site's output is replaced, else 0; [layer].
        value: what it is replaced by, [layer step d_model].
    """

    replaced: SiteValues
    value: SiteValues


def sites(config: FluxConfig) -> list[tuple[str, int]]:
    """Returns every site of a model as (stream, layer), in the order of the forward pass."""
    double = [(stream, layer) for layer in range(config.depth_double) for stream in ("img", "txt")]
    return double + [("joint", layer) for layer in range(config.depth_single)]


def ablation(config: FluxConfig, site: tuple[str, int] | None, value: SiteValues) -> Ablation:
    """Returns the ablation of one site, or of none.

    Args:
        config: of the model.
        site: one of `sites`.
        value: what outputs are replaced by, [layer step d_model].
    """
    depth = {"img": config.depth_double, "txt": config.depth_double, "joint": config.depth_single}
    chosen = {
        stream: jnp.array([(stream, layer) == site for layer in range(layers)], jnp.float32)
        for stream, layers in depth.items()
    }
    return Ablation(SiteValues(**chosen), value)


def ablated_velocity(
    params: tuple[MMDiT, Ablation], inputs: Inputs, step: Array, grid: tuple[int, int]
) -> Float[Array, "img outputs"]:
    """The velocity with some MLPs replaced; see `pipeline.Velocity`."""
    model, change = params
    replaced, value = change.replaced, jax.tree.map(lambda mean: mean[:, step], change.value)

    def swap(y: Array, extra: tuple[Array, Array]) -> Array:
        on, mean = extra
        return y + on * (mean[None, :] - y)

    def double_mlp(extra: Streams, block, x: Streams) -> Streams:
        return both(swap, run_mlps(block, x), extra)

    h, cond = model.embed(inputs, grid)
    pairs = Streams((replaced.img, value.img), (replaced.txt, value.txt))
    h, _ = run_double(model.double, h, cond, mlp=double_mlp, per_layer=pairs)
    joint, _ = run_single(
        model.single,
        join(h),
        cond,
        mlp=lambda extra, block, x: swap(run_mlp(block, x), extra),
        per_layer=(replaced.joint, value.joint),
    )
    return model.final(split(joint, h.txt.shape[0]).img, cond)


def mean_outputs(
    model: MMDiT,
    run: Run,
    text: Float[Array, "image txt text_width"],
    pooled: Float[Array, "image pooled_width"],
    noise: Float[Array, "image img channels"],
) -> SiteValues:
    """Returns the mean output of every MLP per step, [layer step d_model], over images and tokens, padding included."""
    return _mean_outputs(model, text, pooled, noise, jnp.asarray(run.sigmas), run.grid)


@partial(jax.jit, static_argnames="grid")
def _mean_outputs(
    model: MMDiT, text: Array, pooled: Array, noise: Array, sigmas: Array, grid: tuple[int, int]
) -> SiteValues:
    def one(z: Array, txt: Array, vec: Array, sigma: Array) -> tuple[Array, SiteValues]:
        h, cond = model.embed(Inputs(z, txt, vec, sigma), grid)
        h, double = run_double(model.double, h, cond, tap=lambda acts: both(_token_mean, acts.mlp_out))
        joint, single = run_single(model.single, join(h), cond, tap=lambda acts: _token_mean(acts.mlp_out))
        velocity = model.final(split(joint, txt.shape[0]).img, cond)
        return velocity, SiteValues(double.img, double.txt, single)

    def step(latents: Array, levels: tuple[Array, Array]) -> tuple[Array, SiteValues]:
        sigma, after = levels
        velocity, means = jax.vmap(one, (0, 0, 0, None))(latents, text, pooled, sigma)
        return latents + (after - sigma) * velocity, jax.tree.map(lambda mean: mean.mean(axis=0), means)

    _, means = jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))
    return jax.tree.map(lambda mean: jnp.swapaxes(mean, 0, 1), means)


def _token_mean(y: Float[Array, "rows d_model"]) -> Float[Array, "d_model"]:
    return jnp.mean(y, axis=0)
