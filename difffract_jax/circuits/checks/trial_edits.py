"""Which edits a graph's grade tries: its units, random ones beside them, and how they are laid out as arrays.

A unit is a feature of one site and step at all its positions; of both branches where guidance has two and the run holds
both. At dose d its code z becomes (1 + d) z. The first units by the change that the graph predicts are tried alone and
in groups. Beside each stands a control: a random feature that
the graph does not name, of the same site, active where the unit is strongest and about as strongly; its dose is such
that what is written has the unit's norm. No feature is the control of two units, so that a group's controls are as many
features as the group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import STREAMS
from difffract_jax.circuits.attribution.engine import Engine
from difffract_jax.circuits.checks.edit_runs import ALL_STEPS, NOWHERE, Edits
from difffract_jax.circuits.checks.rerun import Rerun
from difffract_jax.circuits.effects.readings import node_effects, predict
from difffract_jax.generators import random_generator
from difffract_jax.graphs.grade import WORTH
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.names import node_names

SINGLES = 16
"""Units tried alone."""
NEAREST = 5
"""Features, the nearest in activation, of which a control is drawn."""


class Unit(NamedTuple):
    """A feature of one site and step, at all its positions.

    Attributes:
        key: step, stream, block, feature.
        name: of its strongest node's site and feature.
        nodes: of the graph; none for a feature that it does not name.
        effect: what the graph predicts at dose 1, as a share of the target's value.
        norm: of what it writes, over all positions.
        mean: root of its mean square over the positions of its stream that count.
    """

    key: tuple[int, int, int, int]
    name: str
    nodes: Int64[np.ndarray, "node"]
    effect: float
    norm: float
    mean: float


class Trial(NamedTuple):
    """One edit: units, each with its own dose, and what is added to its code besides."""

    units: tuple[Unit, ...]
    doses: tuple[float, ...]
    offsets: tuple[float, ...]


def trial(units: Sequence[Unit], dose: float) -> Trial:
    """Returns an edit of some units at one dose."""
    return Trial(tuple(units), (dose,) * len(units), (0.0,) * len(units))


def steering(unit: Unit) -> Trial:
    """Returns what adds to a unit's code at every position alike, with the norm of dose 1."""
    return Trial((unit,), (0.0,), (unit.mean,))


def target_scale(graph: Graph, readings: Float64[np.ndarray, "target"]) -> float:
    """Returns what changes of a graph's targets are shares of.

    Args:
        graph: whose targets these are.
        readings: of the targets in the run.

    Returns:
        Their weighted size: that of a feature its reading, that of an output, which may be near 0, the sum of the
        absolute edges that features have into it.
    """
    sizes, of_feature = np.abs(readings), graph.node_kind[graph.edge_source] == FEATURE
    for i, node in enumerate(graph.targets.tolist()):
        if graph.node_kind[node] != FEATURE:
            sizes[i] = np.sum(
                np.abs(graph.edge_attribution[of_feature & (graph.edge_target == node)]), dtype=np.float64
            )
    return float(sizes @ graph.root_weights[graph.targets]) or 1.0


def graph_scale(graph: Graph) -> float:
    """Returns what the changes that a graph predicts are shares of, see `target_scale`."""
    place = {int(node): i for i, node in enumerate(graph.target_node)}
    return target_scale(graph, graph.target_preactivation[[place[int(node)] for node in graph.targets]])


def units_of(again: Rerun, graph: Graph) -> list[Unit]:
    """Returns a graph's units that are predicted to move its targets by `WORTH`, those that move it most first.

    Args:
        again: the graph's run.
        graph: position by position.
    """
    inside = np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets)
    columns = (graph.node_step, graph.node_stream, graph.node_block, graph.node_feature)
    keys, place = np.unique(
        np.stack([column[inside].astype(np.int64) for column in columns], 1), axis=0, return_inverse=True
    )
    effect = np.bincount(place.ravel(), node_effects(graph)[inside], len(keys)) / graph_scale(graph)
    names, found = node_names(graph), []
    for number in np.argsort(-np.abs(effect), kind="stable").tolist():
        if abs(effect[number]) < WORTH:
            break
        nodes = inside[place.ravel() == number]
        name = names[nodes[np.argmax(graph.node_value[nodes])]].partition("@")[0]
        step, stream, block, feature = keys[number].tolist()
        found.append(Unit((step, stream, block, feature), name, nodes, float(effect[number]), 0.0, 0.0))
    return measured_units(again.engine, found)


def measured_units(engine: Engine, units: Sequence[Unit]) -> list[Unit]:
    """Returns units with the norm of what they write in a run."""
    return [unit._replace(norm=_norms(engine, unit.key, [unit.key[3]])[0], mean=_mean(engine, unit)) for unit in units]


def _site_rows(engine: Engine, key: tuple[int, int, int, int]) -> np.ndarray:
    """Returns the rows of the table that are active features of a unit's site and step, of every branch."""
    table, (step, stream, block, _) = engine.table, key
    there = (table.kind == FEATURE) & (table.value > 0) & (table.step == step)
    return np.flatnonzero(there & (table.stream == stream) & (table.block == block))


