"""The circuit of a feature: which sources drive it, through which features (METHOD sections 4 and 5, mode `difffract`).

1. Encode the trace: active features, errors, inputs, one row of the source table each.
2. Choose the target's position: the given one, else where the feature is strongest.
3. Pull the target back; keep the edges above `min_attribution`.
4. Until `max_nodes` features are expanded: recompute influence, and pull back the `expansion_batch` most influential
   features among the sources found so far.
5. Compact what was not expanded into one node per position, and return the graph.

The device computes dense rows of edges for `target_batch` targets at a time; selection and bookkeeping are NumPy on the
host (`expansion`). Every target's bias is the affine map evaluated at zero sources, never a difference.
"""

import math
from collections.abc import Callable
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from difffract_jax.circuits import expansion as expanding
from difffract_jax.circuits.expansion import Expansion, SourceTable
from difffract_jax.circuits.feature import Feature
from difffract_jax.circuits.graph import Graph
from difffract_jax.circuits.pullback import Layout, Targets, exact_preactivations, layout_of, pull_back
from difffract_jax.circuits.replacement import Replacement, prepare, run, site
from difffract_jax.circuits.trace import Trace, TraceInfo
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Streams, both
from difffract_jax.transcoders.transcoder import TranscoderSet

FEATURE, ERROR, INPUT = 0, 1, 2
STREAMS = ("img", "txt")
LARGEST_BATCH = 64
"""Targets pulled back together if nothing else is said; more gain little and cost memory."""
LARGEST_ROWS = 2**30
"""Bytes that the edges of targets pulled back together may fill if nothing else is said."""


