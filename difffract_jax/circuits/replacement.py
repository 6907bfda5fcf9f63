"""The local replacement model: an affine map from sources to every MLP sublayer's input (METHOD section 3).

1. At every site and position that is replaced, y = W_dec z + b_dec (+ W_skip x) + err, where z is the transcoder's code
   of the recorded x and err whatever is missing to the recorded y. Everywhere else y itself is the constant err.
2. Attention patterns, norm scales and modulations are those of the trace: the blocks run with `frozen`.
3. What remains is affine in the sources: the residual streams h0 entering the first block, the values of the active
   features, and the errors. `replacement` returns that map and its sources, for anyone's `jax.linearize` or `jax.vjp`.

Codes are kept as the active features alone: `index` and `value` of up to K features per position, K the largest number
anywhere in a group. Filling places have value 0. Layers count through the recorded blocks, double-stream ones first;
`trace.info.recorded` gives the model's blocks. The single-stream sequence has the text first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.circuits.record import Reading, Record
from difffract_jax.circuits.trace import Trace
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Groups, Streams, both, join, split
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet
from difffract_jax.trees import brief

BY_EIGHTS = 8
"""K is rounded up to a multiple of this, so that similar traces share a compilation."""
CODE_BYTES = 2**28
"""Codes of a group kept between counting and finding their active features; larger ones are computed twice."""


class SiteLayers(NamedTuple):
    """Where one group's MLP sublayers are replaced; arrays have a leading layer axis.

    Attributes:
        slot: place in the stack of each block's transcoder; 0, and nothing live, where there is none.
        live: positions that are replaced.
        index: features of every position that can be sources: the active ones, filled up with inactive ones.
    """

    slot: Int[Array, "layer"]
    live: Bool[Array, "layer rows"]
    index: Int[Array, "layer rows active"]


class Sites(NamedTuple):
    """One group's MLP sublayers in the replacement.

    Attributes:
        stack: the group's transcoders; None if it has none.
        layers: where they stand.
    """

    stack: Transcoder | None
    layers: SiteLayers

    __repr__ = brief


class Sources(NamedTuple):
    """What the affine map starts from.

    Attributes:
        boundary: residual streams entering the first block.
        values: values of the active features, [layer rows active] per group.
        errors: what is added at every site besides, [layer rows d_model] per group.
    """

    boundary: Streams
    values: Groups
    errors: Groups

    __repr__ = brief


class Replacement(NamedTuple):
    """The replacement of one trace, ready to run.

    Attributes:
        record: the trace's arrays.
        sites: all groups' MLP sublayers.
        sources: sources at the traced point.
    """

    record: Record
    sites: Groups
    sources: Sources

    __repr__ = brief


def replacement(trace: Trace, tcs: TranscoderSet) -> tuple[Callable[[Sources], Reading], Sources]:
    """Returns the affine map of a trace, and the sources at which it reproduces the trace.

    Args:
        trace: from `capture`.
        tcs: the transcoders it was captured for.

    Returns:
        f, a pure function of sources that returns the MLP sublayers' inputs x of every recorded block, and the
        velocity if it is recorded; and the sources.

    Example:
        >>> from difffract_jax import capture, random_pipeline, random_transcoders
        >>> pipe = random_pipeline()
        >>> tcs = random_transcoders(pipe.config.transformer)
        >>> f, sources = replacement(capture(pipe, tcs, "a red circle"), tcs)
        >>> reading, push = jax.linearize(f, sources)
        >>> reading.mlp_in.img.shape
        (3, 36, 32)
    """
    prepared = prepare(trace, tcs)
    return partial(run, prepared.record, prepared.sites), prepared.sources


def prepare(trace: Trace, tcs: TranscoderSet, *, active: Groups | None = None) -> Replacement:
    """Encodes every replaced site of a trace, and splits its output into features and error.

    Args:
        trace: from `capture`.
        tcs: the transcoders it was captured for.
        active: places for features per position of each group, at least as many as are active; counted if left out.

    Raises:
        UserError: if the transcoders have sites outside the trace.
    """
    record, info = trace.record, trace.info
    groups = group_layers(tcs, info.depths[0])
    outside = sorted({block for blocks in groups for block in blocks} - set(info.recorded))
    if outside:
        raise UserError(
            f"The trace recorded the blocks {info.recorded[0]} to {info.recorded[-1]}, but the transcoders have block "
            f"{outside[0]}; capture again with these transcoders."
        )
    stacks = Groups(tcs.img, tcs.txt, tcs.joint)
    double, single = ([b for b in info.recorded if (b >= info.depths[0]) == last] for last in (False, True))
    with jax.default_matmul_precision("highest"):
        parts = [
            _encode_group(
                stack,
                blocks,
                (double, double, single)[i],
                GroupRecord(record.mlp_in[i], record.mlp_out[i], record.replaceable[i], record.t),
                None if active is None else active[i],
            )
            for i, (stack, blocks) in enumerate(zip(stacks, groups, strict=True))
        ]
    sites, values, errors = (Groups(*column) for column in zip(*parts, strict=True))
    return Replacement(record, sites, Sources(record.boundary, values, errors))


def prepare_steps(traces: tuple[Trace, ...], tcs: TranscoderSet) -> tuple[Replacement, ...]:
    """Prepares several steps with the same places for features, so that one program does for all.

    Args:
        traces: of a span.
        tcs: the transcoders it was captured for.
    """
    prepared = [prepare(trace, tcs) for trace in traces]
    most = Groups(*(max(one.sources.values[i].shape[2] for one in prepared) for i in range(len(Groups._fields))))
    if all(one.sources.values[i].shape[2] == most[i] for one in prepared for i in range(len(most))):
        return tuple(prepared)
    return tuple(prepare(trace, tcs, active=most) for trace in traces)


def group_layers(tcs: TranscoderSet, depth_double: int) -> Groups:
    """Returns the model's blocks of every group's transcoders; single-stream blocks count on after the others."""
    return Groups(tcs.img_layers, tcs.txt_layers, tuple(depth_double + layer for layer in tcs.joint_layers))


class GroupRecord(NamedTuple):
    """What encoding one group's sites reads of a trace: MLP inputs and outputs, replaceable positions, time."""

    mlp_in: Float[Array, "layer rows d_model"]
    mlp_out: Float[Array, "layer rows d_model"]
    replaceable: Bool[Array, "rows"]
    t: Float[Array, ""]


