"""The local replacement model: an affine map from sources to every MLP sublayer's input (docs/method.md, section 3).

1. At every site and position that is replaced, y = W_dec z + b_dec (+ W_skip x) + err, where z is the transcoder's code
   of the recorded x and err whatever is missing to the recorded y. Everywhere else y itself is the constant err.
2. Attention patterns, norm scales and modulations are those of the trace: the blocks run with `frozen`.
3. What remains is affine in the sources: the residual streams h0 entering the first block, the values of the active
   features, and the errors. `replacement` returns that map and its sources, for anyone's `jax.linearize` or `jax.vjp`.

Codes are kept as the active features alone, see `encoding`. "Per group" is a tuple over the model's groups of sites
(`address`); layers count through the recorded blocks of the group's stack.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.circuits.frozen.encoding import GroupRecord, ReplacedSites, SiteLayers, encode_group, site
from difffract_jax.circuits.frozen.streamed_sites import encode_sites
from difffract_jax.circuits.trace.capture import Span, Trace
from difffract_jax.circuits.trace.record import Record, RunOutputs
from difffract_jax.config import UserError
from difffract_jax.display import hash_text
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.memory import memory_for
from difffract_jax.models.blocks import Modulations, Streams
from difffract_jax.models.stacks import Visit, per_group, run_stacks
from difffract_jax.models.streaming import Streamed, streams_layers
from difffract_jax.spread import on_mesh_of, spread
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet
from difffract_jax.trees import brief

DecoderRows = Literal["held", "auto", "streamed"]
"""Whether the decoder rows of active features stay on the device where transcoders are streamed; see `prepare`."""
ROWS_SHARE = 1 / 4
"""Share of the free memory that such rows may take; while a group's are put together they are there twice."""


class Sources(NamedTuple):
    """What the affine map starts from.

    Attributes:
        boundary: residual streams entering the first block.
        values: values of the active features, [layer rows active] per group.
        errors: what is added at every site besides, [layer rows d_model] per group.
    """

    boundary: Streams
    values: tuple[Float[Array, "_ _ _"], ...]
    errors: tuple[Float[Array, "_ _ d_model"], ...]

    __repr__ = brief


class Replacement(NamedTuple):
    """The replacement of one trace, ready to run.

    Attributes:
        record: the trace's arrays.
        sites: the MLP sublayers, per group.
        sources: sources at the traced point.
    """

    record: Record
    sites: tuple[ReplacedSites, ...]
    sources: Sources

    __repr__ = brief


class Prepared(NamedTuple):
    """A trace or span with every replaced site encoded; accepted wherever a trace is, so that nothing is encoded twice.

    Attributes:
        trace: what was prepared.
        steps: the replacement of each step.
        source: content hash of the transcoders.
    """

    trace: Trace | Span
    steps: tuple[Replacement, ...]
    source: str

    @property
    def info(self) -> TraceInfo:
        """Where the last step comes from."""
        return self.trace.info

    def __repr__(self) -> str:
        return f"Prepared with the transcoders {hash_text(self.source)}\n{self.trace!r}"

    def _repr_html_(self) -> str:
        return self.trace._repr_html_()


def prepare(
    trace: Trace | Span | Prepared,
    tcs: TranscoderSet,
    *,
    active: Sequence[int] | None = None,
    rows: DecoderRows = "held",
) -> Prepared:
    """Encodes every replaced site of a trace or span, and splits its output into features and error.

    Args:
        trace: from `capture` or `capture_steps`; what is prepared already is returned as it is.
        tcs: the transcoders it was captured for.
        active: places for features per position, per group, at least as many as are active; counted if left out. Given
            the same, traces of one size share every compiled program.
        rows: where transcoders are streamed, what becomes of the decoder rows of active features: `held`, `streamed`,
            from where the transcoders lie, for `attribute` with attention frozen and `total_effects` alone; or `auto`,
            streamed if they would take more than `ROWS_SHARE` of the memory that is free.

    Raises:
        UserError: if the transcoders have sites outside the trace, or are not those that it was prepared with.

    Example:
        >>> from difffract_jax import attribute, capture, random_pipeline, random_transcoders, strongest_feature
        >>> pipe = random_pipeline()
        >>> tcs = random_transcoders(pipe.config.transformer)
        >>> prepared = prepare(capture(pipe, tcs, "a red circle"), tcs)
        >>> target = strongest_feature(prepared, tcs, "img", 2)
        >>> attribute(prepared, tcs, target=target, max_nodes=2).targets.size
        1
    """
    if isinstance(trace, Prepared):
        if trace.source != tcs.source:
            raise UserError(
                f"The trace was prepared with the transcoders {trace.source[:12]}, but these are {tcs.source[:12]}; "
                "prepare it again."
            )
        return trace
    steps = trace.traces if isinstance(trace, Span) else (trace,)
    return Prepared(trace, prepare_steps(steps, tcs, active=active, rows=rows), tcs.source)


