"""The circuit of a target: which sources drive it, through which features.

This is mode `difffract` of docs/method.md, sections 4 to 6:

1. Encode the trace: active features, errors, inputs, one row of the source table each; outputs that are targets too.
2. Choose a feature target's position: the given one, else where the feature is strongest.
3. Pull the targets back; keep the edges above `min_attribution`.
4. Until `max_nodes` features are expanded: recompute influence, and pull back the `expansion_batch` most influential
   features among the sources found so far.
5. Compact what was not expanded into one node per position, and return the graph.

The device computes dense rows of edges for `target_batch` targets at a time; selection and bookkeeping are NumPy on the
host (`expansion`). Every target's bias is the affine map evaluated at zero sources, never a difference.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int64

from difffract_jax.circuits.attribution import expansion as expanding
from difffract_jax.circuits.attribution.engine import Engine, Output, make_engine, pull_rows, read_targets
from difffract_jax.circuits.attribution.expansion import Expansion
from difffract_jax.circuits.attribution.explained import add_scores, check_explainable
from difffract_jax.circuits.attribution.pooled_graph import add_pooled, check_pooled
from difffract_jax.circuits.attribution.pullback import PRECISIONS, PullOptions
from difffract_jax.circuits.attribution.selection import target_row
from difffract_jax.circuits.frozen.replacement import Prepared
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import Span, Trace
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import Graph, conservation_scale
from difffract_jax.graphs.provenance import AttributionSettings, PooledPath, Rounding, TraceInfo
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.transcoders.transcoder import TranscoderSet

LARGEST_BATCH = 64
"""Targets pulled back together if nothing else is said; more gain little and cost memory."""
LARGEST_ROWS = 2**30
"""Bytes that the edges of targets pulled back together may fill if nothing else is said."""
Target = Feature | Output


def attribute(
    trace: Trace | Span | Prepared,
    tcs: TranscoderSet,
    *,
    target: Target | str | Sequence[tuple[Target | str, float]],
    max_nodes: int = 1000,
    expansion_batch: int = 50,
    min_attribution: float = 1e-3,
    target_batch: int | None = None,
    mesh: Mesh | None = None,
    precision: Literal["f32", "bf16"] = "f32",
    attention: Literal["frozen", "explained"] = "frozen",
    max_scores: int = 50,
    pooled: Literal["frozen", "explained"] = "frozen",
    pipe: Pipeline | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Graph:
    """Traces the circuit behind one target, or several weighted ones.

    Args:
        trace: from `capture`, or from `capture_steps` for one graph over several steps; or either from `prepare`.
        tcs: the transcoders it was captured for.
        target: a feature or its text, as in `img/1/f159@13`, where it names several positions the one among them where
            it is strongest; or an output from `outputs.resolve_target`; or several of them with positive weights, as
            in `[(target, 1.0), ...]`, which share the influence.
        max_nodes: features and outputs to expand, the targets included.
        expansion_batch: features expanded between two computations of influence.
        min_attribution: smallest absolute edge kept, in units of its target; features of a smaller value are no sources
            either, as in the reference. 0 keeps all.
        target_batch: targets computed together; memory grows with it. It changes nothing else.
        mesh: devices, from `sharding.make_mesh`: its axis `data` shares the targets out, and `site` and `feature` split
            weights, transcoders and records between the devices of each share. What lies elsewhere is put there.
        precision: of the pull-back's products. `bf16` rounds their factors and sums in float32; recorded values,
            attention patterns, biases and pre-activations stay in float32. Its error is measured on the first target
            and kept in the graph's provenance under `precision`.
        attention: whether attention is taken as it was, or its scores become nodes too: those that bear most on the
            graph's targets, each driven by what makes its query and its keys.
        max_scores: at most so many, of all steps; the others are one node per block and step.
        pooled: whether modulations are taken as they were, or become nodes too, with what each brings to the exchange
            of the pooled embedding, and the prompt's words behind them.
        pipe: the pipeline that was traced, its blocks in memory; needed where the pooled path is explained.
        progress: called with (nodes expanded, `max_nodes`).

    Returns:
        The graph, position by position; `prune` sums over positions. Its provenance says under `pooled_path` how each
        target's value changes when only the pooled embedding becomes that of the empty prompt, a path that the
        replacement holds constant (empty where the model has none); under `attention` what scores add to each target,
        under `pooled` what modulations do.

    Raises:
        UserError: if a target does not exist, is inactive or is not traced, contradicts another, is reached by no
            source, or a number is out of range; if precision is neither f32 nor bf16; or if attention or the pooled
            path is neither frozen nor explained, or cannot be explained.
    """
    alone = isinstance(target, Feature | Output | str)
    wanted = [(_target(one), weight) for one, weight in ([(target, 1.0)] if alone else target)]
    _check_numbers(max_nodes, expansion_batch, min_attribution, target_batch)
    _check_targets(wanted, max_nodes)
    _check_explained(attention, pooled, trace, max_scores, pipe)
    options = pull_options(mesh, precision)
    outputs = tuple(one for one, _ in wanted if isinstance(one, Output))
    # What explains attention runs all blocks in one program, so that it needs all decoder rows at once.
    engine = make_engine(trace, tcs, outputs, options, rows="auto" if attention == "frozen" else "held")
    roots, weights = _roots(engine, wanted)
    state = expanding.start_expansion(engine.table, roots, weights, min_attribution)
    batch = batch_size(engine, target_batch or min(expansion_batch, max_nodes), limited=target_batch is None)
    rows, spares, told = state.targets, None, ()
    while rows.size:
        # Deep targets first, so that shallow ones, whose walk is short, share their batches.
        rows = rows[np.lexsort((-engine.table.block[rows], -engine.table.step[rows]))]
        for begin in range(0, rows.size, batch):
            state, spares = _expand(state, engine, rows[begin : begin + batch], batch, spares)
        _check_reached(state, wanted)
        if attention == "explained" and state.scores is None:
            state, told = add_scores(state, engine, max_scores)
        if progress is not None:
            progress(state.features, max_nodes)
        rows = expanding.next_batch(state, min(expansion_batch, max_nodes - state.features))
    names = [one.name if isinstance(one, Output) else str(one) for one, _ in wanted]
    settings = AttributionSettings(
        target=names[0] if len(names) == 1 else tuple(names),
        max_nodes=max_nodes,
        expansion_batch=expansion_batch,
        min_attribution=min_attribution,
        max_scores=max_scores if attention == "explained" else None,
    )
    graph = expanding.compact(state).with_provenance(
        run=trace.info,
        attribution=settings,
        attention=told,
        precision=rounding_error(engine, roots[:1], batch) if precision != "f32" else None,
        target_weights=tuple(weights.tolist()) if len(wanted) > 1 else (1.0,),
        **_facts(engine, roots, tcs),
    )
    explaining = pooled == "explained" and pipe is not None
    return add_pooled(graph, engine, roots, pipe, min_attribution) if explaining else graph


def _facts(engine: Engine, roots: Int64[np.ndarray, "target"], tcs: TranscoderSet) -> dict[str, Any]:
    """Returns what a graph says of its run, whatever was asked of it."""
    info = engine.info
    return {
        "transcoders": tcs.source,
        "steps": tuple(dict.fromkeys(one.step for one in engine.infos)),
        "pooled_path": _pooled_path(engine, roots),
        "sources": _origins(info, tcs),
    }


def _origins(info: TraceInfo, tcs: TranscoderSet) -> dict[str, str] | None:
    """Returns where on the hub model and transcoders came from; None if neither did."""
    origins = {"model_origin": info.model_origin, "transcoders_origin": tcs.origin}
    return {role: origin for role, origin in origins.items() if origin} or None


def pull_options(mesh: Mesh | None, precision: str) -> PullOptions:
    """Returns the options of a pull-back.

    Args:
        mesh: devices; one alone is none.
        precision: of the products, one of `pullback.PRECISIONS`.

    Raises:
        UserError: if there is no such precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be {' or '.join(PRECISIONS)}, but got {precision!r}.")
    return PullOptions(mesh if mesh is not None and mesh.size > 1 else None, precision)


