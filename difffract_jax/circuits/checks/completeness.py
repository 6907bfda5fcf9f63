"""Whether a circuit's features are enough for its target, and whether they are needed.

Readings and ablations are those of docs/method.md, sections 7 and 9.

The unit is a feature of one site, stream and step, at all its positions: that is what pruning keeps and edits reach.

completeness    the circuit's features keep their values, all other features of all replaced sites are ablated.
                recovered = (value - value with none kept) / (value with all kept - value with none kept)
minimality      the circuit's features are ablated, all others keep their values.
                lost = (value with all kept - value) / (value with all kept - value with none kept)

Both run from 0 to 1 unless features work against each other. Value is the graph's weighted sum of its targets'
readings: pre-activations of features, values of outputs. What a kept feature's value is depends on the reading: in
`direct` it is the recorded one; in `propagated`, `live` and `full` it follows what is left of the run (see `readings`).
Errors, inputs and untouched MLPs stay, so that `recovered` is about features alone.

Ablated features get their mean over the replaced positions of their stream in the same step of the same run (`mean`:
what a site writes on average stays, so that the run stays near what the model knows), or 0. Means over other prompts
can be given.

Sets of growing size come from three rankings: the graph's features by influence; all active features that lie below a
target by their largest value; the same at random.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from difffract_jax.address import STREAMS
from difffract_jax.circuits.attribution.engine import Engine
from difffract_jax.circuits.checks.rerun import Rerun
from difffract_jax.circuits.checks.variants import (
    AT_ONCE,
    entering,
    map_variants,
    read_variants,
    recorded_latents,
    round_up,
)
from difffract_jax.circuits.effects.readings import SWITCHED, Mode, edited
from difffract_jax.circuits.frozen.encoding import SiteLayers, site
from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.frozen.targets import Targets, inputs_at, reading_terms
from difffract_jax.generators import random_generator
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.order import levels
from difffract_jax.graphs.pruning import node_influence
from difffract_jax.models.streaming import jit_resident, streams_layers
from difffract_jax.transcoders.transcoder import Transcoder

Ablation = Literal["mean", "zero"]
NEVER = np.iinfo(np.int32).max
"""Rank of a feature outside a ranking."""
FEW = 4
"""Sets computed together: each holds whole codes, unlike other variants. Where layers are streamed memory is what is
short, and sets are computed one at a time."""


class Sets(NamedTuple):
    """Sets of features: the first `size` of a ranking; arrays have one entry per set.

    Attributes:
        ranking: which ranking.
        size: features; -1 for all there are, active or not.
        removed: whether the set is ablated and all else kept, instead of the reverse.
    """

    ranking: Int[Array, "set"]
    size: Int[Array, "set"]
    removed: Bool[Array, "set"]


class Units(NamedTuple):
    """Features of a run, a row each, without positions.

    Attributes:
        number: of the evaluation within the run.
        group: number of the group.
        layer: recorded layer of the group's stack.
        side: place of the stream among those that the group's sequence holds.
        feature: of the site's transcoder.
        value: largest over positions.
    """

    number: np.ndarray
    group: np.ndarray
    layer: np.ndarray
    side: np.ndarray
    feature: np.ndarray
    value: Float64[np.ndarray, "unit"]


def candidates(again: Rerun, graph: Graph) -> tuple[Units, dict[tuple[int, ...], int]]:
    """Returns every feature that is active in the run below one of the graph's targets, and their places.

    Args:
        again: the graph's run.
        graph: position by position.

    Returns:
        The features, and step, branch, stream, block and feature -> row.
    """
    engine = again.engine
    table, level = engine.table, levels(engine.table.step, engine.table.block)
    highest = int(level[again.rows[graph.targets]].max())
    rows = np.flatnonzero((table.kind == FEATURE) & (table.value > 0) & (level < highest))
    keys = np.stack(
        [
            column[rows].astype(np.int64)
            for column in (table.step, table.branch, table.stream, table.block, table.feature)
        ]
    )
    unique, place = np.unique(keys, axis=1, return_inverse=True)
    value = np.zeros(unique.shape[1])
    np.maximum.at(value, place.ravel(), table.value[rows].astype(np.float64))
    info = engine.infos[0]
    step, branch, stream, block, feature = unique
    evaluations = {(one.step, one.branch): number for number, one in enumerate(engine.infos)}
    number = np.array([evaluations[pair] for pair in zip(step.tolist(), branch.tolist(), strict=True)], np.int64)
    group = info.layout.groups_at(block, stream)
    layer = block - info.recorded[0] - np.array(engine.steps[0].record.first_layers, np.int64)[group]
    sides = [{STREAMS.index(name): i for i, name in enumerate(one.streams)} for one in info.layout.groups]
    side = np.array([sides[g][s] for g, s in zip(group.tolist(), stream.tolist(), strict=True)], np.int64)
    units = Units(number, group, layer, side, feature, value)
    return units, {tuple(key): i for i, key in enumerate(unique.T.tolist())}


def by_influence(graph: Graph, places: dict[tuple[int, ...], int]) -> np.ndarray:
    """Returns the rows of a graph's features by their influence, summed over positions, the largest first.

    Args:
        graph: position by position.
        places: from `candidates`.
    """
    summed = aggregate(graph)
    influence = node_influence(summed)
    inside = np.setdiff1d(np.flatnonzero(summed.node_kind == FEATURE), summed.targets)
    ranked = inside[np.argsort(-influence[inside], kind="stable")]
    columns = (summed.node_step, summed.node_branch, summed.node_stream, summed.node_block, summed.node_feature)
    return np.array([places[tuple(int(column[node]) for column in columns)] for node in ranked], np.int64)


def rank(engine: Engine, units: Units, order: np.ndarray, number: int) -> tuple[Int[Array, "layer side feat"], ...]:
    """Returns every feature's place in a ranking, [layer side feat] per group; `NEVER` for those not in it.

    Args:
        engine: of the run.
        units: from `candidates`.
        order: their rows, the first first.
        number: of the evaluation within the run.
    """
    ranks = []
    first = engine.steps[0]
    per_group = zip(first.sites, first.sources.errors, first.record.side_lengths, strict=True)
    for group, (sites, errors, lengths) in enumerate(per_group):
        places = np.full((errors.shape[0], len(lengths), sites.features), NEVER, np.int32)
        chosen = np.flatnonzero((units.group[order] == group) & (units.number[order] == number))
        at = order[chosen]
        places[units.layer[at], units.side[at], units.feature[at]] = chosen
        ranks.append(jnp.asarray(places))
    return tuple(ranks)


def mean_values(prepared: Replacement) -> tuple[Float[Array, "layer side feat"], ...]:
    """Returns every feature's mean over the replaced positions of its stream, [layer side feat] per group."""
    record, per_group = prepared.record, []
    with jax.default_matmul_precision("highest"):
        for sites, x, lengths in zip(prepared.sites, record.mlp_in, record.side_lengths, strict=True):
            if sites.stack is None:
                per_group.append(jnp.zeros((x.shape[0], len(lengths), 0), x.dtype))
            elif sites.streamed is None:
                per_group.append(_mean_values(sites.stack, sites.layers, x, record.t, lengths))
            else:
                none = jnp.zeros((len(lengths), sites.features), x.dtype)  # no transcoder, hence none is fetched
                layers = zip(sites.used_slots, sites.layers.live, x, strict=True)
                means = [
                    none if slot is None else _means(sites.transcoder(slot), live, rows, record.t, lengths)
                    for slot, live, rows in layers
                ]
                per_group.append(jnp.stack(means))
    return tuple(per_group)


