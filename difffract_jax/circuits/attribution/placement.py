"""Where a trace lives on several devices, so that nothing that is large lies on all of them.

1. `data` shares targets out, and with them cotangents and rows of edges. `site` and `feature` split all else between
   the devices of each share: weights, transcoders, records (`spread`, `sharding`).
2. Queries and keys are split by head, MLP inputs and outputs by channel, codes by position. What does not divide so is
   split by position, and else whole.
3. `placed_trace` and `placed_transcoders` put a trace and transcoders there before they are encoded, `placed_steps`
   what has been encoded. What lies there already is not moved.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.trace.capture import Span, Trace
from difffract_jax.circuits.trace.record import Record
from difffract_jax.config import UserError
from difffract_jax.sharding import traced_stack, traced_transcoders
from difffract_jax.spread import spread_over, ways_of
from difffract_jax.transcoders.transcoder import TranscoderSet


def placed_trace(trace: Trace | Span, mesh: Mesh) -> Trace | Span:
    """Puts a trace, or all steps of a span, onto a mesh.

    Args:
        trace: from `capture`, wherever it lies.
        mesh: of several devices.
    """
    traces = trace.traces if isinstance(trace, Span) else (trace,)
    moved = [
        one._replace(record=jax.device_put(one.record, record_shardings(one.record, _names(one), mesh)))
        for one in traces
    ]
    return Span(tuple(moved)) if isinstance(trace, Span) else moved[0]


def placed_transcoders(tcs: TranscoderSet, mesh: Mesh) -> TranscoderSet:
    """Puts transcoders onto a mesh.

    Args:
        tcs: the transcoders.
        mesh: of several devices.
    """
    place = traced_transcoders(mesh).tree
    return tcs._replace(stacks={name: jax.device_put(stack, place(stack)) for name, stack in tcs.stacks.items()})


def placed_steps(steps: Sequence[Replacement], names: Sequence[str], mesh: Mesh) -> tuple[Replacement, ...]:
    """Puts the replacements of steps onto a mesh.

    Args:
        steps: from `prepare`.
        names: of the model's stacks.
        mesh: of several devices.
    """
    return tuple(jax.device_put(one, replacement_shardings(one, names, mesh)) for one in steps)


def refuse_undivided(trace: Trace | Span, tcs: TranscoderSet, mesh: Mesh) -> None:
    """Refuses a mesh whose model axes split nothing of a trace.

    Args:
        trace: to be put onto it.
        tcs: its transcoders.
        mesh: of several devices.

    Raises:
        UserError: if it divides neither channels nor features.
    """
    ways, features = ways_of(mesh), tcs.config.features
    record = (trace.traces[0] if isinstance(trace, Span) else trace).record
    width = record.boundary.img.shape[1]
    if width % ways and features % ways:
        divisors = [n for n in range(2, mesh.size + 1) if width % n == 0 or features % n == 0]
        fitting = f"make it {' or '.join(map(str, divisors))}, and use the rest" if divisors else "use all devices"
        raise UserError(
            f"The mesh splits a trace {ways} ways (site x feature), which divides neither its {width} channels nor its "
            f"{features} features per site; {fitting} along data."
        )


def replacement_shardings(replacement: Replacement, names: Sequence[str], mesh: Mesh) -> Replacement:
    """Returns where the arrays of a replacement live, as a tree like it.

    Args:
        replacement: of arrays, or their shapes.
        names: of the model's stacks.
        mesh: of several devices.
    """
    place = traced_transcoders(mesh).tree
    sites = tuple(
        one._replace(
            stack=None if one.stack is None else place(one.stack),
            layers=one.layers._replace(
                slot=_over(mesh, one.layers.slot),
                live=_over(mesh, one.layers.live),
                index=_over(mesh, one.layers.index, 1),
            ),
        )
        for one in replacement.sites
    )
    sources = replacement.sources
    placed = sources._replace(
        boundary=_each(mesh, sources.boundary, 1, 0),
        values=_each(mesh, sources.values, 1),
        errors=_each(mesh, sources.errors, 2, 1),
    )
    return Replacement(record_shardings(replacement.record, names, mesh), sites, placed)


def record_shardings(record: Record, names: Sequence[str], mesh: Mesh) -> Record:
    """Returns where the arrays of a record live, as a tree like it.

    Args:
        record: of arrays, or their shapes.
        names: of the model's stacks.
        mesh: of several devices.
    """
    weights = record.weights
    stacks = tuple(traced_stack(name, stack, mesh) for name, stack in zip(names, weights.stacks, strict=True))
    unpooled = record.unpooled
    return record._replace(
        weights=weights._replace(
            stacks=stacks,
            final=None if weights.final is None else traced_stack("final", weights.final, mesh),
            img_in=_each(mesh, weights.img_in),
            txt_in=_each(mesh, weights.txt_in),
        ),
        cond=_each(mesh, record.cond),
        boundary=_each(mesh, record.boundary, 1, 0),
        frozen=_each(mesh, record.frozen, 2, 1),
        inv_std=_each(mesh, record.inv_std),
        mlp_in=_each(mesh, record.mlp_in, 2, 1),
        mlp_out=_each(mesh, record.mlp_out, 2, 1),
        velocity=_each(mesh, record.velocity),
        replaceable=_each(mesh, record.replaceable),
        latents=_each(mesh, record.latents),
        text=_each(mesh, record.text, 1),
        t=_each(mesh, record.t),
        unpooled=None
        if unpooled is None
        else unpooled._replace(
            mlp_in=_each(mesh, unpooled.mlp_in, 2, 1),
            velocity=_each(mesh, unpooled.velocity),
            latents=_each(mesh, unpooled.latents),
        ),
    )


def _names(trace: Trace) -> list[str]:
    return [stack.name for stack in trace.info.layout.stacks]


def _each(mesh: Mesh, tree: Any, *axes: int) -> Any:
    return jax.tree.map(lambda leaf: _over(mesh, leaf, *axes), tree)


def _over(mesh: Mesh, leaf: Any, *axes: int) -> NamedSharding:
    """Splits a leaf along the first of some axes that it has and that divides; vectors of layers stay whole."""
    ways = ways_of(mesh)
    fitting = [axis for axis in axes if leaf.ndim > max(axes) and leaf.shape[axis] and leaf.shape[axis] % ways == 0]
    return NamedSharding(mesh, spread_over(leaf.ndim, fitting[0]) if ways > 1 and fitting else PartitionSpec())
