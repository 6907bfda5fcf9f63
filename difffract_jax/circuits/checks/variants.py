"""Many variants of a traced run side by side, and what the graph's targets read in each.

A variant changes what the MLPs add, or what the run starts from, in one or several of the traced steps. Per step, or
with guidance by two branches per evaluation:

1. `run_step(number, targets, latents)` runs all variants, and returns the targets' readings and the velocities.
2. Outputs are <velocity, v> + <latents, z>, with the weights of the `Output`.
3. Over several steps the variants' latents follow their own velocities: z + (sigma_{i+1} - sigma_i) v.

Variants run `AT_ONCE` at a time inside one compiled program per step (`map_variants`). Numbers of variants and targets
are rounded up, so that circuits of similar size share programs. Where blocks or transcoders are streamed a loop on the
host takes the place of the program, and fetches every layer once for `AT_ONCE` variants. `push_edges` uses this for the
frozen map's push-forward, `faithfulness.perturb` and `completeness` for the model itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64

from difffract_jax.address import IMG, LATENT, TXT
from difffract_jax.circuits.attribution.carried import after_step, ends_step
from difffract_jax.circuits.attribution.engine import Engine, targets_of
from difffract_jax.circuits.frozen.replacement import Replacement, Sources, run_replacement
from difffract_jax.circuits.frozen.targets import Targets, inputs_at, reading_terms
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT
from difffract_jax.models.blocks import Streams
from difffract_jax.models.stacks import slice_layer

AT_ONCE = 8
"""Variants computed together; also the fewest that programs are compiled for."""
TARGETS = 128
"""The fewest targets that programs are compiled for."""
RunStep = Callable[[int, Targets, Array], tuple[Array, Array | None]]


def read_variants(
    engine: Engine,
    rows: Int64[np.ndarray, "target"],
    latents: Float[Array, "variant img channels"],
    run_step: RunStep,
    *,
    changes: bool = False,
) -> Float64[np.ndarray, "variant target"]:
    """Returns the targets' values in every variant.

    Args:
        engine: from `make_engine`.
        rows: features or outputs of its table.
        latents: entering the first step, of every variant; or what is added to them.
        run_step: returns features' pre-activations, [variant target], and velocities, [variant img outputs], of the
            evaluation of this number; the latents it gets are those entering the step.
        changes: whether these are changes rather than values, so that outputs have no constant.
    """
    table, values = engine.table, np.zeros((latents.shape[0], rows.size))
    filled, velocities = pad_rows(rows, TARGETS), []
    for number, info in enumerate(engine.infos):
        u, velocity = run_step(number, targets_of(engine, filled, number), latents)
        of_step = table.step[rows] == info.step
        here = of_step & (table.kind[rows] == FEATURE) & (table.branch[rows] == info.branch)
        values[:, here] = np.asarray(u, np.float64)[:, : rows.size][:, here]
        for i in np.flatnonzero((table.kind[rows] == OUTPUT) & of_step):
            output = engine.outputs[int(rows[i]) - engine.sources]
            values[:, i] += info.velocity_weight * _along(velocity, output.velocity)
            if ends_step(engine.infos, number):
                values[:, i] = values[:, i] + _along(latents, output.latents) + (0.0 if changes else output.constant)
        velocities.append(velocity)
        if engine.across and ends_step(engine.infos, number) and number + 1 < len(engine.steps):
            evaluations = engine.infos[number + 1 - len(velocities) : number + 1]
            latents, velocities = after_step(latents, evaluations, velocities), []
    return values


def map_variants(run: Callable[[Any], Any], variants: Any, at_once: int, *, streamed: bool) -> Any:
    """Returns what a function gives for every variant, stacked; for use inside other programs, or streamed, outside.

    Args:
        run: of one variant.
        variants: tree of arrays with a leading axis, a multiple of `at_once` long.
        at_once: variants computed together.
        streamed: whether `run` fetches layers, which no program can.
    """
    if not streamed:
        return jax.lax.map(run, variants, batch_size=at_once)
    starts = range(0, jax.tree.leaves(variants)[0].shape[0], at_once)
    found = [jax.vmap(run)(slice_layer(variants, slice(start, start + at_once))) for start in starts]
    return jax.tree.map(lambda *each: jnp.concatenate(each), *found)


def _along(ours: Array | None, weights: Array) -> Float64[np.ndarray, "variant"]:
    return np.einsum("vsc,sc->v", *(np.asarray(a, np.float64) for a in (ours, weights)))


def pad_rows(rows: Int64[np.ndarray, "row"], least: int) -> Int64[np.ndarray, "filled"]:
    """Returns rows of the table and as many -1, which stand for nothing, as `round_up` asks for."""
    return np.concatenate([rows, np.full(round_up(rows.size, least) - rows.size, -1)]).astype(np.int64)


def round_up(count: int, least: int) -> int:
    """Returns a number doubled until it is at least a count: few sizes, and few programs."""
    while least < count:
        least *= 2
    return least


def recorded_latents(engine: Engine, variants: int) -> Float[Array, "variant img channels"]:
    """Returns the latents entering the first step, once per variant."""
    latents = engine.steps[0].record.latents
    return jnp.broadcast_to(latents, (variants, *latents.shape))


def entering(prepared: Replacement, latents: Array, *, across: bool) -> Replacement:
    """Returns a step's replacement with a run that starts from other latents, for use inside other programs.

    Args:
        prepared: from `prepare_step`.
        latents: entering the step, [img channels].
        across: whether the residual streams follow them, as over several steps; else they stay as recorded.
    """
    record, weights = prepared.record, prepared.record.weights
    boundary = Streams(weights.img_in(latents), record.boundary.txt) if across else record.boundary
    record = record._replace(boundary=boundary, latents=latents)
    return prepared._replace(record=record, sources=prepared.sources._replace(boundary=boundary))


class SourceLocations(NamedTuple):
    """Where some sources of one step stand; arrays have one entry per source.

    Attributes:
        kind: `FEATURE`, `ERROR`, `INPUT` of this step; anything else for one that is not.
        group: number of the group; for inputs the stream's code.
        layer: recorded layer, counted through all stacks.
        position: within the group's sequence, or the stream.
        feature: of a feature.
    """

    kind: Int[Array, "source"]
    group: Int[Array, "source"]
    layer: Int[Array, "source"]
    position: Int[Array, "source"]
    feature: Int[Array, "source"]


NOT_HERE = 255
"""`SourceLocations.kind` of a source of another evaluation."""


def locations_at(engine: Engine, rows: Int64[np.ndarray, "source"], number: int) -> SourceLocations:
    """Returns where rows of the table stand in one evaluation.

    Args:
        engine: from `make_engine`.
        rows: features, errors or inputs; -1 for nothing.
        number: of the evaluation within the span.
    """
    table, info = engine.table, engine.infos[number]
    kind, stream, block = (column[rows].astype(np.int64) for column in (table.kind, table.stream, table.block))
    kind[(table.step[rows] != info.step) | (table.branch[rows] != info.branch) | (rows < 0)] = NOT_HERE
    group = info.layout.groups_at(block, stream)
    position = info.layout.rows_at(group, stream, table.position[rows], info.tokens_of)
    layer = np.clip(block - info.recorded[0], 0, len(info.recorded) - 1)
    columns = (kind, np.where(group < 0, stream, group), layer, position, np.maximum(table.feature[rows], 0))
    return SourceLocations(*(jnp.asarray(column, jnp.int32) for column in columns))


def push_edges(
    engine: Engine, sources: Int64[np.ndarray, "source"], targets: Int64[np.ndarray, "target"]
) -> Float64[np.ndarray, "source target"]:
    """Returns by how much each source, taken away alone, lowers each target in the frozen map, all else held.

    This is the push-forward of the source's whole value, through the blocks themselves; attribution pulls targets back
    through hand-written rules. Both give the same edges.

    Args:
        engine: from `make_engine`.
        sources: rows of its table: features, errors, inputs.
        targets: rows of its table: features, outputs.
    """
    rows, table = pad_rows(sources, AT_ONCE), engine.table
    first = np.asarray(engine.steps[0].record.latents)
    latents = np.zeros((rows.size, *first.shape))
    inputs = (rows >= 0) & (table.kind[rows] == INPUT)
    for i in np.flatnonzero(inputs & (table.stream[rows] == LATENT)):
        latents[i, table.position[rows[i]]] = first[table.position[rows[i]]]
    # All steps of a span read one text embedding, which counts to the first.
    text = inputs & (table.stream[rows] == TXT) & engine.across

    def run_step(number: int, readouts: Targets, entering: Array) -> tuple[Array, Array | None]:
        with jax.default_matmul_precision("highest"):
            places = locations_at(engine, rows, number)
            mine = jnp.asarray(text & (table.branch[rows] == engine.infos[number].branch))
            places = places._replace(kind=jnp.where(mine, INPUT, places.kind))
            step = engine.steps[number]
            gradients, _ = reading_terms(step.record, step.sites, readouts)
            return _push(step, places, readouts, gradients, entering, across=engine.across)

    start = jnp.asarray(latents, engine.steps[0].record.latents.dtype)
    return read_variants(engine, targets, start, run_step, changes=True)[: sources.size]


@partial(jax.jit, static_argnames="across")
def _push(
    prepared: Replacement,
    places: SourceLocations,
    readouts: Targets,
    gradients: Float[Array, "target d_model"],
    latents: Array,
    *,
    across: bool,
) -> tuple[Array, Array | None]:
    record, sites, sources = prepared
    _, push = jax.linearize(partial(run_replacement, record, sites), sources)

    def one(variant: tuple[SourceLocations, Array]) -> tuple[Array, Array | None]:
        place, entering = variant
        moved = push(_change(prepared, place, entering, across=across))
        return jnp.sum(gradients * inputs_at(record, readouts, moved.mlp_in), axis=1), moved.velocity

    return jax.lax.map(one, (places, latents), batch_size=AT_ONCE)


def _change(prepared: Replacement, place: SourceLocations, latents: Array, *, across: bool) -> Sources:
    """Returns the change of the sources that one of them stands for, and that the latents bring."""
    record, sites, sources = prepared
    weights, values, errors = record.weights, [], []
    for group, (one, value, error) in enumerate(zip(sites, sources.values, sources.errors, strict=True)):
        layers, rows = (jnp.arange(size)[:, None] for size in error.shape[:2])
        layers = layers + record.first_layers[group]
        here = (layers == place.layer) & (place.position == rows.T) & (place.group == group)
        chosen = here[:, :, None] & (one.layers.index == place.feature) & (place.kind == FEATURE)
        values.append(jnp.where(chosen, value, 0))
        errors.append(jnp.where(here[:, :, None] & (place.kind == ERROR), error, 0))
    own, text = (
        (place.kind == INPUT) & (jnp.arange(h.shape[0]) == place.position) & (place.group == stream)
        for stream, h in ((IMG, sources.boundary.img), (TXT, sources.boundary.txt))
    )
    img = jnp.where(own[:, None], sources.boundary.img, 0)
    if across:
        # What the projections' biases add is no source's.
        img = latents @ weights.img_in.kernel[...]
        txt = jnp.where(text[:, None], record.text, 0) @ weights.txt_in.kernel[...]
    else:
        txt = jnp.where(text[:, None], sources.boundary.txt, 0)
    return Sources(Streams(img, txt), tuple(values), tuple(errors))
