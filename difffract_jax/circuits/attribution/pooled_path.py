"""What each modulation brings to the exchange of the pooled embedding (docs/method.md, section 11).

1. `integrate` divides the straight line between two pooled embeddings into parts of `POINTS` Gauss-Legendre points
   each. Of a part it is known what it should add up to, from runs at its ends; while all parts together miss too much,
   the one that misses most is halved. All evaluations of a run go along their lines together.
2. What a modulation brings is the product of its integral with the exchanged part of its branch's pooled embedding.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import STREAMS
from difffract_jax.circuits.attribution.engine import Engine, read_targets
from difffract_jax.circuits.attribution.pooled_steps import (
    Walk,
    evaluations_of,
    latents_along,
    moved_alone_in,
    moved_along,
    moved_directly_in_all,
    prompts_of,
    slopes_along,
)
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.spread import using

POINTS = 8
"""Gauss-Legendre points of one part of the line."""
MOST = 32
"""Parts at most."""
NEAR = 1e-3
"""What all parts may miss of what they should add up to, over the sum of the sizes of edges."""


class ModulationPlaces(NamedTuple):
    """Which modulation is which, in one order for all of a model.

    Attributes:
        step: denoising step.
        branch: of guidance.
        block: the model's; the number of all blocks for the last norm.
        stream: code of a stream that it is of; img where there are several.
        row: of the modulations of the block's group, or of the last norm.
    """

    step: Int64[np.ndarray, "modulation"]
    branch: Int64[np.ndarray, "modulation"]
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
        weights: integral of each target's derivative by its branch's pooled embedding through each modulation.
        rounding: part of each edge that comes from the rounding of the line's ends; 0 for float32 weights.
        exchanged: of every branch, by its number, the pooled embedding of its prompt minus the empty prompt's.
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
    exchanged: dict[int, Float64[np.ndarray, "pooled_width"]]
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
        engine: whose trace ran the exchange; on a mesh the model is put where a trace of it has it.
        rows: of the targets in the table, features or outputs.
        pipe: the pipeline that was traced, its blocks in memory.
        parts: equal parts of the line; as many as are needed, where they are, if left out.
    """
    prompts = prompts_of(engine, pipe)  # as the trace has encoded them: in that precision, on those devices
    with jax.default_matmul_precision("highest"), using(engine.options.mesh):
        walk = evaluations_of(engine, rows, pipe, prompts)
        part = partial(_part, walk)
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
        change, alone = zip(*(moved_alone_in(walk, number) for number in range(len(walk))), strict=True)
        direct = moved_directly_in_all(walk)
    exchanged = {one.info.branch: one.exchanged for one in walk}
    told = exchanged, _swapped(engine, rows), direct, POINTS * len(found), missed
    fallen = np.concatenate(change), edges, np.concatenate(alone, axis=1)
    return PooledEffects(_places(walk), *fallen, weights, rounding, *told)


def _swapped(engine: Engine, rows: Int64[np.ndarray, "target"]) -> Float64[np.ndarray, "target"]:
    """Returns by how much targets fall when the pooled embedding is exchanged, from the runs of the trace."""
    unpooled = tuple(step.record.unpooled for step in engine.steps if step.record.unpooled is not None)
    assert len(unpooled) == len(engine.steps), "the trace ran the exchange"
    readings = tuple(step.record.reading for step in engine.steps)
    return read_targets(engine, rows, readings) - read_targets(engine, rows, unpooled)


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


def _part(walk: Walk, begin: float, end: float) -> _Part:
    """Integrates over a part of the line."""
    number = partial(jnp.asarray, dtype=walk[0].ends.prompt.dtype)
    places, shares = np.polynomial.legendre.leggauss(POINTS)
    points = number(begin + (end - begin) * (places + 1) / 2)
    moved, sums = latents_along(walk, points), [np.zeros(()), np.zeros(())]
    for place, share in enumerate(shares):
        found = slopes_along(walk, points[place], [None if one is None else one[place] for one in moved])
        sums = [before + share * (end - begin) / 2 * one for before, one in zip(sums, found, strict=True)]
    exchanged = np.concatenate([np.tile(one.exchanged, (one.modulations, 1)) for one in walk])
    edges = np.einsum("tmw,mw->tm", sums[0], exchanged) + sums[1]
    should = moved_along(walk, number([begin, end]))
    return _Part((begin, end), *sums, edges, should - edges.sum(axis=1))


def _worst(parts: list[_Part]) -> int | None:
    """Returns which part misses most; None if all together are near enough."""
    size = np.abs(np.sum([one.edges for one in parts], axis=0)).sum(axis=1)
    missed = np.stack([np.abs(one.missed) for one in parts]) / np.where(size > 0, size, 1)
    return int(np.argmax(missed.max(axis=1))) if np.any(missed.sum(axis=0) > NEAR) else None


def _places(walk: Walk) -> ModulationPlaces:
    """Returns which modulation is which: evaluations in order, and in each as `pooled_runs` has them.

    That is by group, block and kind; the last norm's are last.
    """
    found = [np.zeros((5, 0), np.int64)]
    for one in walk:
        layout, of_evaluation = one.info.layout, []
        for number, group in enumerate(layout.groups):
            inside = [block for block in layout.blocks_of(number) if block < one.blocks.end]
            stream = STREAMS.index(group.streams[-1])
            of_evaluation += [(block, stream, row) for block in inside for row in range(len(group.modulations))]
        if one.blocks.output:
            of_evaluation += [(layout.depth, STREAMS.index("img"), row) for row in range(2)]
        columns = [(one.info.step, one.info.branch, *place) for place in of_evaluation]
        found.append(np.array(columns, np.int64).reshape(-1, 5).T)
    return ModulationPlaces(*np.concatenate(found, axis=1))