@partial(jax.jit, static_argnames="lengths")
def _mean_values(
    stack: Transcoder, layers: SiteLayers, x: Array, t: Array, lengths: tuple[int, ...]
) -> Float[Array, "layer side feat"]:
    def means(layer: tuple[Array, Array, Array]) -> Float[Array, "side feat"]:
        slot, live, x = layer
        return _means(site(stack, slot), live, x, t, lengths)

    return jax.lax.map(means, (layers.slot, layers.live, x))


@partial(jax.jit, static_argnames="lengths")
def _means(
    transcoder: Transcoder, live: Array, x: Array, t: Array, lengths: tuple[int, ...]
) -> Float[Array, "side feat"]:
    z, side_of_row = transcoder.encode(x, t), np.repeat(np.arange(len(lengths)), lengths)
    counted = jnp.stack([(side_of_row == side) & live for side in range(len(lengths))]).astype(z.dtype)
    return (counted @ z) / jnp.maximum(jnp.sum(counted, axis=1), 1)[:, None]


def values_of(
    again: Rerun,
    graph: Graph,
    units: Units,
    rankings: list[np.ndarray],
    sets: Sets,
    mode: Mode,
    *,
    ablation: Ablation = "mean",
    means: Sequence[Sequence[Array]] | None = None,
) -> Float64[np.ndarray, "set"]:
    """Returns the graph's value with each set of features kept, or removed.

    Args:
        again: the graph's run.
        graph: whose targets are read, weighted.
        units: from `candidates`.
        rankings: orders of their rows.
        sets: which features.
        mode: reading, see `readings`.
        ablation: what the other features become.
        means: of every step, instead of those of the run, [layer side feat] per group.
    """
    engine = again.engine
    # Streamed sets run one after another, so that their number makes no program.
    least = sets.size.shape[0] if streams_layers(engine.steps) else AT_ONCE
    more = round_up(sets.size.shape[0], least) - sets.size.shape[0]
    filled = jax.tree.map(lambda column: jnp.pad(jnp.asarray(column), (0, more)), sets)

    # Tracing a program takes longer than running it: one serves both readings that differ in what is on.
    switching = jnp.asarray(mode == "live") if mode in SWITCHED else None
    program = SWITCHED[0] if mode in SWITCHED else mode

    def run_step(number: int, targets: Targets, latents: Array) -> tuple[Array, Array | None]:
        prepared = engine.steps[number]
        ranks = jax.tree.map(lambda *each: jnp.stack(each), *(rank(engine, units, one, number) for one in rankings))
        other = mean_values(prepared) if means is None else means[number]
        if ablation == "zero":
            other = jax.tree.map(jnp.zeros_like, other)
        with jax.default_matmul_precision("highest"):
            given = (prepared, ranks, other, filled, targets, latents, switching)
            return _run_sets(*given, mode=program, across=engine.across)

    start = recorded_latents(engine, filled.size.shape[0])
    found = read_variants(engine, again.rows[graph.targets], start, run_step)
    return (found @ graph.root_weights[graph.targets])[: sets.size.shape[0]]