def _check_explained(
    attention: str,
    pooled: str,
    trace: Trace | Span | Prepared,
    max_scores: int,
    pipe: Pipeline | None,
) -> None:
    for name, value in (("attention", attention), ("pooled", pooled)):
        if value not in ("frozen", "explained"):
            raise UserError(f"{name} must be frozen or explained, but got {value!r}.")
    if attention == "explained":
        check_explainable(trace, max_scores)
    if pooled == "explained":
        check_pooled(trace, pipe)


def _check_numbers(max_nodes: int, expansion_batch: int, min_attribution: float, target_batch: int | None) -> None:
    for name, value in (
        ("max_nodes", max_nodes),
        ("expansion_batch", expansion_batch),
        ("target_batch", 1 if target_batch is None else target_batch),
    ):
        if value < 1:
            raise UserError(f"{name} must be at least 1, but got {value}.")
    if not min_attribution >= 0:
        raise UserError(f"min_attribution must be 0 or more, but got {min_attribution}.")


def _target(target: Target | str) -> Target:
    return Feature.parse(target) if isinstance(target, str) else target


def _check_targets(wanted: list[tuple[Target, float]], max_nodes: int) -> None:
    if not wanted:
        raise UserError("There is no target; name at least one.")
    if max_nodes < len(wanted):
        raise UserError(
            f"max_nodes is {max_nodes}, too few for {len(wanted)} targets; give at least {len(wanted)}, and more for "
            "the circuit behind them."
        )
    outputs = [(one.name, one.step) for one, _ in wanted if isinstance(one, Output)]
    twice = [name for i, (name, step) in enumerate(outputs) if (name, step) in outputs[:i]]
    if twice:
        raise UserError(f"{twice[0]} is given twice as a target; give it once, with the weight you want.")
    for one, weight in wanted:
        if not (math.isfinite(weight) and weight > 0):
            name = one.name if isinstance(one, Output) else one
            raise UserError(f"The weight of {name} must be a positive number, but is {weight}.")