def replacement(trace: Trace | Prepared, tcs: TranscoderSet) -> tuple[Callable[[Sources], RunOutputs], Sources]:
    """Returns the affine map of a trace, and the sources at which it reproduces the trace.

    Args:
        trace: from `capture`, or from `prepare`.
        tcs: the transcoders it was captured for.

    Returns:
        f, a pure function of sources that returns the MLP sublayers' inputs x of every recorded block, and the
        velocity if it is recorded; and the sources. f is a pytree (`jax.tree_util.Partial`): given to a jitted function
        as an argument, its weights are no constants of the program, and one program serves all traces of a shape.

    Raises:
        UserError: if the trace is a span of several steps.

    Example:
        >>> from difffract_jax import capture, random_pipeline, random_transcoders
        >>> pipe = random_pipeline()
        >>> tcs = random_transcoders(pipe.config.transformer)
        >>> f, sources = replacement(capture(pipe, tcs, "a red circle"), tcs)
        >>> reading, push = jax.jit(jax.linearize)(f, sources)
        >>> reading.mlp_in[0].shape
        (3, 36, 32)
    """
    steps = prepare(trace, tcs).steps
    if len(steps) != 1:
        raise UserError(f"The affine map is that of one step, but the trace spans {len(steps)}; give one of them.")
    (prepared,) = steps
    return jax.tree_util.Partial(run_replacement, prepared.record, prepared.sites), prepared.sources


def prepare_step(
    trace: Trace, tcs: TranscoderSet, *, active: Sequence[int] | None = None, room: float = inf
) -> Replacement:
    """Encodes every replaced site of one step's trace, and splits its output into features and error.

    Args:
        trace: from `capture`.
        tcs: the transcoders it was captured for.
        active: places for features per position, per group, at least as many as are active; counted if left out.
        room: bytes that the decoder rows of streamed transcoders may take, all sites together.

    Raises:
        UserError: if the transcoders have sites outside the trace.
    """
    record, info = trace.record, trace.info
    slots = tcs.sites.slots(info.layout)
    outside = sorted({block for placed in slots for block in placed} - set(info.recorded))
    if outside:
        raise UserError(
            f"The trace recorded the blocks {info.recorded[0]} to {info.recorded[-1]}, but the transcoders have block "
            f"{outside[0]}; capture again with these transcoders."
        )
    parts, count = [], sum(map(len, slots))
    with jax.default_matmul_precision("highest"), on_mesh_of(record):
        for i, stack in enumerate(tcs.per_group(info.layout)):
            given = (
                [slots[i].get(block) for block in info.recorded if block in info.layout.blocks_of(i)],
                GroupRecord(record.mlp_in[i], record.mlp_out[i], record.replaceable[i], record.t),
                None if active is None else active[i],
            )
            if isinstance(stack, Streamed):
                parts.append(encode_sites(stack, *given, room * len(slots[i]) / count))
            else:
                parts.append(encode_group(stack, *given))
    sites, values, errors = zip(*parts, strict=True)
    return Replacement(record, tuple(sites), Sources(record.boundary, tuple(values), tuple(errors)))


def prepare_steps(
    traces: tuple[Trace, ...],
    tcs: TranscoderSet,
    *,
    active: Sequence[int] | None = None,
    rows: DecoderRows = "held",
) -> tuple[Replacement, ...]:
    """Prepares several steps with the same places for features, so that one program does for all.

    Args:
        traces: of a span.
        tcs: the transcoders it was captured for.
        active: see `prepare`.
        rows: see `prepare`.
    """
    room = _room(rows) / len(traces)
    prepared = [prepare_step(trace, tcs, active=active, room=room) for trace in traces]
    places = [[values.shape[2] for values in one.sources.values] for one in prepared]
    most = [max(column) for column in zip(*places, strict=True)]
    if all(one == most for one in places):
        return tuple(prepared)
    if streams_layers(tcs.stacks):
        # To encode once more would read all transcoders once more.
        return tuple(_with_places(one, most) for one in prepared)
    return tuple(prepare_step(trace, tcs, active=most) for trace in traces)


def _room(rows: DecoderRows) -> float:
    """Returns the bytes that decoder rows may take, all steps together."""
    if rows == "auto":
        return ROWS_SHARE * memory_for(jax.devices()[0]).available
    return inf if rows == "held" else 0.0


def _with_places(prepared: Replacement, most: Sequence[int]) -> Replacement:
    """Returns a replacement with more places for features, per group; what fills them has value 0."""
    sites, values = [], []
    for one, value, places in zip(prepared.sites, prepared.sources.values, most, strict=True):
        more = partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, places - value.shape[2])))
        row = None if one.layers.row is None else more(one.layers.row)
        sites.append(one._replace(layers=one.layers._replace(index=more(one.layers.index), row=row)))
        values.append(more(value))
    return prepared._replace(sites=tuple(sites), sources=prepared.sources._replace(values=tuple(values)))


