"""A directory that takes long to write: what is finished outlives an interruption, and the next call goes on there.

1. The output is held by its lock, and refused if it is occupied, before any work.
2. `Output.begin` names what is made: the source and the settings. Work in progress lies beside the output, in
   `.NAME.TOKEN.partial` with a token of that; of another source or other settings it is removed. A journal in it lists
   what is finished, a line each, with a checksum that is compared before it is used again.
3. When the block ends well the files get the output's name by one rename. When it fails or is interrupted, what is
   finished stays, and a line of the log says so; without anything finished nothing stays.
4. An output in a bucket is made on the cache's disk, and published at the end; where that fails, all of it stays there,
   and the next call has nothing left to do but to publish it.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.storage.files import check_vacant, publish
from difffract_jax.storage.locks import sole_writer
from difffract_jax.storage.remote.addresses import is_remote, parse_address
from difffract_jax.storage.remote.outputs import kept_for
from difffract_jax.storage.remote.publication import publish as publish_remotely

JOURNAL = "journal.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG = logging.getLogger(__name__)


class Output:
    """A directory that is being written.

    Attributes:
        target: its name when it is complete.
        files: where its files lie until then.
        finished: name of what is finished -> its checksum.
    """

    def __init__(self, target: Path):
        """Takes the name; nothing is written before `begin`."""
        self.target, self.finished = target, dict[str, int]()
        self._home: Path | None = None

    @property
    def files(self) -> Path:
        """Where the files lie until the directory is complete."""
        assert self._home is not None, "nothing has begun"
        return self._home / "files"

    def begin(self, identity: str, size: int) -> None:
        """Opens the work in progress on this output, or begins it.

        Args:
            identity: says all that the files depend on.
            size: bytes that will be written in all.

        Raises:
            UserError: if the disk has not as much room.
        """
        token = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._home = self.target.with_name(f".{self.target.name}.{token}.partial")
        for other in self.target.parent.glob(f".{self.target.name}.*.partial"):
            if other != self._home and (other / JOURNAL).is_file():
                _LOG.info("%s, work on another source or with other settings, is removed.", other)
                shutil.rmtree(other, ignore_errors=True)
        self.files.mkdir(parents=True, exist_ok=True)
        self.finished = _read_journal(self._home / JOURNAL)
        held = sum(512 * path.stat().st_blocks for path in self.files.rglob("*"))
        free = shutil.disk_usage(self._home).free
        needed = max(0, size - held)
        if needed > free:
            raise UserError(
                f"{self.target} needs {needed:,} bytes, but its disk has {free:,}; make room, or name another output."
            )
        if self.finished:
            _LOG.info("Work on %s goes on where it was interrupted, with %s finished.", self.target, gigabytes(held))

    def finish(self, name: str, checksum: int) -> None:
        """Notes that something is finished.

        Args:
            name: of what it is.
            checksum: of its bytes.
        """
        assert self._home is not None, "nothing has begun"
        self.finished[name] = checksum
        with (self._home / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, checksum]) + "\n")

    def forget(self, *names: str) -> None:
        """Takes back that something is finished, as its bytes are no longer there."""
        for name in names:
            self.finished.pop(name, None)

    def discard(self) -> None:
        """Removes what was done so far, which is of no use."""
        self.finished = {}

    def publish(self, *, overwrite: bool) -> None:
        """Gives the files the output's name."""
        publish(self.files, self.target, overwrite)

    def leave(self) -> None:
        """Ends the work: keeps what is finished of an output that is not complete, and says so, or removes it."""
        if self._home is None:
            return
        if not self.finished or not self.files.is_dir():
            shutil.rmtree(self._home, ignore_errors=True)
            return
        held = sum(512 * path.stat().st_blocks for path in self.files.rglob("*"))
        _LOG.info(
            "%s of %s are kept in %s; the same call goes on from there.", gigabytes(held), self.target, self._home
        )


@contextmanager
def resumable_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Output]:
    """Hands out an `Output` that becomes `path` when the block ends well; see the module.

    Args:
        path: directory to write.
        overwrite: replace an existing one once the new one is complete.

    Raises:
        UserError: if the output is occupied or another process writes it; if the disk is full.
    """
    remote = is_remote(path)
    if remote:
        check_vacant(path, overwrite=overwrite)
    target = kept_for(path) if remote else Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with sole_writer(target):
        check_vacant(path, overwrite=overwrite)
        output = Output(target)
        try:
            yield output
            if remote:
                publish_remotely(output.files, parse_address(path), overwrite=overwrite)
                output.discard()
            else:
                output.publish(overwrite=overwrite)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(f"The disk of {path} is full; make room and run the same again.") from None
        finally:
            output.leave()
    if remote:
        with suppress(OSError):
            target.parent.rmdir()


def checksum_of(path: Path) -> int:
    """Returns the checksum of a file's bytes; -2 where there is none."""
    if not path.is_file():
        return -2
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def gigabytes(count: int) -> str:
    """Returns a number of bytes for people.

    Example:
        >>> gigabytes(33_742_000_000), gigabytes(479_830)
        ('33.7 GB', '0.5 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"


def _read_journal(path: Path) -> dict[str, int]:
    """Reads what is finished; a line that was cut off by the interruption counts as none."""
    if not path.is_file():
        return {}
    found: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            name, checksum = json.loads(line)
        except (ValueError, TypeError):
            continue
        found[name] = checksum
    return found
