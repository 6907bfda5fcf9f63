"""What every source adds to an output along all paths, of all steps, at once.

This is the reading `propagated` of docs/method.md, section 7.

`readings.node_effects` sums paths through the features of a graph. Here all paths count, without a graph:

1. The frozen map of all steps runs with every active feature live, code = u * (1 + a), and every error and input
   times 1 + a; a is 0 everywhere, so that the run is the recorded one. Latents pass from step to step as in `engine`.
2. The derivative of the output by a, one backward pass, is the source's effect: the map is affine in each source
   alone, and u passes on what drives it in its proportion.

Zeroing one feature moves the output by minus its effect, as long as no other feature switches on or off and attention
and norms are held; a test holds that. Effects of sources on one path overlap: their sum is not the output's value. A
graph with every feature expanded and no threshold says the same. Where transcoders are streamed, `streamed_effects`
does the backward pass block by block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from difffract_jax.address import Layout
from difffract_jax.circuits.attribution.engine import Output
from difffract_jax.circuits.effects.streamed_effects import Factors, SitePart, scaled_write, streamed_effects
from difffract_jax.circuits.frozen.encoding import site
from difffract_jax.circuits.frozen.replacement import Replacement, prepare_step, prepare_steps
from difffract_jax.circuits.trace.capture import Span
from difffract_jax.circuits.trace.record import Weights
from difffract_jax.models.blocks import Streams
from difffract_jax.models.stacks import run_stacks
from difffract_jax.models.streaming import streams_layers
from difffract_jax.transcoders.transcoder import TranscoderSet

FEW = 1024
"""Transcoders of no more features have a place for each of them, so that traces of all prompts share a compilation."""


class TotalEffects(NamedTuple):
    """What every source adds to an output, in its units; layers are those of each group's stack.

    Attributes:
        features: of the active features, [step layer rows active] per group; 0 in places that fill up.
        index: which features they are, of the same shape.
        errors: of the sites' errors, [step layer rows] per group.
        text: of the text embedding, which all steps share.
        noise: of the latents entering the first step.
        layout: of the model, which orders the groups.
    """

    features: tuple[Float[Array, "_ _ _ _"], ...]
    index: tuple[Int[Array, "_ _ _ _"], ...]
    errors: tuple[Float[Array, "_ _ _"], ...]
    text: Float[Array, "txt"]
    noise: Float[Array, "img"]
    layout: Layout


def total_effects(span: Span, tcs: TranscoderSet, output: Output) -> TotalEffects:
    """Returns what every source of a span adds to an output of its last step, along all paths.

    Args:
        span: from `capture_steps`.
        tcs: the transcoders it was captured for.
        output: from `outputs.resolve_target`, in the span's last step.

    Raises:
        ValueError: if the output lies in another step.
    """
    if output.step != span.info.step:
        raise ValueError(f"The output lies in step {output.step}, but effects are on the last step, {span.info.step}.")
    prepared = _prepare(span, tcs)
    sigmas = span.info.sigmas
    changes = [sigmas[t.info.step + 1] - sigmas[t.info.step] for t in span.traces]
    dtype = prepared[0].record.latents.dtype
    onto = output.velocity.astype(dtype), output.latents.astype(dtype)
    if streams_layers(prepared):
        found = streamed_effects(prepared, changes, *map(jnp.asarray, onto))
        places = [one.layers.index for step in prepared for one in step.sites]
        groups = len(prepared[0].sites)
        index = tuple(jnp.stack(places[group::groups]) for group in range(groups))
        return TotalEffects(found.features, index, found.errors, found.text, found.noise, span.info.layout)
    weights, transcoders = prepared[0].record.weights, tuple(sites.stack for sites in prepared[0].sites)
    slim = [
        one._replace(
            record=one.record._replace(weights=None, unpooled=None),
            sites=tuple(sites._replace(stack=None) for sites in one.sites),
        )
        for one in prepared
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slim)
    # What the last step adds to latents is not read.
    found = _effects(weights, transcoders, stacked, jnp.asarray(changes, dtype), *onto)
    index = tuple(sites.layers.index for sites in stacked.sites)
    return TotalEffects(found.features, index, found.errors, found.text, found.noise, span.info.layout)


def _prepare(span: Span, tcs: TranscoderSet) -> tuple[Replacement, ...]:
    if tcs.config.features > FEW or streams_layers(tcs.stacks):
        return prepare_steps(span.traces, tcs, rows="auto")
    stacks = tcs.per_group(span.info.layout)
    every = [0 if stack is None else tcs.config.features for stack in stacks]
    return tuple(prepare_step(trace, tcs, active=every) for trace in span.traces)


@jax.jit
def _effects(
    weights: Weights, transcoders: tuple[Any, ...], steps: Replacement, taken: Array, velocity: Array, latents: Array
) -> Factors:
    """Returns the derivative of the output by every factor."""
    errors = tuple(jnp.zeros(error.shape[:-1], error.dtype) for error in steps.sources.errors)
    dtype = steps.record.latents.dtype
    none = Factors(
        jax.tree.map(jnp.zeros_like, steps.sources.values),
        errors,
        jnp.zeros(steps.record.text.shape[1], dtype),
        jnp.zeros(steps.record.latents.shape[1], dtype),
    )
    with jax.default_matmul_precision("highest"):
        return jax.grad(partial(_value, weights, transcoders, steps, taken, velocity, latents))(none)


def _value(
    weights: Weights,
    transcoders: tuple[Any, ...],
    steps: Replacement,
    taken: Array,
    velocity: Array,
    latents: Array,
    factors: Factors,
) -> Float[Array, ""]:
    """Returns the output's value, without its constant, with sources scaled."""
    text = weights.txt_in(steps.record.text[0] * (1 + factors.text)[:, None])

    @jax.checkpoint
    def step(z: Array, now: tuple[Replacement, Any, Any, Array]) -> tuple[Array, tuple[Array, Array]]:
        prepared, features, errors, change = now
        v = _velocity(weights, transcoders, prepared, Streams(weights.img_in(z), text), features, errors)
        return z + change * v, (z, v)

    first = steps.record.latents[0] * (1 + factors.noise)[:, None]
    entering, out = jax.lax.scan(step, first, (steps, factors.features, factors.errors, taken))[1]
    return jnp.sum(velocity * out[-1]) + jnp.sum(latents * entering[-1])


def _velocity(
    weights: Weights,
    transcoders: tuple[Any, ...],
    prepared: Replacement,
    h: Streams,
    features: tuple[Array, ...],
    errors: tuple[Array, ...],
) -> Float[Array, "img outputs"]:
    """Returns one step's velocity with its sources scaled, every active feature live."""
    record, sites, sources = prepared
    # Stacked by layer: where features stand, their values, the errors, and what both are scaled by.
    parts = ([one.layers for one in sites], sources.values, sources.errors, features, errors)
    last, _ = run_stacks(
        weights.stacks,
        h,
        record.cond,
        frozen=record.frozen,
        write=partial(_write, record.t),
        fixed=transcoders,
        layers=[SitePart(*part) for part in zip(*parts, strict=True)],
        unroll=False,
        remat=True,
    )
    assert weights.final is not None
    return weights.final(last.img, record.cond, record.inv_std)


def _write(
    t: Array, stack: Any, layer: SitePart, x: Float[Array, "rows d_model"], true: Callable[[], Array]
) -> tuple[Float[Array, "rows d_model"], None]:
    """Returns what one MLP sublayer adds, its active features following x."""
    del true
    return scaled_write(None if stack is None else site(stack, layer.at.slot), t, layer, x), None
