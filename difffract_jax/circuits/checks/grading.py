"""A graph graded: edits tried in the model beside what the graph predicts of them (docs/faithfulness.md).

1. `trial_edits` says which edits: the first units alone and in groups, at six doses, and random features beside them.
2. `edit_runs` runs them: in the frozen map's readings direct, propagated and live; in the model itself; in the model
   with other seeds; in all steps up to the target's.
3. `graphs.grade` turns what happened into a grade.

Changes are shares of the target's value in the run in which they happen. In a run with another seed a target in the
image is read where it is strongest, one in the text at its position.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import TXT
from difffract_jax.circuits.attribution.engine import Engine, make_engine, read_targets
from difffract_jax.circuits.checks.completeness import curve
from difffract_jax.circuits.checks.edit_runs import EditRuns, run_edits
from difffract_jax.circuits.checks.rerun import Rerun, capture_run, outputs_of
from difffract_jax.circuits.checks.trial_edits import (
    SINGLES,
    Trial,
    Unit,
    controlled,
    controls_of,
    laid_out,
    predicted,
    steering,
    target_scale,
    trial,
    units_of,
)
from difffract_jax.circuits.checks.validation import circuit_sizes
from difffract_jax.circuits.effects.readings import Mode
from difffract_jax.graphs.frozen_attention import without_pooled, without_scores
from difffract_jax.graphs.grade import Grade, grade_of, median_error
from difffract_jax.graphs.graph import EXPLAINING, FEATURE, OUTPUT, Graph
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.transcoders.transcoder import TranscoderSet

DOSES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
SEEDS, SEEDS_TRIED = 4, 12
"""Other seeds in which edits are tried, and among how many."""
READINGS: tuple[Mode, ...] = ("direct", "propagated", "live")
PARTS = 6
"""Parts of the work, as progress tells them."""


class OtherRun(NamedTuple):
    """A run of a graph's prompt from another seed, or over more steps.

    Attributes:
        seed: of its starting noise.
        engine: of the run.
        rows: of its table, the graph's targets.
    """

    seed: int
    engine: Engine
    rows: Int64[np.ndarray, "target"]


def grade(
    pipe: Pipeline,
    tcs: TranscoderSet,
    again: Rerun,
    graph: Graph,
    *,
    seed: int = 0,
    units: Callable[[list[Unit]], list[Unit]] = list,
    others: Sequence[OtherRun] | None = None,
    seeds: int = SEEDS,
    latents: Any = None,
    readings: Sequence[Mode] = READINGS,
    reproducible: bool = True,
    circuit: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Grade, dict[str, Any]]:
    """Grades a graph.

    Args:
        pipe: the pipeline it was traced in.
        tcs: the transcoders it was traced with.
        again: its run, from `capture_again`.
        graph: position by position; attention's scores and modulations are left out.
        seed: of the controls' draw.
        units: picks those that are tried from all that are worth it, in their order.
        others: runs from other seeds; looked for if left out.
        seeds: how many of these.
        latents: packed starting noise, where the graph's run started from given noise.
        readings: of the frozen map, whose predictions stand beside the graph's.
        reproducible: whether the pipeline can make the run, as it cannot where activations were imported.
        circuit: what the pruned circuit recovers and loses in the model, under `recovered` and `lost`; measured if left
            out.
        progress: called with (parts done, parts in all).

    Returns:
        The grade; and JSON values: `units`, their names; `edits`, a row each, see `grade_of`, and `direct`,
        `propagated`, `live`, `all steps`, `active`; `steering`; `errors`, medians of what predictions miss.
    """
    again = again._replace(rows=again.rows[~np.isin(graph.node_kind, EXPLAINING)])
    graph = without_pooled(without_scores(graph))
    chosen = units(units_of(again, graph))
    own = OtherRun(graph.provenance.traced_run.seed, again.engine, again.rows[graph.targets])
    done = 0

    def advance(parts: int = 1) -> None:
        nonlocal done
        done += parts
        if progress is not None:
            progress(done, PARTS)

    trials = trials_of(chosen)
    rows = rows_of(graph, trials)
    singles = [unit for unit in chosen[:SINGLES] if unit.norm > 0]
    no_op, steered = _in_the_model(own, graph, trials, rows, chosen, singles, controls_of(again, graph, chosen, seed))
    advance()
    for reading in readings:
        _put(rows, reading, changes(own, graph, trials, reading)[0])
    advance()
    if others is None:
        others = list(islice(other_runs(pipe, tcs, graph), seeds)) if reproducible else []
    in_other_seeds(others, graph, trials, rows)
    advance(2)
    if reproducible:
        _in_all_steps(pipe, tcs, graph, trials, rows, latents)
    advance()
    circuit = _circuit(again, graph) if circuit is None else circuit
    advance()
    made = grade_of(rows, **circuit, no_op=no_op, seeds=(own.seed, *(run.seed for run in others)))
    found: dict[str, Any] = {"units": [unit.name for unit in chosen], "edits": rows, "steering": steered}
    return made, found | {"errors": _errors(rows)}


def trials_of(units: Sequence[Unit], doses: Sequence[float] = DOSES) -> list[Trial]:
    """Returns the edits that are tried: the first units alone, then groups of the first 2, 4, 8, ... and of all.

    Args:
        units: those that move the target most first.
        doses: of each.
    """
    sizes = sorted({2**power for power in range(1, 31) if 2**power < len(units)} | ({len(units)} - {0, 1}))
    alone = [trial([unit], dose) for unit in units[:SINGLES] for dose in doses]
    return alone + [trial(units[:size], dose) for size in sizes for dose in doses]


def changes(
    run: OtherRun,
    graph: Graph,
    trials: Sequence[Trial],
    mode: Mode,
    *,
    all_steps: bool = False,
    moved: bool = False,
) -> tuple[Float64[np.ndarray, "edit"], EditRuns]:
    """Returns by what share of its value every edit moves a graph's targets.

    Args:
        run: in which they are made.
        graph: whose targets these are.
        trials: the edits.
        mode: the reading.
        all_steps: whether features are edited in every step of the run.
        moved: whether to measure how far activations move.

    Returns:
        The shares; and what the edits do besides, before them that of an edit which changes nothing.
    """
    found = run_edits(run.engine, run.rows, laid_out(run.engine, trials, all_steps=all_steps), mode, moved=moved)
    weights = graph.root_weights[graph.targets]
    scale = target_scale(graph, found.values[0])
    return (found.values[1:] - found.values[0]) @ weights / scale, found


def other_runs(pipe: Pipeline, tcs: TranscoderSet, graph: Graph, tried: int = SEEDS_TRIED) -> Any:
    """Yields runs of a graph's prompt from other seeds, those in which its targets are active.

    Args:
        pipe: the pipeline it was traced in.
        tcs: the transcoders it was traced with.
        graph: position by position.
        tried: seeds looked at, from the one after the graph's own.
    """
    first = graph.provenance.traced_run.seed
    for number in range(1, tried + 1):
        seed = (first + number) % 2**64
        trace = capture_run(pipe, tcs, graph, seed=seed)
        engine = make_engine(trace, tcs, tuple(outputs_of(pipe, trace, graph)))
        rows = _target_rows(engine, graph)
        if rows is not None:
            yield OtherRun(seed, engine, rows)


def _target_rows(engine: Engine, graph: Graph) -> Int64[np.ndarray, "target"] | None:
    """Returns the rows of a graph's targets in another run; None if one of them is active nowhere there."""
    table, rows, outputs = engine.table, [], np.flatnonzero(graph.node_kind == OUTPUT).tolist()
    for node in graph.targets.tolist():
        if graph.node_kind[node] == OUTPUT:
            rows.append(engine.sources + outputs.index(node))
            continue
        there = (table.kind == FEATURE) & (table.value > 0) & (table.feature == graph.node_feature[node])
        for name in ("step", "branch", "stream", "block"):
            there &= getattr(table, name) == getattr(graph, f"node_{name}")[node]
        if graph.node_stream[node] == TXT:
            there &= table.position == graph.node_position[node]
        active = np.flatnonzero(there)
        if not active.size:
            return None
        rows.append(int(active[np.argmax(table.value[active])]))
    return np.array(rows, np.int64)