def attribute(
    trace: Trace,
    tcs: TranscoderSet,
    *,
    target: Feature,
    max_nodes: int = 1000,
    expansion_batch: int = 50,
    min_attribution: float = 1e-3,
    target_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Graph:
    """Traces the circuit behind one feature.

    Args:
        trace: from `capture`.
        tcs: the transcoders it was captured for.
        target: the feature; where it names several positions, the one among them where it is strongest is explained.
        max_nodes: features to expand, the target included.
        expansion_batch: features expanded between two computations of influence.
        min_attribution: smallest absolute edge kept, in units of the target's pre-activation; features of a smaller
            value are no sources either, as in the reference. 0 keeps all.
        target_batch: targets computed together; memory grows with it. It changes nothing else.
        progress: called with (features expanded, `max_nodes`).

    Returns:
        The graph, position by position; `prune` sums over positions.

    Raises:
        UserError: if the target does not exist, is inactive or is not traced, or a number is out of range.
    """
    _check_numbers(max_nodes, expansion_batch, min_attribution, target_batch)
    prepared = prepare(trace, tcs)
    table = source_table(prepared, trace.info)
    state = expanding.start(table, target_row(prepared, trace.info, table, target), min_attribution)
    batch = target_batch or _batch(prepared, expansion_batch)
    constant, spare = affine_constant(prepared), None
    rows = np.array([state.target])
    while rows.size:
        # Deep targets first, so that shallow ones, whose walk is short, share their batches.
        rows = rows[np.argsort(-table.block[rows], kind="stable")]
        for begin in range(0, rows.size, batch):
            state, spare = _expand(state, prepared, trace.info, constant, rows[begin : begin + batch], batch, spare)
        if progress is not None:
            progress(len(state.expanded), max_nodes)
        rows = expanding.next_batch(state, min(expansion_batch, max_nodes - len(state.expanded)))
    settings = {
        "target": str(target),
        "max_nodes": max_nodes,
        "expansion_batch": expansion_batch,
        "min_attribution": min_attribution,
    }
    record = {"attribution": settings, "trace": asdict(trace.info), "transcoders": tcs.source}
    return expanding.compact(state).with_metadata(record)


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


def _batch(prepared: Replacement, expansion_batch: int) -> int:
    """Divides an expansion's targets into equal batches, as few as memory allows."""
    row = layout_of(prepared.sources).size * prepared.record.boundary.img.dtype.itemsize
    most = max(1, min(LARGEST_BATCH, LARGEST_ROWS // row))
    return math.ceil(expansion_batch / math.ceil(expansion_batch / most))


def _expand(
    state: Expansion,
    prepared: Replacement,
    info: TraceInfo,
    constant: Streams,
    rows: Int64[np.ndarray, "target"],
    batch: int,
    spare: Float[Array, "batch source"] | None,
) -> tuple[Expansion, Float[Array, "batch source"]]:
    """Computes the edges into a few targets, and adds them; returns their rows too, as memory that is free again."""
    # Every batch is filled up to one size, so that one program does for all.
    filler = np.full(batch - rows.size, -1, np.int32)
    targets = jax.tree.map(lambda column: jnp.concatenate([column, filler]), targets_of(state.table, info, rows))
    u, bias = (exact_preactivations(prepared, targets, x)[: rows.size] for x in (prepared.record.mlp_in, constant))
    edges = pull_back(prepared, targets, spare)
    return expanding.add(state, rows, np.asarray(edges)[: rows.size], u, bias), edges


def targets_of(table: SourceTable, info: TraceInfo, rows: Int64[np.ndarray, "target"]) -> Targets:
    """Returns feature rows of a source table as targets.

    Args:
        table: of the trace.
        info: of the trace.
        rows: rows of the table.
    """
    columns = (table.stream[rows], table.block[rows] - info.first_block, table.position[rows], table.feature[rows])
    return Targets(*(jnp.asarray(column, jnp.int32) for column in columns))


def affine_constant(prepared: Replacement) -> Streams:
    """Returns every MLP sublayer's input x at zero sources: what biases alone make of it, [layer rows d_model]."""
    zeros = jax.tree.map(jnp.zeros_like, prepared.sources)
    # Features of value 0 need not be decoded.
    zeros = zeros._replace(values=both(lambda v: v[:, :, :0], zeros.values))
    none = both(lambda s: s._replace(layers=s.layers._replace(index=s.layers.index[:, :, :0])), prepared.sites)
    with jax.default_matmul_precision("highest"):
        return _run(prepared.record, none, zeros)


_run = jax.jit(run)


def source_table(prepared: Replacement, info: TraceInfo) -> SourceTable:
    """Returns what every place in a row of edges stands for, see `pullback`.

    Places that fill a position's features up to K have value 0, and hence no edges. Errors and inputs have value 1:
    their vectors are taken whole.
    """
    layout = layout_of(prepared.sources)
    parts = [_features(prepared, info, layout, layer) for layer in range(layout.layers)]
    inputs = [_vectors(INPUT, stream, -1, layout.rows[stream]) for stream in range(len(STREAMS))]
    columns = [
        np.concatenate(column) for column in zip(*(row for part in (*parts, inputs) for row in part), strict=True)
    ]
    dtypes = (np.uint8, np.uint8, np.int16, np.int32, np.int32, np.float32)
    return SourceTable(*(c.astype(dtype) for c, dtype in zip(columns, dtypes, strict=True)), step=info.step)


def _features(prepared: Replacement, info: TraceInfo, layout: Layout, layer: int) -> list[tuple[np.ndarray, ...]]:
    """Returns the columns of one block's features and errors."""
    block = info.first_block + layer
    parts = []
    for stream, (sites, values) in enumerate(zip(prepared.sites, prepared.sources.values, strict=True)):
        index, value = np.asarray(sites.layers.index[layer]), np.asarray(values[layer])
        position = np.broadcast_to(np.arange(index.shape[0])[:, None], index.shape).ravel()
        same = [np.full(index.size, code) for code in (FEATURE, stream, block)]
        parts.append((*same, position, index.ravel(), value.ravel()))
    return parts + [_vectors(ERROR, stream, block, layout.rows[stream]) for stream in range(len(STREAMS))]


def _vectors(kind: int, stream: int, block: int, rows: int) -> tuple[np.ndarray, ...]:
    same = [np.full(rows, code) for code in (kind, stream, block)]
    return (*same, np.arange(rows), np.full(rows, -1), np.ones(rows))


def strongest_feature(trace: Trace, tcs: TranscoderSet, stream: str, block: int) -> Feature:
    """Returns the feature with the largest value at one site, at the position where it has it.

    Args:
        trace: from `capture`.
        tcs: the transcoders it was captured for.
        stream: "img" or "txt".
        block: the model's double-stream block.

    Raises:
        UserError: if nothing is active there.
    """
    table = source_table(prepare(trace, tcs), trace.info)
    rows = np.flatnonzero(
        (table.kind == FEATURE) & (table.stream == STREAMS.index(stream)) & (table.block == block) & (table.value > 0)
    )
    if not rows.size:
        raise UserError(f"No feature is active at {stream}/{block} in step {trace.info.step}; choose another site.")
    row = rows[np.argmax(table.value[rows])]
    return Feature(stream, block, int(table.feature[row]), (int(table.position[row]),))


def target_row(prepared: Replacement, info: TraceInfo, table: SourceTable, target: Feature) -> int:
    """Returns the row of the target at its position.

    Args:
        prepared: replacement of the trace.
        info: of the trace.
        table: of the trace.
        target: the feature; without positions, or with several, the one where it is strongest is taken.

    Raises:
        UserError: if there is no such feature, or it is active nowhere it may be; the message says where it is.
    """
    _check_site(prepared, info, target)
    stream = STREAMS.index(target.stream)
    mine = (table.kind == FEATURE) & (table.stream == stream) & (table.block == target.block)
    mine &= (table.feature == target.feature) & (table.value > 0)
    rows = np.flatnonzero(mine)
    wanted = rows if target.positions is None else rows[np.isin(table.position[rows], target.positions)]
    if wanted.size:
        return int(wanted[np.argmax(table.value[wanted])])
    if rows.size:
        strongest = rows[np.argsort(-table.value[rows], kind="stable")][:12]
        places = ", ".join(f"{table.position[r]} ({table.value[r]:.3g})" for r in strongest)
        raise UserError(
            f"{target} is inactive there; it is active at the positions (values): {places}"
            f"{' and others' if rows.size > strongest.size else ''}; name one of them."
        )
    raise UserError(_inactive_everywhere(prepared, info, target, table, stream))


def _check_site(prepared: Replacement, info: TraceInfo, target: Feature) -> None:
    if target.stream not in STREAMS:
        raise UserError(f"{target} lies in the {target.stream}-stream blocks, but only img and txt sites are traced.")
    stream = STREAMS.index(target.stream)
    sites = prepared.sites[stream]
    live = np.asarray(sites.layers.live)
    layer = target.block - info.first_block
    traced = [info.first_block + i for i in range(live.shape[0]) if live[i].any()]
    if target.block not in traced:
        there = ", ".join(map(str, traced)) or "none"
        raise UserError(f"There is no transcoder at {target.stream}/{target.block}; blocks with one: {there}.")
    features = sites.stack.config.features if sites.stack is not None else 0
    if target.feature >= features:
        raise UserError(f"{target} does not exist: the transcoders have features 0 to {features - 1}.")
    if target.steps is not None and info.step not in target.steps:
        raise UserError(f"{target} is asked for at other steps than the traced one, {info.step}; change one of them.")
    asked = np.array([] if target.positions is None else target.positions, int)
    beyond = asked[asked >= live.shape[1]]
    if beyond.size:
        raise UserError(f"{target} names position {beyond[0]}, but the stream has positions 0 to {live.shape[1] - 1}.")
    if asked.size and not live[layer][asked].any():
        raise UserError(
            f"{target} lies on padding, where transcoders are not used; name one of the prompt's own tokens, "
            f"0 to {int(np.flatnonzero(live[layer])[-1])}, or trace with include_padding."
        )


def _inactive_everywhere(
    prepared: Replacement, info: TraceInfo, target: Feature, table: SourceTable, stream: int
) -> str:
    """Says how far an inactive feature is from being active, and which features of its site are."""
    layer = target.block - info.first_block
    u = site_preactivations(prepared, stream, layer, target.feature)
    best = int(np.argmax(u))
    here = (table.kind == FEATURE) & (table.stream == stream) & (table.block == target.block) & (table.value > 0)
    order = np.flatnonzero(here)[np.argsort(-table.value[here], kind="stable")]
    examples = dict.fromkeys(f"f{table.feature[r]}@{table.position[r]}" for r in order[:5])
    return (
        f"{target} is inactive at every position of step {info.step}: it comes closest at position {best}, where its "
        f"pre-activation is {u[best]:.3g}, too little to be active. Strongest at this site: {', '.join(examples)}."
    )


def site_preactivations(prepared: Replacement, stream: int, layer: int, feature: int) -> Float64[np.ndarray, "rows"]:
    """Returns a feature's pre-activation u at every position; minus infinity where the MLP is not replaced.

    Args:
        prepared: replacement of the trace.
        stream: 0 image, 1 text.
        layer: block, counted from the trace's first.
        feature: of the site's transcoder.
    """
    sites = prepared.sites[stream]
    if sites.stack is None:
        raise UserError(f"The {STREAMS[stream]} stream has no transcoders.")
    transcoder = site(sites.stack, sites.layers.slot[layer])
    u = transcoder.preactivation(prepared.record.mlp_in[stream][layer], prepared.record.t)[:, feature]
    return np.where(np.asarray(sites.layers.live[layer]), np.asarray(u, np.float64), -np.inf)
