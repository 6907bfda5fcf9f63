"""Arrays that are spread over processes, taken apart into pieces that each process writes, and put together again.

1. `pieces_of` says how an array is cut, and which process writes each piece: of several that hold the same one, the
   first. Every process comes to the same answer without asking.
2. `own_pieces` copies those of this process to the host; an array of NumPy's, which every process has, is one piece.
3. `assembled` makes an array for another sharding, on other processes: each asks for what its own devices need.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from difffract_jax.transcoders.processes import placed


class Piece(NamedTuple):
    """A part of an array that lies on one device.

    Attributes:
        process: that writes it.
        begin: its first place on every axis.
        end: past its last place on every axis.
    """

    process: int
    begin: tuple[int, ...]
    end: tuple[int, ...]


Read = Callable[[int, tuple[slice, ...]], np.ndarray]
"""`read(number, index)`: a part of a piece, counted on every axis from its own first place."""


def pieces_of(leaf: jax.Array | np.ndarray) -> list[Piece]:
    """Returns how an array is cut into pieces.

    Args:
        leaf: the array.
    """
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable and jax.process_count() > 1:
        return [Piece(0, (0,) * leaf.ndim, tuple(leaf.shape))]
    pieces: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for device, index in leaf.sharding.devices_indices_map(tuple(leaf.shape)).items():
        bounds = _bounds(index, leaf.shape)
        pieces[bounds] = min(device.process_index, pieces.get(bounds, device.process_index))
    return [Piece(process, *bounds) for bounds, process in sorted(pieces.items())]


def own_pieces(leaf: jax.Array | np.ndarray) -> dict[int, np.ndarray]:
    """Returns copies of the pieces that this process writes, by their number in `pieces_of`.

    Args:
        leaf: the array; it may be reused or given away afterwards.
    """
    mine = {(p.begin, p.end): n for n, p in enumerate(pieces_of(leaf)) if p.process == jax.process_index()}
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable and jax.process_count() > 1:
        return {number: np.array(leaf) for number in mine.values()}
    shards = {_bounds(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
    return {number: np.array(shards[bounds]) for bounds, number in mine.items()}


def assembled(wanted: Any, pieces: Sequence[Piece], read: Read) -> jax.Array | np.ndarray:
    """Puts an array together from pieces of it.

    Args:
        wanted: its shape, type and sharding; or an array of NumPy's, where such a one is wanted.
        pieces: that cover it.
        read: reads a part of a piece.
    """
    shape, dtype = tuple(wanted.shape), np.dtype(wanted.dtype)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        begin, end = _bounds(index, shape)
        made = np.empty([b - a for a, b in zip(begin, end, strict=True)], dtype)
        for number, piece in enumerate(pieces):
            first = tuple(map(max, begin, piece.begin))
            last = tuple(map(min, end, piece.end))
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            inner = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, piece.begin, strict=True))
            outer = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, begin, strict=True))
            made[outer] = read(number, inner)
        return made

    if isinstance(wanted, np.ndarray):
        return part(tuple(slice(0, size) for size in shape))
    return placed(shape, wanted.sharding, part)


def _bounds(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns where an index of slices begins and ends on every axis."""
    pairs = [one.indices(size)[:2] for one, size in zip(index, shape, strict=True)]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
