"""Circuits of many runs: which edges they share, how surely, and in which two sets of runs differ (NumPy).

1. Graphs are matched as in `combine`: summed over positions, node by node. `edge_table` holds every edge's attribution
   in every run, 0 where a run lacks it.
2. What is drawn at random are units: prompts, whose seeds are averaged, since runs of one prompt depend on one
   another; or, where all runs have one prompt, the seeds.
3. `intervals`: percentile bootstrap over units (Efron & Tibshirani 1993, chapter 13). Edges are not drawn, since
   those of one run depend on one another, too.
4. `contrast`: Welch's t for every edge, and how often the largest |t| of all edges is as large when units change sets
   at random (Westfall & Young 1993, single-step max T). Its p-values hold for all edges together, whatever their
   dependence. Where both sets have the same units, their differences change signs instead.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from difffract_jax.config import UserError
from difffract_jax.generators import random_generator
from difffract_jax.graphs.combine import average, check_origins, summed_alike, unite_nodes
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.names import node_names

FEWEST_UNITS = 10
"""Units that an interval takes: resampled means of fewer have too few different values for its ends."""
SMALLEST_P = 0.05
"""What the smallest p-value that a number of units can give must reach, or no edge could ever differ."""
_CHUNK = 2**24
"""Resampled values held at a time."""


Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of values, [unit edge], and which units are in the first set or keep their sign, [draw unit]: [draw edge]."""


