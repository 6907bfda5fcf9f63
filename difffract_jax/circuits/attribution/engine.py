"""Targets pulled back through one step, or through all steps of a span (docs/method.md, sections 4 and 6).

Within a step `pullback` does the work. Between steps, packed latents obey

    z_i = z_0 + sum over j < i of (sigma_{j+1} - sigma_j) v_j

so that a cotangent G of z_i is one of every earlier velocity, times its step of sigma, and of z_0. With guidance by two
branches v_j is the weighted sum of two evaluations' velocities, s and 1 - s, which read the same latents: each has its
own place in the table, and everything below is said of evaluations. Walking the steps backwards, G gathers what reaches
each step's latents:

1. At step j, targets of later steps are directions (sigma_{j+1} - sigma_j) G of v_j; features and outputs of step j
   enter as they are. All go through the blocks together.
2. The cotangent of the image stream, pulled through its projection, is added to G, of both branches once both are
   done; that of the text stream is gathered in the same way, for all steps read one text embedding of each branch.

Below the first step G and its counterpart meet the latents and the text embedding: the inputs' edges.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float64, Int64

from difffract_jax.circuits.attribution.carried import Carried, after_step, ends_step, enter
from difffract_jax.circuits.attribution.expansion import SourceTable
from difffract_jax.circuits.attribution.placement import (
    placed_steps,
    placed_trace,
    placed_transcoders,
    refuse_undivided,
)
from difffract_jax.circuits.attribution.pullback import PullOptions, input_edges, pull, velocity_cotangent
from difffract_jax.circuits.attribution.sources import source_table
from difffract_jax.circuits.frozen.encoding import ReplacedSites, SiteLayers
from difffract_jax.circuits.frozen.replacement import DecoderRows, Prepared, Replacement, Sources, prepare, run_affine
from difffract_jax.circuits.frozen.streamed_sites import without_rows
from difffract_jax.circuits.frozen.targets import DIRECTION, Targets, exact_preactivations
from difffract_jax.circuits.trace.capture import Span, Trace, TraceInfo, main_info
from difffract_jax.circuits.trace.record import RunOutputs
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import FEATURE, OUTPUT
from difffract_jax.models.streaming import streams_layers
from difffract_jax.spread import mesh_of, on_mesh_of
from difffract_jax.transcoders.transcoder import TranscoderSet


class Output(NamedTuple):
    """A target that is not a feature: <velocity, v> + <latents, z> + constant at one step.

    Attributes:
        name: as it was asked for.
        step: denoising step.
        velocity: weights of the step's velocity v, with guidance by two branches that of both.
        latents: weights of the packed latents z entering the step.
        constant: what does not depend on either.
    """

    name: str
    step: int
    velocity: Float[Array, "img outputs"]
    latents: Float[Array, "img channels"]
    constant: float


class Engine(NamedTuple):
    """All that pulling targets back needs.

    Attributes:
        infos: of the traces of the steps, or with guidance by two branches of both evaluations of each, in the order
            of `Span`.
        steps: their replacements.
        constants: what the affine map gives at zero sources, alike.
        outputs: targets that are not features; their rows end the table.
        across: whether images are carried back to the latents entering the first step.
        table: what the places of a row of edges stand for.
        options: devices and precision.
    """

    infos: tuple[TraceInfo, ...]
    steps: tuple[Replacement, ...]
    constants: tuple[RunOutputs, ...]
    outputs: tuple[Output, ...]
    across: bool
    table: SourceTable
    options: PullOptions = PullOptions()

    @property
    def sources(self) -> int:
        """Places in a row of edges."""
        return self.table.kind.size - len(self.outputs)

    @property
    def info(self) -> TraceInfo:
        """Of the last step, with guidance by two branches of the prompt's."""
        return main_info(self.infos)


def make_engine(
    trace: Trace | Span | Prepared,
    tcs: TranscoderSet,
    outputs: tuple[Output, ...] = (),
    options: PullOptions = PullOptions(),  # noqa: B008  (immutable)
    rows: DecoderRows = "held",
) -> Engine:
    """Prepares the steps of a trace or span.

    Args:
        trace: from `capture`, `capture_steps` or `prepare`.
        tcs: the transcoders it was captured for.
        outputs: targets that are not features.
        options: devices and precision. Weights, transcoders and records are put where `placement` says.
        rows: of streamed transcoders, see `prepare`; other than held, targets can be pulled back and read, no more.

    Raises:
        UserError: as `prepare`, or if the mesh divides nothing of the trace.
    """
    mesh = options.mesh
    if mesh is not None and streams_layers((trace, tcs)):
        raise UserError(
            "A mesh splits what lies on its devices, but these weights are streamed; keep them on the device, or leave "
            "the mesh out."
        )
    if mesh is not None and not isinstance(trace, Prepared):
        refuse_undivided(trace, tcs, mesh)
        trace, tcs = placed_trace(trace, mesh), placed_transcoders(tcs, mesh)
    prepared = prepare(trace, tcs, rows=rows)
    across = isinstance(prepared.trace, Span)
    traces = prepared.trace.traces if isinstance(prepared.trace, Span) else (prepared.trace,)
    infos, steps = tuple(one.info for one in traces), prepared.steps
    if mesh is not None:
        refuse_undivided(prepared.trace, tcs, mesh)
        steps = placed_steps(steps, [stack.name for stack in infos[0].layout.stacks], mesh)
    table = source_table(steps, infos, across=across, outputs=[output.step for output in outputs])
    constants = affine_constants(steps, infos, across)
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        outputs = tuple(
            one._replace(**jax.device_put({"velocity": one.velocity, "latents": one.latents}, everywhere))
            for one in outputs
        )
    return Engine(infos, steps, constants, outputs, across, table, options)


