"""A run with features edited, many edits side by side: what targets read, and how far activations move.

An edit makes features' codes z into factor * z + offset at all replaced positions of their stream (`effects.readings`).
`Edits` holds one row per edit and one column per feature, filled up with places that change nothing, so that what is
edited is data and one program serves all edits of a size. With guidance by two branches, an edit acts in both.

How far an edit moves activations is told in the run's own measure: the distance of an MLP's input from the unedited
one, over the median distance of a position's input from the nearest other position's, of the same block and stream.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64

from difffract_jax.circuits.attribution.engine import Engine
from difffract_jax.circuits.checks.variants import (
    AT_ONCE,
    entering,
    map_variants,
    read_variants,
    recorded_latents,
    round_up,
)
from difffract_jax.circuits.effects.readings import Mode, edited
from difffract_jax.circuits.frozen.encoding import ReplacedSites, site
from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.frozen.targets import Targets, inputs_at, reading_terms
from difffract_jax.circuits.trace.record import Record
from difffract_jax.models.streaming import jit_resident, streams_layers

LEAST = 64
"""The fewest edits that programs are compiled for."""
WIDTH = 32
"""The fewest features of an edit that programs are compiled for."""
ALL_STEPS = -1
"""`Edits.number` of a feature that is edited in every step."""
NOWHERE = np.iinfo(np.int32).max
"""`Edits.layer` of a place that changes nothing."""
FARTHEST = 0.9
"""Quantile of positions at which an edit's distance is read."""
SAMPLED = 256
"""Positions between which distances are taken: a run has thousands at FLUX's size."""


class Edits(NamedTuple):
    """Edits of a run, one row each; a column is a feature of the edit, or fills up.

    Attributes:
        number: of the step, counted from the run's first; `ALL_STEPS` for all.
        group: number of the group of sites.
        layer: recorded layer of the group's stack; `NOWHERE` for what fills up.
        side: place of the stream among those that the group's sequence holds.
        feature: of the site's transcoder.
        factor: what its code is multiplied with.
        offset: what is added to it.
    """

    number: Int[Any, "edit part"]
    group: Int[Any, "edit part"]
    layer: Int[Any, "edit part"]
    side: Int[Any, "edit part"]
    feature: Int[Any, "edit part"]
    factor: Float[Any, "edit part"]
    offset: Float[Any, "edit part"]


class EditRuns(NamedTuple):
    """What edits do in a run.

    Attributes:
        values: of the targets.
        distance: how far activations move, of the block where they move farthest, and with guidance by two branches of
            the evaluation; empty where it was not measured.
        active: active features of all replaced sites and positions, of both branches; likewise, and empty where
            transcoders are streamed.
    """

    values: Float64[np.ndarray, "edit target"]
    distance: Float64[np.ndarray, "edit"]
    active: Float64[np.ndarray, "edit"]


def run_edits(
    engine: Engine, targets: Int64[np.ndarray, "target"], edits: Edits, mode: Mode, *, moved: bool = False
) -> EditRuns:
    """Runs every edit, over all steps of the run.

    Args:
        engine: of the run.
        targets: rows of its table, features (their pre-activation u) or outputs.
        edits: NumPy arrays.
        mode: the reading, see `readings`.
        moved: whether to measure how far activations move.

    Returns:
        The targets' values; and where it is measured, of the last step how far activations move, and how many features
        are active.
    """
    count, parts = edits.layer.shape
    streamed = streams_layers(engine.steps)
    rows, columns = round_up(count, LEAST), round_up(parts, WIDTH)
    filling = (0, 0, NOWHERE, 0, 0, 1.0, 0.0)
    filled = Edits(
        *(
            np.pad(column, ((0, rows - count), (0, columns - parts)), constant_values=value)
            for column, value in zip(edits, filling, strict=True)
        )
    )
    told: list[tuple[Array, Array | None]] = []
    first, last = engine.infos[0].step, engine.infos[-1].step

    def run_step(number: int, readouts: Targets, latents: Array) -> tuple[Array, Array | None]:
        step, prepared = engine.infos[number].step, engine.steps[number]
        here = (filled.number == step - first) | (filled.number == ALL_STEPS)
        # Numbers in the type of the run; what is of another step changes nothing.
        now = jax.tree.map(jnp.asarray, filled._replace(layer=np.where(here, filled.layer, NOWHERE).astype(np.int32)))
        dtype = prepared.record.latents.dtype
        now = now._replace(factor=now.factor.astype(dtype), offset=now.offset.astype(dtype))
        typical = tuple(map(jnp.asarray, own_distances(prepared.record))) if moved and step == last else ()
        with jax.default_matmul_precision("highest"):
            u, velocity, distance, active = _run_edits(
                prepared, now, readouts, latents, typical, mode=mode, across=engine.across, counted=not streamed
            )
        told.extend([] if distance is None else [(distance, active)])
        return u, velocity

    values = read_variants(engine, targets, recorded_latents(engine, rows), run_step)
    distances, counts = ([np.asarray(one[i], np.float64)[:count] for one in told if one[i] is not None] for i in (0, 1))
    distance, active = np.max(distances or [np.zeros(0)], axis=0), np.sum(counts or [np.zeros(0)], axis=0)
    return EditRuns(values[:count], distance, active)