def rows_of(graph: Graph, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Returns what each edit is, and what the graph predicts of it.

    Args:
        graph: position by position.
        trials: the edits.
    """
    return [
        {"features": [unit.name for unit in one.units], "size": len(one.units), "dose": one.doses[0]}
        | {"predicted": predicted(graph, one)}
        for one in trials
    ]


def _put(rows: list[dict[str, Any]], name: str, values: Sequence[float] | np.ndarray | None) -> None:
    """Enters a column; None everywhere if there are no values."""
    for i, row in enumerate(rows):
        row[name] = None if values is None else float(values[i])


def _in_the_model(
    own: OtherRun,
    graph: Graph,
    trials: list[Trial],
    rows: list[dict[str, Any]],
    chosen: list[Unit],
    singles: list[Unit],
    controls: Sequence[tuple[Unit, float] | None],
) -> tuple[float, dict[str, Any] | None]:
    """Tries edits, controls, steering and dose 0 in the model, all in one call.

    Returns:
        The largest change that dose 0 makes, as a share of the target, beside the edit of nothing and beside the record
        of the run; and medians of steering and of detect and replace.
    """
    beside = dict(zip((unit.key for unit in chosen), controls, strict=True))
    known = [(i, made) for i, one in enumerate(trials) if (made := controlled(one, beside)) is not None]
    steered = [steering(unit) for unit in singles]
    everything = [*trials, *(made for _, made in known), *steered, trial(chosen, 0.0)]
    shares, found = changes(own, graph, everything, "full", moved=True)
    _put(rows, "full", shares)
    _put(rows, "distance", found.distance[1:])
    _put(rows, "active", found.active[1:] / max(found.active[0], 1) if found.active.size else None)
    _put(rows, "control", None)
    for place, (i, _) in enumerate(known, len(trials)):
        rows[i]["control"] = float(shares[place])
    recorded = read_targets(own.engine, own.rows, tuple(step.record.reading for step in own.engine.steps))
    beside_record = (found.values[0] - recorded) @ graph.root_weights[graph.targets]
    no_op = max(abs(float(shares[-1])), abs(float(beside_record)) / target_scale(graph, recorded))
    return no_op, _steered(rows, singles, shares, found.distance[1:], len(trials) + len(known))


def _steered(
    rows: list[dict[str, Any]], singles: list[Unit], shares: np.ndarray, distance: np.ndarray, first: int
) -> dict[str, Any] | None:
    if not singles:
        return None
    names = [unit.name for unit in singles]
    replaced = [row for row in rows if row["size"] == 1 and row["dose"] == 1 and row["features"][0] in names]
    at = slice(first, first + len(singles))
    moved = {
        "detect and replace": (np.array([row["full"] for row in replaced]), [row["distance"] for row in replaced]),
        "steering": (shares[at], distance[at]),
    }
    return {
        name: {"change": float(np.median(np.abs(change))), "distance": float(np.median(far))}
        for name, (change, far) in moved.items()
    }


def in_other_seeds(runs: Sequence[OtherRun], graph: Graph, trials: Sequence[Trial], rows: list[dict[str, Any]]) -> None:
    """Tries doses -1 and 1 in runs from other seeds, and enters the column `other`: a change for each run.

    Args:
        runs: from `other_runs`.
        graph: whose targets are read.
        trials: the edits.
        rows: of the edits; other doses get None.
    """
    _put(rows, "other", None)
    chosen = [i for i, one in enumerate(trials) if abs(one.doses[0]) == 1]
    for run in runs if chosen else ():
        found, _ = changes(run, graph, [trials[i] for i in chosen], "full")
        for i, value in zip(chosen, found.tolist(), strict=True):
            rows[i]["other"] = [*(rows[i]["other"] or []), value]


def _in_all_steps(
    pipe: Pipeline, tcs: TranscoderSet, graph: Graph, trials: list[Trial], rows: list[dict[str, Any]], latents: Any
) -> None:
    """Tries doses -1 and 1 in every step up to the target's; not for graphs of step 0 or of several steps."""
    _put(rows, "all steps", None)
    steps = graph.provenance.steps
    chosen = [i for i, one in enumerate(trials) if abs(one.doses[0]) == 1]
    if len(steps) > 1 or steps[0] == 0 or not chosen:
        return
    trace = capture_run(pipe, tcs, graph, latents=latents, all_steps=True)
    engine = make_engine(trace, tcs, tuple(outputs_of(pipe, trace, graph)))
    targets = _same_rows(engine, graph)
    run = OtherRun(graph.provenance.traced_run.seed, engine, targets)
    found, _ = changes(run, graph, [trials[i] for i in chosen], "full", all_steps=True)
    for i, value in zip(chosen, found.tolist(), strict=True):
        rows[i]["all steps"] = value


def _same_rows(engine: Engine, graph: Graph) -> Int64[np.ndarray, "target"]:
    """Returns the rows of a graph's targets in its own run, over more steps."""
    table, rows, outputs = engine.table, [], np.flatnonzero(graph.node_kind == OUTPUT).tolist()
    for node in graph.targets.tolist():
        if graph.node_kind[node] == OUTPUT:
            rows.append(engine.sources + outputs.index(node))
            continue
        there = table.kind == FEATURE
        for name in ("step", "branch", "stream", "block", "position", "feature"):
            there &= getattr(table, name) == getattr(graph, f"node_{name}")[node]
        rows.append(int(np.flatnonzero(there & (table.value > 0))[0]))
    return np.array(rows, np.int64)


def _circuit(again: Rerun, graph: Graph) -> dict[str, Any]:
    """Returns what the pruned circuit recovers of the target alone, and what is lost without it, in the model."""
    _, kept = circuit_sizes(graph)
    found = curve(again, graph, [kept], "full", draws=1)["rows"] if kept else []
    row = next((row for row in found if row["ranking"] == "influence"), {})
    return {name: row.get(name) for name in ("recovered", "lost")}


def _errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns by how much predictions miss the model, in the median, over the change itself."""
    kinds = {
        "single edits": lambda row: row["size"] == 1 and abs(row["dose"]) <= 1,
        "groups": lambda row: row["size"] > 1 and abs(row["dose"]) <= 1,
        "doses -2 and 2": lambda row: abs(row["dose"]) > 1,
    }
    names = {"predicted": "the graph"} | {name: name for name in READINGS if name in (rows[0] if rows else {})}
    return [
        {"prediction": told} | {kind: median_error(rows, name, kept) for kind, kept in kinds.items()}
        for name, told in names.items()
    ]