def affine_constants(
    steps: tuple[Replacement, ...], infos: tuple[TraceInfo, ...], across: bool
) -> tuple[RunOutputs, ...]:
    """Returns what the affine map of every step gives at zero sources: what biases alone make of it."""
    found, velocities = [], []
    with jax.default_matmul_precision("highest"), on_mesh_of(steps):
        z = jnp.zeros_like(steps[0].record.latents)
        for number, prepared in enumerate(steps):
            zeros, sites = no_sources(prepared)
            if across:
                zeros = zeros._replace(boundary=enter(prepared.record.weights, z, jnp.zeros_like(prepared.record.text)))
            found.append(run_affine(prepared.record, sites, zeros)._replace(latents=z))
            if across:
                velocities.append(found[-1].velocity)
            if across and ends_step(infos, number):
                z, velocities = after_step(z, infos[number + 1 - len(velocities) : number + 1], velocities), []
    return tuple(found)


def no_sources(prepared: Replacement) -> tuple[Sources, tuple[ReplacedSites, ...]]:
    """Returns zero sources, and sites with no places for features: those of value 0 need not be decoded."""
    # On a mesh every array of zeros is sharded like the array it replaces; one program for all would not know how.
    empty = _empty_at_once if mesh_of(prepared.sources) is None else _empty
    zeros, layers = empty(prepared.sources, tuple(s.layers for s in prepared.sites))
    pairs = zip(prepared.sites, layers, strict=True)
    return zeros, tuple(s._replace(stack=without_rows(s.stack), layers=own) for s, own in pairs)


def _empty(sources: Sources, layers: tuple[SiteLayers, ...]) -> tuple[Sources, tuple[SiteLayers, ...]]:
    """Returns zero sources, and layers of sites with no places for features."""
    zeros = jax.tree.map(jnp.zeros_like, sources)
    zeros = zeros._replace(values=tuple(v[:, :, :0] for v in zeros.values))
    return zeros, tuple(one.without_features() for one in layers)


_empty_at_once = jax.jit(_empty, keep_unused=True)  # which keeps them on their device


class TargetEdges(NamedTuple):
    """Incoming edges of some targets, on the host.

    Attributes:
        parts: edges from every source, [target source], by step and then from the inputs; views of the device's memory.
        preactivation: u; an output's value.
        bias: value of the affine map at zero sources.
        spares: the steps' edges on the device, whose memory a later call may use again.
    """

    parts: tuple[np.ndarray, ...]
    preactivation: Float64[np.ndarray, "target"]
    bias: Float64[np.ndarray, "target"]
    spares: tuple[Array, ...]

    @property
    def edges(self) -> Float[np.ndarray, "target source"]:
        """The edges from every source, copied."""
        return np.concatenate(self.parts, axis=1)


def pull_rows(
    engine: Engine, rows: Int64[np.ndarray, "target"], batch: int, spares: tuple[Array, ...] | None = None
) -> TargetEdges:
    """Returns the edges into rows of the table, and what they must add up to.

    Args:
        engine: from `make_engine`.
        rows: features or outputs; at most `batch`.
        batch: number of targets the programs are compiled for; a multiple of the devices.
        spares: of an earlier call whose edges nobody needs any more.
    """
    filled = np.concatenate([rows, np.full(batch - rows.size, -1)]).astype(np.int64)
    # Rows come deepest first. Dealt out like cards, every device gets some of each depth, and all end at about once.
    dealt = np.arange(batch).reshape(-1, engine.options.shards).T.ravel()
    reach = _Reach(engine, filled[dealt])
    numbers = reversed(range(len(engine.steps)))
    found = tuple(reach.through(number, None if spares is None else spares[number]) for number in numbers)[::-1]
    parts = tuple(np.asarray(part) for part in (*found, reach.inputs()))
    back = np.argsort(dealt)[: rows.size]
    parts = tuple(part[: rows.size] if engine.options.shards == 1 else part[back] for part in parts)
    u = read_targets(engine, rows, tuple(step.record.reading for step in engine.steps))
    return TargetEdges(parts, u, read_targets(engine, rows, engine.constants), found)


