"""The local replacement model: an affine map from sources to every MLP sublayer's input (METHOD section 3).

1. At every site and position that is replaced, y = W_dec z + b_dec (+ W_skip x) + err, where z is the transcoder's code
   of the recorded x and err whatever is missing to the recorded y. Everywhere else y itself is the constant err.
2. Attention patterns, norm scales and modulations are those of the trace: the blocks run with `frozen`.
3. What remains is affine in the sources: the residual streams h0 entering the first block, the values of the active
   features, and the errors. `replacement` returns that map and its sources, for anyone's `jax.linearize` or `jax.vjp`.

Codes are kept as the active features alone: `index` and `value` of up to K features per position, K the largest number
anywhere in a stream. Filling places have value 0. The model's blocks are `trace.info.first_block + layer`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.circuits.trace import Record, Trace
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Streams, both
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet

BY_EIGHTS = 8
"""K is rounded up to a multiple of this, so that similar traces share a compilation."""

CODE_BYTES = 2**28
"""Codes of a stream kept between counting and finding their active features; larger ones are computed twice."""


class SiteLayers(NamedTuple):
    """Where one stream's MLP sublayers are replaced; arrays have a leading layer axis.

    Attributes:
        slot: place in the stack of each block's transcoder; 0, and nothing live, where there is none.
        live: positions that are replaced.
        index: features of every position that can be sources: the active ones, filled up with inactive ones.
    """

    slot: Int[Array, "layer"]
    live: Bool[Array, "layer rows"]
    index: Int[Array, "layer rows active"]


class Sites(NamedTuple):
    """One stream's MLP sublayers in the replacement.

    Attributes:
        stack: the stream's transcoders; None if it has none.
        layers: where they stand.
    """

    stack: Transcoder | None
    layers: SiteLayers


class Sources(NamedTuple):
    """What the affine map starts from.

    Attributes:
        boundary: residual streams entering the first block.
        values: values of the active features, [layer rows active].
        errors: what is added at every site besides, [layer rows d_model].
    """

    boundary: Streams
    values: Streams
    errors: Streams


class Replacement(NamedTuple):
    """The replacement of one trace, ready to run.

    Attributes:
        record: the trace's arrays.
        sites: both streams' MLP sublayers.
        sources: sources at the traced point.
    """

    record: Record
    sites: Streams
    sources: Sources


def replacement(trace: Trace, tcs: TranscoderSet) -> tuple[Callable[[Sources], Streams], Sources]:
    """Returns the affine map of a trace, and the sources at which it reproduces the trace.

    Args:
        trace: from `capture`.
        tcs: the transcoders it was captured for.

    Returns:
        f, a pure function of sources that returns the MLP sublayers' inputs x of every recorded block, and the sources.

    Example:
        >>> from difffract_jax import capture, random_pipeline, random_transcoders
        >>> pipe = random_pipeline()
        >>> tcs = random_transcoders(pipe.config.transformer)
        >>> f, sources = replacement(capture(pipe, tcs, "a red circle"), tcs)
        >>> x, push = jax.linearize(f, sources)
        >>> x.img.shape
        (3, 36, 32)
    """
    prepared = prepare(trace, tcs)
    return partial(run, prepared.record, prepared.sites), prepared.sources


def prepare(trace: Trace, tcs: TranscoderSet) -> Replacement:
    """Encodes every replaced site of a trace, and splits its output into features and error.

    Args:
        trace: from `capture`.
        tcs: the transcoders it was captured for.

    Raises:
        UserError: if the transcoders have sites outside the trace.
    """
    record, first = trace.record, trace.info.first_block
    count = record.mlp_in.img.shape[0]
    outside = [b for b in (*tcs.img_layers, *tcs.txt_layers) if not first <= b < first + count]
    if outside:
        raise UserError(
            f"The trace recorded the blocks {first} to {first + count - 1}, but the transcoders have block "
            f"{outside[0]}; capture again with these transcoders."
        )
    with jax.default_matmul_precision("highest"):
        img, img_values, img_errors = _encode_stream(tcs.img, tcs.img_layers, first, _stream(record, "img"))
        txt, txt_values, txt_errors = _encode_stream(tcs.txt, tcs.txt_layers, first, _stream(record, "txt"))
    sources = Sources(record.boundary, Streams(img_values, txt_values), Streams(img_errors, txt_errors))
    return Replacement(record, Streams(img, txt), sources)


class _StreamRecord(NamedTuple):
    mlp_in: Float[Array, "layer rows d_model"]
    mlp_out: Float[Array, "layer rows d_model"]
    replaceable: Bool[Array, "rows"]
    t: Float[Array, ""]


def _stream(record: Record, which: str) -> _StreamRecord:
    index = Streams._fields.index(which)
    return _StreamRecord(record.mlp_in[index], record.mlp_out[index], record.replaceable[index], record.t)


def _encode_stream(
    stack: Transcoder | None, layers: tuple[int, ...], first: int, record: _StreamRecord
) -> tuple[Sites, Array, Array]:
    """Returns one stream's sites, feature values and errors."""
    count, rows, _ = record.mlp_in.shape
    slot = np.zeros(count, np.int32)
    slot[np.array(layers, int) - first] = np.arange(len(layers))
    has = jnp.asarray(np.isin(np.arange(first, first + count), layers))
    live = has[:, None] & record.replaceable[None]
    if stack is None:
        none = jnp.zeros((count, rows, 0), jnp.int32)
        layout = SiteLayers(jnp.asarray(slot), live, none)
        return Sites(None, layout), none.astype(record.mlp_in.dtype), record.mlp_out
    floats = count * rows * stack.config.features
    if floats * record.mlp_in.dtype.itemsize <= CODE_BYTES:
        codes = _codes(stack, jnp.asarray(slot), live, record)
        most = int(jnp.max(jnp.sum(codes > 0, axis=2)))
    else:
        codes, most = None, int(_count_active(stack, jnp.asarray(slot), live, record))
    most = min(-(-max(most, 1) // BY_EIGHTS) * BY_EIGHTS, stack.config.features)
    index, values, errors = _find_active(stack, jnp.asarray(slot), live, record, codes, most)
    return Sites(stack, SiteLayers(jnp.asarray(slot), live, index)), values, errors


def site(stack: Transcoder, slot: Int[Array, ""]) -> Transcoder:
    """Returns one transcoder of a stack."""
    return jax.tree.map(lambda leaf: leaf[slot], stack)


@jax.jit
def _codes(stack: Transcoder, slot: Array, live: Array, record: _StreamRecord) -> Float[Array, "layer rows feat"]:
    """Returns the code of every position of every block."""
    return jax.lax.map(lambda at: _code(stack, at[0], at[1], at[2], record.t), (slot, live, record.mlp_in))


def _code(stack: Transcoder, slot: Array, live: Array, x: Array, t: Array) -> Float[Array, "rows feat"]:
    return jnp.where(live[:, None], site(stack, slot).encode(x, t), 0)


@jax.jit
def _count_active(stack: Transcoder, slot: Array, live: Array, record: _StreamRecord) -> Int[Array, ""]:
    """Returns the largest number of active features at any position of any block."""

    def step(most: Array, layer: tuple[Array, Array, Array]) -> tuple[Array, None]:
        slot, live, x = layer
        z = _code(stack, slot, live, x, record.t)
        return jnp.maximum(most, jnp.max(jnp.sum(z > 0, axis=1, dtype=jnp.int32))), None

    return jax.lax.scan(step, jnp.int32(0), (slot, live, record.mlp_in))[0]


@partial(jax.jit, static_argnames="most")
def _find_active(
    stack: Transcoder, slot: Array, live: Array, record: _StreamRecord, codes: Array | None, most: int
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


def run(record: Record, sites: Streams, sources: Sources) -> Streams:
    """Evaluates the affine map: the MLP sublayers' inputs x of every recorded block.

    Args:
        record: the trace's arrays.
        sites: the MLP sublayers.
        sources: where to evaluate it; zeros give its constant.
    """
    stacks = both(lambda s: s.stack, sites)

    def step(h: Streams, layer: Any) -> tuple[Streams, Streams]:
        block, frozen, *parts = layer
        h, acts = block(h, record.cond, frozen=frozen, mlp=lambda _, x: both(write, stacks, *parts, x))
        return h, acts.mlp_in

    layers = both(lambda s: s.layers, sites)
    per_layer = (record.blocks, record.frozen, layers, sources.values, sources.errors)
    return jax.lax.scan(step, sources.boundary, per_layer)[1]


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
        # No features, as in the map's constant: what a row of zeros decodes to, the same everywhere, and the skip.
        common = transcoder.decode(jnp.zeros((1, stack.config.features), x.dtype), jnp.zeros_like(x[:1]))
        y = common + transcoder.skip(x) if stack.config.skip else common
        return error + jnp.where(layer.live[:, None], y, 0)
    rows = jnp.arange(x.shape[0])[:, None]
    z = jnp.zeros((x.shape[0], stack.config.features), x.dtype).at[rows, layer.index].add(values)
    return error + jnp.where(layer.live[:, None], transcoder.decode(z, x), 0)
