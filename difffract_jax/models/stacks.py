"""Running a model's stacks of blocks: the one walk through the layers, whatever is recorded, replaced or held.

1. Residual streams become a stack's sequences, one per group (`sequences`), and streams again behind it (`streams`).
2. `run_stack` scans the stack. Where `write` is given it stands in for every MLP sublayer; where records are given the
   blocks run frozen; `tap` picks what each block reports, so that a caller keeps only what it reduces to.
3. `run_stacks` does this for one stack after the other.
4. A stack that is not in memory (`streaming.Streamed`), or whose `layers` are not, is run in a loop on the host, a
   compiled program per block.

A model is a tuple of stacks and what stands around them: `embed` before the first, the last norm and projection behind
the last. "Per group" is a tuple over the groups of a stack, or of all stacks in order (`address.Layout`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.address import Group
from difffract_jax.models.blocks import BlockActs, Cond, Streams
from difffract_jax.models.streaming import Streamed, is_streamed, no_layers, stack_trees, streams_layers, wait_for

UNROLLED = 4
"""Stacks of at most so many blocks run without a loop; a training step of the organism then takes a third less time."""
Write = Callable[[Any, Any, Float[Array, "rows d_model"], Callable[[], Array]], tuple[Array, Any]]
"""Stands in for one MLP sublayer: `write(fixed, layer, x, true) -> (y, report)`. `fixed` is the group's, `layer` the
block's slice, x the sublayer's input, and `true()` computes the output that the model itself gives."""


class Visit(NamedTuple):
    """One block of a run, as a tap sees it.

    Attributes:
        entering: residual streams entering the block, per group.
        acts: what the block computed.
        reports: what `write` reported, per group; empty without it.
    """

    entering: tuple[Float[Array, "_ d_model"], ...]
    acts: BlockActs
    reports: tuple[Any, ...]


Tap = Callable[[Visit], Any]


def drop(visit: Visit) -> None:
    """The tap that keeps nothing."""


def keep_mlp_in(visit: Visit) -> tuple[Array, ...]:
    """The tap that keeps the inputs x of the MLP sublayers, per group."""
    return tuple(visit.acts.mlp_in)


def slice_layer(stack: Any, layer: Any) -> Any:
    """Returns one layer of anything with a leading layer axis: a stack of blocks, their records, transcoders.

    Args:
        stack: tree of arrays; streamed ones are fetched.
        layer: number of the layer, also a traced one where nothing is streamed; or a slice of layers.
    """

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Streamed):
            return leaf.layers(layer) if isinstance(layer, slice) else leaf.fetch(layer)
        if isinstance(layer, jax.Array):
            # As `leaf[layer]` does, but traced in a sixth of the time.
            return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        return leaf[layer]

    leaves, structure = jax.tree.flatten(stack, is_leaf=is_streamed)
    if not isinstance(layer, int) or not any(map(_is_array, leaves)):
        return jax.tree.unflatten(structure, map(take, leaves))
    # One program takes the layer of all arrays, whichever layer it is.
    taken = iter(_layer_of([leaf for leaf in leaves if _is_array(leaf)], layer))
    return jax.tree.unflatten(structure, [next(taken) if _is_array(leaf) else take(leaf) for leaf in leaves])


def _is_array(leaf: Any) -> bool:
    """Says whether a leaf is an array on a device, not one that is being traced."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


@jax.jit
def _layer_of(leaves: list[Array], layer: Any) -> list[Array]:
    return [jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) for leaf in leaves]


def depth_of(stack: Any) -> int:
    """Returns the number of layers of anything with a leading layer axis."""
    first = jax.tree.leaves(stack, is_leaf=is_streamed)[0]
    return first.depth if isinstance(first, Streamed) else first.shape[0]


def group_slices(stacks: Sequence[Any]) -> tuple[slice, ...]:
    """Returns where each stack's groups lie among those of all stacks."""
    ends = [sum(len(stack.groups) for stack in stacks[: i + 1]) for i in range(len(stacks))]
    return tuple(slice(end - len(stack.groups), end) for end, stack in zip(ends, stacks, strict=True))


def sequences(h: Streams, groups: Sequence[Group], axis: int = -2) -> tuple[Any, ...]:
    """Puts streams into the groups' sequences.

    Args:
        h: one array per stream; NumPy's stay NumPy's.
        groups: of a stack.
        axis: along which tokens are counted.
    """
    chain = np.concatenate if all(isinstance(part, np.ndarray) for part in h) else jnp.concatenate
    joined = []
    for group in groups:
        parts = [getattr(h, stream) for stream in group.streams]
        joined.append(parts[0] if len(parts) == 1 else chain(parts, axis=axis))
    return tuple(joined)


