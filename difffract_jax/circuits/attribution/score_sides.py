"""What makes an attention score: its two sides, split by the sources of the trace (docs/method.md, section 10).

With the denominators of their RMS norms held, a head's query at i and its keys are affine in the sources: q = q0 +
sum_a q_a, and k = k0 + sum_b k_b for the centred key k = k_j - sum_n P_in k_n, P being the recorded pattern. Their
scaled product is the score minus its query's mean. It is split without counting a pair twice:

    <q, k> = sum_a <q_a, (k + k0) / 2>  +  sum_b <(q + q0) / 2, k_b>  +  <q0, k0>

Each side is one direction of the residual streams entering the block, pulled back through everything below. A source's
part is what it adds on the straight way from zero sources to those of the trace; where no bias takes part, a small
change of one source moves the score by twice its part of it, as the square of a sum does. Over several steps the
sources are those of all steps up to the score's, and the sides go on through the velocities of the earlier ones.

Products of pairs, at a pull-back for every column of a head, are in `effects.attention.score_parts`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64

from difffract_jax.address import STREAMS
from difffract_jax.circuits.attribution.carried import Carried, enter
from difffract_jax.circuits.attribution.engine import Engine, no_sources
from difffract_jax.circuits.attribution.pullback import Pulled, input_edges, layout_of, pull, velocity_cotangent
from difffract_jax.circuits.attribution.score_gradients import at_highest
from difffract_jax.circuits.frozen.replacement import Replacement, residuals
from difffract_jax.circuits.frozen.targets import DIRECTION, Targets
from difffract_jax.config import UserError
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.models.blocks import Cond, Streams, both
from difffract_jax.models.stacks import group_slices, slice_layer, streams
from difffract_jax.models.streaming import Streamed

AT_ONCE = 8
"""Scores of a block whose sides are pulled back together; fewer are filled up, so that a program serves all."""


class ScoreEdges(NamedTuple):
    """Attention scores, each minus its query's pattern-weighted mean, split by source.

    Attributes:
        query: every source's part through the query, one row per score.
        key: its part through the keys.
        constant: what biases alone give.
        value: what all of these add up to.
    """

    query: Float64[np.ndarray, "score source"]
    key: Float64[np.ndarray, "score source"]
    constant: Float64[np.ndarray, "score"]
    value: Float64[np.ndarray, "score"]


class ScorePlace(NamedTuple):
    """Where an attention score stands.

    Attributes:
        block: the model's.
        head: of the block.
        query: stream, "img" or "txt", and position of the token that attends.
        key: the same of the token that is attended to.
        number: of the evaluation within the span; 0 where there is one.
    """

    block: int
    head: int
    query: tuple[str, int]
    key: tuple[str, int]
    number: int = 0


def score_edges(engine: Engine, places: list[ScorePlace]) -> ScoreEdges:
    """Splits attention scores by the sources of the trace, through the query and through the keys.

    Args:
        engine: from `engine.make_engine`.
        places: of the scores.

    Raises:
        UserError: if there is no such block, head or token in the trace.

    Example:
        >>> from difffract_jax import capture, random_pipeline, random_transcoders
        >>> from difffract_jax.circuits import make_engine
        >>> pipe = random_pipeline()
        >>> tcs = random_transcoders(pipe.config.transformer)
        >>> engine = make_engine(capture(pipe, tcs, "a red circle"), tcs)
        >>> edges = score_edges(engine, [ScorePlace(2, 1, ("img", 5), ("txt", 1))])
        >>> total = edges.query.sum() + edges.key.sum() + edges.constant[0]
        >>> bool(abs(total - edges.value[0]) < 1e-4)
        True
    """
    checked = [check_place(engine, place) for place in places]
    found = [np.zeros((len(places), engine.sources)) for _ in range(2)] + [np.zeros(len(places)) for _ in range(2)]
    number, block = (np.array([getattr(place, name) for place in places], int) for name in ("number", "block"))
    columns = np.array(checked, np.int32).reshape(-1, 3)
    for mine, part in sides_of_scores(engine, number, block, columns):
        for array, rows in zip(found, part, strict=True):
            array[mine] = rows
    return ScoreEdges(*found)


def sides_of_scores(
    engine: Engine,
    number: Int[np.ndarray, "score"],
    block: Int[np.ndarray, "score"],
    columns: Int[np.ndarray, "score head_query_key"],
) -> Iterator[tuple[Int64[np.ndarray, "some"], ScoreEdges]]:
    """Splits scores block by block, so that one evaluation's residual streams are in memory at a time.

    Args:
        engine: from `engine.make_engine`.
        number: of each score's evaluation.
        block: the model's, of each.
        columns: head, and places of query and key in attention's sequence, of each.

    Returns:
        Which scores, and their parts.
    """
    for evaluation in np.unique(number).tolist():
        entering, first = entering_blocks(engine, evaluation), engine.infos[evaluation].recorded[0]
        for one in np.unique(block[number == evaluation]).tolist():
            mine = np.flatnonzero((number == evaluation) & (block == one))
            yield mine, sides_of_block(engine, evaluation, one - first, columns[mine].astype(np.int32), entering)


def check_place(engine: Engine, place: ScorePlace) -> tuple[int, int, int]:
    """Returns a score's head, and the places of its tokens in attention's sequence.

    Args:
        engine: from `engine.make_engine`.
        place: of the score.

    Raises:
        UserError: if there is no such block, head or token in the trace.
    """
    info, record = engine.infos[place.number], engine.steps[place.number].record
    layout, block = info.layout, place.block
    if block not in info.recorded:
        first, last, wanted = (layout.block_name(one) for one in (info.recorded[0], info.recorded[-1], block))
        raise UserError(f"The trace recorded the blocks {first} to {last}, but not {wanted}.")
    stack = layout.stack_of_block(block)
    shape = record.weights.stacks[stack].attention_shape(record.frozen[stack])
    heads = 0 if shape is None else shape[1]
    if not 0 <= place.head < heads:
        known = f"heads 0 to {heads - 1}" if heads else "no attention"
        raise UserError(f"The block {layout.block_name(block)} has {known}, but got {place.head}.")
    tokens = attention_tokens(info, record.weights.stacks[stack], stack)
    rows = []
    for stream, position in (place.query, place.key):
        lengths = info.tokens_of._asdict()
        if stream not in lengths or not 0 <= position < lengths[stream]:
            raise UserError(
                f"There is no token {stream}{position}; the run has {lengths['img']} image tokens, from img0 on, and "
                f"{lengths['txt']} text tokens, from txt0 on."
            )
        own = (tokens[0] == STREAMS.index(stream)) & (tokens[1] == position)
        rows.append(int(np.flatnonzero(own)[0]))
    return place.head, *rows


def attention_tokens(info: TraceInfo, block: Any, stack: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns stream and position of every token of attention's sequence.

    Args:
        info: of the trace.
        block: a block of the stack, or the stack.
        stack: its number.
    """
    first = info.layout.groups_of_stack(stack).start
    parts = [info.layout.sequence(first + group, info.tokens_of) for group in block.attention_order]
    stream, position = (np.concatenate(column) for column in zip(*parts, strict=True))
    return stream, position


