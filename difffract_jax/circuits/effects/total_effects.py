"""What every source adds to an output along all paths, of all steps, at once.

This is the reading `propagated` of docs/method.md, section 7.

`readings.node_effects` sums paths through the features of a graph. Here all paths count, without a graph:

1. The frozen map of all steps runs with every active feature live, code = u * (1 + a), and every error and input
   times 1 + a; a is 0 everywhere, so that the run is the recorded one. Latents pass from step to step as in `engine`.
   With guidance by two branches a step is two evaluations, each with sources of its own, whose velocities count by
   their weights.
2. The derivative of the output by a, one backward pass, is the source's effect: the map is affine in each source
   alone, and u passes on what drives it in its proportion.

Zeroing one feature moves the output by minus its effect, as long as no other feature switches on or off and attention
and norms are held; a test holds that. Effects of sources on one path overlap: their sum is not the output's value. A
graph with every feature expanded and no threshold says the same. Where transcoders are streamed, `streamed_effects`
does the backward pass block by block.

With attention explained every softmax is live, and the effect is a derivative at the run: it takes the paths through
queries and keys too, as a graph with every score a node does (`live_scores`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from difffract_jax.address import Layout
from difffract_jax.circuits.attribution.engine import Output
from difffract_jax.circuits.effects.live_scores import LiveScores
from difffract_jax.circuits.effects.streamed_effects import Factors, SitePart, scaled_write, streamed_effects
from difffract_jax.circuits.frozen.encoding import site
from difffract_jax.circuits.frozen.replacement import Prepared, Replacement, prepare
from difffract_jax.circuits.trace.capture import Span
from difffract_jax.circuits.trace.record import Weights
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Streams
from difffract_jax.models.stacks import run_stacks
from difffract_jax.models.streaming import streams_layers
from difffract_jax.transcoders.transcoder import TranscoderSet

AttentionPaths = Literal["frozen", "explained"]
"""Whether effects go through values alone, or through queries and keys too."""
FEW = 1024
"""Transcoders of no more features have a place for each of them, so that traces of all prompts share a compilation."""


class TotalEffects(NamedTuple):
    """What every source adds to an output, in its units; layers are those of each group's stack.

    Attributes:
        features: of the active features, [evaluation layer rows active] per group; 0 in places that fill up. An
            evaluation is a step, or with guidance by two branches one branch of it, the prompt's first.
        index: which features they are, of the same shape.
        errors: of the sites' errors, [evaluation layer rows] per group.
        text: of the text embedding, which all steps share.
        noise: of the latents entering the first step.
        layout: of the model, which orders the groups.
        negative_text: of the negative prompt's text embedding; None where a step is one evaluation.
    """

    features: tuple[Float[Array, "_ _ _ _"], ...]
    index: tuple[Int[Array, "_ _ _ _"], ...]
    errors: tuple[Float[Array, "_ _ _"], ...]
    text: Float[Array, "txt"]
    noise: Float[Array, "img"]
    layout: Layout
    negative_text: Float[Array, "txt"] | None = None

    @property
    def branches(self) -> int:
        """Evaluations of a step."""
        return 1 if self.negative_text is None else 2


def total_effects(
    span: Span | Prepared, tcs: TranscoderSet, output: Output, *, attention: AttentionPaths = "frozen"
) -> TotalEffects:
    """Returns what every source of a span adds to an output of its last step, along all paths.

    Args:
        span: from `capture_steps`; or from `prepare_effects`, so that several outputs share what is prepared.
        tcs: the transcoders it was captured for.
        output: from `outputs.resolve_target`, in the span's last step.
        attention: `frozen`, or `explained` for the paths through queries and keys too.

    Raises:
        UserError: if attention is to be explained and the model or the transcoders are streamed.
        ValueError: if the output lies in another step.
    """
    if output.step != span.info.step:
        raise ValueError(f"The output lies in step {output.step}, but effects are on the last step, {span.info.step}.")
    ready = prepare_effects(span, tcs)
    prepared, span = ready.steps, ready.trace
    assert isinstance(span, Span)
    infos = [trace.info for trace in span.traces]
    dtype = prepared[0].record.latents.dtype
    onto = output.velocity.astype(dtype), output.latents.astype(dtype)
    if attention == "explained" and (streams_layers(prepared) or prepared[0].record.weights.streamed):
        raise UserError("Total effects explain attention with model and transcoders in memory, but these are streamed.")
    if streams_layers(prepared):
        found = streamed_effects(prepared, infos, *map(jnp.asarray, onto))
        places = [one.layers.index for step in prepared for one in step.sites]
        groups = len(prepared[0].sites)
        index = tuple(jnp.stack(places[group::groups]) for group in range(groups))
        return _of_factors(found, index, span)
    weights, transcoders = prepared[0].record.weights, tuple(sites.stack for sites in prepared[0].sites)
    slim = [
        one._replace(
            record=one.record._replace(weights=None, unpooled=None),
            sites=tuple(sites._replace(stack=None) for sites in one.sites),
        )
        for one in prepared
    ]
    # What the last step adds to latents is not read.
    taken, velocity_weights = (
        jnp.asarray([getattr(info, name) for info in infos], dtype) for name in ("taken", "velocity_weight")
    )
    if attention == "explained":
        weights = weights._replace(stacks=tuple(map(LiveScores, weights.stacks)))
    shape = len(infos) // infos[0].branches, infos[0].branches  # a leaf may be empty, and -1 not be known from it
    index, *by_step = _by_step(slim, taken, velocity_weights, shape)
    return _of_factors(_effects(weights, transcoders, *by_step, *onto), index, span)


@partial(jax.jit, static_argnames="shape")
def _by_step(
    slim: list[Replacement], taken: Array, velocity_weights: Array, shape: tuple[int, int]
) -> tuple[tuple[Array, ...], Replacement, Array, Array]:
    """Returns the features of all evaluations, and what is given of each as [step branch ...]."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slim)
    given = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), (stacked, taken, velocity_weights))
    return tuple(sites.layers.index for sites in stacked.sites), *given


