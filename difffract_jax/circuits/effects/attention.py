"""What attention does in a circuit: edges split by head, a score by pairs of sources (docs/method.md, section 6).

*Head loadings.* Every path from a source to a target takes some attention hops or none. An edge is the sum over the
heads of its paths whose last hop, the one nearest to the target, is through that head, plus the paths without a hop:

1. Walk down from the target with the residual stream alone: what has taken no hop.
2. At every block, one head's part of what attention passes on is a direction of the residual stream entering the block;
   pulled back through everything below, all paths included, it gives that head's share of every edge.

*Query and key.* With the denominators of their RMS norms held, a head's query at i and key at j are affine in the
sources: q = q0 + sum_a q_a, k = k0 + sum_b k_b. Their scaled product is

    score = sum_ab <q_a, k_b> + sum_a <q_a, k0> + sum_b <q0, k_b> + <q0, k0>

*Centred.* Where scores are nodes of a graph, their value is the score minus its query's mean, k_j - sum_n P_in k_n in
the key's place. The same four sums add up to it, and a node's edges are what `score_sides` makes of them: half of each
pair goes to either side, and the linear terms to their own.

Both hold for one step; in a span, for the step's own sources.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from difffract_jax.address import STREAMS
from difffract_jax.circuits.attribution.contraction import gather_bytes
from difffract_jax.circuits.attribution.engine import Engine, targets_of
from difffract_jax.circuits.attribution.pullback import input_edges, layout_of, velocity_cotangent
from difffract_jax.circuits.attribution.score_gradients import at_highest, at_row
from difffract_jax.circuits.attribution.score_sides import (
    AT_ONCE,
    ScorePlace,
    block_parts,
    check_place,
    edges_below,
    entering_blocks,
    queries_or_keys,
)
from difffract_jax.circuits.attribution.walk import block_at, contract_block, skip
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Replacement, residuals
from difffract_jax.circuits.frozen.targets import Targets, target_gradients
from difffract_jax.circuits.trace.capture import one_evaluation
from difffract_jax.circuits.trace.record import Record
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import OUTPUT
from difffract_jax.models.blocks import Cond, both
from difffract_jax.models.stacks import group_slices, sequences, slice_layer, streams
from difffract_jax.models.streaming import Streamed


class HeadLoadings(NamedTuple):
    """The edges into one target, by the head of their last attention hop.

    Attributes:
        block: the model's block of each head.
        head: its number.
        loading: share of each edge, one row per head.
        direct: share of each edge that took no hop.
    """

    block: Int64[np.ndarray, "hop"]
    head: Int64[np.ndarray, "hop"]
    loading: Float64[np.ndarray, "hop source"]
    direct: Float64[np.ndarray, "source"]


def head_loadings(engine: Engine, row: int, sources: Int64[np.ndarray, "source"] | None = None) -> HeadLoadings:
    """Splits the edges into a target by head.

    Args:
        engine: of one step, from `engine.make_engine`.
        row: the target's row of the table.
        sources: rows of the sources wanted; all if left out.

    Raises:
        UserError: if the engine is a span's.
    """
    wanted = np.arange(engine.sources) if sources is None else sources
    *layers, (_, direct) = ((block, part[:, wanted]) for block, part in loadings_by_layer(engine, row))
    counts = [len(part) for _, part in layers]
    block = np.repeat(np.array([block for block, _ in layers], np.int64), counts)
    head = np.array([head for count in counts for head in range(count)], np.int64)
    loading = np.concatenate([np.zeros((0, wanted.size)), *(part for _, part in layers)])
    return HeadLoadings(block, head, loading, direct[0])


def loadings_by_layer(
    engine: Engine, row: int
) -> Iterator[tuple[int | None, Float64[np.ndarray, "head_or_direct source"]]]:
    """Splits the edges into a target by head, one layer after another, so that one layer's heads are in memory at once.

    Args:
        engine: of one step.
        row: the target's row of the table.

    Returns:
        Per layer, top down, the model's block and its heads' loadings; at the end None and one row, the share of every
        edge that took no hop.

    Raises:
        UserError: if the engine is a span's.
    """
    if engine.across:
        raise UserError(f"Head loadings are those of one step, not of a span; trace {one_evaluation(engine.info)}.")
    return _walk_directly(engine, row)


def _walk_directly(engine: Engine, row: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """Walks down from a target without attention hops, and pulls every layer's heads back with all of them."""
    prepared, info = engine.steps[0], engine.infos[0]
    record, sites, sources = prepared
    target = targets_of(engine, np.array([row]), 0)
    boundary, layout = sources.boundary, layout_of(prepared)
    cotangent = both(partial(_zeros, 1), boundary)
    # The context must not stay open across a yield: it is the caller's, too.
    highest = partial(jax.default_matmul_precision, "highest")
    with highest():
        gradient = target_gradients(record, sites, target)
        if engine.table.kind[row] == OUTPUT:
            cotangent = velocity_cotangent(prepared, engine.outputs[row - engine.sources].velocity[None])
    direct: list[np.ndarray] = []
    for stack in reversed(range(len(layout.layers))):
        groups, first = record.weights.stacks[stack].groups, sum(layout.layers[:stack])
        joined = sequences(cotangent, groups)
        for layer in reversed(range(layout.layers[stack])):
            with highest():
                direct.insert(0, np.asarray(_direct_edges(prepared, joined, jnp.int32(layer), stack)))
                own = target.layer[0] == first + layer
                passed, joined = _without_hops(
                    record, sites, joined, target, jnp.where(own, gradient, 0), jnp.int32(layer), stack
                )
                before = both(partial(_zeros, passed[0].shape[0]), boundary)
                loadings = [edges_below(engine, 0, first + layer, streams(passed, groups, before))]
            # Nothing of this layer may stay in memory while the next one is computed.
            del before, passed
            yield info.recorded[first + layer], loadings.pop()
        cotangent = streams(joined, groups, cotangent)
    with highest():
        direct.append(np.asarray(input_edges(cotangent, boundary))[0])
    if record.velocity is not None:
        # The latents' own edges are an objective's direct dependence on them.
        output = engine.outputs[row - engine.sources].latents if engine.table.kind[row] == OUTPUT else 0
        direct.append(np.asarray(jnp.sum(output * record.latents, axis=1)))
    yield None, np.concatenate(direct)[None].astype(np.float64)


