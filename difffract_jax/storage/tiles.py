"""Matrices cut into tiles, each of which lies in one piece: what a host of a mesh needs of one is then a few ranges.

A matrix `[rows columns]` that lies row by row has its rows in one piece each, so that a shard of some columns is as
many short ranges as there are rows: a hundred thousand for a stack of FLUX's blocks. Cut into R x C tiles, as `Tiling`
says, it lies tile by tile, and a shard of an R-th of its rows or a C-th of its columns, or of both, is whole tiles.

1. `tiled` and `untiled` turn an array into the order of its tiles and back; leading axes, as that of a stack's layers,
   stay outermost.
2. `spans` says which bytes hold a part of an array; `part_of` cuts it out of the array as it is stored.
3. Tilings stand in the metadata of a safetensors file, `TILES`; the header has the shape as it is stored.

NumPy only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np

TILES = "difffract_tiles"
"""Key of a safetensors file's metadata: the tilings of its tensors, by name, as JSON."""
Index = tuple[slice, ...]
"""A slice for each axis of an array, each with its beginning and end."""
Span = tuple[int, int]
"""First byte, and past the last one."""


class Tiling(NamedTuple):
    """How the last two axes of an array are cut.

    Attributes:
        rows: parts of the last axis but one; they divide it.
        columns: parts of the last axis; they divide it.
        by_column: whether tiles of the same columns follow one another; else those of the same rows do.
    """

    rows: int
    columns: int
    by_column: bool

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in which an array is stored.

        Args:
            shape: of the array.

        Example:
            >>> Tiling(2, 4, True).stored((3, 10, 8))
            (3, 4, 2, 5, 2)
        """
        *lead, rows, columns = shape
        grid = (self.columns, self.rows) if self.by_column else (self.rows, self.columns)
        return (*lead, *grid, rows // self.rows, columns // self.columns)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of an array by that in which it is stored.

        Raises:
            ValueError: if it is not stored in these tiles.
        """
        *lead, _, _, rows, columns = stored
        shape = (*lead, rows * self.rows, columns * self.columns)
        if min(self[:2]) < 1 or self.stored(shape) != tuple(stored):
            raise ValueError(f"{stored} is not the shape of {self}")
        return shape


