"""Runs of one evaluation between two pooled embeddings, and what targets read of them (docs/method.md, section 11).

The pooled embedding goes on a straight line from the empty prompt's to that of the evaluation's branch; the model is
live. All else that enters it stays, but for the latents of later steps, which earlier ones move: `moved` says by how
much from those recorded, and is None where there is one step. `pooled_steps` walks through the evaluations with these.

1. `slopes_at` differentiates targets by every modulation at a point of the line, and pulls that back to the pooled
   embedding; `velocities_at` runs at points, and `moved_between` says by how much targets move between two of them.
2. `moved_alone` exchanges one modulation at a time, and `moved_directly` all of them in the frozen map.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Sources, run_replacement
from difffract_jax.circuits.frozen.targets import Targets, inputs_at
from difffract_jax.circuits.trace.record import Blocks, Record, RunOutputs
from difffract_jax.models.blocks import Cond, Modulations, Streams
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.stacks import group_slices, keep_mlp_in, run_stacks, slice_layer
from difffract_jax.ops import widen

Latents = Float[Array, "img channels"]


class Reading(NamedTuple):
    """What a target reads of a run, but for a constant.

    Attributes:
        target: a feature; None for what reads the velocity.
        direction: of the velocity; or of the input of the feature's MLP, at its position.
        latents: of the latents that enter, where these move and are read.
    """

    target: Targets | None
    direction: Float[Array, "*_"]
    latents: Float[Array, "img channels"] | None = None


class Line(NamedTuple):
    """A straight line between two pooled embeddings, all else that enters an evaluation as recorded.

    Attributes:
        inputs: of the evaluation, with the pooled embedding of its branch's prompt.
        empty: the empty prompt's.
    """

    inputs: Inputs
    empty: Float[Array, "pooled_width"]


def _read(
    record: Record, readings: tuple[Reading | None, ...], run: RunOutputs, moved: Latents | None
) -> Float[Array, "target"]:
    """Returns what targets read of a run, or of the difference of two, but for constants; 0 of those that do not."""
    found = []
    for reading in readings:
        if reading is None:
            found.append(jnp.zeros((), record.latents.dtype))
            continue
        target, direction, latents = reading
        value = jnp.sum(direction * (run.velocity if target is None else inputs_at(record, target, run.mlp_in)))
        found.append(value if latents is None or moved is None else value + jnp.sum(latents * moved))
    return jnp.stack(found)


class Ends(NamedTuple):
    """What the pooled embeddings at both ends of the line condition a run with.

    Attributes:
        h: residual streams entering the first block.
        cond: conditioning with the prompt's pooled embedding.
        prompt: its vector.
        empty: the vector with the empty prompt's.
        added: what the exchange adds to every modulation: the empty prompt's minus the prompt's.
    """

    h: Streams
    cond: Cond
    prompt: Float[Array, "d_model"]
    empty: Float[Array, "d_model"]
    added: Modulations


@partial(jax.jit, static_argnames=("grid", "blocks"))
def ends_of(model: Any, line: Line, grid: tuple[int, int], blocks: Blocks) -> Ends:
    """Returns what the pooled embeddings at both ends of a line condition a run with.

    Args:
        model: the transformer, its blocks in memory.
        line: the line.
        grid: rows and columns of image tokens.
        blocks: that the trace recorded; a run goes up to the last of them.
    """
    h, cond = jax.tree.map(widen, model.embed(line.inputs, grid))
    if blocks.output and not blocks.first:
        img_in, txt_in = model.projections(grid)
        h = Streams(img_in(widen(line.inputs.latents)), txt_in(widen(line.inputs.text)))
    _, other = jax.tree.map(widen, model.embed(line.inputs._replace(pooled=line.empty), grid))
    of_prompt, of_empty = (_modulations(model, one, blocks) for one in (cond, other))
    return Ends(h, cond, cond.vec, other.vec, jax.tree.map(jnp.subtract, of_empty, of_prompt))


def _depths(model: Any, blocks: Blocks) -> tuple[int, ...]:
    """Returns how many layers of each stack a run up to the last recorded block has."""
    return tuple(layers.stop for layers in blocks.layers(model.stacks))


def _modulations(model: Any, cond: Cond, blocks: Blocks) -> Modulations:
    """Returns all modulations of a run up to the last recorded block."""
    found: list[Any] = []
    for stack, depth in zip(model.stacks, _depths(model, blocks), strict=True):
        if any(group.modulations for group in stack.groups):
            found += jax.vmap(lambda block: tuple(block.modulations(cond)))(slice_layer(stack, slice(0, depth)))
        else:
            found += [None] * len(stack.groups)
    return Modulations(tuple(found), model.final.modulations(cond) if blocks.output else None)


def _run(
    model: Any,
    record: Record,
    ends: Ends,
    vec: Array,
    added: Modulations,
    moved: Latents | None,
    blocks: Blocks,
) -> RunOutputs:
    """Runs the live model with something added to its modulations; returns what targets read."""
    depths, cond = _depths(model, blocks), ends.cond._replace(vec=vec)
    stacks = [slice_layer(stack, slice(0, depth)) for stack, depth in zip(model.stacks, depths, strict=True)]
    begun = ends.h if moved is None else ends.h._replace(img=ends.h.img + projected(record, moved))
    h, kept = run_stacks(stacks, begun, cond, tap=keep_mlp_in, modulation=added.blocks, remat=True)
    inputs = []
    for layers, rows in zip(blocks.layers(model.stacks), kept, strict=True):
        inputs += [x[layers.start :] for x in rows]
    velocity = model.final(h.img, cond, modulation=added.final) if blocks.output else None
    return RunOutputs(tuple(inputs), velocity, record.latents)


def projected(record: Record, moved: Latents) -> Float[Array, "img d_model"]:
    """Returns by how much the image stream that enters the first block moves when the latents do."""
    return jnp.matmul(moved, record.weights.img_in.kernel[...].astype(moved.dtype), precision="highest")


@partial(jax.jit, static_argnames=("grid", "blocks"))
def slopes_at(
    model: Any,
    record: Record,
    line: Line,
    ends: Ends,
    readings: tuple[Reading | None, ...],
    at: Float[Array, ""],
    moved: Latents | None,
    grid: tuple[int, int],
    blocks: Blocks,
) -> tuple[
    Float[Array, "target modulation pooled_width"],
    Float[Array, "target modulation"],
    Float[Array, "target img channels"] | None,
]:
    """Returns targets' derivatives at a point of the line, through each modulation.

    Args:
        model: this and the last two as for `ends_of`.
        record: the trace's arrays.
        line: the line.
        ends: of it.
        readings: of the targets.
        at: the point, 0 at the empty prompt's pooled embedding and 1 at the prompt's.
        moved: by how much the latents that enter are other ones than recorded there.
        grid: rows and columns of image tokens.
        blocks: that the trace recorded.

    Returns:
        By the pooled embedding; along what rounding adds to the line's ends; and by the latents that enter.
    """
    vec, pull, rounded = _vector(model, line, ends, at, grid)

    def read(added: Modulations, moved: Latents | None) -> Array:
        return _read(record, readings, _run(model, record, ends, vec, added, moved, blocks), moved)

    _, back = jax.vjp(read, jax.tree.map(jnp.zeros_like, ends.added), moved)

    def one(cotangent: Array) -> tuple[Array, Array, Array | None]:
        added, latents = back(cotangent)
        by_vec = _to_vector(model, ends.cond._replace(vec=vec), added, blocks)
        return jax.vmap(lambda row: pull(row)[0])(by_vec), by_vec @ rounded, latents

    return jax.lax.map(one, jnp.eye(len(readings), dtype=vec.dtype))


def _vector(
    model: Any, line: Line, ends: Ends, at: Float[Array, ""], grid: tuple[int, int]
) -> tuple[Array, Any, Array]:
    """Returns the conditioning vector at a point of the line, its pull-back, and what rounding adds to the ends."""
    first, last = widen(line.empty), widen(line.inputs.pooled)

    def embedded(pooled: Array) -> Array:
        # Of the whole model in float32, what `embed` does not read is left out by the compiler.
        wide = jax.tree.map(widen, model)
        return wide.embed(line.inputs._replace(pooled=pooled), grid)[1].vec

    at_first = embedded(first)
    vec, pull = jax.vjp(embedded, first + at * (last - first))
    rounded = ends.prompt - ends.empty - (embedded(last) - at_first)
    return ends.empty + (vec - at_first) + at * rounded, pull, rounded


@partial(jax.jit, static_argnames=("grid", "blocks"))
def velocities_at(
    model: Any,
    record: Record,
    line: Line,
    ends: Ends,
    points: Float[Array, "point"],
    moved: Float[Array, "point img channels"],
    grid: tuple[int, int],
    blocks: Blocks,
) -> Float[Array, "point img outputs"]:
    """Returns by how much the velocity at points of the line is another one than recorded.

    Args:
        model: this and the rest as for `slopes_at`.
        record: the trace's arrays.
        line: the line.
        ends: of it.
        points: where on it.
        moved: the latents at each.
        grid: rows and columns of image tokens.
        blocks: that the trace recorded.
    """
    nothing = jax.tree.map(jnp.zeros_like, ends.added)

    def run(point: tuple[Array, Array]) -> Array:
        vec = _vector(model, line, ends, point[0], grid)[0]
        velocity = _run(model, record, ends, vec, nothing, point[1], blocks).velocity
        assert velocity is not None and record.velocity is not None
        return velocity - record.velocity

    return jax.lax.map(run, (points, moved))


@partial(jax.jit, static_argnames=("grid", "blocks"))
def moved_between(
    model: Any,
    record: Record,
    line: Line,
    ends: Ends,
    readings: tuple[Reading | None, ...],
    points: Float[Array, "2"],
    moved: Float[Array, "2 img channels"] | None,
    grid: tuple[int, int],
    blocks: Blocks,
) -> tuple[Float[Array, "target"], Float[Array, "2 img outputs"] | None]:
    """Returns by how much targets move from one point of the line to another, and velocities as `velocities_at`.

    Args:
        model: this and the rest as for `slopes_at`.
        record: the trace's arrays.
        line: the line.
        ends: of it.
        readings: of the targets.
        points: both.
        moved: the latents at each.
        grid: rows and columns of image tokens.
        blocks: that the trace recorded.
    """
    nothing = jax.tree.map(jnp.zeros_like, ends.added)

    def run(point: tuple[Array, Array | None]) -> RunOutputs:
        vec = _vector(model, line, ends, point[0], grid)[0]
        return _run(model, record, ends, vec, nothing, point[1], blocks)

    # The difference first: what targets read is far larger than by how much they move.
    runs = jax.lax.map(run, (points, moved))
    apart, latents = jax.tree.map(lambda leaf: leaf[1] - leaf[0], (runs, moved))
    velocities = None if moved is None or runs.velocity is None else runs.velocity - record.velocity
    return _read(record, readings, apart, latents), velocities


def _to_vector(model: Any, cond: Cond, by: Modulations, blocks: Blocks) -> Float[Array, "modulation d_model"]:
    """Pulls cotangents of modulations back to the conditioning vector, each on its own."""
    found: list[Array] = []

    def each(modulate: Any, cotangents: tuple[Array, ...]) -> list[Array]:
        """Returns, per group, the pull-back of every row alone, [kind d_model]."""
        _, pull = jax.vjp(lambda vec: tuple(modulate(cond._replace(vec=vec))), cond.vec)
        pulled = []
        for group, rows in enumerate(cotangents):
            apart = jnp.eye(rows.shape[0], dtype=rows.dtype)[:, :, None] * rows[None]
            alone = tuple(
                apart if place == group else jnp.zeros((rows.shape[0], *other.shape), other.dtype)
                for place, other in enumerate(cotangents)
            )
            pulled.append(jax.vmap(pull)(alone)[0])
        return pulled

    assert by.blocks is not None
    parts = zip(model.stacks, _depths(model, blocks), group_slices(model.stacks), strict=True)
    for stack, depth, part in parts:
        if any(group.modulations for group in stack.groups):
            layers = slice_layer(stack, slice(0, depth))
            pulled = jax.vmap(lambda block, g: each(block.modulations, g))(layers, by.blocks[part])
            found += [rows.reshape(-1, rows.shape[-1]) for rows in pulled]
    if by.final is not None:
        found += each(lambda cond: (model.final.modulations(cond),), (by.final,))
    return jnp.concatenate(found)


def changes(added: Modulations) -> Float[Array, "modulation"]:
    """Returns the norm of each modulation's change."""
    leaves = jax.tree.leaves(added)
    return jnp.concatenate([jnp.linalg.norm(leaf.reshape(-1, leaf.shape[-1]), axis=1) for leaf in leaves])