def _zeros(count: int, h: Float[Array, "rows d_model"]) -> Float[Array, "count rows d_model"]:
    return jnp.zeros((count, *h.shape), h.dtype)


@partial(jax.jit, static_argnames="stack")
def _direct_edges(
    prepared: Replacement, cotangent: tuple[Float[Array, "one _ d_model"], ...], layer: Array, stack: int
) -> Float[Array, "source"]:
    """Returns the edges of one block's features and errors into cotangents of what leaves the block."""
    part = group_slices(prepared.record.weights.stacks)[stack]
    block = block_at(*prepared, stack, part, layer)
    empty = jnp.zeros((1, layout_of(prepared).per_layer[stack]), cotangent[0].dtype)
    corner, gather = (jnp.int32(0), jnp.int32(0)), gather_bytes(jax.default_backend())
    return contract_block(block, empty, corner, cotangent, 1, gather)[0]


@partial(jax.jit, static_argnames="stack")
def _without_hops(
    record: Record,
    sites: tuple[ReplacedSites, ...],
    cotangent: tuple[Float[Array, "one _ d_model"], ...],
    target: Targets,
    gradient: Float[Array, "one d_model"],
    layer: Array,
    stack: int,
) -> tuple[tuple[Float[Array, "head _ d_model"], ...], tuple[Float[Array, "one _ d_model"], ...]]:
    """Pulls the residual streams' own cotangent through a block; returns what heads pass on, and the cotangent.

    Args:
        record: the trace's arrays.
        sites: per group.
        cotangent: of the residual streams leaving the block, per group of its stack.
        target: the one target.
        gradient: of the target by its MLP's input; zeros unless it lies in this block.
        layer: counted from the stack's first recorded block.
        stack: number of the stack.
    """
    part = group_slices(record.weights.stacks)[stack]
    block, frozen, layers = slice_layer(
        (record.weights.stacks[stack], record.frozen[stack], [one.layers for one in sites[part]]), layer
    )
    at = [ReplacedSites(one.stack, place) for one, place in zip(sites[part], layers, strict=True)]
    into = tuple(
        at_row(gradient[0], target, group, c.shape[1:])
        for group, c in zip(range(part.start, part.stop), cotangent, strict=True)
    )

    def pulled(mask: Float[Array, "heads"] | None) -> tuple[Array, ...]:
        def forward(h: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            after, acts = block(h, record.cond, frozen=frozen, mlp=lambda i, x: skip(at[i], x), heads=mask)
            return tuple(after), tuple(acts.mlp_in)

        _, pull_one = jax.vjp(forward, tuple(jnp.zeros(c.shape[1:], c.dtype) for c in cotangent))
        return pull_one((tuple(c[0] for c in cotangent), into))[0]

    shape = block.attention_shape(frozen)
    if shape is None:
        return tuple(jnp.zeros((0, *c.shape[1:]), c.dtype) for c in cotangent), tuple(c[None] for c in pulled(None))
    masks = jnp.concatenate([jnp.zeros((1, shape[1])), jnp.eye(shape[1])]).astype(gradient.dtype)
    h = jax.vmap(pulled)(masks)
    return tuple(leaf[1:] - leaf[:1] for leaf in h), tuple(leaf[:1] for leaf in h)


class ScoreParts(NamedTuple):
    """One attention score as a bi-affine function of the sources.

    Attributes:
        queries: every source's part of the query, scaled by 1/sqrt(head_dim), [head_dim source].
        keys: every source's part of the key, centred if that was asked for.
        query_constant: what the query is at zero sources, scaled alike.
        key_constant: the same of the key.
        score: of the trace, before the softmax; minus its query's mean if it is centred.
    """

    queries: Float64[np.ndarray, "head_dim source"]
    keys: Float64[np.ndarray, "head_dim source"]
    query_constant: Float64[np.ndarray, "head_dim"]
    key_constant: Float64[np.ndarray, "head_dim"]
    score: float

    @property
    def query_terms(self) -> Float64[np.ndarray, "source"]:
        """<q_a, k0> of every source."""
        return self.key_constant @ self.queries

    @property
    def key_terms(self) -> Float64[np.ndarray, "source"]:
        """<q0, k_b> of every source."""
        return self.query_constant @ self.keys

    @property
    def constant(self) -> float:
        """<q0, k0>."""
        return float(self.query_constant @ self.key_constant)

    def pairs(
        self, a: Int64[np.ndarray, "query_source"], b: Int64[np.ndarray, "key_source"]
    ) -> Float64[np.ndarray, "query_source key_source"]:
        """Returns <q_a, k_b> of some sources: rows of the table on the query's side, and on the key's."""
        return self.queries[:, a].T @ self.keys[:, b]


def score_parts(
    engine: Engine, block: int, head: int, query: tuple[str, int], key: tuple[str, int], *, centred: bool = False
) -> ScoreParts:
    """Splits one attention score by the sources of query and key.

    Args:
        engine: of one step.
        block: the model's block; single-stream blocks count on after the double-stream ones.
        head: of the block.
        query: stream, "img" or "txt", and position of the token that attends.
        key: the same of the token that is attended to.
        centred: whether to split the score minus its query's mean, the value of a graph's node.

    Raises:
        UserError: if there is no such block, head or token in the trace, or the engine is a span's.
    """
    if engine.across:
        raise UserError(f"An attention score is one step's, not a span's; trace {one_evaluation(engine.info)}.")
    prepared, info = engine.steps[0], engine.infos[0]
    layout, record = info.layout, prepared.record
    columns = check_place(engine, ScorePlace(block, head, query, key))
    stack = layout.stack_of_block(block)
    places = []
    for stream, position in (query, key):
        code = STREAMS.index(stream)
        group = int(layout.groups_at(block, code))
        places.append((group, int(layout.rows_at(group, code, position, info.tokens_of))))
    with jax.default_matmul_precision("highest"):
        sides = [
            _side(engine, block - info.recorded[0], stack, head, group, row, part)
            for part, (group, row) in enumerate(places[: 1 if centred else 2])
        ]
        sides += [_centred_key(engine, block - info.recorded[0], columns)] if centred else []
    (q, q0, q_true), (k, k0, k_true) = sides
    scale = float(record.weights.stacks[stack].attention_shape(record.frozen[stack])[2]) ** -0.5
    return ScoreParts(q * scale, k, q0 * scale, k0, float(scale * (q_true @ k_true)))


def _side(
    engine: Engine, layer: int, stack: int, head: int, group: int, row: int, part: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns every source's part of a query (part 0) or key (1), its constant, and its value in the trace."""
    record, sites, sources = engine.steps[0]
    within = layer - record.first_layers[group]
    live, frozen = record.weights.live[stack], slice_layer(record.frozen[stack], within)
    block = live.fetch(within) if isinstance(live, Streamed) else slice_layer(live, within)
    own_group = group - group_slices(record.weights.stacks)[stack].start
    true_row = residuals(record, sites, sources)[group][within, row]
    zero_row = residuals(record, sites, jax.tree.map(jnp.zeros_like, sources))[group][within, row]
    place = jnp.int32(head), jnp.int32(row)
    value, constant, directions = _projected(block, record.cond, frozen, true_row, zero_row, *place, part, own_group)
    groups = record.weights.stacks[stack].groups
    before = both(lambda h: jnp.zeros((value.size, *h.shape), value.dtype), sources.boundary)
    joined = list(sequences(before, groups))
    joined[own_group] = joined[own_group].at[:, row].set(directions)
    edges = edges_below(engine, 0, layer, streams(joined, groups, before))
    return edges, np.asarray(constant, np.float64), np.asarray(value, np.float64)


@partial(jax.jit, static_argnames=("part", "group"))
def _projected(
    block: Any,
    cond: Cond,
    frozen: Any,
    true_row: Float[Array, "d_model"],
    zero_row: Float[Array, "d_model"],
    head: Array,
    row: Array,
    part: int,
    group: int,
) -> tuple[Float[Array, "head_dim"], Float[Array, "head_dim"], Float[Array, "head_dim d_model"]]:
    """Returns a query (part 0) or key (1) of the trace, what it is at zero sources, and its derivative by the row."""
    project = partial(block.query_or_key, cond, frozen, part, head, group, row)
    denominator = project(true_row, None)[1]
    affine = lambda h: project(h, denominator)[0]  # noqa: E731  (closed over what is held)
    value, pull_row = jax.vjp(affine, true_row)
    directions = jax.vmap(lambda unit: pull_row(unit)[0])(jnp.eye(value.size, dtype=value.dtype))
    return value, affine(zero_row), directions


def _centred_key(
    engine: Engine, layer: int, columns: tuple[int, int, int]
) -> tuple[Float64[np.ndarray, "head_dim source"], Float64[np.ndarray, "head_dim"], Float64[np.ndarray, "head_dim"]]:
    """Splits a score's centred key, column by column of the head: k_j - sum_n P_in k_n, P being the recorded pattern.

    Args:
        engine: of one step.
        layer: recorded layer of the block, counted through all stacks.
        columns: head, and places of query and key in attention's sequence.

    Returns:
        Every source's part; what biases alone give; and the key itself.
    """
    prepared, entering = engine.steps[0], entering_blocks(engine, 0)
    block, frozen, inputs, groups = block_parts(prepared, layer, entering)
    before = both(lambda h: jnp.zeros((AT_ONCE, *h.shape), h.dtype), prepared.sources.boundary)
    place = tuple(jnp.int32(column) for column in columns)
    size = block.attention_shape(frozen)[2]
    units = np.eye(size + -size % AT_ONCE)[:, :size]
    found = []
    with at_highest(engine):
        for some in np.split(units, len(units) // AT_ONCE):
            given = jnp.asarray(some, before.img.dtype)
            directions, constant, value = _key_directions(block, prepared.record.cond, frozen, *inputs, place, given)
            found.append(edges_below(engine, 0, layer, streams(directions, groups, before)))
    return np.concatenate(found)[:size], *(np.asarray(one, np.float64) for one in (constant, value))


@jax.jit
def _key_directions(
    block: Any,
    cond: Cond,
    frozen: Any,
    entering: tuple[Float[Array, "_ d_model"], ...],
    zero: tuple[Float[Array, "_ d_model"], ...],
    place: tuple[Array, Array, Array],
    units: Float[Array, "column head_dim"],
) -> tuple[tuple[Array, ...], Float[Array, "head_dim"], Float[Array, "head_dim"]]:
    """Returns columns' directions in the streams entering the block; and the centred key, at zero sources and now."""
    head, query, key = place
    recorded_q, recorded_k = block.queries_and_keys(frozen)
    pattern = jax.nn.softmax(recorded_q.shape[-1] ** -0.5 * (recorded_k[:, head] @ recorded_q[query, head]))
    weights = jax.nn.one_hot(key, pattern.size, dtype=pattern.dtype) - pattern
    held = queries_or_keys(block, cond, frozen, 1, entering, None)[1]

    def centred(h: tuple[Array, ...]) -> Array:
        return weights @ queries_or_keys(block, cond, frozen, 1, h, held)[0][:, head]

    value, pull_one = jax.vjp(centred, entering)
    return jax.vmap(lambda unit: pull_one(unit)[0])(units), centred(zero), value