def _encode_group(
    stack: Transcoder | None, blocks: tuple[int, ...], recorded: list[int], record: GroupRecord, most: int | None
) -> tuple[Sites, Array, Array]:
    """Returns one group's sites, feature values and errors."""
    count, rows, _ = record.mlp_in.shape
    slot, has = np.zeros(count, np.int32), np.isin(np.array(recorded, int), blocks)
    slot[has] = np.arange(len(blocks))
    live = jnp.asarray(has)[:, None] & record.replaceable[None]
    if stack is None or not count:
        none = jnp.zeros((count, rows, 0), jnp.int32)
        layout = SiteLayers(jnp.asarray(slot), live, none)
        return Sites(None, layout), none.astype(record.mlp_in.dtype), record.mlp_out
    codes, counted, size = None, None, count * rows * stack.config.features * record.mlp_in.dtype.itemsize
    if size <= CODE_BYTES:
        codes, counted = _codes(stack, jnp.asarray(slot), live, record)
    if most is None:
        counted = count_active(stack, jnp.asarray(slot), live, record) if counted is None else counted
        most = min(-(-max(int(counted), 1) // BY_EIGHTS) * BY_EIGHTS, stack.config.features)
    index, values, errors = find_active(stack, jnp.asarray(slot), live, record, codes, most)
    return Sites(stack, SiteLayers(jnp.asarray(slot), live, index)), values, errors


def site(stack: Transcoder, slot: Int[Array, ""]) -> Transcoder:
    """Returns one transcoder of a stack."""
    return jax.tree.map(lambda leaf: leaf[slot], stack)


@jax.jit
def _codes(
    stack: Transcoder, slot: Array, live: Array, record: GroupRecord
) -> tuple[Float[Array, "layer rows feat"], Int[Array, ""]]:
    """Returns the code of every position of every block, and what `count_active` does."""

    def one(layer: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        slot, live, x = layer
        code = _code(stack, slot, live, x, record.t)
        return code, _most_active(code)

    codes, counts = jax.lax.map(one, (slot, live, record.mlp_in))
    return codes, jnp.max(counts)


@jax.jit
def count_active(stack: Transcoder, slot: Array, live: Array, record: GroupRecord) -> Int[Array, ""]:
    """Returns the largest number of active features at any position of any block, from one block's codes at a time."""

    def one(layer: tuple[Array, Array, Array]) -> Array:
        slot, live, x = layer
        return _most_active(_code(stack, slot, live, x, record.t))

    return jnp.max(jax.lax.map(one, (slot, live, record.mlp_in)))


def _code(stack: Transcoder, slot: Array, live: Array, x: Array, t: Array) -> Float[Array, "rows feat"]:
    return jnp.where(live[:, None], site(stack, slot).encode(x, t), 0)


def _most_active(code: Float[Array, "rows feat"]) -> Int[Array, ""]:
    return jnp.max(jnp.sum(code > 0, axis=1, dtype=jnp.int32))


@partial(jax.jit, static_argnames="most")
def find_active(
    stack: Transcoder, slot: Array, live: Array, record: GroupRecord, codes: Array | None, most: int
) -> tuple[Int[Array, "layer rows active"], Float[Array, "layer rows active"], Float[Array, "layer rows d_model"]]:
    """Returns every position's active features, strongest first, their values, and the errors."""

    def step(_: None, layer: tuple[Array, Array, Array, Array, Array | None]) -> tuple[None, Any]:
        slot, live, x, y, z = layer
        transcoder = site(stack, slot)
        if z is None:
            z = _code(stack, slot, live, x, record.t)
        value, index = jax.lax.top_k(z, most)
        error = y - jnp.where(live[:, None], transcoder.decode(z, x), 0)
        return None, (index, value, error)

    return jax.lax.scan(step, None, (slot, live, record.mlp_in, record.mlp_out, codes))[1]


def run(record: Record, sites: Groups, sources: Sources) -> Reading:
    """Evaluates the affine map: the MLP sublayers' inputs x of every recorded block, and the velocity if recorded.

    Args:
        record: the trace's arrays.
        sites: the MLP sublayers.
        sources: where to evaluate it; zeros give its constant.
    """
    joint, x, joint_x = _blocks(record, sites, sources, lambda _, acts: acts.mlp_in)
    velocity = None
    if record.weights.final is not None:
        last = split(joint, sources.boundary.txt.shape[0]).img
        velocity = record.weights.final(last, record.cond, record.inv_std)
    return Reading(Groups(x.img, x.txt, joint_x), velocity, record.latents)


@jax.jit
def residuals(record: Record, sites: Groups, sources: Sources) -> tuple[Streams, Array]:
    """Returns the residual streams entering every block: both streams' [layer rows d_model], the joint one's the same.

    Args:
        record: the trace's arrays.
        sites: the MLP sublayers.
        sources: where to evaluate the affine map.
    """
    with jax.default_matmul_precision("highest"):
        return _blocks(record, sites, sources, lambda h, _: h)[1:]


def _blocks(record: Record, sites: Groups, sources: Sources, tap: Callable[[Any, Any], Any]) -> tuple[Array, Any, Any]:
    """Runs all recorded blocks; returns the last residual stream, and what `tap(h, acts)` keeps of either kind."""
    double = [Streams(tree.img, tree.txt) for tree in (sites, sources.values, sources.errors)]
    stacks, layers = both(lambda s: s.stack, double[0]), both(lambda s: s.layers, double[0])

    def step(h: Streams, layer: Any) -> tuple[Streams, Any]:
        block, frozen, *parts = layer
        after, acts = block(h, record.cond, frozen=frozen, mlp=lambda _, x: both(write, stacks, *parts, x))
        return after, tap(h, acts)

    def step_single(h: Array, layer: Any) -> tuple[Array, Any]:
        block, frozen, here, values, errors = layer
        mlp = lambda _, x: write(sites.joint.stack, here, values, errors, x)  # noqa: E731  (closed over the layer)
        after, acts = block(h, record.cond, frozen=frozen, mlp=mlp)
        return after, tap(h, acts)

    h, kept = jax.lax.scan(step, sources.boundary, (record.weights.double, record.frozen, layers, double[1], double[2]))
    single = (record.weights.single, record.frozen_single, sites.joint.layers)
    joint, kept_single = jax.lax.scan(step_single, join(h), (*single, sources.values.joint, sources.errors.joint))
    return joint, kept, kept_single


def write(
    stack: Transcoder | None,
    layer: SiteLayers,
    values: Float[Array, "rows active"],
    error: Float[Array, "rows d_model"],
    x: Float[Array, "rows d_model"],
) -> Float[Array, "rows d_model"]:
    """Returns what the replacement adds for one MLP sublayer: W_dec z + b_dec (+ W_skip x) where live, plus the error.

    Args:
        stack: the stream's transcoders.
        layer: one block's slice.
        values: of the features in `layer.index`.
        error: the sublayer's error.
        x: the sublayer's input, read by a skip alone.
    """
    if stack is None:
        return error
    transcoder = site(stack, layer.slot)
    if not values.shape[1]:
        # No features, as in the map's constant: the decoder gives its bias, and need not be read.
        assert transcoder.dec.bias is not None
        y = transcoder.dec.bias[None].astype(x.dtype)
        y = y + transcoder.skip(x) if stack.config.skip else y
        return error + jnp.where(layer.live[:, None], y, 0)
    rows = jnp.arange(x.shape[0])[:, None]
    z = jnp.zeros((x.shape[0], stack.config.features), x.dtype).at[rows, layer.index].add(values)
    return error + jnp.where(layer.live[:, None], transcoder.decode(z, x), 0)
