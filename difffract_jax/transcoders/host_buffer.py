"""The shuffle buffer in this machine's memory, or in a file: the same rows as `buffer` serves, kept as NumPy's arrays.

1. `empty` makes the arrays; on disk they are memory-mapped from a file of their size, which is asked for at once, so
   that a disk without room says so before the first row is read. A file belongs to the process that works with it: what
   is kept of a buffer is in the checkpoints, and `discard` removes the file.
2. `write` brings new rows here and puts them in their places; `gather` takes a batch out.
3. `Ahead` prepares the next batch of a round in a thread of its own, and begins to send it, while the step before runs.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from difffract_jax.transcoders.objective import ActivationRows

FILE = "buffer.rows"
"""Name of the file in the run's directory."""


def empty(abstract: dict[str, ActivationRows], directory: Path | None = None) -> dict[str, ActivationRows]:
    """Makes a buffer without rows.

    Args:
        abstract: shape and type of its arrays.
        directory: where its file shall be, for a buffer on disk.
    """
    if directory is None:
        return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)
    directory.mkdir(parents=True, exist_ok=True)
    path, sizes = directory / FILE, [a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract)]
    discard(directory)
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, sum(sizes))
    except OSError:
        discard(directory)
        raise
    starts = iter(np.cumsum([0, *sizes])[:-1].tolist())

    def mapped(a: Any) -> np.ndarray:
        # NumPy cannot map bfloat16 by its name, but can look at the same bytes as such.
        raw = np.memmap(path, np.uint8, "r+", next(starts), a.size * a.dtype.itemsize)
        return raw.view(np.ndarray).view(a.dtype).reshape(a.shape)

    return jax.tree.map(mapped, abstract)


def discard(directory: Path) -> None:
    """Removes the file of a buffer on disk, if there is one."""
    (directory / FILE).unlink(missing_ok=True)


def restored(found: dict[str, ActivationRows], directory: Path | None = None) -> dict[str, ActivationRows]:
    """Returns a buffer that was read from a checkpoint as one that can be written; on disk, copied into its file."""
    made = empty(found, directory)
    jax.tree.map(np.copyto, made, found)
    return made


def write(old: ActivationRows, new: ActivationRows, places: Int[np.ndarray, "rows"]) -> ActivationRows:
    """Writes rows to their places; those past the end are dropped."""
    kept = np.flatnonzero(places < old.t.shape[0])
    at = places[kept]
    for mine, theirs in ((old.x, new.x), (old.y, new.y)):
        mine[:, at] = np.asarray(theirs.astype(mine.dtype, copy=False))[:, kept]
    old.t[at] = np.asarray(new.t)[kept]
    return old


def gather(parts: list[tuple[ActivationRows, Int[np.ndarray, "batch"]]]) -> ActivationRows:
    """Returns a batch of every site from the given places of each group, as NumPy's arrays of the buffer's types."""
    x, y = (np.concatenate([_taken(getattr(rows, name), at) for rows, at in parts]) for name in ("x", "y"))
    t = [np.broadcast_to(rows.t[at], (rows.x.shape[0], at.size)) for rows, at in parts]
    return ActivationRows(x, y, np.concatenate(t))


def _taken(rows: np.ndarray, at: Int[np.ndarray, "batch"]) -> np.ndarray:
    """Returns some rows of every site; as words, since NumPy copies types of its own faster."""
    words = rows.view(f"u{rows.dtype.itemsize}")
    return np.take(words, at, axis=1).view(rows.dtype)


class Ahead:
    """Batches by their number, the next one always in preparation; to be closed."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: tuple[int, Future] | None = None

    def take(self, number: int, last: int) -> Any:
        """Returns a batch, and begins with the next.

        Args:
            number: of the batch.
            last: number of the last one for which the buffer stays as it is; nothing is prepared beyond.
        """
        coming, self._coming = self._coming, None
        ready = coming is not None and coming[0] == number
        batch = coming[1].result() if ready and coming is not None else self._make(number)
        if number < last:
            self._coming = number + 1, self._thread.submit(self._make, number + 1)
        return batch

    def close(self) -> None:
        """Waits for what is in preparation, and ends the thread."""
        self._thread.shutdown()
