"""Local copies of what lies in buckets, bounded, and kept for the next process.

1. A copy lies in a folder whose name holds the object's version, or the identity of a directory's listing: what has
   changed in the bucket is fetched anew, and what has not is asked about in one request.
2. Files are written beside their names and renamed, so that processes at once, or killed ones, never show half a file.
3. All copies together hold at most `most_bytes()`; whole folders go, those that were used longest ago first, and none
   that this process has handed out, nor copies of directories that another one has, as it holds a lock on each.
4. An output is written in a folder of its process's own, which holds a lock on it: `clear` removes those of processes
   that are gone. What was complete and could not be published is kept for `KEPT` seconds.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.memory import parse_bytes
from difffract_jax.storage.compile_cache import user_cache
from difffract_jax.storage.remote.addresses import Address, is_remote, parse_address, spelled
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.objects import Stat, check_recorded
from difffract_jax.storage.remote.publication import AT_ONCE, Listing, listing
from difffract_jax.storage.remote.ranges import lay_out, written_bytes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER, MOST = "DIFFFRACT_REMOTE_CACHE", "DIFFFRACT_REMOTE_CACHE_BYTES"
"""Environment variables: where copies lie, and how large they may be together, as in 50GB."""
DEFAULT = "100GB"
SPARSE_FROM = 2**26
"""Bytes from which on weights of our own directories are fetched unit by unit, as they are read."""
LEFT_BEHIND = 7 * 86400
"""Seconds after which an output is taken for one that a killed process has left, where there are no locks to tell."""
YOUNG = 60.0
"""Seconds within which a folder that was just made may not be held yet."""
KEPT = 30 * 86400
"""Seconds that an output is kept which was complete and could not be published."""
_handed_out: set[Path] = set()
_held: dict[Path, int] = {}
"""Folder of a copy of a directory -> open file of the lock on it."""


def root() -> Path:
    """Returns the folder of all copies; it need not exist."""
    given = os.environ.get(FOLDER, "")
    return Path(given).expanduser().absolute() if given else user_cache() / "remote"


def most_bytes() -> int:
    """Returns the most bytes that all copies may hold together.

    Raises:
        UserError: if the setting is no size.
    """
    return parse_bytes(os.environ.get(MOST) or DEFAULT, MOST)


def local_file(path: str | Path) -> Path:
    """Returns where a file can be read on this machine: its own path, or that of a copy of a remote one.

    Args:
        path: of a file here or in a bucket.

    Raises:
        UserError: if a remote one does not exist or cannot be fetched.

    Example:
        >>> local_file("graph.npz").name
        'graph.npz'
    """
    if not is_remote(path):
        return Path(path)
    at = parse_address(path)
    bucket = open_bucket(at)
    stat = bucket.known(at.key) if at.key else None
    if stat is None:
        raise UserError(f"{at} is a whole bucket, but a file is wanted; name one in it.")
    home = _home(hashlib.sha256(repr((str(at), stat)).encode()).hexdigest()[:24])
    _fetch(at, stat, home / at.name, "")
    return home / at.name


def has_file(path: str | Path) -> bool:
    """Says whether there is a file of this path, on this machine or in a bucket.

    Args:
        path: of a file here or in a bucket.

    Raises:
        UserError: if its bucket cannot be asked.
    """
    if not is_remote(path):
        return Path(path).is_file()
    at = parse_address(path)
    return open_bucket(at).stat(at.key) is not None


def local_directory(path: str | Path, files: Collection[str] | None = None, *, by_range: bool = False) -> Path:
    """Returns where a directory can be read on this machine: its own path, or that of a copy of a remote one.

    Args:
        path: of a directory here or in a bucket.
        files: which to fetch of a remote one, by their paths within it; all if left out.
        by_range: whether large `.safetensors` files are read by `storage.files.TensorFile` alone; of these, blocks are
            fetched when they are read.

    Raises:
        UserError: if a remote one holds nothing, is not finished, or cannot be fetched.
    """
    return fetch(listing(parse_address(path)), files, by_range=by_range) if is_remote(path) else Path(path)


def fetch(of: Listing, files: Collection[str] | None = None, *, by_range: bool = False) -> Path:
    """Brings files of a directory in a bucket to this machine; see `local_directory`.

    Args:
        of: from `publication.listing`.
        files: which; all if left out.
        by_range: fetch blocks of large weights when they are read.
    """
    home, bucket = _home(of.identity), open_bucket(of.at)
    _hold(home)
    wanted = sorted(of.files if files is None else files)
    absent = [name for name in wanted if name not in of.files]
    if absent:
        raise UserError(f"{of.at} lacks {', '.join(absent)}; copy the directory again.")

    def bring(name: str) -> None:
        entry, at, target = of.files[name], of.at / name, home / name
        if _is_whole(target, entry.size):
            return
        stat = bucket.known(at.key)
        if stat.size != entry.size or (entry.version and stat.version != entry.version):
            raise UserError(f"{at} is not what its directory lists; it was changed meanwhile, so write it again.")
        if by_range and name.endswith(".safetensors") and entry.size >= SPARSE_FROM:
            make_room(0)
            lay_out(target, at, stat, entry.sums or entry.crc32, entry.ends)
        else:
            _fetch(at, stat, target, entry.sha256)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(bring, wanted))
    return home


def staging(name: str) -> Path:
    """Returns a path on the cache's disk where an output is written before it is published; its folder is made.

    Args:
        name: of the output, which its path will have.
    """
    clear()
    folder = root() / "staging" / f"{os.getpid()}-{os.urandom(4).hex()}"
    _hold(folder)
    return folder / name


def drop(folder: Path) -> None:
    """Removes a folder that `staging` has made, and lets go of it.

    Args:
        folder: that the path which it returned lies in.
    """
    shutil.rmtree(folder, ignore_errors=True)
    lock = _held.pop(folder, None)
    if lock is not None:
        folder.with_name(f".{folder.name}.held").unlink(missing_ok=True)
        os.close(lock)


def clear() -> None:
    """Removes outputs that killed processes have left half-written, and those that were kept and not fetched for long.

    Other processes may be writing meanwhile: a folder goes only if nobody holds it.
    """
    for folder in _folders("staging"):
        age = time.time() - _used(folder)
        try:
            lock = None if folder in _held else _lock(folder, exclusive=True)
        except BlockingIOError:
            continue
        if age > (LEFT_BEHIND if lock is None else YOUNG) and folder not in _held:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                folder.with_name(f".{folder.name}.held").unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)
    for folder in _folders("unpublished"):
        if time.time() - _used(folder) > KEPT:
            shutil.rmtree(folder, ignore_errors=True)


def _folders(name: str) -> list[Path]:
    """Returns the folders in a folder of the cache."""
    home = root() / name
    return [path for path in home.iterdir() if path.is_dir()] if home.is_dir() else []


def _home(identity: str) -> Path:
    """Returns the folder of a copy, which is kept from now on as long as this process lives."""
    home = root() / "copies" / identity
    home.mkdir(parents=True, exist_ok=True)
    _handed_out.add(home)
    with suppress(OSError):
        os.utime(home)
    return home


def _hold(home: Path) -> None:
    """Keeps other processes from removing a folder as long as this one lives, where there are locks."""
    while home not in _held or not home.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        file = _lock(home, exclusive=False)
        if file is None:
            return
        _held[home] = file


def _lock(home: Path, *, exclusive: bool) -> int | None:
    """Takes a lock on a folder, by a file beside it; returns the open file, None where there are no locks.

    Raises:
        BlockingIOError: if it is to be exclusive, and another process has one.
    """
    if fcntl is None:
        return None
    try:
        file = os.open(home.with_name(f".{home.name}.held"), os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return file


def _fetch(at: Address, stat: Stat, target: Path, sha256: str) -> None:
    """Copies an object to a file, if it is not there yet."""
    if _is_whole(target, stat.size):
        return
    make_room(stat.size)
    partial = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    bucket = open_bucket(at)

    def copy() -> None:
        digest = hashlib.sha256()
        with partial.open("wb") as stream:
            for block in bucket.blocks(stat):
                digest.update(block)
                stream.write(block)
            os.fsync(stream.fileno())  # or the name might outlive a machine that goes down, and the bytes not
        check_recorded(digest.hexdigest(), sha256)

    try:
        bucket.again(copy, at.key)
        partial.replace(target)
    except OSError as error:
        raise UserError(
            f"{at} cannot be copied to {root()} ({error.strerror}); make room there, or name another folder in "
            f"{FOLDER}."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _is_whole(target: Path, size: int) -> bool:
    return target.is_file() and target.stat().st_size == size


def make_room(size: int) -> None:
    """Removes copies that were used longest ago until so many more bytes fit; none that this process uses.

    Args:
        size: bytes that are to come.
    """
    copies = root() / "copies"
    if not copies.is_dir():
        return
    homes = {home: written_bytes(home) for home in copies.iterdir() if home.is_dir()}
    over = sum(homes.values()) + size - most_bytes()
    for home in sorted(homes.keys() - _handed_out, key=_used):
        if over <= 0:
            return
        try:
            lock = _lock(home, exclusive=True)
        except BlockingIOError:
            continue
        shutil.rmtree(home, ignore_errors=True)
        over -= homes[home]
        if lock is not None:
            os.close(lock)  # whoever waited for it makes the folder anew


def _used(home: Path) -> float:
    try:
        return home.stat().st_mtime
    except OSError:
        return time.time()


def refuse_remote(path: str | Path, what: str) -> None:
    """Refuses a remote path where only a local one can stand.

    Args:
        path: any path.
        what: it is, to begin the sentence with, as in "The folder of pages".

    Raises:
        UserError: if it is remote.
    """
    if is_remote(path):
        raise UserError(
            f"{what} must lie on this machine, but got {spelled(path)}; name a path here, and copy between the two."
        )