class _Reach:
    """How far back a batch of targets has been pulled; `through` is called from the last step to the first."""

    def __init__(self, engine: Engine, rows: np.ndarray) -> None:
        self.engine = engine
        self.step = np.where(rows >= 0, engine.table.step[rows], -1)
        self.rows = rows
        self.carried = Carried(engine.steps, engine.infos, rows.size)
        self.directed = engine.across or bool(engine.outputs)

    def through(self, number: int, spare: Array | None) -> Array:
        """Pulls everything back through one evaluation; returns the edges of its features and errors."""
        prepared, info, carried = self.engine.steps[number], self.engine.infos[number], self.carried
        targets = targets_of(self.engine, self.rows, number)
        cotangent = None
        if self.directed:
            direction = _of_later(self.step > info.step, info.taken, carried.latents)
            for i, row in enumerate(self.rows.tolist()):
                if self._is_output(row, info.step):
                    output = self.engine.outputs[row - self.engine.sources]
                    direction = _with_row(direction, i, info.velocity_weight, output.velocity)
                    carried.latents = _with_row(carried.latents, i, 1.0, output.latents)
            cotangent = velocity_cotangent(prepared, direction)
        pulled = pull(prepared, targets, cotangent, spare, self.engine.options)
        if self.engine.across:
            carried.gather(number, pulled.boundary)
        else:
            carried.boundary = pulled.boundary
        return pulled.edges

    def inputs(self) -> Array:
        """Returns the edges of the inputs."""
        if self.engine.across:
            return self.carried.inputs()
        record = self.engine.steps[0].record
        assert self.carried.boundary is not None
        residual = input_edges(self.carried.boundary, record.boundary)
        return residual if record.velocity is None else jnp.concatenate([residual, self.carried.from_latents()], axis=1)

    def _is_output(self, row: int, step: int) -> bool:
        table = self.engine.table
        return row >= 0 and bool(table.kind[row] == OUTPUT) and bool(table.step[row] == step)


@jax.jit
def _of_later(later: Bool[Array, "target"], taken: ArrayLike, latents: Array) -> Array:
    """Returns what targets of later steps read of a step's velocity; zeros for the others."""
    return jnp.where(later[:, None, None], taken * latents, 0)


@jax.jit
def _with_row(rows: Array, at: ArrayLike, weight: ArrayLike, row: Array) -> Array:
    """Returns rows with one of them replaced, times a weight."""
    return rows.at[at].set(weight * row)


def targets_of(engine: Engine, rows: np.ndarray, number: int) -> Targets:
    """Returns rows of the table as targets of one evaluation: later ones are directions there, others nothing.

    Args:
        engine: from `make_engine`.
        rows: of the table; -1 for places that only fill up.
        number: of the evaluation within the span.
    """
    info, table = engine.infos[number], engine.table
    columns = (table.kind, table.step, table.branch)
    kind, step, branch = (np.where(rows >= 0, column[rows].astype(int), -1) for column in columns)
    feature = (kind == FEATURE) & (step == info.step) & (branch == info.branch)
    direction = ((kind == OUTPUT) & (step == info.step)) | (step > info.step if engine.across else False)
    block, stream = (column[rows].astype(np.int64) for column in (table.block, table.stream))
    group = info.layout.groups_at(block, stream)
    position = info.layout.rows_at(group, stream, table.position[rows], info.tokens_of)
    recorded = (block >= info.recorded[0]) & (block <= info.recorded[-1])
    layer = np.where(feature & recorded, block - info.recorded[0], -1)
    layer = np.where(direction, len(info.recorded), layer)
    columns = (
        np.where(direction, DIRECTION, group),
        layer,
        np.where(feature, position, 0),
        np.where(feature, table.feature[rows], 0),
    )
    return jax.device_put(Targets(*(column.astype(np.int32) for column in columns)))


def read_targets(
    engine: Engine, rows: Int64[np.ndarray, "target"], readings: tuple[RunOutputs, ...]
) -> Float64[np.ndarray, "target"]:
    """Returns the targets' values in a run, summed in float64.

    Args:
        engine: from `make_engine`.
        rows: features or outputs of the table.
        readings: of the run, by evaluation.
    """
    values, table = np.zeros(rows.size), engine.table
    for number, (prepared, info, reading) in enumerate(zip(engine.steps, engine.infos, readings, strict=True)):
        of_step = table.step[rows] == info.step
        here = np.flatnonzero((table.kind[rows] == FEATURE) & of_step & (table.branch[rows] == info.branch))
        if here.size:
            targets = targets_of(engine, rows[here], number)
            values[here] = exact_preactivations(prepared, targets, reading.mlp_in)
        for i in np.flatnonzero((table.kind[rows] == OUTPUT) & of_step):
            output = engine.outputs[int(rows[i]) - engine.sources]
            assert reading.velocity is not None
            values[i] += info.velocity_weight * _inner(output.velocity, reading.velocity)
            if ends_step(engine.infos, number):
                values[i] = output.constant + (values[i] + _inner(output.latents, reading.latents))
    return values


def output_value(output: Output, velocity: Float[Array, "img outputs"], latents: Float[Array, "img channels"]) -> float:
    """Returns an output's value, summed in float64.

    Args:
        output: the output.
        velocity: of its step.
        latents: entering that step.
    """
    return output.constant + (_inner(output.velocity, velocity) + _inner(output.latents, latents))


def _inner(*pair: Array) -> float:
    return float(np.vdot(*(np.asarray(array, np.float64) for array in pair)))
