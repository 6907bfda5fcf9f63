"""Trees of weights written while their values are made: never more than a slice of a leaf is in memory.

1. A `Leaf` is an array that is not there yet: its type, its shape, and a function that makes one slice of it at a time,
   as of one layer of a stack.
2. `stream_trees` writes what `checkpoint.save_trees` would write of the same values, byte for byte: the same files and
   the same content hashes. Leaves are made in the order in which the hash takes them in, each written to its place.
3. Finished leaves are kept by an interruption (`resumable`). The next call reads them back, which the hash needs in any
   case, and compares their checksums.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from difffract_jax.storage.checkpoint import Tilings, heading, write_config
from difffract_jax.storage.files import raw_bytes
from difffract_jax.storage.headers import beginning_of_file, size_of
from difffract_jax.storage.resumable import Output
from difffract_jax.storage.shards import shard_files, write_index
from difffract_jax.storage.tiles import Tiling, tiled, untiled

BLOCK = 2**24
"""Bytes that are read back together."""
Advance = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Leaf(NamedTuple):
    """An array that is made slice by slice.

    Attributes:
        dtype: its type.
        shape: its shape.
        count: slices that it is made of, one after the other along its leading axes.
        make: number of a slice -> its values, in the type of the array.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    count: int
    make: Callable[[int], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return size_of(self.dtype, self.shape)

    def array(self) -> np.ndarray:
        """Makes it whole."""
        if self.count == 1:
            return self.make(0).reshape(self.shape)
        made = np.empty(self.shape, self.dtype)
        slices = made.reshape(self.count, -1)
        for number in range(self.count):
            slices[number] = self.make(number).reshape(-1)
        return made


class _Progress:
    """Counts bytes and tells of them."""

    def __init__(self, total: int, advance: Advance):
        self.done, self.total, self._advance = 0, total, advance

    def add(self, count: int) -> None:
        self.done += count
        self._advance(self.done, self.total)


def stream_trees(
    trees: Mapping[str, Mapping[str, Leaf]],
    output: Output,
    config: Mapping[str, Any],
    *,
    tilings: Tilings | None = None,
    check: Callable[[], None] = lambda: None,
    advance: Advance = lambda done, total: None,
) -> str:
    """Writes several trees into one directory, then its `config.json`.

    Args:
        trees: name of the file -> path of each leaf, in the tree's order, and what makes it.
        output: the directory, which has begun.
        config: facts to store, see `checkpoint.save_trees`.
        tilings: how some leaves are cut into tiles, see `checkpoint.save_trees`.
        check: called after every leaf, before it counts as finished; raises an error if its source has changed.
        advance: told of progress.

    Returns:
        The content hash over all trees.
    """
    progress = _Progress(sum(leaf.nbytes for leaves in trees.values() for leaf in leaves.values()), advance)
    cut = tilings or {}
    hashes = {
        name: _stream_tree(name, leaves, cut.get(name, {}), output, check, progress) for name, leaves in trees.items()
    }
    return write_config(output.files, hashes, config, tiled=any(cut.values()))


def _stream_tree(
    name: str,
    leaves: Mapping[str, Leaf],
    tilings: Mapping[str, Tiling],
    output: Output,
    check: Callable[[], None],
    progress: _Progress,
) -> str:
    """Writes one tree; returns its content hash."""
    kinds = {path: (leaf.dtype, leaf.shape) for path, leaf in leaves.items()}
    files = shard_files(name, kinds)
    places: dict[str, tuple[Path, int]] = {}
    for file, paths in files.items():
        beginning, offsets = beginning_of_file([(path, *kinds[path]) for path in paths], tilings)
        _begin(output, output.files / file, beginning, [f"{name}/{path}" for path in paths])
        places |= {path: (output.files / file, offset) for path, offset in offsets.items()}
    digest = hashlib.sha256()
    for path in sorted(leaves):
        leaf, entry, tiling = leaves[path], f"{name}/{path}", tilings.get(path)
        digest.update(heading(path, leaf.dtype, leaf.shape))
        known = _read_back(output, entry, leaf, tiling, *places[path], digest)
        if known is not None:
            digest = known
            progress.add(leaf.nbytes)
            continue
        checksum = 0
        for raw, stored in _write_slices(leaf, tiling, *places[path]):
            checksum = zlib.crc32(stored, checksum)
            digest.update(raw)
            progress.add(len(raw))
        check()
        output.finish(entry, checksum)
    write_index(output.files, name, kinds, files)
    return digest.hexdigest()


def _begin(output: Output, file: Path, beginning: bytes, entries: Sequence[str]) -> None:
    """Begins a file, unless an interrupted call has begun it in the same way."""
    if file.is_file():
        with file.open("rb") as stream:
            if stream.read(len(beginning)) == beginning:
                return
    output.forget(*entries)
    file.write_bytes(beginning)


def _read_back(
    output: Output, entry: str, leaf: Leaf, tiling: Tiling | None, file: Path, offset: int, digest: Any
) -> Any:
    """Returns the digest after a finished leaf, or None where there is none, or not as it was written."""
    wanted = output.finished.get(entry)
    if wanted is None:
        return None
    digest, checksum, left = digest.copy(), 0, leaf.nbytes
    matrix = () if tiling is None else tiling.stored(leaf.shape)[-4:]
    most = BLOCK if tiling is None else size_of(leaf.dtype, matrix)
    with file.open("rb") as stream:
        stream.seek(offset)
        while left and (block := stream.read(min(most, left))):
            checksum = zlib.crc32(block, checksum)
            left -= len(block)
            if tiling is not None and len(block) == most:
                block = raw_bytes(untiled(np.frombuffer(block, leaf.dtype).reshape(matrix), tiling))
            digest.update(block)
    if left or checksum != wanted:
        output.forget(entry)
        return None
    return digest


def _write_slices(
    leaf: Leaf, tiling: Tiling | None, file: Path, offset: int
) -> Iterator[tuple[memoryview, memoryview]]:
    """Makes a leaf, writes it to its place, and yields the bytes of each slice, row by row and as they are stored."""
    # A tile is of one matrix: where slices are parts of matrices, the leaf is made whole.
    by_slice = tiling is None or math.prod(leaf.shape[:-2]) % leaf.count == 0
    made = map(leaf.make, range(leaf.count)) if by_slice else [leaf.array()]
    with file.open("r+b") as stream:
        stream.seek(offset)
        for values in made:
            raw = stored = raw_bytes(values)
            if tiling is not None:
                stored = raw_bytes(tiled(np.asarray(values).reshape(-1, *leaf.shape[-2:]), tiling))
            stream.write(stored)
            yield raw, stored
