"""Directories that become visible whole: objects first, then a commit marker, which lists them.

1. `publish` claims the directory by an object that is written only if there is none, `difffract-writing.json`: of
   several writers at a time the first one has it.
2. It uploads every file, and records size and SHA-256 of each, and the CRC32 of every block, for reads by range. Of
   safetensors it records units too, matrices and tiles (`storage.headers.units_of`); blocks are for older releases.
3. The commit marker `difffract-complete.json` comes last, and the claim goes. What fails on the way is removed again;
   what a killed process leaves has a claim and no marker, and no reader takes it for finished.
4. `listing` is what readers see: what the marker lists; in a directory that something else wrote, such as
   `gcloud storage cp`, all that is there. Where there is a claim without a marker, it says that the directory is not
   finished.
"""

import hashlib
import json
import os
import secrets
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from difffract_jax.config import UserError
from difffract_jax.storage.headers import units_of
from difffract_jax.storage.remote.addresses import Address
from difffract_jax.storage.remote.bucket import Bucket, open_bucket
from difffract_jax.storage.remote.objects import BLOCK

MARKER, CLAIM = "difffract-complete.json", "difffract-writing.json"
FORMAT = 1
AT_ONCE = 8
"""Objects that are read or written at a time."""


class Entry(NamedTuple):
    """A file of a directory in a bucket.

    Attributes:
        size: in bytes.
        sha256: as the marker records it; "" where there is none.
        crc32: of every block of `BLOCK` bytes, as the marker records them.
        version: as the bucket lists it; "" where the marker speaks for it.
        ends: of the units of a safetensors file, as the marker records them.
        sums: CRC32 of each unit.
    """

    size: int
    sha256: str = ""
    crc32: tuple[int, ...] = ()
    version: str = ""
    ends: tuple[int, ...] = ()
    sums: tuple[int, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Entry":
        """Returns an entry by what JSON has of it.

        Args:
            record: its fields; those of units may be missing.

        Raises:
            ValueError: if it is no such record; LookupError and TypeError as well.
        """
        crc32, ends, sums = (tuple(map(int, record.get(name, ()))) for name in ("crc32", "ends", "sums"))
        size = int(record["size"])
        if len(ends) != len(sums) or list(ends) != sorted(set(ends)) or (ends and (ends[0] <= 0 or ends[-1] != size)):
            raise ValueError("units that do not make the file")
        return cls(size, str(record["sha256"]), crc32, str(record["version"]), ends, sums)


class Listing(NamedTuple):
    """A directory in a bucket.

    Attributes:
        at: its address.
        files: by their paths within it.
        marker: version of the commit marker that lists them; "" where there is none.
    """

    at: Address
    files: dict[str, Entry]
    marker: str = ""

    @property
    def name(self) -> str:
        """The address as it is written."""
        return str(self.at)

    @property
    def pinned(self) -> str:
        """The same; a bucket has no commits to pin."""
        return str(self.at)

    @property
    def identity(self) -> str:
        """Changes whenever a file of the directory does."""
        return hashlib.sha256(repr((str(self.at), self.marker, sorted(self.files.items()))).encode()).hexdigest()[:24]


def listing(at: Address) -> Listing:
    """Returns what a directory in a bucket holds.

    Args:
        at: its address.

    Raises:
        UserError: if it holds nothing, is not finished, or cannot be read.
    """
    bucket = open_bucket(at)
    marker = bucket.stat((at / MARKER).key)
    if marker is not None:
        return Listing(at, _read_marker(at, bucket.read(marker.key)), marker.version)
    start = len(at.key) + 1 if at.key else 0
    files = {stat.key[start:]: Entry(stat.size, version=stat.version) for stat in bucket.below(at.key)}
    if CLAIM in files:
        raise UserError(
            f"{at} is not finished: {_who(bucket, at)} began to write it, and it has no {MARKER}; wait until it is "
            f"done; if it was killed, write it again with --overwrite, or remove {at / CLAIM} to read what is there."
        )
    if not files:
        raise UserError(f"{at} holds nothing; check the name, of which upper and lower case count.")
    return Listing(at, files)


def is_taken(at: Address) -> bool:
    """Says whether something lies at an address: an object, or a directory of some."""
    bucket = open_bucket(at)
    return (bool(at.key) and bucket.stat(at.key) is not None) or bool(bucket.below(at.key))


def publish(folder: Path, at: Address, *, overwrite: bool = False) -> None:
    """Writes a directory into a bucket; readers see it once it is complete.

    Args:
        folder: of this machine.
        at: its address in the bucket.
        overwrite: replace what is there, or what a killed process has left; it is gone from the first upload on.

    Raises:
        UserError: if the place is taken, another process writes it, or the bucket cannot be written.
    """
    if not at.key:
        raise UserError(f"{at} is a whole bucket; name a folder in it, as in {at}/NAME.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    bucket = open_bucket(at)
    claim = _claim(bucket, at, overwrite)
    done = False
    try:
        if overwrite:
            remove(bucket, (stat.key for stat in bucket.below(at.key) if stat.key != (at / CLAIM).key))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            entries = dict(zip(files, pool.map(lambda name: upload(bucket, at, name, files[name]), files), strict=True))
        if bucket.read((at / CLAIM).key) != claim:
            raise UserError(
                f"{at} was taken over by another process meanwhile and is its own now; name another output."
            )
        mark(bucket, at, entries)
        done = True
    finally:
        if not done:
            with suppress(UserError):
                _take_back(bucket, at, claim, files)
    bucket.delete((at / CLAIM).key)


@contextmanager
def filling(at: Address, *, keep: bool = True) -> Iterator[None]:
    """Holds a directory while files are written into it one by one, and lists them in its marker at the end.

    Until the block ends, and if the process is killed, the directory is not finished. Other processes may write files
    of it meanwhile, those that the holder has told to.

    Args:
        at: its address.
        keep: leave files where they are if the block fails, as those that were there before; else they are removed.

    Raises:
        UserError: if another process writes it.
    """
    bucket, key = open_bucket(at), (at / CLAIM).key
    if not bucket.create(key, _new_claim()):
        raise UserError(_busy(bucket, at))
    done = False
    try:
        bucket.delete((at / MARKER).key)
        yield
        start = len(at.key) + 1
        listed = {stat.key[start:]: stat for stat in bucket.below(at.key) if stat.key != key}
        mark(bucket, at, {name: Entry(stat.size, version=stat.version) for name, stat in listed.items()})
        done = True
    finally:
        if not done and not keep:
            with suppress(UserError):
                remove(bucket, (stat.key for stat in bucket.below(at.key) if stat.key != key))
        bucket.delete(key)


def mark(bucket: Bucket, at: Address, entries: Mapping[str, Entry]) -> None:
    """Writes the commit marker of a directory: from then on it is there.

    Args:
        bucket: that it lies in.
        at: its address.
        entries: its files, by their paths within it.
    """
    marker = {"format_version": FORMAT, "files": {name: entry._asdict() for name, entry in entries.items()}}
    bucket.write((at / MARKER).key, json.dumps(marker, indent=1).encode())


def _new_claim() -> bytes:
    """Returns what a claim of this process holds, which no other one does."""
    about = {"process": os.getpid(), "host": socket.gethostname(), "token": secrets.token_hex(8)}
    return json.dumps(about).encode()


def _busy(bucket: Bucket, at: Address) -> str:
    return (
        f"Another process is writing {at}: {_who(bucket, at)}; wait until it is done, or name another output; if it "
        f"was killed, remove {at / CLAIM}."
    )


def _claim(bucket: Bucket, at: Address, overwrite: bool) -> bytes:
    """Takes a directory for this process; returns what its claim holds."""
    claim, key = _new_claim(), (at / CLAIM).key
    if overwrite:
        bucket.write(key, claim)
        return claim
    if is_taken(at) and bucket.stat(key) is None:
        raise UserError(f"{at} exists already; name another output, or pass --overwrite to replace it.")
    if not bucket.create(key, claim):
        raise UserError(_busy(bucket, at))
    if bucket.stat((at / MARKER).key) is not None:  # another writer has finished since it was asked
        bucket.delete(key)
        raise UserError(f"{at} was written by another process meanwhile and stays; name another output.")
    return claim


def upload(bucket: Bucket, at: Address, name: str, path: Path) -> Entry:
    """Writes a file into a directory, and returns what the marker says of it.

    Args:
        bucket: that the directory lies in.
        at: its address.
        name: of the file within it.
        path: of the file on this machine.
    """
    digest, sums, ends = hashlib.sha256(), [], _units(path)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            sums.append(zlib.crc32(block))
        stream.seek(0)
        of_units = [zlib.crc32(stream.read(end - begin)) for begin, end in pairwise((0, *ends))]
    bucket.upload((at / name).key, path)
    return Entry(path.stat().st_size, digest.hexdigest(), tuple(sums), "", ends, tuple(of_units))


def _units(path: Path) -> tuple[int, ...]:
    """Returns where the units of a file end; none of what is no safetensors file."""
    if path.suffix != ".safetensors":
        return ()
    with suppress(UserError):
        return tuple(units_of(path))
    return ()


def _take_back(bucket: Bucket, at: Address, claim: bytes, files: Iterable[str]) -> None:
    """Removes what a publication that failed has written, if the directory is still its own."""
    if bucket.read((at / CLAIM).key) == claim:
        remove(bucket, ((at / name).key for name in files))
        bucket.delete((at / CLAIM).key)


def remove(bucket: Bucket, keys: Iterable[str]) -> None:
    """Removes objects, the marker first, so that nobody reads what is half gone.

    Args:
        bucket: that they lie in.
        keys: of the objects of one directory.
    """
    ordered = sorted(keys, key=lambda key: not key.endswith(MARKER))
    if ordered:
        bucket.delete(ordered[0])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(bucket.delete, ordered[1:]))


def _who(bucket: Bucket, at: Address) -> str:
    """Returns which process a claim names."""
    try:
        about = json.loads(bucket.read((at / CLAIM).key))
        return f"process {about['process']} on {about['host']}"
    except (UserError, ValueError, LookupError, TypeError):
        return "a process"


def _read_marker(at: Address, content: bytes) -> dict[str, Entry]:
    try:
        record: Any = json.loads(content)
        version = record["format_version"]
        files = {str(name): Entry.of(one) for name, one in record["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{at / MARKER} is not a valid commit marker; write the directory again.") from None
    if version != FORMAT:
        raise UserError(f"{at / MARKER} has format_version {version}, but this release reads {FORMAT}; update it.")
    return files