@partial(jit_resident, static_argnames=("mode", "across"))
def _run_sets(
    prepared: Replacement,
    ranks: tuple[Array, ...],
    other: tuple[Array, ...],
    sets: Sets,
    readouts: Targets,
    latents: Float[Array, "set img channels"],
    switching: Bool[Array, ""] | None,
    *,
    mode: Mode,
    across: bool,
) -> tuple[Array, Array | None]:
    record = prepared.record
    gradients, constant = reading_terms(record, prepared.sites, readouts)

    def one(variant: tuple[Sets, Array]) -> tuple[Array, Array | None]:
        chosen, z = variant
        inside = jax.tree.map(lambda each: (each[chosen.ranking] < chosen.size) | (chosen.size < 0), ranks)
        kept = jax.tree.map(lambda inside: inside != chosen.removed, inside)
        factors = jax.tree.map(lambda kept, mean: kept.astype(mean.dtype), kept, other)
        offsets = jax.tree.map(lambda kept, mean: jnp.where(kept, 0, mean), kept, other)
        found = edited(entering(prepared, z, across=across), factors, offsets, mode, switching=switching)
        return jnp.sum(gradients * inputs_at(record, readouts, found.mlp_in), axis=1) + constant, found.velocity

    streamed = streams_layers(prepared)
    return map_variants(one, (sets, latents), 1 if streamed else FEW, streamed=streamed)


def curve(
    again: Rerun,
    graph: Graph,
    sizes: list[int],
    mode: Mode,
    *,
    ablation: Ablation = "mean",
    draws: int = 5,
    seed: int = 0,
    means: Sequence[Sequence[Array]] | None = None,
) -> dict[str, Any]:
    """Returns completeness and minimality of sets of growing size, by influence, largest value, and at random.

    Args:
        again: the graph's run.
        graph: position by position.
        sizes: of the sets; those of more features than the graph has are left out of all rankings.
        mode: reading.
        ablation: what the other features become.
        draws: random sets of each size.
        seed: of these.
        means: see `values_of`.

    Returns:
        JSON values: `all` and `none`, the value with all features kept and with none; `rows`, one per ranking (`draw`
        counts the random ones) and size, with the values and what is `recovered` and `lost`, None where all and none
        give the same value.
    """
    units, places = candidates(again, graph)
    chosen = by_influence(graph, places)
    rng = random_generator(seed)
    random = [rng.permutation(units.value.size) for _ in range(draws)]
    orders = [chosen, np.argsort(-units.value, kind="stable"), *random]
    names = [("influence", 0), ("largest value", 0), *(("random", draw) for draw in range(draws))]
    fitting = sorted({size for size in sizes if 0 < size <= chosen.size})
    asked = [(i, size, removed) for i in range(len(orders)) for size in fitting for removed in (False, True)]
    columns = np.array([(0, -1, False), (0, 0, False), *asked], np.int64).reshape(-1, 3).T
    sets = Sets(jnp.asarray(columns[0], jnp.int32), jnp.asarray(columns[1], jnp.int32), jnp.asarray(columns[2] == 1))
    values = values_of(again, graph, units, orders, sets, mode, ablation=ablation, means=means)
    everything, nothing, pairs = float(values[0]), float(values[1]), values[2:].reshape(-1, 2)
    span = everything - nothing
    told = abs(span) > 1e-6 * abs(everything)
    rows = []
    for (i, size, _), (kept, removed) in zip(asked[::2], pairs.tolist(), strict=True):
        row: dict[str, Any] = {"ranking": names[i][0], "draw": names[i][1], "size": size, "kept": kept}
        row |= {"removed": removed, "recovered": (kept - nothing) / span if told else None}
        rows.append(row | {"lost": (everything - removed) / span if told else None})
    return {"reading": mode, "all": everything, "none": nothing, "candidates": int(units.value.size), "rows": rows}
