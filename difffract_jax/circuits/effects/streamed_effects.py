"""Total effects where transcoders are streamed: the backward pass of `total_effects`, a block at a time on the host.

1. Every step's frozen map runs once at the traced point, and what enters each block is kept.
2. From the last step to the first, and within a step from the last block to the first, a block's transcoders are
   fetched and the derivative by what enters it, and by its features' and errors' factors, is pulled back. The map is
   affine in what enters a block, so that what is pulled back does not depend on the order in which blocks are run.
3. Latents take a step's derivative to the step before; the text embedding gathers that of all steps. With guidance by
   two branches both evaluations of a step read the same latents, which gather what both send back before the step
   before, and each branch has a text embedding of its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.circuits.frozen.encoding import SiteLayers
from difffract_jax.circuits.frozen.replacement import Replacement, residuals
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.stacks import depth_of, group_slices, sequences, slice_layer, streams
from difffract_jax.transcoders.transcoder import Transcoder


class Factors(NamedTuple):
    """What sources are scaled by, less 1; or the derivative of an output by it.

    Attributes:
        features: of the active features, [evaluation layer rows active] per group.
        errors: of the sites' errors, [evaluation layer rows] per group.
        text: of the text embedding's tokens, of each branch.
        noise: of the tokens of the latents entering the first step.
    """

    features: tuple[Array, ...]
    errors: tuple[Array, ...]
    text: Float[Array, "branch txt"]
    noise: Float[Array, "img"]


class SitePart(NamedTuple):
    """What one block's MLP sublayer is made of in the map.

    Attributes:
        at: where features stand.
        values: of the active features.
        error: what is missing to the true output.
        features: factors of the features, less 1.
        errors: of the error's rows, alike.
    """

    at: SiteLayers
    values: Float[Array, "rows active"]
    error: Float[Array, "rows d_model"]
    features: Float[Array, "rows active"]
    errors: Float[Array, "rows"]


def scaled_write(transcoder: Transcoder | None, t: Array, part: SitePart, x: Float[Array, "rows d_model"]) -> Array:
    """Returns what one MLP sublayer adds, its active features following x, sources scaled.

    Args:
        transcoder: of the site; None if it has none.
        t: denoising time.
        part: of the site.
        x: the sublayer's input.
    """
    error = part.error * (1 + part.errors)[:, None]
    if transcoder is None:
        return error
    u = jnp.take_along_axis(transcoder.preactivation(x, t), part.at.index, axis=1)
    active = jnp.where(part.values > 0, u, 0) * (1 + part.features)
    rows = jnp.arange(x.shape[0])[:, None]
    z = jnp.zeros((x.shape[0], transcoder.config.features), active.dtype).at[rows, part.at.index].add(active)
    return error + jnp.where(part.at.live[:, None], transcoder.decode(z, x), 0)


def streamed_effects(
    steps: Sequence[Replacement],
    infos: Sequence[TraceInfo],
    velocity: Float[Array, "img outputs"],
    latents: Float[Array, "img channels"],
) -> Factors:
    """Returns the derivative of an output by every source's factor.

    Args:
        steps: the replacements of a span, one for each evaluation.
        infos: where they come from.
        velocity: weights of the output in the last step's velocity.
        latents: weights in the latents entering the last step.
    """
    weights, found, branches = steps[0].record.weights, [], infos[0].branches
    img, text = latents, [jnp.zeros_like(one.record.boundary.txt) for one in steps[:branches]]
    with jax.default_matmul_precision("highest"):
        for first in reversed(range(0, len(steps), branches)):
            after = img  # of the latents after the step; in the last one velocities are read, and no latents after it
            for number in reversed(range(first, first + branches)):
                info, last = infos[number], first + branches == len(steps)
                out = info.velocity_weight * velocity if last else info.taken * after
                entering, *derived = _pull_step(steps[number], out)
                found.insert(0, derived)
                img = img + _pull_linear(weights.img_in, latents, entering.img)
                text[info.branch] = text[info.branch] + entering.txt
        noise = jnp.sum(steps[0].record.latents * img, axis=1)
        read = jnp.stack(
            [
                jnp.sum(one.record.text * _pull_linear(weights.txt_in, one.record.text, own), axis=1)
                for one, own in zip(steps[:branches], text, strict=True)
            ]
        )
    features, errors = (tuple(map(jnp.stack, zip(*column, strict=True))) for column in zip(*found, strict=True))
    return Factors(features, errors, read, noise)


def _pull_step(prepared: Replacement, out: Float[Array, "img outputs"]) -> tuple[Streams, list[Array], list[Array]]:
    """Pulls the derivative by a step's velocity back through its blocks.

    Returns:
        The derivatives by the residual streams entering the first block; by the factors of features, [layer rows
        active] per group; and by those of errors, [layer rows].
    """
    record, sites, sources = prepared
    weights, entering = record.weights, residuals(record, sites, sources)
    assert weights.final is not None and record.inv_std is not None
    img = _pull_final(weights.final, record.cond, record.inv_std, record.boundary.img, out)
    h = Streams(img, jnp.zeros_like(record.boundary.txt))
    features: list[Any] = [jnp.zeros_like(values) for values in sources.values]
    errors: list[Any] = [jnp.zeros(error.shape[:2], error.dtype) for error in sources.errors]
    parts = [
        SitePart(one.layers, values, error, no_feature, no_error)
        for one, values, error, no_feature, no_error in zip(
            sites, sources.values, sources.errors, features, errors, strict=True
        )
    ]
    stacks = list(zip(weights.stacks, record.frozen, group_slices(weights.stacks), strict=True))
    for stack, frozen, part in reversed(stacks):
        joined = sequences(h, stack.groups)
        groups = range(part.start, part.stop)
        for layer in reversed(range(depth_of(stack))):
            joined, scales = _pull_block(
                *slice_layer((stack, frozen), layer),
                record.cond,
                record.t,
                tuple(_transcoder(sites[group], layer) for group in groups),
                tuple(slice_layer((parts[group], entering[group]), layer) for group in groups),
                joined,
            )
            jax.block_until_ready(joined)  # what was fetched goes before more is
            for group, (by_feature, by_error) in zip(groups, scales, strict=True):
                features[group] = features[group].at[layer].set(by_feature)
                errors[group] = errors[group].at[layer].set(by_error)
        h = streams(joined, stack.groups, h)
    return h, features, errors


def _transcoder(sites: Any, layer: int) -> Transcoder | None:
    """Returns a block's transcoder, fetched if it is streamed; None where no row of the block is replaced."""
    live = sites.stack is not None and bool(sites.layers.live[layer].any())
    return sites.transcoder(sites.layers.slot[layer]) if live else None


