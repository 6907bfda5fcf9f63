"""One writer at a time: an output is held by a lock beside it, which goes with the process, however it ends.

The lock is on the file `.NAME.lock` next to the output. Where that file cannot be made, or the file system has no
locks, outputs are written without; directories are still published by one rename, see `files.atomic_directory`. In a
bucket an object is the lock, see `remote.publication.filling`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import is_remote, parse_address
from difffract_jax.storage.remote.publication import filling

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def sole_writer(path: str | Path) -> Iterator[None]:
    """Holds an output for this block, against other processes and other threads of this one.

    Args:
        path: file or directory that is going to be written.

    Raises:
        UserError: if another block holds it.
    """
    if is_remote(path):
        with filling(parse_address(path)):
            yield
        return
    lock = Path(os.path.realpath(path))
    lock = lock.with_name(f".{lock.name or 'root'}.lock")
    held = _held(lock, path)
    try:
        yield
    finally:
        if held is not None:
            # While it is still held, so that nobody waits for a file that is no longer there.
            lock.unlink(missing_ok=True)
            os.close(held)


def _held(lock: Path, path: str | Path) -> int | None:
    """Takes a lock; returns its open file, or None where there are no locks."""
    while fcntl is not None:
        try:
            file = os.open(lock, os.O_RDONLY | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(
                f"Another process is writing {path}; wait until it is done, or name another output."
            ) from None
        except OSError:
            os.close(file)
            return None
        if _is_still(lock, file):
            return file
        os.close(file)
    return None


def _is_still(lock: Path, file: int) -> bool:
    """Says whether a lock's file is the one that was opened: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(file), lock.stat())
    except FileNotFoundError:
        return False