def streams(joined: Sequence[Array], groups: Sequence[Group], before: Streams, axis: int = -2) -> Streams:
    """Undoes `sequences`; streams in none of the groups stay as they were.

    Args:
        joined: one array per group.
        groups: of a stack.
        before: the streams that `sequences` was given; their lengths tell where a sequence is cut.
        axis: along which tokens are counted.
    """
    after = before._asdict()
    for array, group in zip(joined, groups, strict=True):
        first = 0
        for stream in group.streams:
            length = getattr(before, stream).shape[axis]
            whole = length == array.shape[axis]
            after[stream] = array if whole else jax.lax.slice_in_dim(array, first, first + length, axis=axis)
            first += length
    return Streams(**after)


def run_stack(
    stack: Any,
    h: Sequence[Float[Array, "_ d_model"]],
    cond: Cond,
    *,
    frozen: Any = None,
    write: Write | None = None,
    fixed: Sequence[Any] | None = None,
    layers: Sequence[Any] | None = None,
    tap: Tap = drop,
    kept: Sequence[Sequence[int]] | None = None,
    unroll: bool = True,
    remat: bool = False,
    looped: bool = False,
    modulation: Sequence[Any] | None = None,
) -> tuple[tuple[Array, ...], Any]:
    """Applies a stack's blocks in order.

    Args:
        stack: blocks with a leading layer axis, or streamed ones.
        h: the residual stream of each group's sequence.
        cond: what the evaluation's blocks share.
        frozen: records with a leading layer axis; None to run live.
        write: stands in for every MLP sublayer. Where blocks are streamed this and `tap` are static: named functions
            compile once.
        fixed: per group, what `write` gets whole.
        layers: per group, what `write` gets a slice of; trees with a leading layer axis, or streamed.
        tap: what each block reports; stacked on a leading layer axis.
        kept: per group, the blocks whose reports are kept, ascending; all if left out. The tap then reports per group.
        unroll: whether a stack of at most `UNROLLED` blocks is written out, where a loop costs more than it saves.
        remat: whether reverse mode keeps only what enters each block, and computes the rest again.
        looped: whether blocks are run in a loop on the host though they are in memory.
        modulation: per group, what is added to the blocks' modulations, with a leading layer axis; nothing if left out.

    Returns:
        The residual streams after the last block, and the reports.
    """
    count = len(stack.groups)
    fixed, layers = (tuple(one or (None,) * count) for one in (fixed, layers))
    if looped or streams_layers(stack, layers):
        return _run_streamed(stack, tuple(h), cond, (frozen, layers, modulation), write, fixed, tap, kept)
    step = partial(_run_block, write=write, tap=tap, cond=cond, fixed=fixed)
    depth = depth_of(stack)
    body = jax.checkpoint(step) if remat else step
    inputs, unrolled = (stack, frozen, layers, modulation), unroll and depth <= UNROLLED
    if kept is None or all(len(numbers) == depth for numbers in kept):
        return jax.lax.scan(body, tuple(h), inputs, unroll=unrolled)
    return _scan_kept(body, tuple(h), inputs, kept, unrolled)


def _scan_kept(
    step: Callable[..., Any], h: tuple[Array, ...], layers: Any, kept: Sequence[Sequence[int]], unroll: bool
) -> tuple[tuple[Array, ...], Any]:
    """Scans with a carry that holds the reports of some blocks, so that those of the others never lie side by side."""
    places = np.stack([np.full(depth_of(layers), len(numbers), np.int32) for numbers in kept], axis=1)
    for group, numbers in enumerate(kept):
        places[list(numbers), group] = np.arange(len(numbers))

    def room(numbers: Sequence[int], report: Any) -> Any:
        if not numbers:
            return None
        return jax.tree.map(lambda leaf: jnp.zeros((len(numbers) + 1, *leaf.shape), leaf.dtype), report)

    def put(held: Any, report: Any, place: Array) -> Any:
        if held is None:
            return None
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, place, 0), held, report)

    def both(carry: tuple[Any, Any], now: tuple[Any, Array]) -> tuple[tuple[Any, Any], None]:
        after, reports = step(carry[0], now[0])
        held = [put(*one) for one in zip(carry[1], reports, now[1], strict=True)]
        return (after, held), None

    shapes = jax.eval_shape(step, h, slice_layer(layers, 0))[1]
    held = [room(numbers, report) for numbers, report in zip(kept, shapes, strict=True)]
    (h, held), _ = jax.lax.scan(both, (h, held), (layers, jnp.asarray(places)), unroll=unroll)
    return h, tuple(slice_layer(one, slice(len(numbers))) for numbers, one in zip(kept, held, strict=True))