def run_replacement(
    record: Record,
    sites: Sequence[ReplacedSites],
    sources: Sources,
    *,
    looped: bool = False,
    modulation: Modulations | None = None,
) -> RunOutputs:
    """Evaluates the affine map: the MLP sublayers' inputs x of every recorded block, and the velocity if recorded.

    Args:
        record: the trace's arrays.
        sites: the MLP sublayers, per group.
        sources: where to evaluate it; zeros give its constant.
        looped: whether blocks are run in a loop on the host, a program each.
        modulation: added to the recorded modulations; 0 if left out.
    """
    added = Modulations(None, None) if modulation is None else modulation
    h, x = _blocks(record, sites, sources, _spread_mlp_in, looped, added.blocks)
    final = record.weights.final
    velocity = None if final is None else final(h.img, record.cond, record.inv_std, added.final)
    return RunOutputs(x, velocity, record.latents)


def _spread_mlp_in(visit: Visit) -> tuple[Array, ...]:
    return tuple(spread(x, 1, 0) for x in visit.acts.mlp_in)


def run_affine(record: Record, sites: Sequence[ReplacedSites], sources: Sources) -> RunOutputs:
    """Evaluates the affine map in a program of its own; arguments as for `run_replacement`.

    Blocks that were streamed are run by a program each on a processor, where a loop over all of them would widen the
    bfloat16 weights of all at once; so are those whose decoder rows are streamed, anywhere.
    """
    if by_program(record) or streams_layers([one.stack for one in sites]):
        return run_replacement(record, sites, sources, looped=True)
    return affine_program(record, sites, sources)


affine_program = jax.jit(run_replacement, static_argnames="looped")


def by_program(record: Record) -> bool:
    """Says whether a record's blocks are better run by a program each than in a loop; see `run_affine`."""
    return bool(record.weights.streamed) and jax.default_backend() == "cpu"


def residuals(
    record: Record, sites: Sequence[ReplacedSites], sources: Sources
) -> tuple[Float[Array, "_ _ d_model"], ...]:
    """Returns the residual streams entering every block, [layer rows d_model] per group.

    Args:
        record: the trace's arrays.
        sites: the MLP sublayers, per group.
        sources: where to evaluate the affine map.
    """
    with jax.default_matmul_precision("highest"):
        if by_program(record) or streams_layers([one.stack for one in sites]):
            return _entering(record, sites, sources, looped=True)
        return _residuals(record, sites, sources)


def _entering(
    record: Record, sites: Sequence[ReplacedSites], sources: Sources, *, looped: bool = False
) -> tuple[Float[Array, "_ _ d_model"], ...]:
    return _blocks(record, sites, sources, _keep_entering, looped)[1]


_residuals = jax.jit(_entering, static_argnames="looped")


def _keep_entering(visit: Visit) -> tuple[Array, ...]:
    return visit.entering


def _blocks(
    record: Record,
    sites: Sequence[ReplacedSites],
    sources: Sources,
    tap: Callable[[Visit], tuple[Array, ...]],
    looped: bool,
    modulation: tuple[Any, ...] | None = None,
) -> tuple[Streams, tuple[Array, ...]]:
    """Runs all recorded blocks; returns the last residual streams, and what `tap` keeps per group."""
    fetched = [one.row_layers for one in sites]
    parts = ([one.layers for one in sites], sources.values, sources.errors, fetched)
    h, kept = run_stacks(
        record.weights.stacks,
        sources.boundary,
        record.cond,
        frozen=record.frozen,
        write=_write_site,
        fixed=[one.stack if rows is None else None for one, rows in zip(sites, fetched, strict=True)],
        layers=list(zip(*parts, strict=True)),
        tap=tap,
        unroll=False,
        looped=looped,
        modulation=modulation,
    )
    return h, per_group(kept)


def _write_site(
    stack: Transcoder | None,
    layer: tuple[SiteLayers, Array, Array, Transcoder | None],
    x: Array,
    true: Callable[[], Array],
) -> tuple[Array, None]:
    del true
    *own, fetched = layer
    transcoder = site(stack, own[0].slot) if stack is not None else fetched
    return write(transcoder, *own, x), None


def write(
    transcoder: Transcoder | None,
    layer: SiteLayers,
    values: Float[Array, "rows active"],
    error: Float[Array, "rows d_model"],
    x: Float[Array, "rows d_model"],
) -> Float[Array, "rows d_model"]:
    """Returns what the replacement adds for one MLP sublayer: W_dec z + b_dec (+ W_skip x) where live, plus the error.

    Args:
        transcoder: the site's, or what the map reads of it; None if it has none.
        layer: one block's slice.
        values: of the features in `layer.index`.
        error: the sublayer's error.
        x: the sublayer's input, read by a skip alone.
    """
    if transcoder is None:
        return error
    if not values.shape[1]:
        # No features, as in the map's constant: the decoder gives its bias, and need not be read.
        assert transcoder.dec.bias is not None
        y = transcoder.dec.bias[None].astype(x.dtype)
        y = y + transcoder.skip(x) if transcoder.config.skip else y
        return error + jnp.where(layer.live[:, None], y, 0)
    rows = jnp.arange(x.shape[0])[:, None]
    z = jnp.zeros((x.shape[0], transcoder.config.features), x.dtype).at[rows, layer.decoder_rows].add(values)
    return error + jnp.where(layer.live[:, None], transcoder.decode(z, x), 0)
