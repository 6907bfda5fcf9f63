"""Runs between two pooled embeddings, and what targets read of them (docs/method.md, section 11).

The pooled embedding goes on a straight line from the empty prompt's to the prompt's; the model is live, all else that
enters it stays.

1. `slopes_at` differentiates targets by every modulation at a point of the line, and pulls that back to the pooled
   embedding; `moved_between` says by how much targets move between two points.
2. `moved_alone` exchanges one modulation at a time, and `moved_directly` all of them in the frozen map.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Sources, run_replacement
from difffract_jax.circuits.frozen.targets import Targets, inputs_at
from difffract_jax.circuits.trace.record import Blocks, Record, RunOutputs
from difffract_jax.models.blocks import Cond, Modulations, Streams
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.stacks import group_slices, keep_mlp_in, run_stacks, slice_layer
from difffract_jax.ops import widen


class Reading(NamedTuple):
    """What a target reads of a run, but for a constant.

    Attributes:
        target: a feature; None for an output.
        direction: of the velocity; or of the input of the feature's MLP, at its position.
    """

    target: Targets | None
    direction: Float[Array, "*_"]


class Line(NamedTuple):
    """A straight line between two pooled embeddings, all else that enters a step held.

    Attributes:
        inputs: of the step, with the prompt's pooled embedding.
        empty: the empty prompt's.
    """

    inputs: Inputs
    empty: Float[Array, "pooled_width"]


def _read(record: Record, readings: tuple[Reading, ...], run: RunOutputs) -> Float[Array, "target"]:
    """Returns what targets read of a run, or of the difference of two, but for constants."""
    found = []
    for target, direction in readings:
        seen = run.velocity if target is None else inputs_at(record, target, run.mlp_in)
        found.append(jnp.sum(direction * seen))
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


def _run(model: Any, ends: Ends, vec: Array, added: Modulations, blocks: Blocks) -> RunOutputs:
    """Runs the live model with something added to its modulations; returns what targets read."""
    depths, cond = _depths(model, blocks), ends.cond._replace(vec=vec)
    stacks = [slice_layer(stack, slice(0, depth)) for stack, depth in zip(model.stacks, depths, strict=True)]
    h, kept = run_stacks(stacks, ends.h, cond, tap=keep_mlp_in, modulation=added.blocks, remat=True)
    inputs = []
    for layers, rows in zip(blocks.layers(model.stacks), kept, strict=True):
        inputs += [x[layers.start :] for x in rows]
    velocity = model.final(h.img, cond, modulation=added.final) if blocks.output else None
    return RunOutputs(tuple(inputs), velocity, ends.h.img)


@partial(jax.jit, static_argnames=("grid", "blocks"))
def slopes_at(
    model: Any,
    record: Record,
    line: Line,
    ends: Ends,
    readings: tuple[Reading, ...],
    at: Float[Array, ""],
    grid: tuple[int, int],
    blocks: Blocks,
) -> tuple[Float[Array, "target modulation pooled_width"], Float[Array, "target modulation"]]:
    """Returns targets' derivatives at a point of the line, through each modulation.

    Args:
        model: this and the last two as for `ends_of`.
        record: the trace's arrays.
        line: the line.
        ends: of it.
        readings: of the targets.
        at: the point, 0 at the empty prompt's pooled embedding and 1 at the prompt's.
        grid: rows and columns of image tokens.
        blocks: that the trace recorded.

    Returns:
        By the pooled embedding; and along what rounding adds to the line's ends.
    """
    vec, pull, rounded = _vector(model, line, ends, at, grid)
    nothing = jax.tree.map(jnp.zeros_like, ends.added)
    _, back = jax.vjp(lambda added: _read(record, readings, _run(model, ends, vec, added, blocks)), nothing)

    def one(cotangent: Array) -> tuple[Array, Array]:
        by_vec = _to_vector(model, ends.cond._replace(vec=vec), back(cotangent)[0], blocks)
        return jax.vmap(lambda row: pull(row)[0])(by_vec), by_vec @ rounded

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
def moved_between(
    model: Any,
    record: Record,
    line: Line,
    ends: Ends,
    readings: tuple[Reading, ...],
    begin: Float[Array, ""],
    end: Float[Array, ""],
    grid: tuple[int, int],
    blocks: Blocks,
) -> Float[Array, "target"]:
    """Returns by how much targets move from one point of the line to another.

    Args:
        model: this and the rest as for `slopes_at`.
        record: the trace's arrays.
        line: the line.
        ends: of it.
        readings: of the targets.
        begin: the first point.
        end: the other.
        grid: rows and columns of image tokens.
        blocks: that the trace recorded.
    """
    nothing = jax.tree.map(jnp.zeros_like, ends.added)

    def run(at: Array) -> RunOutputs:
        return _run(model, ends, _vector(model, line, ends, at, grid)[0], nothing, blocks)

    # The difference first: what targets read is far larger than by how much they move.
    runs = jax.lax.map(run, jnp.stack([begin, end]))
    return _read(record, readings, jax.tree.map(lambda leaf: leaf[1] - leaf[0], runs))


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


@partial(jax.jit, static_argnames="blocks")
def moved_alone(
    model: Any,
    record: Record,
    ends: Ends,
    readings: tuple[Reading, ...],
    blocks: Blocks,
) -> tuple[Float[Array, "modulation"], Float[Array, "modulation target"]]:
    """Returns the norm of each modulation's change, and by how much targets fall when it alone is exchanged.

    Args:
        model: this and the rest as for `slopes_at`.
        record: the trace's arrays.
        ends: of the line.
        readings: of the targets.
        blocks: that the trace recorded.
    """
    leaves, tree = jax.tree.flatten(ends.added)
    sizes = [leaf.size // leaf.shape[-1] for leaf in leaves]
    change = jnp.concatenate([jnp.linalg.norm(leaf.reshape(-1, leaf.shape[-1]), axis=1) for leaf in leaves])
    run = partial(_run, model, ends, ends.prompt, blocks=blocks)
    before = run(jax.tree.map(jnp.zeros_like, ends.added))

    def one(number: Array) -> Array:
        chosen = jnp.split(jnp.arange(sum(sizes)) == number, np.cumsum(sizes)[:-1].tolist())
        parts = [
            jnp.where(mine.reshape(leaf.shape[:-1])[..., None], leaf, 0)
            for mine, leaf in zip(chosen, leaves, strict=True)
        ]
        after = run(jax.tree.unflatten(tree, parts))
        # The difference first: what targets read is far larger than by how much they move.
        return _read(record, readings, jax.tree.map(jnp.subtract, before, after))

    return change, jax.lax.map(one, jnp.arange(sum(sizes)))


@partial(jax.jit, static_argnames="blocks")
def moved_directly(
    model: Any,
    record: Record,
    sites: tuple[ReplacedSites, ...],
    sources: Sources,
    ends: Ends,
    readings: tuple[Reading, ...],
    blocks: Blocks,
) -> Float[Array, "target"]:
    """Returns by how much targets fall when all modulations of recorded blocks are exchanged in the frozen map.

    Args:
        model: this and the rest as for `slopes_at`.
        record: the trace's arrays.
        sites: of the replacement.
        sources: of the replacement, which are held.
        ends: of the line.
        readings: of the targets.
        blocks: that the trace recorded.
    """
    assert ends.added.blocks is not None
    parts = []
    for layers, part in zip(blocks.layers(model.stacks), group_slices(model.stacks), strict=True):
        parts += [None if one is None else one[layers.start :] for one in ends.added.blocks[part]]
    before, after = (
        run_replacement(record, sites, sources, modulation=added)
        for added in (None, ends.added._replace(blocks=tuple(parts)))
    )
    return _read(record, readings, jax.tree.map(jnp.subtract, before, after))