@jax.jit
def _pull_final(final: Any, cond: Cond, inv_std: Array, h: Array, out: Array) -> Float[Array, "img d_model"]:
    return jax.vjp(lambda h: final(h, cond, inv_std), h)[1](out)[0]


@jax.jit
def _pull_linear(linear: Any, x: Array, out: Array) -> Array:
    return jax.vjp(linear, x)[1](out)[0]


@jax.jit
def _pull_block(
    block: Any,
    frozen: Any,
    cond: Cond,
    t: Array,
    transcoders: tuple[Transcoder | None, ...],
    parts: tuple[tuple[SitePart, Array], ...],
    out: tuple[Array, ...],
) -> tuple[tuple[Array, ...], list[tuple[Array, Array]]]:
    """Returns the derivatives by what enters a block, and per group by the factors of its features and errors."""

    def run(h: tuple[Array, ...], scales: list[tuple[Array, Array]]) -> tuple[Array, ...]:
        def stand_in(group: int, x: Array) -> Array:
            by_feature, by_error = scales[group]
            part = parts[group][0]._replace(features=by_feature, errors=by_error)
            return scaled_write(transcoders[group], t, part, x)

        return tuple(block(h, cond, frozen=frozen, mlp=stand_in)[0])

    scales = [(part.features, part.errors) for part, _ in parts]
    return jax.vjp(run, tuple(entering for _, entering in parts), scales)[1](out)
