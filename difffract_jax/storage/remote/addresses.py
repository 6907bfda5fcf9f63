"""How a path in a bucket is written: `gs://BUCKET/KEY` or `s3://BUCKET/KEY` (pure Python).

`pathlib.Path` joins slashes in a row into one, and settings hold paths: `gs:/BUCKET/KEY` is read as the same.
"""

import re
from pathlib import Path
from typing import NamedTuple

from difffract_jax.config import UserError

EXTRAS = {"gs": "gcs", "s3": "s3"}
"""Scheme of a remote path -> the extra of this package that reads it."""
_REMOTE = re.compile(r"(gs|s3):/+(?:([^/]+)(?:/+(.*))?)?", re.DOTALL)
_COLLAPSED = re.compile(r"\b(gs|s3):/(?!/)")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]")


class Address(NamedTuple):
    """A place in a bucket.

    Attributes:
        scheme: "gs" or "s3".
        bucket: name of the bucket.
        key: of an object, or what the keys of a directory's objects begin with; "" for the bucket itself.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        """Returns the address as it is written."""
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"

    def __truediv__(self, name: str) -> "Address":
        """Returns the address of what has this name below."""
        return self._replace(key=f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """Last part of the key, or the bucket's name."""
        return self.key.rpartition("/")[2] or self.bucket


def is_remote(path: str | Path) -> bool:
    """Says whether a path lies in a bucket.

    Args:
        path: as a user writes it, or as a `Path` of that.

    Example:
        >>> is_remote("gs://bucket/graph.npz"), is_remote(Path("s3://bucket/runs")), is_remote("graph.npz")
        (True, True, False)
    """
    return str(path).startswith(("gs:/", "s3:/"))


def parse_address(path: str | Path) -> Address:
    """Reads a remote path.

    Args:
        path: for which `is_remote` holds.

    Raises:
        UserError: if it names no bucket, or one that cannot exist.

    Example:
        >>> parse_address(Path("gs://bucket/runs/a/"))
        Address(scheme='gs', bucket='bucket', key='runs/a')
    """
    match = _REMOTE.fullmatch(str(path))
    scheme = str(path).partition(":")[0]
    if match is None or not match[2]:
        raise UserError(f"{spelled(path)} names no bucket; write {scheme}://BUCKET/PATH.")
    if _BUCKET.fullmatch(match[2]) is None:
        raise UserError(
            f"{match[2]!r} in {spelled(path)} is not a possible name of a bucket, which has 3 to 222 lower-case "
            f"letters, digits, dashes, dots and underscores; write {scheme}://BUCKET/PATH."
        )
    key = re.sub("/+", "/", match[3] or "").strip("/")
    if {".", ".."} & {*key.split("/")}:
        raise UserError(
            f"{spelled(path)} holds '.' or '..' as a folder, which buckets do not have; write the path out."
        )
    return Address(match[1], match[2], key)


def spelled(path: str | Path) -> str:
    """Returns a text with every remote path in it written with two slashes, as `Path` leaves one of them.

    Args:
        path: any text, or a path.

    Example:
        >>> spelled(Path("gs://bucket/graph.npz"))
        'gs://bucket/graph.npz'
    """
    return _COLLAPSED.sub(r"\1://", str(path))