@partial(jax.jit, static_argnames="blocks")
def moved_alone(
    model: Any,
    record: Record,
    ends: Ends,
    readings: tuple[Reading | None, ...],
    numbers: Int[Array, "case"],
    moved: Float[Array, "case img channels"] | None,
    blocks: Blocks,
) -> tuple[Float[Array, "case target"], Float[Array, "case img outputs"] | None]:
    """Returns by how much targets fall when a modulation alone is exchanged, and what is added to the velocity.

    Args:
        model: this and the rest as for `slopes_at`.
        record: the trace's arrays.
        ends: of the line.
        readings: of the targets.
        numbers: of the modulation that each case exchanges; -1 for none.
        moved: by how much the latents that enter have moved in each.
        blocks: that the trace recorded.
    """
    leaves, tree = jax.tree.flatten(ends.added)
    sizes = [leaf.size // leaf.shape[-1] for leaf in leaves]
    none = None if moved is None else jnp.zeros_like(moved[0])
    run = partial(_run, model, record, ends, ends.prompt, blocks=blocks)
    before = run(jax.tree.map(jnp.zeros_like, ends.added), none)

    def one(case: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        number, moved = case
        chosen = jnp.split(jnp.arange(sum(sizes)) == number, np.cumsum(sizes)[:-1].tolist())
        parts = [
            jnp.where(mine.reshape(leaf.shape[:-1])[..., None], leaf, 0)
            for mine, leaf in zip(chosen, leaves, strict=True)
        ]
        after = run(jax.tree.unflatten(tree, parts), moved)
        # The difference first: what targets read is far larger than by how much they move.
        apart = jax.tree.map(jnp.subtract, after, before)
        return -_read(record, readings, apart, moved), None if moved is None else apart.velocity

    return jax.lax.map(one, (numbers, moved))


@partial(jax.jit, static_argnames="blocks")
def moved_directly(
    model: Any,
    record: Record,
    sites: tuple[ReplacedSites, ...],
    sources: Sources,
    ends: Ends,
    readings: tuple[Reading | None, ...],
    moved: Latents | None,
    blocks: Blocks,
) -> tuple[Float[Array, "target"], Float[Array, "img outputs"] | None]:
    """Returns what `moved_alone` does, with all modulations of recorded blocks exchanged in the frozen map.

    Args:
        model: this and the rest as for `slopes_at`.
        record: the trace's arrays.
        sites: of the replacement.
        sources: of the replacement, which are held.
        ends: of the line.
        readings: of the targets.
        moved: by how much the latents that enter have moved.
        blocks: that the trace recorded.
    """
    assert ends.added.blocks is not None
    parts = []
    for layers, part in zip(blocks.layers(model.stacks), group_slices(model.stacks), strict=True):
        parts += [None if one is None else one[layers.start :] for one in ends.added.blocks[part]]
    held = sources
    if moved is not None:
        boundary = sources.boundary
        held = sources._replace(boundary=boundary._replace(img=boundary.img + projected(record, moved)))
    before = run_replacement(record, sites, sources)
    after = run_replacement(record, sites, held, modulation=ends.added._replace(blocks=tuple(parts)))
    apart = jax.tree.map(jnp.subtract, after, before)
    return -_read(record, readings, apart, moved), None if moved is None else apart.velocity