def tiled(array: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Returns an array in the order of its tiles, with the shape in which it is stored.

    Args:
        array: of at least two axes.
        tiling: how its last two are cut.
    """
    *lead, rows, columns = array.shape
    cut = array.reshape(*lead, tiling.rows, rows // tiling.rows, tiling.columns, columns // tiling.columns)
    return np.ascontiguousarray(np.moveaxis(cut, -2, -4) if tiling.by_column else np.swapaxes(cut, -3, -2))


def untiled(stored: np.ndarray, tiling: Tiling) -> np.ndarray:
    """Returns a copy of an array, by what `tiled` made of it.

    Args:
        stored: in the order of its tiles.
        tiling: how it is cut.
    """
    cut = np.moveaxis(stored, -4, -2) if tiling.by_column else np.swapaxes(stored, -3, -2)
    return cut.reshape(tiling.shape(stored.shape)).copy() if cut.base is None else _joined(cut, tiling, stored)


def _joined(cut: np.ndarray, tiling: Tiling, stored: np.ndarray) -> np.ndarray:
    made = np.empty(cut.shape, cut.dtype)
    made[...] = cut
    return made.reshape(tiling.shape(stored.shape))


def full_index(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """Returns an index with a slice for every axis.

    Args:
        index: slices of step 1 of the first axes.
        shape: of the array.
    """
    given = [*index, *[slice(None)] * (len(shape) - len(index))]
    return tuple(slice(*one.indices(size)[:2]) for one, size in zip(given, shape, strict=True))


def spans(shape: tuple[int, ...], itemsize: int, tiling: Tiling | None, index: Index) -> list[Span]:
    """Returns the bytes that hold a part of an array, counted from its first one, in their order.

    Of a matrix without tiles, or of a tile, whole rows are meant: a part of the columns alone is in many short ranges.

    Args:
        shape: of the array.
        itemsize: bytes of a value.
        tiling: how it is cut; None if it lies row by row.
        index: of the part.
    """
    if any(one.start >= one.stop for one in index):
        return []
    lead = tuple(shape[:-2])
    rows, columns = (*(1, 1), *shape)[-2:] if len(shape) != 1 else (shape[0], 1)
    of_rows, of_columns = (*[slice(0, 1)] * 2, *index)[-2:] if len(shape) != 1 else (index[0], slice(0, 1))
    pieces = list(_pieces(rows, columns, tiling or Tiling(1, 1, False), of_rows, of_columns))
    found: list[list[int]] = []
    for place in product(*(range(one.start, one.stop) for one in index[:-2])):
        base = int(np.ravel_multi_index(place, lead)) if lead else 0
        for begin, end in pieces:
            first, last = (itemsize * (base * rows * columns + bound) for bound in (begin, end))
            if found and found[-1][1] == first:
                found[-1][1] = last
            else:
                found.append([first, last])
    return [(begin, end) for begin, end in found]


def _pieces(rows: int, columns: int, tiling: Tiling, of_rows: slice, of_columns: slice) -> Iterator[Span]:
    """Yields the values of a matrix that hold a part of it, as ranges of numbers in the order in which they lie."""
    height, width = rows // tiling.rows, columns // tiling.columns
    down = range(of_rows.start // height, -(-of_rows.stop // height))
    across = range(of_columns.start // width, -(-of_columns.stop // width))
    ordered = ((r, c) for c in across for r in down) if tiling.by_column else product(down, across)
    for r, c in ordered:
        number = c * tiling.rows + r if tiling.by_column else r * tiling.columns + c
        first = max(of_rows.start, r * height) - r * height
        last = min(of_rows.stop, (r + 1) * height) - r * height
        yield (number * height + first) * width, (number * height + last) * width


def part_of(stored: np.ndarray, shape: tuple[int, ...], tiling: Tiling, index: Index) -> np.ndarray:
    """Returns a copy of a part of an array that is stored in tiles; nothing else of it is read.

    Args:
        stored: the array in the order of its tiles.
        shape: of the array.
        tiling: how it is cut.
        index: of the part.
    """
    *lead, of_rows, of_columns = index
    made = np.empty([one.stop - one.start for one in index], stored.dtype)
    if not made.size:
        return made
    height, width = shape[-2] // tiling.rows, shape[-1] // tiling.columns
    for r in range(of_rows.start // height, -(-of_rows.stop // height)):
        for c in range(of_columns.start // width, -(-of_columns.stop // width)):
            tile = stored[(*lead, *((c, r) if tiling.by_column else (r, c)))]
            top, left = r * height, c * width
            rows = slice(max(of_rows.start, top), min(of_rows.stop, top + height))
            columns = slice(max(of_columns.start, left), min(of_columns.stop, left + width))
            to_rows = slice(rows.start - of_rows.start, rows.stop - of_rows.start)
            to_columns = slice(columns.start - of_columns.start, columns.stop - of_columns.start)
            inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
            made[..., to_rows, to_columns] = tile[(..., *inner)]
    return made


def written(tilings: Mapping[str, Tiling]) -> dict[str, str]:
    """Returns what a file's metadata says of tilings; nothing of none.

    Args:
        tilings: by name of the tensor.
    """
    return {TILES: json.dumps({name: list(tiling) for name, tiling in tilings.items()})} if tilings else {}


def read(metadata: Mapping[str, str]) -> dict[str, Tiling]:
    """Returns the tilings that a file's metadata speaks of.

    Args:
        metadata: of the file.

    Raises:
        ValueError: if it does not say what a tiling is.
    """
    record: Any = json.loads(metadata.get(TILES, "{}"))
    found = {}
    for name, (rows, columns, by_column) in record.items():
        if type(rows) is not int or type(columns) is not int or type(by_column) is not bool:
            raise ValueError(f"the tiling of {name}")
        found[str(name)] = Tiling(rows, columns, by_column)
    return found


def cuts(shape: tuple[int, ...], itemsize: int, tiling: Tiling | None) -> Iterator[int]:
    """Yields where, counted in bytes from an array's first one, its matrices and their tiles end.

    Args:
        shape: of the array.
        itemsize: bytes of a value.
        tiling: how it is cut.
    """
    matrix = prod(shape[-2:]) if len(shape) > 1 else prod(shape)
    each = matrix // (tiling.rows * tiling.columns if tiling else 1)
    yield from range(each * itemsize, prod(shape) * itemsize + 1, max(1, each * itemsize))
