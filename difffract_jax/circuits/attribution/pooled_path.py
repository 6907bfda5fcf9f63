"""What each modulation brings to the exchange of the pooled embedding (docs/method.md, section 11).

1. `integrate` divides the straight line between two pooled embeddings into parts of `POINTS` Gauss-Legendre points
   each. Of a part it is known what it should add up to, from runs at its ends; while all parts together miss too much,
   the one that misses most is halved.
2. What a modulation brings is the product of its integral with the exchanged part of the pooled embedding.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import STREAMS, Layout
from difffract_jax.circuits.attribution.engine import Engine, read_targets, targets_of
from difffract_jax.circuits.attribution.pooled_runs import (
    Ends,
    Line,
    Reading,
    ends_of,
    moved_alone,
    moved_between,
    moved_directly,
    slopes_at,
)
from difffract_jax.circuits.frozen.targets import target_gradients
from difffract_jax.circuits.trace.capture import run_of_trace
from difffract_jax.circuits.trace.record import Blocks, Record
from difffract_jax.graphs.graph import OUTPUT
from difffract_jax.models.pipeline import Pipeline, encode, step_inputs
from difffract_jax.ops import widen

POINTS = 8
"""Gauss-Legendre points of one part of the line."""
MOST = 32
"""Parts at most."""
NEAR = 1e-3
"""What all parts may miss of what they should add up to, over the sum of the sizes of edges."""


class ModulationPlaces(NamedTuple):
    """Which modulation is which, in one order for all of a model.

    Attributes:
        block: the model's; the number of all blocks for the last norm.
        stream: code of a stream that it is of; img where there are several.
        row: of the modulations of the block's group, or of the last norm.
    """

    block: Int64[np.ndarray, "modulation"]
    stream: Int64[np.ndarray, "modulation"]
    row: Int64[np.ndarray, "modulation"]


class PooledEffects(NamedTuple):
    """What every modulation brings to the exchange of the pooled embedding.

    Attributes:
        places: of the modulations.
        change: norm of each one's change.
        edges: of each into every target.
        alone: by how much each target falls when one modulation alone becomes what the empty prompt gives.
        weights: integral of each target's derivative by the pooled embedding through each modulation.
        rounding: part of each edge that comes from the rounding of the line's ends; 0 for float32 weights.
        exchanged: the prompt's pooled embedding minus the empty prompt's.
        swap: by how much each target falls when the pooled embedding is exchanged, in the real model.
        direct: the same in the frozen map, sources held.
        points: of the integral.
        missed: by how much the parts of the line miss what they should add up to, sizes added up.
    """

    places: ModulationPlaces
    change: Float64[np.ndarray, "modulation"]
    edges: Float64[np.ndarray, "target modulation"]
    alone: Float64[np.ndarray, "target modulation"]
    weights: Float64[np.ndarray, "target modulation pooled_width"]
    rounding: Float64[np.ndarray, "target modulation"]
    exchanged: Float64[np.ndarray, "pooled_width"]
    swap: Float64[np.ndarray, "target"]
    direct: Float64[np.ndarray, "target"]
    points: int
    missed: Float64[np.ndarray, "target"]

    @property
    def remainder(self) -> Float64[np.ndarray, "target"]:
        """What the exchange does beyond the sum of the edges."""
        return self.swap - self.edges.sum(axis=1)


def integrate(
    engine: Engine, rows: Int64[np.ndarray, "target"], pipe: Pipeline, parts: int | None = None
) -> PooledEffects:
    """Integrates targets' derivatives by all modulations between the pooled embeddings.

    Args:
        engine: of one step, without a mesh, whose trace ran the exchange.
        rows: of the targets in the table, features or outputs.
        pipe: the pipeline that was traced, its blocks in memory.
        parts: equal parts of the line; as many as are needed, where they are, if left out.
    """
    (record, sites, sources), info, model = engine.steps[0], engine.infos[0], pipe.transformer
    assert record.unpooled is not None, "the trace ran the exchange"
    line = _line(pipe, engine)
    blocks = Blocks(info.recorded[0], info.recorded[-1] + 1, record.velocity is not None)
    fixed = {"grid": info.grid, "blocks": blocks}
    swap = read_targets(engine, rows, (record.reading,)) - read_targets(engine, rows, (record.unpooled,))
    with jax.default_matmul_precision("highest"):
        readings = tuple(_reading(engine, int(row)) for row in rows)
        ends = ends_of(model, line, **fixed)
        exchanged = np.asarray(widen(line.inputs.pooled), np.float64) - np.asarray(widen(line.empty), np.float64)
        part = partial(_part, model, record, line, ends, readings, exchanged, **fixed)
        borders = np.linspace(0, 1, (parts or 1) + 1).tolist()
        found = [part(*pair) for pair in zip(borders[:-1], borders[1:], strict=True)]
        while parts is None and len(found) < MOST and (worst := _worst(found)) is not None:
            begin, end = found.pop(worst).ends
            middle = (begin + end) / 2
            found += [part(begin, middle), part(middle, end)]
        weights, rounding, edges = (
            np.sum([getattr(one, name) for one in found], axis=0) for name in ("weights", "rounding", "edges")
        )
        missed = np.sum([np.abs(one.missed) for one in found], axis=0)
        change, alone = moved_alone(model, record, ends, readings, blocks)
        direct = moved_directly(model, record, sites, sources, ends, readings, blocks)
    change, alone, direct = (np.asarray(array, np.float64) for array in (change, alone, direct))
    places = _places(info.layout, blocks)
    told = exchanged, swap, direct, POINTS * len(found), missed
    return PooledEffects(places, change, edges, alone.T, weights, rounding, *told)


class _Part(NamedTuple):
    """The integral over a part of the line.

    Attributes:
        ends: of the part.
        weights: this and the next two as in `PooledEffects`.
        rounding: [target modulation].
        edges: [target modulation].
        missed: what the part should add up to, minus what it does.
    """

    ends: tuple[float, float]
    weights: np.ndarray
    rounding: np.ndarray
    edges: np.ndarray
    missed: Float64[np.ndarray, "target"]


def _part(
    model: Any,
    record: Record,
    line: Line,
    ends: Ends,
    readings: tuple[Reading, ...],
    exchanged: Float64[np.ndarray, "pooled_width"],
    begin: float,
    end: float,
    **fixed: Any,
) -> _Part:
    """Integrates over a part of the line."""
    given, sums = (model, record, line, ends, readings), [0.0, 0.0]
    number = partial(jnp.asarray, dtype=ends.prompt.dtype)
    for place, share in zip(*np.polynomial.legendre.leggauss(POINTS), strict=True):
        at = begin + (end - begin) * (place + 1) / 2
        found = slopes_at(*given, number(at), **fixed)
        sums = [
            before + share * (end - begin) / 2 * np.asarray(one, np.float64)
            for before, one in zip(sums, found, strict=True)
        ]
    edges = sums[0] @ exchanged + sums[1]
    should = np.asarray(moved_between(*given, number(begin), number(end), **fixed), np.float64)
    return _Part((begin, end), *sums, edges, should - edges.sum(axis=1))


def _worst(parts: list[_Part]) -> int | None:
    """Returns which part misses most; None if all together are near enough."""
    size = np.abs(np.sum([one.edges for one in parts], axis=0)).sum(axis=1)
    missed = np.stack([np.abs(one.missed) for one in parts]) / np.where(size > 0, size, 1)
    return int(np.argmax(missed.max(axis=1))) if np.any(missed.sum(axis=0) > NEAR) else None


def _line(pipe: Pipeline, engine: Engine) -> Line:
    """Returns what entered the traced step, and the empty prompt's pooled embedding."""
    info = engine.infos[0]
    run = run_of_trace(pipe, info)
    encoded, empty = (encode(pipe, prompt, info.text_tokens) for prompt in (info.text, ""))
    inputs = step_inputs(run, encoded, engine.steps[0].record.latents, info.step)
    return Line(inputs, empty.pooled)


def _reading(engine: Engine, row: int) -> Reading:
    if engine.table.kind[row] == OUTPUT:
        return Reading(None, engine.outputs[row - engine.sources].velocity)
    prepared, target = engine.steps[0], targets_of(engine, np.array([row], np.int64), 0)
    return Reading(target, target_gradients(prepared.record, prepared.sites, target))


def _places(layout: Layout, blocks: Blocks) -> ModulationPlaces:
    """Returns which modulation is which, in the order of `pooled_runs`: group, block, kind; the last norm's last."""
    found = [np.zeros((3, 0), np.int64)]
    for number, group in enumerate(layout.groups):
        inside = [block for block in layout.blocks_of(number) if block < blocks.end]
        pairs = [(block, row) for block in inside for row in range(len(group.modulations))]
        stream = STREAMS.index(group.streams[-1])
        found.append(np.array([(block, stream, row) for block, row in pairs], np.int64).reshape(-1, 3).T)
    if blocks.output:
        found.append(np.array([(layout.depth, STREAMS.index("img"), row) for row in range(2)], np.int64).T)
    return ModulationPlaces(*np.concatenate(found, axis=1))
