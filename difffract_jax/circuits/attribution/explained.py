"""Attention's scores as nodes of a graph (docs/method.md, section 10).

1. The scores that bear most on the graph's targets become nodes (`score_gradients.choose_scores`); the others of a
   block are one node, so that nothing is lost.
2. An edge from a score is its gradient times its value. The frozen edges add up to the target already: what scores add
   stands in its bias with the opposite sign, so that conservation holds whatever they are. A derivative in forward mode
   is what they are held against: that of the target by all queries, scaled by 1 + eps, must be the sum of the edges.
3. An edge into a score is the part of its value that a source makes (`score_sides`); with the constant they add up to
   it.

Only the graph's own targets have edges from scores: features between read attention as it was.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float64, Int64

from difffract_jax.circuits.attribution.engine import Engine, targets_of
from difffract_jax.circuits.attribution.expansion import Edges, Expansion, ScoreRows, Totals, edges_of
from difffract_jax.circuits.attribution.score_gradients import ChosenScores, choose_scores, removal_effects
from difffract_jax.circuits.attribution.score_sides import (
    attention_tokens,
    entering_blocks,
    sides_of_block,
)
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Prepared, Sources, run_replacement
from difffract_jax.circuits.frozen.targets import inputs_at, target_gradients
from difffract_jax.circuits.trace.capture import Span, Trace
from difffract_jax.circuits.trace.record import Record
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import OUTPUT, SCORE
from difffract_jax.graphs.held_paths import ExplainedAttention
from difffract_jax.models.streaming import streams_layers


def check_explainable(trace: Trace | Span | Prepared, max_scores: int, mesh: Mesh | None) -> None:
    """Refuses what attention is not explained of.

    Args:
        trace: what is traced.
        max_scores: how many scores may be nodes.
        mesh: devices.

    Raises:
        UserError: if it is a span or spread over devices, or was prepared with decoder rows that are streamed; or the
            number is negative.
    """
    if max_scores < 0:
        raise UserError(f"max_scores must be 0 or more, but got {max_scores}.")
    if isinstance(trace.trace if isinstance(trace, Prepared) else trace, Span):
        raise UserError("Attention is explained within one step, not over several; trace a single step, as --step 1.")
    if mesh is not None and mesh.size > 1:
        raise UserError("Attention is explained on one device as yet; leave the mesh out.")
    if isinstance(trace, Prepared) and streams_layers([one.stack for step in trace.steps for one in step.sites]):
        raise UserError('Attention is explained with all decoder rows in memory; prepare the trace with rows="held".')


def add_scores(state: Expansion, engine: Engine, most: int) -> tuple[Expansion, tuple[ExplainedAttention, ...]]:
    """Adds attention scores to an expansion whose targets are expanded.

    Args:
        state: the expansion.
        engine: of one step, without a mesh.
        most: how many scores may be nodes of their own.

    Returns:
        The expansion, and what is told of each target in the graph's provenance.
    """
    chosen = choose_scores(engine, state.targets, state.weights, most)
    state = _with_rows(state, engine, chosen)
    assert state.scores is not None
    total = chosen.total.sum(axis=1)
    absolute = np.abs(chosen.edges).sum(axis=1) + np.abs(chosen.rest).sum(axis=1)
    place = np.array([int(np.flatnonzero(state.expanded == row)[0]) for row in state.targets])
    totals = Totals(*(column.copy() for column in state.totals))
    totals.sum[place] += total
    totals.abs_sum[place] += absolute
    totals.bias[place] -= total
    state = state._replace(totals=totals, edges=_joined(state.edges, *_edges_from(state, chosen)))
    state = _with_sides(state, engine, chosen)
    forward = forward_derivatives(engine, state.targets)
    columns = zip(total.tolist(), absolute.tolist(), forward.tolist(), strict=True)
    return state, tuple(ExplainedAttention(total=a, absolute=b, forward=c) for a, b, c in columns)


def _with_rows(state: Expansion, engine: Engine, chosen: ChosenScores) -> Expansion:
    """Returns the expansion with rows for the scores at the end of its table, then for the rest of every block."""
    info, stacks = engine.infos[0], engine.steps[0].record.weights.stacks
    stream, position, key_stream, key_position = (np.zeros(chosen.block.size, np.int64) for _ in range(4))
    for block in np.unique(chosen.block).tolist():
        stack = info.layout.stack_of_block(block)
        tokens = attention_tokens(info, stacks[stack], stack)
        mine = chosen.block == block
        stream[mine], position[mine] = (column[chosen.query[mine]] for column in tokens)
        key_stream[mine], key_position[mine] = (column[chosen.key[mine]] for column in tokens)
    none = np.zeros(chosen.rest_block.size, np.int64)
    columns = {
        "stream": np.concatenate([stream, none]),
        "block": np.concatenate([chosen.block, chosen.rest_block]),
        "position": np.concatenate([position, none - 1]),
        "value": np.concatenate([chosen.value, none + 1.0]),
    }
    count = columns["block"].size
    columns |= {"kind": np.full(count, SCORE), "feature": np.full(count, -1), "step": np.full(count, info.step)}
    table = state.table._replace(
        **{
            name: np.concatenate([getattr(state.table, name), column.astype(getattr(state.table, name).dtype)])
            for name, column in columns.items()
        }
    )
    rows = ScoreRows(
        first=state.table.kind.size,
        head=np.concatenate([chosen.head, none - 1]),
        key_stream=np.concatenate([key_stream, none]),
        key_position=np.concatenate([key_position, none - 1]),
        expanded=chosen.block.size,
    )
    return state._replace(table=table, scores=rows)


def _edges_from(state: Expansion, chosen: ChosenScores) -> list[Edges]:
    """Returns the edges from scores, and from the rest of every block, into the targets; few enough to keep all."""
    assert state.scores is not None
    edges = np.concatenate([chosen.edges, chosen.rest], axis=1)
    remainder = np.zeros_like(edges)
    effects = removal_effects(chosen.edges, chosen.value, chosen.pattern)
    remainder[:, : chosen.block.size] = effects - chosen.edges
    found = []
    for i, row in enumerate(state.targets):
        place = np.flatnonzero(edges[i])
        attribution, missed = (column[i, place].astype(np.float32) for column in (edges, remainder))
        source, target = state.scores.first + place, np.full(place.size, row)
        found.append(Edges(source, target, attribution, np.zeros_like(attribution), missed))
    return found


def _with_sides(state: Expansion, engine: Engine, chosen: ChosenScores) -> Expansion:
    """Returns the expansion with the scores expanded: what makes their queries and keys."""
    assert state.scores is not None
    if not chosen.block.size:
        return state
    prepared, info = engine.steps[0], engine.infos[0]
    entering, found = entering_blocks(prepared), []
    totals = np.zeros((4, chosen.block.size))
    columns = np.stack([chosen.head, chosen.query, chosen.key], axis=1)
    for block in np.unique(chosen.block).tolist():
        mine = np.flatnonzero(chosen.block == block)
        sides = sides_of_block(prepared, block - info.recorded[0], columns[mine], entering)
        for place, query, key, constant, value in zip(mine, *sides, strict=True):
            parts = query + key
            size = np.abs(parts)
            totals[:, place] = value, constant, parts.sum(), size.sum()
            one = edges_of(state, state.scores.first + int(place), parts, size)
            found.append(one._replace(query=query[one.source].astype(np.float32)))
    new = Totals(*totals)
    return state._replace(
        expanded=np.concatenate([state.expanded, state.scores.first + np.arange(chosen.block.size)]),
        totals=Totals(*(np.concatenate(pair) for pair in zip(state.totals, new, strict=True))),
        edges=_joined(state.edges, *found),
    )


def _joined(*edges: Edges) -> Edges:
    return Edges(*(np.concatenate(column) for column in zip(*edges, strict=True)))


def forward_derivatives(engine: Engine, rows: Int64[np.ndarray, "target"]) -> Float64[np.ndarray, "target"]:
    """Returns targets' derivatives by eps with every block's queries scaled by 1 + eps, in forward mode.

    The softmaxes are live, and all else is frozen. It is the sum over all scores of gradient times score.

    Args:
        engine: of one step, without a mesh.
        rows: of the targets in the table, features or outputs.
    """
    prepared, found = engine.steps[0], np.zeros(rows.size)
    with jax.default_matmul_precision("highest"):
        mlp_in, velocity = _by_queries(*prepared)
        for i, row in enumerate(rows.tolist()):
            if engine.table.kind[row] == OUTPUT:
                pair = engine.outputs[row - engine.sources].velocity, velocity
            else:
                target = targets_of(engine, np.array([row], np.int64), 0)
                gradient = target_gradients(prepared.record, prepared.sites, target)
                pair = gradient, inputs_at(prepared.record, target, mlp_in)
            found[i] = np.vdot(*(np.asarray(array, np.float64) for array in pair))
    return found


@jax.jit
def _by_queries(
    record: Record, sites: tuple[ReplacedSites, ...], sources: Sources
) -> tuple[tuple[Array, ...], Array | None]:
    """Returns the derivative by eps of every MLP sublayer's input, and of the velocity if it is recorded."""

    def run(factor: Array) -> tuple[tuple[Array, ...], Array | None]:
        held = tuple(
            frozen if stack.attention_shape(frozen) is None else stack.with_queries(frozen, factor)
            for stack, frozen in zip(record.weights.stacks, record.frozen, strict=True)
        )
        found = run_replacement(record._replace(frozen=held), sites, sources)
        return tuple(found.mlp_in), found.velocity

    one = jnp.ones((), record.boundary.img.dtype)
    return jax.jvp(run, (one,), (one,))[1]