def _norms(engine: Engine, key: tuple[int, int, int, int], features: Sequence[int]) -> list[float]:
    """Returns the norms of what features of one site write, over all positions."""
    _, group, layer, _ = place_of(engine, key)
    rows = _site_rows(engine, key)
    squares = [float(np.sum(engine.table.value[rows[engine.table.feature[rows] == one]] ** 2.0)) for one in features]
    sites = engine.steps[0].sites[group]
    transcoder = sites.transcoder(sites.layers.slot[layer])
    vectors = np.asarray(transcoder.dec.kernel[jnp.asarray(features)], np.float64)
    return (np.sqrt(squares) * np.linalg.norm(vectors, axis=1)).tolist()


def _mean(engine: Engine, unit: Unit) -> float:
    _, group, layer, side = place_of(engine, unit.key)
    rows = _site_rows(engine, unit.key)
    values = engine.table.value[rows[engine.table.feature[rows] == unit.key[3]]].astype(np.float64)
    lengths = engine.steps[0].record.side_lengths[group]
    first, live = sum(lengths[:side]), 0
    for prepared, info in zip(engine.steps, engine.infos, strict=True):
        if info.step == unit.key[0]:
            live += int(np.asarray(prepared.sites[group].layers.live)[layer, first : first + lengths[side]].sum())
    return float(np.sqrt(np.sum(values**2) / max(live, 1)))


def controls_of(again: Rerun, graph: Graph, units: Sequence[Unit], seed: int) -> list[tuple[Unit, float] | None]:
    """Returns a random feature for every unit, and the dose at which it writes as much as the unit at dose 1.

    Args:
        again: the graph's run.
        graph: which names none of them.
        units: from `units_of`.
        seed: of the draw.

    Returns:
        One for each unit, no feature twice; None where no other feature of the site is active and left.
    """
    table, found = again.engine.table, []
    drawn: set[tuple[int, int, int, int]] = set()
    named = set(zip(graph.node_stream.tolist(), graph.node_block.tolist(), graph.node_feature.tolist(), strict=True))
    for number, unit in enumerate(units):
        step, stream, block, _ = unit.key
        rows = _site_rows(again.engine, unit.key)
        free = [
            (stream, block, one) not in named and (step, stream, block, one) not in drawn
            for one in table.feature[rows].tolist()
        ]
        rows = rows[np.array(free, bool)]
        strongest = unit.nodes[np.argmax(graph.node_value[unit.nodes])]
        there = (table.position[rows] == graph.node_position[strongest]) & (
            table.branch[rows] == graph.node_branch[strongest]
        )
        beside = rows[there]
        rows = beside if beside.size else rows
        if not rows.size:
            found.append(None)
            continue
        near = rows[np.argsort(np.abs(table.value[rows] - graph.node_value[strongest]), kind="stable")]
        near = np.array(list(dict.fromkeys(table.feature[near].tolist()))[:NEAREST])
        feature = int(random_generator(seed, number).choice(near))
        norm = _norms(again.engine, unit.key, [feature])[0]
        key = (step, stream, block, feature)
        drawn.add(key)
        control = Unit(key, f"{unit.name.rpartition('/')[0]}/f{feature}", np.zeros(0, np.int64), 0.0, norm, 0.0)
        found.append((control, unit.norm / norm) if norm > 0 else None)
    return found


def controlled(one: Trial, controls: dict[tuple[int, int, int, int], tuple[Unit, float] | None]) -> Trial | None:
    """Returns an edit of controls in place of units; None if one of these has none.

    Args:
        one: the edit.
        controls: of each unit, by its key.
    """
    found = [controls[unit.key] for unit in one.units]
    known = [pair for pair in found if pair is not None]
    if len(known) < len(found):
        return None
    doses = tuple(dose * factor for dose, (_, factor) in zip(one.doses, known, strict=True))
    return Trial(tuple(unit for unit, _ in known), doses, (0.0,) * len(known))


def predicted(graph: Graph, one: Trial) -> float:
    """Returns by what share of its value a graph predicts its targets to move."""
    factors = np.ones(graph.node_kind.size)
    for unit, dose in zip(one.units, one.doses, strict=True):
        factors[unit.nodes] = 1 + dose
    return float(predict(graph, factors) @ graph.root_weights[graph.targets]) / graph_scale(graph)


def place_of(engine: Engine, key: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Returns where a unit lies in a run: number of the step, group, recorded layer of its stack, side."""
    info, (step, stream, block, _) = engine.infos[0], key
    group = int(info.layout.groups_at(np.array([block]), np.array([stream]))[0])
    layer = block - info.recorded[0] - engine.steps[0].record.first_layers[group]
    return step - info.step, group, layer, info.layout.groups[group].streams.index(STREAMS[stream])


def laid_out(engine: Engine, trials: Sequence[Trial], *, all_steps: bool = False) -> Edits:
    """Returns edits as arrays, before them one that changes nothing.

    Args:
        engine: of the run.
        trials: the edits.
        all_steps: whether features are edited in every step instead of their own.
    """
    shape = len(trials) + 1, max((len(one.units) for one in trials), default=1)
    number, group, side, feature = (np.zeros(shape, np.int32) for _ in range(4))
    layer, factor, offset = np.full(shape, NOWHERE, np.int32), np.ones(shape), np.zeros(shape)
    for row, one in enumerate(trials, 1):
        for part, unit in enumerate(one.units):
            at = row, part
            number[at], group[at], layer[at], side[at] = place_of(engine, unit.key)
            feature[at], factor[at], offset[at] = unit.key[3], 1 + one.doses[part], one.offsets[part]
    if all_steps:
        number[:] = ALL_STEPS
    return Edits(number, group, layer, side, feature, factor, offset)