class EdgeTable(NamedTuple):
    """The edges of many runs.

    Attributes:
        source: name of each edge's source.
        target: name of each edge's target.
        attribution: in units of the target, 0 where a run lacks the edge.
        present: whether a run has the edge.
        left_out: edges of fewer runs than asked for.
        roots: names of the graphs' own targets.
        units: of each run, its prompt, or its seed where all have one prompt.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    attribution: Float64[np.ndarray, "run edge"]
    present: Bool[np.ndarray, "run edge"]
    left_out: int
    roots: tuple[str, ...]
    units: tuple[str | int, ...]

    def by_unit(self) -> Float64[np.ndarray, "unit edge"]:
        """Returns the mean attribution of every unit, in the order in which they first occur."""
        return _means(self.attribution, self.units)


class Interval(NamedTuple):
    """An edge over runs.

    Attributes:
        source: name of its source.
        target: name of its target.
        mean: attribution, in units of the target.
        low: lower end of the mean's interval.
        high: upper end.
        share: of the runs that have the edge.
    """

    source: str
    target: str
    mean: float
    low: float
    high: float
    share: float

    @property
    def sure(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0


class Difference(NamedTuple):
    """An edge in two sets of runs.

    Attributes:
        source: name of its source.
        target: name of its target.
        first: mean of the first set.
        second: mean of the second.
        difference: first minus second.
        t: the difference over its standard error.
        p: share of random exchanges in which any edge's |t| is as large: valid for all edges together.
        share_first: of the first set's runs that have the edge.
        share_second: of the second's.
    """

    source: str
    target: str
    first: float
    second: float
    difference: float
    t: float
    p: float
    share_first: float
    share_second: float


def edge_table(graphs: Sequence[Graph], *, min_share: float = 0.0) -> EdgeTable:
    """Returns the edges of many graphs side by side.

    Args:
        graphs: at least one, of one model and its transcoders.
        min_share: edges of a smaller share of the graphs are left out.

    Raises:
        UserError: if there is no graph, or they are of different models or transcoders.
    """
    mean = average(graphs)
    names = node_names(mean)
    summed = summed_alike(graphs)
    places = unite_nodes(summed).places
    ends = [np.stack([place[g.edge_target], place[g.edge_source]]) for g, place in zip(summed, places, strict=True)]
    runs = np.repeat(np.arange(len(summed)), [pair.shape[1] for pair in ends])
    pairs, edge = np.unique(np.concatenate(ends, axis=1), axis=1, return_inverse=True)
    edge = edge.ravel()
    # Several edges of a run can be one once several targets of a feature are: it is present once.
    often = np.bincount(np.unique(edge * len(summed) + runs) // len(summed), minlength=pairs.shape[1])
    kept = np.flatnonzero(often >= min_share * len(summed))
    column = np.full(pairs.shape[1], -1)
    column[kept] = np.arange(kept.size)
    some = column[edge] >= 0
    at = runs[some], column[edge[some]]
    attribution, present = np.zeros((len(summed), kept.size)), np.zeros((len(summed), kept.size), bool)
    np.add.at(attribution, at, np.concatenate([g.edge_attribution for g in summed])[some].astype(np.float64))
    present[at] = True
    source, target = (tuple(names[node] for node in pairs[end, kept]) for end in (1, 0))
    roots = tuple(names[node] for node in mean.targets)
    return EdgeTable(source, target, attribution, present, int(pairs.shape[1] - kept.size), roots, units_of(graphs))


def intervals(table: EdgeTable, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> list[Interval]:
    """Returns every edge's mean over units with an interval, the largest mean first.

    Args:
        table: from `edge_table`.
        level: of the intervals, as 0.95.
        draws: of as many units, with replacement.
        seed: of the draws.

    Raises:
        UserError: if there are too few units for an interval, or a number is out of range.
    """
    values = table.by_unit()
    count = values.shape[0]
    if count < FEWEST_UNITS:
        raise UserError(
            f"An interval takes at least {FEWEST_UNITS} prompts, or as many seeds of a single prompt, but there are "
            f"{count}; trace more."
        )
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, as 0.95, but got {level}.")
    _check_draws(draws)
    weights = random_generator(seed).multinomial(count, np.full(count, 1 / count), size=draws) / count
    low, high = np.zeros((2, len(table.source)))
    for part in _parts(len(table.source), draws):
        low[part], high[part] = np.quantile(weights @ values[:, part], [(1 - level) / 2, (1 + level) / 2], axis=0)
    mean, share = values.mean(axis=0), table.present.mean(axis=0)
    columns = zip(table.source, table.target, mean, low, high, share, strict=True)
    rows = [Interval(one, other, *map(float, numbers)) for one, other, *numbers in columns]
    return sorted(rows, key=lambda row: -abs(row.mean))


def contrast(
    first: Sequence[Graph], second: Sequence[Graph], *, min_share: float = 0.0, draws: int = 2000, seed: int = 0
) -> tuple[list[Difference], bool]:
    """Returns how every edge differs between two sets of runs, the largest |t| first.

    Args:
        first: graphs of one set.
        second: of the other, of the same model, or of one that LoRAs alone tell apart, and the same transcoders.
        min_share: edges of a smaller share of all graphs are left out.
        draws: of random exchanges.
        seed: of the draws.

    Returns:
        The differences; and whether the sets were compared pair by pair, their prompts, or seeds, being the same.

    Raises:
        UserError: if the sets have too few units for any edge to differ, or share no features; if there are fewer than
            100 draws.
    """
    _check_draws(draws)
    for graphs in (first, second):
        check_origins(graphs, "average")
    if not (first and second):
        raise UserError("One of the two sets has no graph; trace some.")
    check_origins([first[0], second[0]], "difference")
    shared = [_without_model(graph) for graph in (*first, *second)]
    table = edge_table(shared, min_share=min_share)
    a, b, paired = _sides(table, first, second)
    _check_units(len(a), len(b), paired=paired)
    exchange = _signs if paired else _labels
    t, p = exchange(a, b, draws, random_generator(seed))
    shares = table.present[: len(first)].mean(axis=0), table.present[len(first) :].mean(axis=0)
    means = a.mean(axis=0), b.mean(axis=0)
    columns = zip(table.source, table.target, *means, means[0] - means[1], t, p, *shares, strict=True)
    rows = [Difference(one, other, *map(float, numbers)) for one, other, *numbers in columns]
    return sorted(rows, key=lambda row: (row.p, -abs(row.t))), paired


def _without_model(graph: Graph) -> Graph:
    """Returns the graph without its model's identity, so that graphs which LoRAs alone tell apart are matched."""
    known = graph.provenance.known
    return graph.with_provenance(run=None, shared=replace(known, model=known.base_model or known.model))


def units_of(graphs: Sequence[Graph]) -> tuple[str | int, ...]:
    """Returns each run's unit: its prompt, or its seed where all have one prompt; a number where neither is known."""
    runs = [graph.provenance.known for graph in graphs]
    several = len({run.prompt for run in runs}) > 1
    keys = [run.prompt if several else run.seed for run in runs]
    return tuple(number if key is None else key for number, key in enumerate(keys))


def _is_known(graph: Graph) -> bool:
    run = graph.provenance.known
    return run.prompt is not None or run.seed is not None


def _means(values: Float64[np.ndarray, "run edge"], units: Sequence[str | int]) -> Float64[np.ndarray, "unit edge"]:
    place = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    member = np.zeros((len(place), len(units)))
    member[[place[unit] for unit in units], np.arange(len(units))] = 1
    return member @ values / member.sum(axis=1, keepdims=True)