class EnteringBlocks(NamedTuple):
    """The residual streams entering every block, [layer rows d_model] per group.

    Attributes:
        traced: in the trace.
        zero: at zero sources: what biases alone give.
    """

    traced: tuple[Float[Array, "_ _ d_model"], ...]
    zero: tuple[Float[Array, "_ _ d_model"], ...]


def entering_blocks(engine: Engine, number: int) -> EnteringBlocks:
    """Returns the residual streams entering every block of an evaluation.

    Args:
        engine: from `engine.make_engine`.
        number: of the evaluation within the span.
    """
    prepared = engine.steps[number]
    zeros, sites = no_sources(prepared)
    with at_highest(engine):
        if engine.across:
            # At zero sources the earlier steps still move the latents, by their own constants.
            record, latents = prepared.record, engine.constants[number].latents
            zeros = zeros._replace(boundary=enter(record.weights, latents, jnp.zeros_like(record.text)))
        return EnteringBlocks(residuals(*prepared), residuals(prepared.record, sites, zeros))


def sides_of_block(
    engine: Engine,
    number: int,
    layer: int,
    columns: Int[np.ndarray, "score head_query_key"],
    entering: EnteringBlocks,
) -> ScoreEdges:
    """Splits scores of one block.

    Args:
        engine: from `engine.make_engine`.
        number: of the evaluation within the span.
        layer: recorded layer of the block, counted through all stacks.
        columns: head, and places of query and key in attention's sequence, of each score; at least one.
        entering: of all blocks of the evaluation.
    """
    prepared = engine.steps[number]
    record, boundary = prepared.record, prepared.sources.boundary
    block, frozen, inputs, groups = block_parts(prepared, layer, entering)
    before = both(lambda h: jnp.zeros((2 * AT_ONCE, *h.shape), h.dtype), boundary)
    filled = np.concatenate([columns, np.repeat(columns[:1], -len(columns) % AT_ONCE, axis=0)])
    found = []
    for some in np.split(filled, len(filled) // AT_ONCE):
        numbers = (jnp.asarray(column, jnp.int32) for column in some.T)
        with at_highest(engine):
            query, key, constant, value = _directions(block, record.cond, frozen, *inputs, *numbers)
            joined = tuple(jnp.concatenate(pair) for pair in zip(query, key, strict=True))
            edges = edges_below(engine, number, layer, streams(joined, groups, before))
        found.append((*np.split(edges, 2), *(np.asarray(column, np.float64) for column in (constant, value))))
    return ScoreEdges(*(np.concatenate(column)[: len(columns)] for column in zip(*found, strict=True)))


@jax.jit
def _directions(
    block: Any,
    cond: Cond,
    frozen: Any,
    entering: tuple[Float[Array, "_ d_model"], ...],
    zero: tuple[Float[Array, "_ d_model"], ...],
    head: Int[Array, "score"],
    query: Int[Array, "score"],
    key: Int[Array, "score"],
) -> tuple[tuple[Array, ...], tuple[Array, ...], Float[Array, "score"], Float[Array, "score"]]:
    """Returns the directions of both sides in the streams entering the block, and each score's constant and value."""
    project = partial(queries_or_keys, block, cond, frozen)
    recorded_q, recorded_k = block.queries_and_keys(frozen)
    scale = recorded_q.shape[-1] ** -0.5
    (q, held_q), (k, held_k) = (project(part, entering, None) for part in (0, 1))
    q0, k0 = project(0, zero, held_q)[0], project(1, zero, held_k)[0]

    def one(head: Array, query: Array, key: Array) -> tuple[Array, Array, Array, Array]:
        pattern = jax.nn.softmax(scale * (recorded_k[:, head] @ recorded_q[query, head]))
        weights = jax.nn.one_hot(key, pattern.size, dtype=pattern.dtype) - pattern
        own_q, own_q0 = q[query, head], q0[query, head]
        own_k, own_k0 = weights @ k[:, head], weights @ k0[:, head]
        into_q = jnp.zeros_like(q).at[query, head].set(scale * (own_k + own_k0) / 2)
        into_k = jnp.zeros_like(k).at[:, head].set(weights[:, None] * (scale * (own_q + own_q0) / 2)[None])
        return into_q, into_k, scale * (own_q0 @ own_k0), scale * (own_q @ own_k)

    into_q, into_k, constant, value = jax.vmap(one)(head, query, key)
    sides = []
    for part, into, held in ((0, into_q, held_q), (1, into_k, held_k)):
        _, pull_one = jax.vjp(lambda h, part=part, held=held: project(part, h, held)[0], entering)
        sides.append(jax.vmap(lambda cotangent, pull=pull_one: pull(cotangent)[0])(into))
    return sides[0], sides[1], constant, value


def block_parts(prepared: Replacement, layer: int, entering: EnteringBlocks) -> tuple[Any, Any, list[Any], Any]:
    """Returns a block with all its weights, its record, the streams entering it, and its stack's groups.

    Args:
        prepared: the evaluation's replacement.
        layer: recorded layer of the block, counted through all stacks.
        entering: of all blocks.
    """
    record, counts = prepared.record, layout_of(prepared).layers
    stack = next(i for i in range(len(counts)) if layer < sum(counts[: i + 1]))
    within = layer - sum(counts[:stack])
    live, part = record.weights.live[stack], group_slices(record.weights.stacks)[stack]
    block = live.fetch(within) if isinstance(live, Streamed) else slice_layer(live, within)
    frozen, *inputs = slice_layer((record.frozen[stack], entering.traced[part], entering.zero[part]), within)
    return block, frozen, inputs, record.weights.stacks[stack].groups


def queries_or_keys(
    block: Any,
    cond: Cond,
    frozen: Any,
    part: int,
    h: tuple[Float[Array, "_ d_model"], ...],
    held: Float[Array, "seq heads"] | None,
) -> tuple[Float[Array, "seq heads head_dim"], Float[Array, "seq heads"]]:
    """Returns the rotated queries (part 0) or keys (1) of attention's sequence, and 1 / their root mean squares.

    Args:
        block: with all of its weights.
        cond: what the evaluation's blocks share.
        frozen: record of the block.
        part: 0 for queries, 1 for keys.
        h: the residual streams entering the block, per group.
        held: 1 / root mean squares to hold; those of the rows themselves if None.
    """
    _, heads, _ = block.attention_shape(frozen)
    found, begin = [], 0
    for group in block.attention_order:
        rows = h[group].shape[0]
        own = None if held is None else held[begin : begin + rows]
        begin += rows

        def row(number: Array, h: Array, held: Array | None, group: int = group) -> tuple[Array, Array]:
            head = lambda head, held: block.query_or_key(cond, frozen, part, head, group, number, h, held)  # noqa: E731
            return jax.vmap(head, (0, None if held is None else 0))(jnp.arange(heads), held)

        found.append(jax.vmap(row, (0, 0, None if own is None else 0))(jnp.arange(rows), h[group], own))
    values, denominators = (jnp.concatenate(column) for column in zip(*found, strict=True))
    return values, denominators


def edges_below(
    engine: Engine, number: int, layer: int, directions: Streams
) -> Float64[np.ndarray, "direction source"]:
    """Returns the edges of directions of the residual streams entering a layer; within one step the latents have none.

    Args:
        engine: from `engine.make_engine`.
        number: of the evaluation within the span.
        layer: recorded layer, counted through all stacks.
        directions: [direction rows d_model] per stream.
    """
    count, steps = directions.img.shape[0], engine.steps
    if not count:
        return np.zeros((0, engine.sources))
    pulled = _pull_from(engine, number, layer, directions)
    parts, carried = {number: np.asarray(pulled.edges, np.float64)}, Carried(steps, engine.infos, count)
    if not engine.across:
        record, inputs = steps[0].record, input_edges(pulled.boundary, steps[0].sources.boundary)
        latents = np.zeros((count, 0 if record.velocity is None else record.latents.shape[0]))
        return np.concatenate([parts[0], np.asarray(inputs, np.float64), latents], axis=1)
    carried.gather(number, pulled.boundary)
    for earlier in reversed(range(number)):
        info = engine.infos[earlier]
        if info.step == engine.infos[number].step:  # the step's other branch, which nothing reaches
            carried.gather(earlier, None)
            continue
        above = velocity_cotangent(steps[earlier], info.taken * carried.latents)
        pulled = _pull_from(engine, earlier, len(info.recorded), above)
        parts[earlier] = np.asarray(pulled.edges, np.float64)
        carried.gather(earlier, pulled.boundary)
    rows = [parts.get(one, np.zeros((count, layout_of(prepared).inputs))) for one, prepared in enumerate(steps)]
    return np.concatenate([*rows, np.asarray(carried.inputs(), np.float64)], axis=1)


def _pull_from(engine: Engine, number: int, layer: int, directions: Streams) -> Pulled:
    """Pulls directions of the residual streams entering a layer back through the blocks below."""
    same = [jnp.full(directions.img.shape[0], value, jnp.int32) for value in (DIRECTION, layer, 0, 0)]
    return pull(engine.steps[number], Targets(*same), directions, options=engine.options._replace(precision="f32"))
