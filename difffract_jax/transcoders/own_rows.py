"""Rows that come from no model of ours, as sources that training reads: arrays, or batches that Python code makes.

1. `ArrayRows` serves shards in blocks of consecutive rows, epoch after epoch in a new order; the shuffle buffer mixes
   the rows of many blocks. The last rows of every shard, `validation_share` of all, belong to validation alone: rows
   next to each other are often alike, so that single rows drawn at random would not be new to the training.
2. `BatchRows` takes batches from an iterator as they come, cut to blocks of one size. Asked again from the beginning,
   as by a run that is resumed, it begins the iterator anew; one that cannot be begun anew is kept in memory up to
   `KEPT_BYTES`, so that a short one may be gone through many times.
3. `open_rows` and `rows_of` choose between these and a store of harvested rows.

There is one site, rows/0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from difffract_jax.config import UserError
from difffract_jax.storage.remote.cache import local_directory
from difffract_jax.transcoders.arrays import Shard, check_alike, check_values, float_rows, read_directory, shard_of
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.prompts import Split
from difffract_jax.transcoders.sites import ROWS, SiteSet
from difffract_jax.transcoders.store import StoredRows, open_store, spread_rows

BLOCK_ROWS = 1024
"""Consecutive rows that are read together."""
CHECKED_BYTES = 2 * 2**30
"""Rows up to this size are looked through when they are opened; more, only as they are read."""
KEPT_BYTES = 2 * 2**30
"""Batches up to this size are kept of an iterator that cannot be begun anew."""
SITES = SiteSet(((ROWS, (0,)),))


class Block(NamedTuple):
    """Consecutive rows of a shard.

    Attributes:
        shard: its number.
        begin: the first row.
        end: past the last.
    """

    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class ArrayRows:
    """Rows of one split of arrays; a `RowSource`.

    Attributes:
        shards: the arrays.
        blocks: of them, those of the split.
        seed: of the order of blocks.
        sae: report y for x, for an SAE.
        mesh: devices that rows are spread over, each process reading its own part; None for the default device.
    """

    shards: tuple[Shard, ...]
    blocks: tuple[Block, ...]
    seed: int
    sae: bool = False
    mesh: Mesh | None = None

    @property
    def sites(self) -> SiteSet:
        """The one site."""
        return SITES

    @property
    def width(self) -> tuple[int, int]:
        """Channels of x and of y."""
        x, y = self.shards[0].width
        return (y, y) if self.sae else (x, y)

    @property
    def timed(self) -> bool:
        """Whether rows have times of their own."""
        return self.shards[0].t is not None

    def chunk(self, number: int) -> Chunk:
        """Reads block `number` of the order; rows are filled up to those of the largest, so that shapes stay."""
        order: Any = grain.MapDataset.range(len(self.blocks)).seed(self.seed).shuffle().repeat()
        block = self.blocks[order[number]]
        shard, count = self.shards[block.shard], block.end - block.begin
        most = max(one.end - one.begin for one in self.blocks)

        def read(part: int, at: tuple[slice, ...]) -> np.ndarray:
            rows = at[-2] if part < 2 else at[0]
            begin, end = (block.begin + min(each, count) for each in (rows.start, rows.stop))
            check_values(shard, begin, end)
            x, y, t = float_rows(shard, begin, end)
            return t if part == 2 else (x if part == 0 and not self.sae else y)[None, :, at[-1]]

        shapes = (1, count, self.width[0]), (1, count, self.width[1]), (count,)
        arrays = (
            spread_rows(shape, np.dtype(np.float32), most, self.mesh, partial(read, part))
            for part, shape in enumerate(shapes)
        )
        return Chunk({ROWS.name: ActivationRows(*arrays)}, {ROWS.name: np.arange(most) < count})


def _chunk(arrays: tuple[np.ndarray, ...], size: int, sae: bool) -> Chunk:
    """Returns x, y and t as a chunk of one site, filled up to `size` rows."""
    x, y, t = arrays
    missing = size - len(t)
    wide = [np.pad(a, ((0, missing), (0, 0)))[None] for a in ((y if sae else x), y)]
    rows = ActivationRows(*map(jnp.asarray, (*wide, np.pad(t, (0, missing)))))
    return Chunk({ROWS.name: rows}, {ROWS.name: np.arange(size) < len(t)})


def array_rows(
    shards: tuple[Shard, ...], split: Split | None, share: float, seed: int, *, sae: bool = False
) -> ArrayRows:
    """Returns one split of arrays as a source.

    Args:
        shards: the arrays.
        split: which rows; None for all.
        share: share of all rows, at the ends of their shards, that belong to validation.
        seed: of the order of blocks.
        sae: report y for x.

    Raises:
        UserError: if rows hold what they may not, or a split has none.
    """
    ends = np.cumsum([0, *(len(one.x) for one in shards)])
    held_out = np.diff(np.ceil(ends * share)).astype(int).tolist()
    ranges = {
        None: [(0, len(one.x)) for one in shards],
        "train": [(0, len(one.x) - n) for one, n in zip(shards, held_out, strict=True)],
        "validation": [(len(one.x) - n, len(one.x)) for one, n in zip(shards, held_out, strict=True)],
    }[split]
    blocks = tuple(
        Block(number, at, min(at + BLOCK_ROWS, end))
        for number, (begin, end) in enumerate(ranges)
        for at in range(begin, end, BLOCK_ROWS)
    )
    if not blocks:
        raise UserError(
            f"Of {ends[-1]} rows none is left for {split} at a validation share of {share}; give more rows."
        )
    if sum(array.nbytes for one in shards for array in (one.x, one.y)) <= CHECKED_BYTES:
        for shard in shards:
            for at in range(0, len(shard.x), BLOCK_ROWS):
                check_values(shard, at, at + BLOCK_ROWS)
    return ArrayRows(shards, blocks, seed, sae)


class BatchRows:
    """Rows from an iterator of batches; a `RowSource`.

    Attributes:
        sae: report y for x, for an SAE.
        timed: whether batches have times of their own.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]], again: bool, *, sae: bool = False):
        """Looks at the first batch, which tells the widths.

        Args:
            begin: returns the iterator at its beginning.
            again: whether it does so a second time, too.
            sae: report y for x.
        """
        batches = begin()
        first = next(batches, None)
        if first is None:
            raise UserError("The iterator of rows gives no batch; each must be a pair (x, y) or a triple (x, y, t).")
        self._first = _batch(first, 0)
        self._begin, self._again, self.sae = begin, again, sae
        self.timed = self._first.t is not None
        self._next, self._blocks = 0, self._cut(chain([first], batches))

    @property
    def sites(self) -> SiteSet:
        """The one site."""
        return SITES

    @property
    def width(self) -> tuple[int, int]:
        """Channels of x and of y."""
        x, y = self._first.width
        return (y, y) if self.sae else (x, y)

    def chunk(self, number: int) -> Chunk:
        """Returns block `number`; those before it are passed over, which a resumed run does once."""
        if number < self._next:
            if not self._again:
                raise UserError("An iterator of rows cannot go back; give a function that returns a new one.")
            self._next, self._blocks = 0, self._cut(self._begin())
        while True:
            rows = next(self._blocks)
            self._next += 1
            if self._next > number:
                return _chunk(rows, BLOCK_ROWS, self.sae)

    def _cut(self, batches: Iterator[Any]) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields rows in blocks of one size, the last of an epoch smaller, without end."""
        kept: list[tuple[np.ndarray, ...]] = []
        blocks, size = 0, 0
        while True:
            before = blocks
            for block in _blocks(batches, self._first):
                blocks, size = blocks + 1, size + sum(part.nbytes for part in block)
                if not self._again and size <= KEPT_BYTES:
                    kept.append(block)
                yield block
            if not self._again:
                break
            if blocks == before:
                raise UserError("The function of rows returned an empty iterator; return a new one each time.")
            batches = self._begin()
        if size > KEPT_BYTES:
            raise UserError(
                f"The iterator of rows ended after {size / 2**30:.1f} GiB, more than is kept, before the training did; "
                "give a function that returns a new one, or fewer steps."
            )
        while True:
            yield from kept


def _blocks(batches: Iterator[Any], first: Shard) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields the rows of batches in blocks of one size; what remains is the last.

    Args:
        batches: one epoch of them.
        first: what all must be like.
    """
    held: list[tuple[np.ndarray, ...]] = []
    count = 0
    for number, value in enumerate(batches):
        batch = _batch(value, number)
        check_alike((first, batch))
        check_values(batch, 0, len(batch.x))
        held.append(float_rows(batch, 0, len(batch.x)))
        count += len(batch.x)
        while count >= BLOCK_ROWS:
            rows = tuple(np.concatenate(part) for part in zip(*held, strict=True))
            yield tuple(part[:BLOCK_ROWS] for part in rows)
            held, count = [tuple(part[BLOCK_ROWS:] for part in rows)], count - BLOCK_ROWS
    if count:
        yield tuple(np.concatenate(part) for part in zip(*held, strict=True))


