"""Attention's scores as nodes of a graph (docs/method.md, section 10).

1. The scores that bear most on the graph's targets become nodes (`score_gradients.choose_scores`); the others of a
   block are one node, so that nothing is lost.
2. An edge from a score is its gradient times its value. The frozen edges add up to the target already: what scores add
   stands in its bias with the opposite sign, so that conservation holds whatever they are. A derivative in forward mode
   is what they are held against: that of the target by all queries, scaled by 1 + eps, must be the sum of the edges.
3. An edge into a score is the part of its value that a source makes (`score_sides`); with the constant they add up to
   it.

Only the graph's own targets have edges from scores: features between read attention as it was. Over several steps the
scores of all steps up to a target's are candidates.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int64

from difffract_jax.circuits.attribution.carried import after_step, ends_step
from difffract_jax.circuits.attribution.engine import Engine, targets_of
from difffract_jax.circuits.attribution.expansion import Edges, Expansion, ScoreRows, Totals, edges_of
from difffract_jax.circuits.attribution.score_gradients import (
    ChosenScores,
    at_highest,
    choose_scores,
    removal_effects,
)
from difffract_jax.circuits.attribution.score_sides import attention_tokens, sides_of_scores
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Prepared, Sources, run_replacement
from difffract_jax.circuits.frozen.targets import inputs_at, target_gradients
from difffract_jax.circuits.trace.capture import Span, Trace
from difffract_jax.circuits.trace.record import Record
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import OUTPUT, SCORE
from difffract_jax.graphs.held_paths import ExplainedAttention
from difffract_jax.models.blocks import Streams, both
from difffract_jax.models.streaming import streams_layers


def check_explainable(trace: Trace | Span | Prepared, max_scores: int) -> None:
    """Refuses what attention is not explained of.

    Args:
        trace: what is traced.
        max_scores: how many scores may be nodes.

    Raises:
        UserError: if it was prepared with decoder rows that are streamed; or the number is negative.
    """
    if max_scores < 0:
        raise UserError(f"max_scores must be 0 or more, but got {max_scores}.")
    if isinstance(trace, Prepared) and streams_layers([one.stack for step in trace.steps for one in step.sites]):
        raise UserError('Attention is explained with all decoder rows in memory; prepare the trace with rows="held".')


def add_scores(state: Expansion, engine: Engine, most: int) -> tuple[Expansion, tuple[ExplainedAttention, ...]]:
    """Adds attention scores to an expansion whose targets are expanded.

    Args:
        state: the expansion.
        engine: from `engine.make_engine`.
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
    # All evaluations of a span have the same blocks and tokens.
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
    number = np.concatenate([chosen.number, chosen.rest_number])
    columns |= {
        name: np.array([getattr(one, name) for one in engine.infos], np.int64)[number] for name in ("step", "branch")
    }
    columns |= {name: np.full(number.size, value) for name, value in (("kind", SCORE), ("feature", -1))}
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
    found = []
    totals = np.zeros((4, chosen.block.size))
    columns = np.stack([chosen.head, chosen.query, chosen.key], axis=1)
    for mine, sides in sides_of_scores(engine, chosen.number, chosen.block, columns):
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

    The softmaxes are live, and all else is frozen; over several steps those of all steps are. It is the sum over all
    scores of gradient times score.

    Args:
        engine: from `engine.make_engine`.
        rows: of the targets in the table, features or outputs.
    """
    found, velocities = np.zeros(rows.size), []
    moved = jnp.zeros_like(engine.steps[0].record.latents)
    with at_highest(engine):
        for number, (prepared, info) in enumerate(zip(engine.steps, engine.infos, strict=True)):
            mlp_in, velocity = _by_queries(*prepared, moved if engine.across else None)
            for i in np.flatnonzero(engine.table.step[rows] == info.step).tolist():
                found[i] += _moved_target(engine, int(rows[i]), number, (mlp_in, velocity, moved))
            velocities.append(velocity)
            if engine.across and ends_step(engine.infos, number):
                evaluations = engine.infos[number + 1 - len(velocities) : number + 1]
                moved, velocities = after_step(moved, evaluations, velocities), []
    return found


def _moved_target(engine: Engine, row: int, number: int, moved: tuple[tuple[Array, ...], Array | None, Array]) -> float:
    """Returns what one evaluation adds to the change of a target of its step: of MLP inputs, velocity and latents."""
    (prepared, info), (mlp_in, velocity, latents) = (engine.steps[number], engine.infos[number]), moved
    pairs: list[tuple[Array, Array | None]] = []
    if engine.table.kind[row] == OUTPUT:
        output = engine.outputs[row - engine.sources]
        pairs.append((info.velocity_weight * output.velocity, velocity))
        pairs += [(output.latents, latents)] if ends_step(engine.infos, number) else []
    elif engine.table.branch[row] == info.branch:
        target = targets_of(engine, np.array([row], np.int64), number)
        gradient = target_gradients(prepared.record, prepared.sites, target)
        pairs.append((gradient, inputs_at(prepared.record, target, mlp_in)))
    return float(sum(np.vdot(*(np.asarray(array, np.float64) for array in pair)) for pair in pairs))


@jax.jit
def _by_queries(
    record: Record, sites: tuple[ReplacedSites, ...], sources: Sources, latents: Array | None
) -> tuple[tuple[Array, ...], Array | None]:
    """Returns the derivative by eps of every MLP sublayer's input, and of the velocity if it is recorded.

    Args:
        record: the trace's arrays.
        sites: the MLP sublayers, per group.
        sources: at the traced point.
        latents: the derivative of the latents that enter; None within one step.
    """

    def run(factor: Array, boundary: Streams) -> tuple[tuple[Array, ...], Array | None]:
        held = tuple(
            frozen if stack.attention_shape(frozen) is None else stack.with_queries(frozen, factor)
            for stack, frozen in zip(record.weights.stacks, record.frozen, strict=True)
        )
        found = run_replacement(record._replace(frozen=held), sites, sources._replace(boundary=boundary))
        return tuple(found.mlp_in), found.velocity

    one, entering = jnp.ones((), record.boundary.img.dtype), both(jnp.zeros_like, record.boundary)
    if latents is not None:
        entering = entering._replace(img=latents @ record.weights.img_in.kernel[...].astype(latents.dtype))
    return jax.jvp(run, (one, sources.boundary), (one, entering))[1]