def _run_block(
    h: tuple[Array, ...],
    layer: tuple[Any, Any, tuple[Any, ...], tuple[Array, ...] | None],
    *,
    write: Write | None,
    tap: Tap,
    cond: Cond,
    fixed: tuple[Any, ...],
) -> tuple[tuple[Array, ...], Any]:
    """Runs one block: its weights, its record or None, its slice of `layers` per group, and of `modulation`."""
    block, record, parts, modulation = layer
    more = {} if modulation is None else {"modulation": modulation}  # not every class of blocks takes it
    reports: list[Any] = []

    def stand_in(group: int, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        assert write is not None
        y, report = write(fixed[group], parts[group], x, partial(block.run_mlp, group, x))
        reports.append(report)
        return y

    after, acts = block(h, cond, frozen=record, mlp=None if write is None else stand_in, **more)
    return tuple(after), tap(Visit(h, acts, tuple(reports)))


_run_block_alone = jax.jit(_run_block, static_argnames=("write", "tap"))


def _run_streamed(
    stack: Any,
    h: tuple[Array, ...],
    cond: Cond,
    sliced: tuple[Any, tuple[Any, ...], Sequence[Any] | None],
    write: Write | None,
    fixed: tuple[Any, ...],
    tap: Tap,
    kept: Sequence[Sequence[int]] | None,
) -> tuple[tuple[Array, ...], Any]:
    """Applies the blocks of a stack that is not in memory, or whose `layers` are not; arguments as for `run_stack`.

    What has a leading layer axis beside the stack is `sliced`: `frozen`, `layers` and `modulation`.
    """
    given = {"write": write, "tap": tap, "cond": cond, "fixed": fixed}
    reports = []
    for number, block in _fetched(stack):
        h, report = _run_block_alone(h, (block, *slice_layer(sliced, number)), **given)
        wait_for(h)
        reports.append(report if kept is None else _some_groups(report, kept, number))
        del block  # before the one after next is fetched
    if reports and kept is not None:
        columns = [[one for one in column if one is not None] for column in zip(*reports, strict=True)]
        return h, tuple(stack_trees(column) if column else None for column in columns)
    if reports:
        return h, stack_trees(reports)
    like = _layer_shapes((stack, *sliced))
    return h, no_layers(jax.eval_shape(partial(_run_block, **given), h, like)[1])


def _fetched(stack: Any) -> Iterator[tuple[int, Any]]:
    """Yields blocks with their numbers; of a streamed stack the next is fetched while one is used."""
    if isinstance(stack, Streamed):
        return stack.fetched(range(stack.depth))
    return ((number, slice_layer(stack, number)) for number in range(depth_of(stack)))


def _layer_shapes(stacks: Any) -> Any:
    """Returns the shapes of one layer of anything with a leading layer axis."""

    def of(leaf: Any) -> Any:
        return leaf.abstract() if isinstance(leaf, Streamed) else jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    return jax.tree.map(of, stacks, is_leaf=is_streamed)


def _some_groups(report: Sequence[Any], kept: Sequence[Sequence[int]], number: int) -> tuple[Any, ...]:
    """Returns a block's reports of the groups that keep them; None of others."""
    return tuple(one if number in numbers else None for one, numbers in zip(report, kept, strict=True))


def run_stacks(
    stacks: Sequence[Any],
    h: Streams,
    cond: Cond,
    *,
    frozen: Sequence[Any] | None = None,
    write: Write | None = None,
    fixed: Sequence[Any] | None = None,
    layers: Sequence[Any] | None = None,
    tap: Tap | Sequence[Tap] = drop,
    kept: Sequence[Sequence[int]] | None = None,
    unroll: bool = True,
    remat: bool = False,
    looped: bool = False,
    modulation: Sequence[Any] | None = None,
) -> tuple[Streams, tuple[Any, ...]]:
    """Applies one stack after the other; arguments as for `run_stack`, with `fixed` and `layers` over all groups.

    Args:
        stacks: in order.
        h: residual streams entering the first.
        cond: what the evaluation's blocks share.
        frozen: records of each stack; None to run live.
        write: stands in for every MLP sublayer.
        fixed: per group of all stacks.
        layers: per group of all stacks.
        tap: what each block reports; or one tap per stack.
        kept: per group of all stacks.
        unroll: see `run_stack`.
        remat: see `run_stack`.
        looped: see `run_stack`.
        modulation: per group of all stacks, see `run_stack`; None for groups that name no modulations.

    Returns:
        The residual streams after the last stack, and each stack's reports.
    """
    reports = []
    records = [None] * len(stacks) if frozen is None else frozen
    taps = (tap,) * len(stacks) if callable(tap) else tap
    for stack, record, part, one in zip(stacks, records, group_slices(stacks), taps, strict=True):
        joined, report = run_stack(
            stack,
            sequences(h, stack.groups),
            cond,
            frozen=record,
            write=write,
            fixed=None if fixed is None else fixed[part],
            layers=None if layers is None else layers[part],
            tap=one,
            kept=None if kept is None else kept[part],
            unroll=unroll,
            remat=remat,
            looped=looped,
            modulation=None if modulation is None or modulation[part.start] is None else modulation[part],
        )
        h = streams(joined, stack.groups, h)
        reports.append(report)
    return h, tuple(reports)


def per_group(reports: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """Puts the stacks' reports, each a tuple over its groups, into one tuple over all groups."""
    return tuple(one for report in reports for one in report)