Rows = ArrayRows | BatchRows | StoredRows
"""Sources of rows that are there already; all say whether their rows have times (`timed`)."""


def _batch(value: Any, number: int) -> Shard:
    """Reads what an iterator gave: a pair, a triple, or a mapping of x, y and t."""
    name = f"batch {number} of the rows"
    if isinstance(value, Mapping):
        return shard_of(value, name)
    if not isinstance(value, tuple | list) or len(value) not in (2, 3):
        raise UserError(f"{name[0].upper()}{name[1:]} must be a pair (x, y) or a triple (x, y, t) of arrays.")
    return shard_of(dict(zip("xyt", value, strict=False)), name)


def spread_source(source: Any, mesh: Mesh) -> Any:
    """Returns a source of rows that sends them to all devices of a mesh; others than arrays and stores as they are."""
    known = isinstance(source, ArrayRows | StoredRows) and mesh.size > 1
    return replace(source, mesh=mesh) if known else source


def rows_of(rows: Any, split: Split | None, share: float, seed: int, *, sae: bool = False) -> Rows:
    """Returns as a source whatever rows may be given as in Python.

    Args:
        rows: a directory; arrays, as a pair (x, y), a triple (x, y, t) or a mapping; an iterable of batches, each of
            these; or a function without arguments that returns a new iterator of batches.
        split: which rows of a directory or of arrays, None for all; batches all belong to training.
        share: share of rows that belong to validation.
        seed: of the order.
        sae: report y for x.

    Raises:
        UserError: if they are none of these, or hold what rows may not.
    """
    if isinstance(rows, str | Path):
        return open_rows(Path(rows), split, share, seed, sae=sae)
    if isinstance(rows, Mapping) or (isinstance(rows, tuple | list) and all(hasattr(part, "shape") for part in rows)):
        shard = _batch(rows, 0)._replace(name="the rows")
        return array_rows((shard,), split, share, seed, sae=sae)
    if callable(rows):
        begin: Any = rows
        return BatchRows(lambda: iter(begin()), True, sae=sae)
    if isinstance(rows, Iterable):
        return BatchRows(lambda: iter(rows), not isinstance(rows, Iterator), sae=sae)
    raise UserError(
        f"Rows cannot be read from a {type(rows).__name__}; give a directory, arrays, or batches of arrays."
    )


def open_rows(directory: Path, split: Split | None, share: float, seed: int, *, sae: bool = False) -> Rows:
    """Opens one split of a directory of rows, harvested ones or arrays of any origin; arguments as of `rows_of`.

    Of one in a bucket, what is read is fetched.

    Raises:
        UserError: if it is neither, or holds what rows may not.
    """
    directory = local_directory(directory, by_range=True)
    if (directory / "config.json").exists():
        return open_store(directory, split or "train", seed, sae=sae)
    return array_rows(read_directory(directory), split, share, seed, sae=sae)
