"""How attention's scores bear on a target: their gradients through the live softmax (docs/method.md, section 10).

In the frozen map a target reads values through the recorded pattern P. Let one block's softmax live, with its values v
held and everything after it frozen. Then the target's derivative by the score of query i and key j of a head is

    g_ij = P_ij <c_i, v_j - sum_k P_ik v_k>        c_i the target's cotangent of what the head gives at i

A constant added to all scores of a query changes nothing, so that g sums to 0 over keys. A score therefore counts by
its distance from the query's pattern-weighted mean, s_ij - sum_k P_ik s_ik: the node's value, and g times it its edge.

1. `score_gradients` walks a target's cotangent down through the blocks, direct paths alone, as `walk` does; on the way
   it differentiates each by what is added to its scores. One block's scores are in memory at a time. Over several steps
   it goes on through the velocities of earlier ones (`carried`), so that their scores have gradients too.
2. `choose_scores` keeps those with the largest edges, and adds up what it leaves aside, block by block.
3. `removal_effects` is what scores do without a linearisation: an edge's remainder is its distance from that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from difffract_jax.circuits.attribution.carried import Carried
from difffract_jax.circuits.attribution.engine import Engine, targets_of
from difffract_jax.circuits.attribution.pullback import layout_of, velocity_cotangent
from difffract_jax.circuits.attribution.walk import skip
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import residuals
from difffract_jax.circuits.frozen.targets import Targets, target_gradients
from difffract_jax.circuits.trace.record import Record
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import OUTPUT
from difffract_jax.models.blocks import Streams, both
from difffract_jax.models.stacks import group_slices, sequences, slice_layer, streams
from difffract_jax.ops import attention_pattern
from difffract_jax.spread import using


class BlockScores(NamedTuple):
    """The attention scores of one block, and how they bear on some targets.

    Attributes:
        number: of the evaluation within the span; 0 where there is one.
        block: the model's.
        gradient: derivative of each target by each score, through the softmax.
        value: each score minus its query's pattern-weighted mean.
        pattern: the softmax.
    """

    number: int
    block: int
    gradient: Float[Array, "target heads queries keys"]
    value: Float[Array, "heads queries keys"]
    pattern: Float[Array, "heads queries keys"]


class ChosenScores(NamedTuple):
    """The scores that bear most on some targets, and what all others add up to.

    Attributes:
        number: of the evaluation within the span, of each score.
        block: the model's, alike.
        head: of the block.
        query: place in attention's sequence of the token that attends.
        key: the same of the token that is attended to.
        value: the score minus its query's pattern-weighted mean.
        pattern: the softmax there.
        edges: into every target, gradient times value.
        rest_number: the evaluation of each sum that follows; blocks that the targets do not reach are left out.
        rest_block: the model's block of each.
        rest: sum of the edges of the block's other scores.
        total: sum of the edges of all the block's scores, chosen ones included.
    """

    number: Int64[np.ndarray, "score"]
    block: Int64[np.ndarray, "score"]
    head: Int64[np.ndarray, "score"]
    query: Int64[np.ndarray, "score"]
    key: Int64[np.ndarray, "score"]
    value: Float64[np.ndarray, "score"]
    pattern: Float64[np.ndarray, "score"]
    edges: Float64[np.ndarray, "target score"]
    rest_number: Int64[np.ndarray, "block"]
    rest_block: Int64[np.ndarray, "block"]
    rest: Float64[np.ndarray, "target block"]
    total: Float64[np.ndarray, "target block"]


def score_gradients(engine: Engine, rows: Int64[np.ndarray, "target"]) -> Iterator[BlockScores]:
    """Differentiates targets by attention's scores, block by block from the top, step by step from the last.

    Args:
        engine: from `engine.make_engine`.
        rows: of the targets in the table, features or outputs.

    Returns:
        One result per block with attention that any of the targets reaches. For T targets it holds T numbers per score,
        [T heads S S] with S tokens in all.

    Example:
        >>> import numpy as np
        >>> from difffract_jax import capture, random_pipeline, random_transcoders, strongest_feature
        >>> from difffract_jax.circuits import make_engine
        >>> from difffract_jax.circuits.attribution.selection import target_row
        >>> pipe = random_pipeline()
        >>> tcs = random_transcoders(pipe.config.transformer)
        >>> trace = capture(pipe, tcs, "a red circle")
        >>> engine = make_engine(trace, tcs)
        >>> row = target_row(engine, strongest_feature(trace, tcs, "img", 2))
        >>> [found.block for found in score_gradients(engine, np.array([row]))]
        [2, 1, 0]
    """
    carried = [Carried(engine.steps, engine.infos, 1) for _ in rows]
    for number in reversed(range(len(engine.steps))):
        yield from _walk_down(engine, rows, number, carried)


def _walk_down(engine: Engine, rows: np.ndarray, number: int, carried: list[Carried]) -> Iterator[BlockScores]:
    """Walks all targets down through one evaluation; at its end the earlier ones have what it gives."""
    prepared, info = engine.steps[number], engine.infos[number]
    record, sites, _ = prepared
    targets = [targets_of(engine, rows[i : i + 1], number) for i in range(rows.size)]
    top = max((int(target.layer[0]) for target in targets), default=-1)
    if top < 0:
        for one in carried if engine.across else ():
            one.gather(number, None)
        return
    # The context must not stay open across a yield: it is the caller's, too.
    on_devices = partial(at_highest, engine)
    with on_devices():
        layout, entering = layout_of(prepared), residuals(*prepared)
        gradients = [target_gradients(record, sites, target)[0] for target in targets]
        cotangents = [_from_above(engine, int(row), number, one) for row, one in zip(rows, carried, strict=True)]
    for stack in reversed(range(len(layout.layers))):
        groups, first = record.weights.stacks[stack].groups, sum(layout.layers[:stack])
        joined = [sequences(cotangent, groups) for cotangent in cotangents]
        for layer in reversed(range(min(layout.layers[stack], max(top + 1 - first, 0)))):
            found = []
            with on_devices():
                for i, target in enumerate(targets):
                    own = jnp.where(target.layer[0] == first + layer, gradients[i], 0)
                    place = target, own, jnp.int32(layer)
                    gradient, joined[i] = _through_block(record, sites, entering, joined[i], *place, stack=stack)
                    found.append(gradient)
                scores = _centred(record, jnp.int32(layer), stack=stack)
            if scores is not None:
                yield BlockScores(number, info.recorded[first + layer], jnp.stack(found), *scores)
            del found, scores  # before the next block's come
        cotangents = [streams(one, groups, before) for one, before in zip(joined, cotangents, strict=True)]
    if engine.across:
        with on_devices():
            for one, cotangent in zip(carried, cotangents, strict=True):
                one.gather(number, both(lambda h: h[None], cotangent))


@contextmanager
def at_highest(engine: Engine) -> Iterator[None]:
    """Has products of the engine's arrays in full precision, on the devices where they lie."""
    with jax.default_matmul_precision("highest"), using(engine.options.mesh):
        yield