def _of_factors(found: Factors, index: tuple[Array, ...], span: Span) -> TotalEffects:
    """Returns derivatives by factors as effects; leaves [step branch ...] become [evaluation ...]."""
    negative = found.text[1] if found.text.shape[0] > 1 else None
    return TotalEffects(found.features, index, found.errors, found.text[0], found.noise, span.info.layout, negative)


def prepare_effects(span: Span | Prepared, tcs: TranscoderSet) -> Prepared:
    """Prepares a span for `total_effects`, with a place for every feature of small transcoders.

    Args:
        span: from `capture_steps`; what is prepared already is returned as it is.
        tcs: the transcoders it was captured for.

    Raises:
        UserError: as `replacement.prepare`.
    """
    if isinstance(span, Prepared) or tcs.config.features > FEW or streams_layers(tcs.stacks):
        return prepare(span, tcs, rows="auto")
    stacks = tcs.per_group(span.info.layout)
    return prepare(span, tcs, active=[0 if stack is None else tcs.config.features for stack in stacks])


@jax.jit
def _effects(
    weights: Weights,
    transcoders: tuple[Any, ...],
    steps: Replacement,
    taken: Float[Array, "step branch"],
    velocity_weights: Float[Array, "step branch"],
    velocity: Float[Array, "img outputs"],
    latents: Float[Array, "img channels"],
) -> Factors:
    """Returns the derivative of the output by every factor; leaves of `steps` are [step branch ...]."""
    errors = tuple(jnp.zeros(error.shape[:-1], error.dtype) for error in steps.sources.errors)
    dtype = steps.record.latents.dtype
    none = Factors(
        jax.tree.map(jnp.zeros_like, steps.sources.values),
        errors,
        jnp.zeros(steps.record.text.shape[1:3], dtype),
        jnp.zeros(steps.record.latents.shape[2], dtype),
    )
    given = weights, transcoders, steps, taken, velocity_weights[-1], velocity, latents
    with jax.default_matmul_precision("highest"):
        found = jax.grad(partial(_value, *given))(none)
    by_evaluation = jax.tree.map(
        lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), (found.features, found.errors)
    )
    return Factors(*by_evaluation, found.text, found.noise)


def _value(
    weights: Weights,
    transcoders: tuple[Any, ...],
    steps: Replacement,
    taken: Array,
    last: Array,
    velocity: Array,
    latents: Array,
    factors: Factors,
) -> Float[Array, ""]:
    """Returns the output's value, without its constant, with sources scaled; `last` weighs the last step's branches."""
    text = jax.vmap(lambda one, by: weights.txt_in(one * (1 + by)[:, None]))(steps.record.text[0], factors.text)

    @jax.checkpoint
    def evaluate(img: Array, now: tuple[Replacement, Any, Any, Array]) -> tuple[Array, Array]:
        prepared, features, errors, own = now
        return img, _velocity(weights, transcoders, prepared, Streams(img, own), features, errors)

    def step(z: Array, now: tuple[Replacement, Any, Any, Array]) -> tuple[Array, tuple[Array, Array]]:
        prepared, features, errors, change = now
        v = jax.lax.scan(evaluate, weights.img_in(z), (prepared, features, errors, text))[1]
        return z + jnp.tensordot(change, v, 1), (z, v)

    first = steps.record.latents[0, 0] * (1 + factors.noise)[:, None]
    entering, out = jax.lax.scan(step, first, (steps, factors.features, factors.errors, taken))[1]
    return jnp.sum(velocity * jnp.tensordot(last, out[-1], 1)) + jnp.sum(latents * entering[-1])


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