def _roots(engine: Engine, wanted: list[tuple[Target, float]]) -> tuple[Int64[np.ndarray, "target"], np.ndarray]:
    """Returns the targets' rows of the table, and their weights."""
    found, outputs = [], 0
    for one, _ in wanted:
        if isinstance(one, Output):
            found.append(engine.sources + outputs)
            outputs += 1
            if one.step not in [info.step for info in engine.infos]:
                steps = ", ".join(map(str, dict.fromkeys(info.step for info in engine.infos)))
                raise UserError(f"{one.name} lies in step {one.step}, but the traced steps are {steps}.")
        else:
            found.append(target_row(engine, one))
        if found[-1] in found[:-1]:
            name = one.name if isinstance(one, Output) else one
            raise UserError(f"{name} is given twice as a target; give it once, with the weight you want.")
    return np.array(found, np.int64), np.array([weight for _, weight in wanted])


def batch_size(engine: Engine, targets: int, *, limited: bool = True) -> int:
    """Divides an expansion's targets into equal batches, as few as memory allows; each a multiple of the devices.

    Args:
        engine: from `make_engine`.
        targets: of an expansion; give no more than the graph can have, since places that only fill up a batch are
            compiled and computed too.
        limited: whether `LARGEST_BATCH` and `LARGEST_ROWS` limit what a device gets.
    """
    row = engine.sources * engine.steps[0].record.boundary.img.dtype.itemsize
    return divided(targets, row if limited else 0, engine.options.shards)


def divided(targets: int, row_bytes: int, shards: int = 1) -> int:
    """Returns into batches of which size targets are divided.

    Args:
        targets: how many there are.
        row_bytes: of one target's edges; 0 for no limit.
        shards: devices among which a batch is shared out; it is a multiple of them.

    Example:
        >>> divided(50, 2**20), divided(50, 2**26), divided(50, 2**26, 8)
        (50, 13, 56)
    """
    most = max(1, min(LARGEST_BATCH, LARGEST_ROWS // row_bytes)) * shards if row_bytes else targets
    equal = math.ceil(targets / math.ceil(targets / most))
    return math.ceil(equal / shards) * shards


def rounding_error(engine: Engine, rows: Int64[np.ndarray, "target"], batch: int) -> Rounding:
    """Measures what an engine's precision costs: its edges against float32 ones.

    Args:
        engine: from `make_engine`.
        rows: targets to compare.
        batch: number of targets the programs are compiled for.

    Returns:
        The largest difference of an edge, and the largest conservation error of the targets.
    """
    exact = engine._replace(options=engine.options._replace(precision="f32"))
    ours, theirs = (pull_rows(one, rows, batch) for one in (engine, exact))
    edges = ours.edges.astype(np.float64)
    missed = np.abs(edges.sum(axis=1) + ours.bias - ours.preactivation)
    missed /= conservation_scale(np.abs(edges).sum(axis=1), np.asarray(ours.bias, np.float64))
    largest = np.max(np.abs(theirs.edges))
    return Rounding(
        products=engine.options.precision,
        edge_error=float(np.max(np.abs(edges - theirs.edges)) / largest),
        conservation_error=float(missed.max()),
    )


def _expand(
    state: Expansion, engine: Engine, rows: Int64[np.ndarray, "target"], batch: int, spares: tuple[Array, ...] | None
) -> tuple[Expansion, tuple[Array, ...]]:
    """Computes the edges into a few targets, and adds them; returns memory that is free again, too."""
    found = pull_rows(engine, rows, batch, spares)
    state = expanding.add(state, rows, found.parts, found.preactivation, found.bias)
    new = [total[-rows.size :] for total in (found.preactivation, state.totals.sum)]
    if not np.isfinite(new).all():
        raise UserError(
            "The trace holds activations that are not finite (NaN or infinity), so that nothing adds up; trace in "
            "float32, and check that the model generates sound images."
        )
    return state, found.spares


def _check_reached(state: Expansion, wanted: list[tuple[Target, float]]) -> None:
    """Refuses targets that nothing drives."""
    for number, (one, _) in enumerate(wanted):
        place = np.flatnonzero(state.expanded == state.targets[number])
        if place.size and not state.totals.abs_sum[place[0]] > 0:
            name = one.name if isinstance(one, Output) else one
            raise UserError(f"No source reaches {name}: all its edges are zero; choose another target.")


def _pooled_path(engine: Engine, roots: Int64[np.ndarray, "target"]) -> tuple[PooledPath, ...]:
    """Returns each target's value, and its value with the pooled embedding of the empty prompt, in the real model."""
    values = read_targets(engine, roots, tuple(step.record.reading for step in engine.steps))
    unpooled = tuple(step.record.unpooled for step in engine.steps if step.record.unpooled is not None)
    if len(unpooled) < len(engine.steps):
        return ()
    without = read_targets(engine, roots, unpooled)
    share = np.abs(values - without) / np.maximum(np.abs(values), np.finfo(np.float64).tiny)
    columns = zip(values.tolist(), without.tolist(), share.tolist(), strict=True)
    return tuple(PooledPath(value=a, without=b, share=c) for a, b, c in columns)