def _from_above(engine: Engine, row: int, number: int, carried: Carried) -> Streams:
    """Returns a target's cotangents of the residual streams leaving an evaluation's last block.

    Those of an output of its step come from the output, those of a target of later steps from what these brought to
    the latents; a feature of the evaluation has none.
    """
    prepared, info, step = engine.steps[number], engine.infos[number], int(engine.table.step[row])
    if step > info.step and engine.across:
        direction = info.taken * carried.latents
    elif step == info.step and engine.table.kind[row] == OUTPUT:
        output = engine.outputs[row - engine.sources]
        direction = (info.velocity_weight * output.velocity)[None]
        carried.latents = output.latents[None]
    else:
        return both(jnp.zeros_like, prepared.sources.boundary)
    return both(lambda rows: rows[0], velocity_cotangent(prepared, direction))


@partial(jax.jit, static_argnames="stack")
def _through_block(
    record: Record,
    sites: tuple[ReplacedSites, ...],
    entering: tuple[Float[Array, "_ _ d_model"], ...],
    cotangent: tuple[Float[Array, "_ d_model"], ...],
    target: Targets,
    gradient: Float[Array, "d_model"],
    layer: Array,
    *,
    stack: int,
) -> tuple[Array | None, tuple[Float[Array, "_ d_model"], ...]]:
    """Pulls a target back through one block; returns its derivative by the scores, and its cotangent below.

    Args:
        record: the trace's arrays.
        sites: per group.
        entering: the residual streams entering every block, per group, as they were recorded.
        cotangent: of the residual streams leaving the block, per group of its stack.
        target: the one target.
        gradient: of the target by its MLP's input; zeros unless it lies in this block.
        layer: counted from the stack's first recorded block.
        stack: number of the stack.
    """
    part = group_slices(record.weights.stacks)[stack]
    parts = (record.weights.stacks[stack], record.frozen[stack], [one.layers for one in sites[part]], entering[part])
    block, frozen, layers, h = slice_layer(parts, layer)
    at = [ReplacedSites(one.stack, place) for one, place in zip(sites[part], layers, strict=True)]
    into = tuple(
        at_row(gradient, target, group, rows.shape)
        for group, rows in zip(range(part.start, part.stop), cotangent, strict=True)
    )
    shape = block.attention_shape(frozen)

    def forward(h: tuple[Array, ...], **scores: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        after, acts = block(h, record.cond, frozen=frozen, mlp=lambda i, x: skip(at[i], x), **scores)
        return tuple(after), tuple(acts.mlp_in)

    if shape is None:
        _, pull = jax.vjp(forward, tuple(h))
        return None, pull((cotangent, into))[0]
    queries, heads, _ = shape
    # Values are those of the trace: only there does the gradient by the scores hold.
    added = jnp.zeros((heads, queries, queries), gradient.dtype)
    _, pull = jax.vjp(lambda h, scores: forward(h, scores=scores), tuple(h), added)
    below, scores = pull((cotangent, into))
    return scores, below


def at_row(
    gradient: Float[Array, "d_model"], target: Targets, group: int, shape: tuple[int, ...]
) -> Float[Array, "rows d_model"]:
    """Puts a target's gradient at its position, if it is of this group; zeros else.

    Args:
        gradient: of the target by its MLP's input.
        target: the one target.
        group: number of the group.
        shape: of the group's sequence.
    """
    rows = jnp.zeros(shape, gradient.dtype)
    return rows.at[target.position[0]].set(jnp.where(target.group[0] == group, gradient, 0), mode="drop")


@partial(jax.jit, static_argnames="stack")
def _centred(record: Record, layer: Array, *, stack: int) -> tuple[Array, Array] | None:
    """Returns a block's scores minus their pattern-weighted means, and its pattern; None without attention."""
    block, frozen = record.weights.stacks[stack], slice_layer(record.frozen[stack], layer)
    if block.attention_shape(frozen) is None:
        return None
    q, k = block.queries_and_keys(frozen)
    scale = q.shape[-1] ** -0.5
    pattern = attention_pattern(q, k, scale=scale, precision="highest")
    scores = scale * jnp.einsum("qhd,khd->hqk", q, k)
    return scores - jnp.sum(pattern * scores, axis=-1, keepdims=True), pattern


def choose_scores(
    engine: Engine, rows: Int64[np.ndarray, "target"], weights: Float64[np.ndarray, "target"], most: int
) -> ChosenScores:
    """Chooses the scores with the largest absolute edges into weighted targets.

    Args:
        engine: from `engine.make_engine`.
        rows: of the targets in the table.
        weights: of the targets.
        most: how many scores at most, of all steps; those without any edge are never chosen.

    Raises:
        UserError: if `most` is negative.
    """
    if most < 0:
        raise UserError(f"max_scores must be 0 or more, but got {most}.")
    found = [_candidates(one, weights, most) for one in score_gradients(engine, rows)]
    numbers, blocks = (np.array([place[i] for place, _ in found], np.int64) for i in (0, 1))
    none = _Candidates(*(np.zeros(0),) * 6, np.zeros((0, rows.size)), np.zeros(rows.size))
    candidates = [one for _, one in found]
    joined = {
        name: np.concatenate([getattr(one, name) for one in [none, *candidates]])
        for name in ("size", "head", "query", "key", "value", "pattern", "edges")
    }
    of_block = np.repeat(np.arange(blocks.size), [one.size.size for one in candidates])
    best = np.argsort(-joined["size"], kind="stable")[:most]
    best = best[joined["size"][best] > 0]
    edges = joined["edges"][best].T
    total = np.stack([one.total for one in [none, *candidates]], axis=1)[:, 1:]
    chosen = np.zeros_like(total)
    np.add.at(chosen.T, of_block[best], edges.T)
    return ChosenScores(
        numbers[of_block[best]],
        blocks[of_block[best]],
        *(joined[name][best].astype(np.int64) for name in ("head", "query", "key")),
        *(joined[name][best] for name in ("value", "pattern")),
        edges,
        numbers,
        blocks,
        total - chosen,
        total,
    )


class _Candidates(NamedTuple):
    """A block's largest edges from scores, on the host.

    Attributes:
        size: weighted sum over targets of the absolute edge.
        head: this and the rest as in `ChosenScores`, a score per row.
        query: place in the sequence.
        key: place in the sequence.
        value: centred score.
        pattern: the softmax.
        edges: [score target].
        total: [target].
    """

    size: Float64[np.ndarray, "score"]
    head: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: Float64[np.ndarray, "score"]
    pattern: Float64[np.ndarray, "score"]
    edges: Float64[np.ndarray, "score target"]
    total: Float64[np.ndarray, "target"]


def _candidates(found: BlockScores, weights: np.ndarray, most: int) -> tuple[tuple[int, int], _Candidates]:
    """Returns a block's evaluation and number, and its largest edges."""
    largest = jax.device_get(_largest(found, jnp.asarray(weights, found.value.dtype), most))
    size, place, value, pattern, edges, total = (np.asarray(array) for array in largest)
    places = np.unravel_index(place, found.value.shape)
    size, value, pattern, edges, total = (array.astype(np.float64) for array in (size, value, pattern, edges, total))
    return (found.number, found.block), _Candidates(size, *places, value, pattern, edges.T, total)


@partial(jax.jit, static_argnames="most")
def _largest(found: BlockScores, weights: Array, most: int) -> tuple[Array, ...]:
    """Returns the largest weighted absolute edges of a block, where they are, and what is there; and sums over all."""
    edges = found.gradient * found.value[None]
    size = jnp.einsum("t,thqk->hqk", weights, jnp.abs(edges)).reshape(-1)
    largest, place = jax.lax.top_k(size, min(most, size.size))
    at = [array.reshape(-1)[place] for array in (found.value, found.pattern)]
    return largest, place, *at, edges.reshape(edges.shape[0], -1)[:, place], jnp.sum(edges, axis=(1, 2, 3))


def removal_effects(
    edges: Float64[np.ndarray, "*target score"],
    value: Float64[np.ndarray, "score"],
    pattern: Float64[np.ndarray, "score"],
) -> Float64[np.ndarray, "*target score"]:
    """Returns by how much targets fall when a score becomes its query's mean and the softmax of its block is live.

    With r = exp(-s) - 1 of a centred score s, the pattern there becomes P (1 + r) / (1 + P r), and that of the query's
    other keys is divided by 1 + P r; the target is affine in what attention gives. Hence the exact fall,
    -g r / (1 + P r), of which the edge g s is the first order.

    Args:
        edges: gradients times values.
        value: centred scores.
        pattern: the softmax there, at the trace.

    Example:
        >>> removal_effects(np.array([0.1]), np.array([0.1]), np.array([0.5])).round(4)
        array([0.0999])
    """
    change = np.expm1(-value)
    gradient = np.divide(edges, value, out=np.zeros_like(edges), where=value != 0)
    return -gradient * change / (1 + pattern * change)
