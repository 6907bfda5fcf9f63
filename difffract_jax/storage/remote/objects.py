"""Objects of a bucket: what the server says of one, and its bytes held against that."""

import base64
import hashlib
from importlib import import_module
from typing import Any, NamedTuple

from difffract_jax.storage.remote.failures import Damaged

CONNECT, READ = 10.0, 60.0
"""Seconds to wait for a connection, and for the next bytes of an answer."""


BLOCK = 2**22
"""Bytes of what a commit marker has a checksum for, and of what a read by range fetches at least."""


class Stat(NamedTuple):
    """What a bucket says of an object.

    Attributes:
        key: its name in the bucket.
        size: in bytes.
        version: changes whenever the object is written.
        md5: of its bytes, hexadecimal; "" where the server does not know it.
        crc32c: of its bytes, in base64; "" where the server does not know it.
    """

    key: str
    size: int
    version: str
    md5: str = ""
    crc32c: str = ""


def check_sums(content: bytes, of: Stat) -> None:
    """Compares a whole object's bytes with what the server says of them.

    Raises:
        Damaged: if they differ.
    """
    check_digests(of, hashlib.md5(content).hexdigest() if of.md5 else "", crc32c_of(content) if not of.md5 else "")


def check_digests(of: Stat, md5: str, crc32c: str) -> None:
    """Compares digests with those that the server knows; "" stands for one that was not computed.

    Raises:
        Damaged: if one differs.
    """
    if of.md5 and md5 and of.md5 != md5:
        raise Damaged(f"MD5 is {md5} and not {of.md5}")
    if of.crc32c and crc32c and of.crc32c != crc32c:
        raise Damaged(f"CRC32C is {crc32c} and not {of.crc32c}")


def check_recorded(sha256: str, recorded: str) -> None:
    """Compares the SHA-256 of an object's bytes with the one that its publication records, if it does.

    Raises:
        Damaged: if they differ.
    """
    if recorded and sha256 != recorded:
        raise Damaged("SHA-256 differs from the one that was recorded when it was written")


def crc32c_of(content: bytes, before: str = "") -> str:
    """Returns the CRC32C of bytes in base64; "" where the package for it is not installed.

    Args:
        content: the bytes.
        before: the sum of the bytes that precede them, if any.
    """
    try:
        module: Any = import_module("google_crc32c")
    except ImportError:
        return ""
    start = int.from_bytes(base64.b64decode(before), "big") if before else 0
    return base64.b64encode(module.extend(start, content).to_bytes(4, "big")).decode()