def _sides(
    table: EdgeTable, first: Sequence[Graph], second: Sequence[Graph]
) -> tuple[Float64[np.ndarray, "unit edge"], Float64[np.ndarray, "other_unit edge"], bool]:
    """Returns the units of both sets; in one order where they are the same, and whether they are."""
    a, b = table.attribution[: len(first)], table.attribution[len(first) :]
    units, others = units_of(first), units_of(second)
    # Numbers in place of prompts and seeds that nobody knows are equal by chance.
    paired = set(units) == set(others) and all(map(_is_known, (*first, *second)))
    if paired:
        place = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        order = np.argsort([place[unit] for unit in dict.fromkeys(others)])
        return _means(a, units), _means(b, others)[order], True
    return _means(a, units), _means(b, others), False


def _check_draws(draws: int) -> None:
    if draws < 100:
        raise UserError(f"draws must be at least 100, but got {draws}.")


def _check_units(first: int, second: int, *, paired: bool) -> None:
    """Refuses sets of which no exchange could tell that they differ."""
    # An exchange and its mirror image, which sets of different sizes do not have, have one |t|.
    different = 2 ** (first - 1) if paired else math.comb(first + second, first) / (2 if first == second else 1)
    if min(first, second) > 1 and different * SMALLEST_P >= 1:
        return
    needed = 1 + math.ceil(math.log2(1 / SMALLEST_P)) if paired else 4
    sets = f"{first} pairs of prompts or seeds" if paired else f"{first} and {second} prompts or seeds in the two sets"
    each = "pairs" if paired else "in each set"
    raise UserError(
        f"With {sets} no edge can differ at the {SMALLEST_P:.0%} level, whatever its size; trace at least {needed} "
        f"{each}."
    )


def _labels(a: np.ndarray, b: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns Welch's t of each column, and p-values from units that change sets."""
    values, size = np.concatenate([a, b]), a.shape[0]
    own = np.zeros((1, values.shape[0]), bool)
    own[0, :size] = True
    order = np.argsort(rng.random((draws, values.shape[0])), axis=1)
    return _largest(values, own, order < size, _welch)


def _signs(a: np.ndarray, b: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the t of each column's differences, and p-values from pairs that change sides."""
    return _largest(a - b, np.ones((1, a.shape[0]), bool), rng.random((draws, a.shape[0])) < 0.5, _one_sample)


def _welch(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    sides = []
    for member in (inside, ~inside):
        count = member.sum(axis=1, keepdims=True)
        mean, square = (member @ power / count for power in (values, values**2))
        sides.append((mean, np.maximum(square - mean**2, 0) / (count - 1)))
    (one, spread_one), (other, spread_other) = sides
    return _ratio(one - other, spread_one + spread_other, values)


def _one_sample(values: np.ndarray, keeps: np.ndarray) -> np.ndarray:
    runs = values.shape[0]
    mean = np.where(keeps, 1.0, -1.0) @ values / runs
    return _ratio(mean, np.maximum((values**2).mean(axis=0)[None] - mean**2, 0) / (runs - 1), values)


def _ratio(difference: np.ndarray, variance: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns a difference over its standard error, of which rounding is the least."""
    rounding = 1e-9 * np.abs(values).max(axis=0, initial=0.0)
    # What is 0 but for rounding differs by nothing; what has no spread differs surely.
    return np.where(np.abs(difference) > rounding, difference, 0) / np.sqrt(variance + rounding**2 + 1e-300)


def _largest(
    values: np.ndarray, own: np.ndarray, exchanged: np.ndarray, statistic: Statistic
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a statistic of each column, and the share of exchanges whose largest of any column is as large."""
    t = statistic(values, own)[0]
    largest = np.zeros(exchanged.shape[0])
    for part in _parts(values.shape[1], exchanged.shape[0]):
        largest = np.maximum(largest, np.abs(statistic(values[:, part], exchanged)).max(axis=1, initial=0))
    # A relative margin: sums in another order differ by rounding.
    above = largest.size - np.searchsorted(np.sort(largest), np.abs(t) * (1 - 1e-6), side="left")
    return t, (1 + above) / (1 + largest.size)


def _parts(edges: int, draws: int) -> Iterator[slice]:
    step = max(1, _CHUNK // draws)
    return (slice(begin, begin + step) for begin in range(0, edges, step))
