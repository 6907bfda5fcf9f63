"""Walks through the evaluations between two pooled embeddings (docs/method.md, section 11).

All evaluations stand at one point of their lines at a time. What one changes in its velocity moves the latents of later
steps, and what a target's derivative by these is, earlier evaluations' velocities carry on: `carried` has the rule.

1. `evaluations_of` says which evaluations targets depend on, and what they read of each.
2. `latents_along` and `moved_along` walk forwards, `slopes_along` backwards.
3. `moved_alone_in` exchanges every modulation of an evaluation alone, `moved_directly_in_all` all of them in the frozen
   map.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float64, Int64

from difffract_jax.circuits.attribution.carried import after_step, begins_step, ends_step
from difffract_jax.circuits.attribution.engine import Engine, targets_of
from difffract_jax.circuits.attribution.pooled_runs import (
    Ends,
    Line,
    Reading,
    changes,
    ends_of,
    moved_alone,
    moved_between,
    moved_directly,
    slopes_at,
    velocities_at,
)
from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.frozen.targets import target_gradients
from difffract_jax.circuits.trace.capture import TraceInfo, run_of_trace
from difffract_jax.circuits.trace.record import Blocks
from difffract_jax.graphs.graph import OUTPUT
from difffract_jax.models.encoded import EncodedPrompt
from difffract_jax.models.pipeline import Pipeline, encode, step_inputs
from difffract_jax.ops import widen
from difffract_jax.sharding import traced_pipeline


class Evaluation(NamedTuple):
    """One evaluation of the model, at both ends of its branch's line.

    Attributes:
        model: the transformer.
        step: its replacement.
        info: where it comes from.
        line: between the pooled embeddings.
        ends: what these condition it with.
        blocks: that were recorded.
        readings: what each target reads of it; None of those that read nothing.
        exchanged: the pooled embedding of the branch's prompt minus the empty prompt's.
    """

    model: Any
    step: Replacement
    info: TraceInfo
    line: Line
    ends: Ends
    blocks: Blocks
    readings: tuple[Reading | None, ...]
    exchanged: Float64[np.ndarray, "pooled_width"]

    @property
    def sizes(self) -> dict[str, Any]:
        """What its programs are compiled for."""
        return {"grid": self.info.grid, "blocks": self.blocks}

    @property
    def modulations(self) -> int:
        """How many modulations it has."""
        return sum(leaf.size // leaf.shape[-1] for leaf in jax.tree.leaves(self.ends.added))


Walk = Sequence[Evaluation]


class Prompts(NamedTuple):
    """What is exchanged.

    Attributes:
        own: the prompt of every branch, by its number.
        empty: the empty prompt's pooled embedding.
    """

    own: dict[int, EncodedPrompt]
    empty: Float[Array, "pooled_width"]


def prompts_of(engine: Engine, pipe: Pipeline) -> Prompts:
    """Encodes the prompt of each branch, and the empty one, once each; on a mesh they are put on all of its devices.

    Args:
        engine: of the trace.
        pipe: the pipeline that was traced.
    """
    texts = {info.branch: info for info in engine.infos}
    own = {branch: encode(pipe, info.text, info.text_tokens) for branch, info in texts.items()}
    empty = encode(pipe, "", engine.info.text_tokens).pooled
    if (mesh := engine.options.mesh) is not None:
        put = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
        own = {branch: one._replace(text=put(one.text), pooled=put(one.pooled)) for branch, one in own.items()}
        empty = put(empty)
    return Prompts(own, empty)


def evaluations_of(
    engine: Engine, rows: Int64[np.ndarray, "target"], pipe: Pipeline, prompts: Prompts
) -> tuple[Evaluation, ...]:
    """Returns the evaluations that targets depend on, in order.

    Args:
        engine: whose trace ran the exchange.
        rows: of the targets in the table, features or outputs.
        pipe: the pipeline that was traced, its blocks in memory.
        prompts: what is exchanged.
    """
    model, mesh = pipe.transformer, engine.options.mesh
    if mesh is not None:
        # What lies there already is not moved.
        model = jax.device_put(model, traced_pipeline(mesh)("transformer", model))
    last, found = int(engine.table.step[rows].max()), []
    for number, (step, info) in enumerate(zip(engine.steps, engine.infos, strict=True)):
        readings = tuple(_reading(engine, int(row), number) for row in rows)
        if info.step >= last and not any(readings):
            continue
        blocks = Blocks(info.recorded[0], info.recorded[-1] + 1, step.record.velocity is not None)
        own, empty = prompts.own[info.branch], prompts.empty
        line = Line(step_inputs(run_of_trace(pipe, info), own, step.record.latents, info.step), empty)
        if mesh is not None:
            line = jax.device_put(line, NamedSharding(mesh, PartitionSpec()))
        ends = ends_of(model, line, info.grid, blocks)
        exchanged = np.asarray(widen(own.pooled), np.float64) - np.asarray(widen(empty), np.float64)
        found.append(Evaluation(model, step, info, line, ends, blocks, readings, exchanged))
    return tuple(found)


def _reading(engine: Engine, row: int, number: int) -> Reading | None:
    """Returns what a target reads of an evaluation, the latents that enter its step with the last of them."""
    (prepared, info), table = (engine.steps[number], engine.infos[number]), engine.table
    if table.step[row] != info.step:
        return None
    if table.kind[row] == OUTPUT:
        output = engine.outputs[row - engine.sources]
        latents = output.latents if engine.across and ends_step(engine.infos, number) else None
        return Reading(None, info.velocity_weight * output.velocity, latents)
    if table.branch[row] != info.branch:
        return None
    target = targets_of(engine, np.array([row], np.int64), number)
    return Reading(target, target_gradients(prepared.record, prepared.sites, target))


def _several(walk: Walk) -> bool:
    """Says whether latents move on the way."""
    return walk[0].info.step < walk[-1].info.step


def _still(walk: Walk, *cases: int) -> Float[Array, "*cases img channels"] | None:
    """Returns latents that have not moved; None where none do."""
    latents = walk[0].step.record.latents
    return jnp.zeros((*cases, *latents.shape), latents.dtype) if _several(walk) else None


class _Latents:
    """By how much the latents of the step have moved that a walk is in."""

    def __init__(self, walk: Walk, *cases: int) -> None:
        self.walk, self.infos = walk, [one.info for one in walk]
        self.moved = _still(walk, *cases)
        self._velocities: list[Array] = []

    def add(self, number: int, velocities: Array | None) -> None:
        """Takes in by how much an evaluation's velocity is another one; its step's others have to follow."""
        if self.moved is None:
            return
        assert velocities is not None
        self._velocities.append(velocities)
        if ends_step(self.infos, number):
            mine = self.infos[number + 1 - len(self._velocities) : number + 1]
            self.moved, self._velocities = after_step(self.moved, mine, self._velocities), []


def latents_along(walk: Walk, points: Float[Array, "point"]) -> list[Float[Array, "point img channels"] | None]:
    """Returns by how much the latents that enter each evaluation are other ones than recorded, at points of the lines.

    Args:
        walk: the evaluations.
        points: 0 at the empty prompt's pooled embedding and 1 at the prompt's.
    """
    latents, found = _Latents(walk, points.size), []
    for number, one in enumerate(walk):
        found.append(latents.moved)
        if one.info.step < walk[-1].info.step:
            given = one.model, one.step.record, one.line, one.ends, points, latents.moved
            latents.add(number, velocities_at(*given, **one.sizes))
    return found


def moved_along(walk: Walk, points: Float[Array, "2"]) -> Float64[np.ndarray, "target"]:
    """Returns by how much targets move from one point of the lines to another.

    Args:
        walk: the evaluations.
        points: both.
    """
    latents, total = _Latents(walk, 2), np.zeros(len(walk[0].readings))
    for number, one in enumerate(walk):
        given = one.model, one.step.record, one.line, one.ends, one.readings, points, latents.moved
        moved, velocities = moved_between(*given, **one.sizes)
        total += np.asarray(moved, np.float64)
        latents.add(number, velocities)
    return total


def slopes_along(
    walk: Walk, at: Float[Array, ""], moved: Sequence[Float[Array, "img channels"] | None]
) -> tuple[Float64[np.ndarray, "target modulation pooled_width"], Float64[np.ndarray, "target modulation"]]:
    """Returns targets' derivatives at a point of the lines, through every evaluation's modulations.

    Args:
        walk: the evaluations.
        at: the point.
        moved: by how much the latents that enter each evaluation are other ones than recorded.

    Returns:
        By the pooled embedding of the evaluation's branch; and along what rounding adds to its line's ends.
    """
    infos, found = [one.info for one in walk], []
    latents, entering = None, None
    for number in reversed(range(len(walk))):
        one = walk[number]
        readings = one.readings if latents is None else _carried(one, latents)
        given = one.model, one.step.record, one.line, one.ends, readings, at, moved[number]
        *slopes, by = slopes_at(*given, **one.sizes)
        found.append([np.asarray(array, np.float64) for array in slopes])
        if by is not None:
            entering = by if entering is None else entering + by
            if begins_step(infos, number):
                latents, entering = entering if latents is None else latents + entering, None
    weights, rounding = (np.concatenate(parts, axis=1) for parts in zip(*found[::-1], strict=True))
    return weights, rounding


def _carried(one: Evaluation, latents: Float[Array, "target img channels"]) -> tuple[Reading | None, ...]:
    """Returns readings of an evaluation: targets of later steps read how its velocity moves their latents."""
    pairs = zip(one.readings, latents, strict=True)
    return tuple(Reading(None, one.info.taken * later) if own is None else own for own, later in pairs)


def moved_alone_in(
    walk: Walk, number: int
) -> tuple[Float64[np.ndarray, "modulation"], Float64[np.ndarray, "target modulation"]]:
    """Returns the norm of each of an evaluation's changes, and by how much targets fall when it alone is made.

    Args:
        walk: the evaluations.
        number: of the one among them.
    """
    one = walk[number]
    cases, change = one.modulations, np.asarray(changes(one.ends.added), np.float64)
    falls = np.zeros((cases, len(one.readings)))
    if not change.any():
        return change, falls.T
    latents, every = _Latents(walk, cases), jnp.arange(cases)
    for place, other in enumerate(walk):
        if place != number and other.info.step <= one.info.step:
            latents.add(place, latents.moved if latents.moved is None else jnp.zeros_like(latents.moved))
            continue
        given = other.model, other.step.record, other.ends, other.readings
        numbers = every if place == number else jnp.full_like(every, -1)
        fall, velocities = moved_alone(*given, numbers, latents.moved, blocks=other.blocks)
        falls += np.asarray(fall, np.float64)
        latents.add(place, velocities)
    return change, falls.T


def moved_directly_in_all(walk: Walk) -> Float64[np.ndarray, "target"]:
    """Returns by how much targets fall when all modulations are exchanged in the frozen map, over all steps.

    Args:
        walk: the evaluations.
    """
    latents, falls = _Latents(walk), np.zeros(len(walk[0].readings))
    for number, one in enumerate(walk):
        given = *one.step, one.ends, one.readings
        fall, velocities = moved_directly(one.model, *given, latents.moved, blocks=one.blocks)
        falls += np.asarray(fall, np.float64)
        latents.add(number, velocities)
    return falls
