"""Large weights of which only the units are fetched that are read: a sparse file, and beside it what it holds.

`lay_out` makes a file of the object's size without content; `NAME.units` beside it has a byte for every unit, 1 once it
is there, and `NAME.origin` says where it comes from. `storage.files.TensorFile` calls `Origin.fill` before it hands out
bytes. Nothing else may read such a file, so that only `cache.local_directory(..., by_range=True)` makes one.

Units are those that the directory's commit marker lists, a matrix, a tile or a part of one each; where it lists none,
blocks of 4 MiB. They are asked for by the object's version: one that was changed in the bucket is refused. Each is held
against its CRC32 in the marker; servers have checksums of whole objects alone.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import Address, parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.failures import Damaged
from difffract_jax.storage.remote.objects import BLOCK, Stat

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LONGEST = 2**25
"""Bytes of one request at most."""
AT_ONCE = 8
"""Requests at a time."""


def lay_out(path: Path, at: Address, stat: Stat, crc32: Sequence[int] = (), ends: Sequence[int] = ()) -> None:
    """Makes an empty file of an object's size, to be filled as it is read; one that is there, and may hold some, stays.

    Args:
        path: the file, in a folder of the cache.
        at: address of the object.
        stat: what its bucket says of it.
        crc32: of its units; empty where they are not known.
        ends: past the last byte of each unit; empty for blocks of 4 MiB.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"{os.getpid()}-{os.urandom(4).hex()}"
    bounds = list(ends) or [*range(BLOCK, stat.size, BLOCK), stat.size]
    origin = {"at": str(at), "stat": stat._asdict(), "ends": bounds, "crc32": list(crc32)}
    with _alone(path):
        if path.is_file() and path.stat().st_size == stat.size:
            return  # another process has laid it out meanwhile
        path.unlink(missing_ok=True)
        for name, content in (
            (f"{path.name}.units", bytes(len(bounds))),
            (f"{path.name}.origin", json.dumps(origin).encode()),
            (path.name, b""),
        ):
            partial = path.with_name(f".{name}.{own}.partial")
            with partial.open("wb") as stream:
                stream.write(content)
                stream.truncate(stat.size if name == path.name else len(content))
            partial.replace(path.with_name(name))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process lays a file out, where there are locks."""
    with path.with_name(f".{path.name}.lock").open("wb") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def origin_of(path: Path) -> "Origin | None":
    """Returns where a file is filled from; None for a file that is whole.

    Raises:
        UserError: if the file beside it is damaged.
    """
    beside = path.with_name(f"{path.name}.origin")
    if not beside.is_file():
        return None
    try:
        record: Any = json.loads(beside.read_text(encoding="utf-8"))
        ends, sums = (np.array(record[name], np.int64) for name in ("ends", "crc32"))
        return Origin(path, parse_address(record["at"]), Stat(**record["stat"]), ends, sums)
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{beside} is damaged; remove the folder {path.parent}, and run this again.") from None


class Origin:
    """Where a sparse file comes from.

    Attributes:
        at: address of the object.
        stat: what its bucket said of it when the file was laid out.
        fetched: bytes that this process has fetched.
    """

    def __init__(self, path: Path, at: Address, stat: Stat, ends: np.ndarray, crc32: np.ndarray) -> None:
        """Opens what the file holds already; arguments as for `lay_out`."""
        self.at, self.stat, self.fetched = at, stat, 0
        self._path, self._crc32 = path, crc32
        self._bounds = np.concatenate([np.zeros(1, np.int64), ends])
        self._held = np.memmap(path.with_name(f"{path.name}.units"), np.uint8, mode="r+", shape=ends.shape)

    @property
    def is_checked(self) -> bool:
        """Whether there is a sum of every unit."""
        return len(self._crc32) == len(self._held)

    def fill(self, spans: Sequence[tuple[int, int]]) -> None:
        """Fetches the units that hold some bytes and are not there yet.

        Args:
            spans: the first byte of each range, and the one past its last.

        Raises:
            UserError: if they cannot be read, or the object was changed.
        """
        wanted = np.zeros(len(self._held), bool)
        for begin, end in spans:
            if begin < end:
                first = int(np.searchsorted(self._bounds, begin, "right")) - 1
                wanted[first : int(np.searchsorted(self._bounds, end, "left"))] = True
        missing = np.flatnonzero(wanted & (self._held == 0))
        if not len(missing):
            return
        runs = self._runs(missing.tolist())
        with ThreadPoolExecutor(AT_ONCE) as pool, self._path.open("r+b") as stream:
            for (one, _), content in zip(runs, pool.map(self._read, runs), strict=True):
                stream.seek(int(self._bounds[one]))
                stream.write(content)
                self.fetched += len(content)
            stream.flush()
            # Before they are noted: a machine that goes down might keep the note, and not the bytes.
            os.fsync(stream.fileno())
        self._held[missing] = 1

    def _read(self, run: tuple[int, int]) -> bytes:
        begin, end = int(self._bounds[run[0]]), int(self._bounds[run[1]])

        def check(content: bytes) -> None:
            for number, recorded in zip(range(*run), self._crc32[run[0] : run[1]], strict=False):
                first, last = (int(bound) - begin for bound in self._bounds[number : number + 2])
                if zlib.crc32(content[first:last]) != recorded:
                    raise Damaged(f"the CRC32 of bytes {begin + first} to {begin + last} is not the recorded one")

        return open_bucket(self.at).read_range(self.stat, begin, end, check)

    def _runs(self, numbers: list[int]) -> list[tuple[int, int]]:
        """Groups units that follow one another, up to `LONGEST` bytes: the first, and the one past its last."""
        runs: list[tuple[int, int]] = []
        for number in numbers:
            if runs and runs[-1][1] == number and self._bounds[number + 1] - self._bounds[runs[-1][0]] <= LONGEST:
                runs[-1] = (runs[-1][0], number + 1)
            else:
                runs.append((number, number + 1))
        return runs


def written_bytes(folder: Path) -> int:
    """Returns the bytes that files below a folder take on the disk; blocks that were never written take none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:
            continue
        total += 512 * status.st_blocks
    return total