@partial(jit_resident, static_argnames=("mode", "across", "counted"))
def _run_edits(
    prepared: Replacement,
    edits: Edits,
    readouts: Targets,
    latents: Float[Array, "edit img channels"],
    typical: tuple[Float[Array, "_ _"], ...],
    *,
    mode: Mode,
    across: bool,
    counted: bool,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    record = prepared.record
    gradients, constant = reading_terms(record, prepared.sites, readouts)

    def one(variant: tuple[Edits, Array]) -> tuple[Array, Array | None, Array | None, Array | None]:
        edit, z = variant
        factors, offsets = _per_group(prepared, edit)
        found = edited(entering(prepared, z, across=across), factors, offsets, mode)
        u = jnp.sum(gradients * inputs_at(record, readouts, found.mlp_in), axis=1) + constant
        if not typical:
            return u, found.velocity, None, None
        distance = _distance(record, found.mlp_in, typical)
        active = _active(prepared.sites, found.mlp_in, record.t) if counted else None
        return u, found.velocity, distance, active

    streamed = streams_layers(prepared)
    return map_variants(one, (edits, latents), 1 if streamed else AT_ONCE, streamed=streamed)


def _per_group(prepared: Replacement, edit: Edits) -> tuple[list[Array], list[Array]]:
    """Returns factors and offsets of every feature, [layer side feat] per group."""
    factors, offsets = [], []
    per_group = zip(prepared.sites, prepared.sources.errors, prepared.record.side_lengths, strict=True)
    for group, (sites, error, lengths) in enumerate(per_group):
        shape = (error.shape[0], len(lengths), sites.features)
        at = jnp.where(edit.group == group, edit.layer, NOWHERE), edit.side, edit.feature
        factors.append(jnp.ones(shape, edit.factor.dtype).at[at].set(edit.factor, mode="drop"))
        offsets.append(jnp.zeros(shape, edit.offset.dtype).at[at].set(edit.offset, mode="drop"))
    return factors, offsets


def _distance(record: Record, x: tuple[Array, ...], typical: tuple[Float[Array, "_ _"], ...]) -> Float[Array, ""]:
    """Returns how far MLP inputs are from the record's, of the block where they are farthest."""
    farthest = [jnp.zeros((), x[0].dtype)]
    for ours, own, unit, live in zip(x, record.mlp_in, typical, record.replaceable, strict=True):
        if not ours.size:
            continue
        moved = jnp.where(live, jnp.linalg.norm(ours - own, axis=2) / unit, -1)
        place = jnp.ceil(FARTHEST * jnp.sum(live)).astype(jnp.int32) + jnp.sum(~live) - 1
        farthest.append(jnp.max(jnp.sort(moved, axis=1)[:, jnp.clip(place, 0, live.size - 1)]))
    return jnp.max(jnp.stack(farthest))


def _active(sites: tuple[ReplacedSites, ...], x: tuple[Array, ...], t: Array) -> Float[Array, ""]:
    """Returns how many features are active at all replaced positions."""
    total = jnp.zeros((), x[0].dtype)
    for one, rows in zip(sites, x, strict=True):
        if one.stack is None or not rows.size:
            continue

        def count(layer: tuple[Array, Array, Array], stack: Any = one.stack) -> Array:
            slot, live, x = layer
            return jnp.sum(jnp.where(live[:, None], site(stack, slot).encode(x, t) > 0, False)).astype(x.dtype)

        total = total + jnp.sum(jax.lax.map(count, (one.layers.slot, one.layers.live, rows)))
    return total


def own_distances(record: Record) -> list[Float[np.ndarray, "_ _"]]:
    """Returns the run's own measure of distance at every block and position, [layer rows] per group.

    It is the median, over positions of the stream, of the distance of an MLP's input from the nearest other position's;
    1 where a stream has fewer than two positions that count.

    Args:
        record: of one step.
    """
    found = []
    for x, live, lengths in zip(record.mlp_in, record.replaceable, record.side_lengths, strict=True):
        rows, counts = np.asarray(x, np.float64), np.asarray(live)
        side = np.repeat(np.arange(len(lengths)), lengths)
        typical = np.ones(rows.shape[:2])
        for number in range(len(lengths)):
            chosen = np.flatnonzero(counts & (side == number))
            chosen = chosen[:: -(-chosen.size // SAMPLED) or 1]
            for layer in range(rows.shape[0]) if chosen.size > 1 else ():
                typical[layer, side == number] = _nearest(rows[layer, chosen])
        found.append(typical.astype(np.asarray(x).dtype))
    return found


def _nearest(rows: Float64[np.ndarray, "row d_model"]) -> float:
    """Returns the median distance of a row from the nearest other row; at least the smallest number of float32."""
    square = np.sum(rows**2, axis=1)
    distance = square[:, None] + square[None] - 2 * rows @ rows.T
    np.fill_diagonal(distance, np.inf)
    return max(float(np.median(np.sqrt(np.maximum(distance.min(axis=1), 0)))), float(np.finfo(np.float32).tiny))
