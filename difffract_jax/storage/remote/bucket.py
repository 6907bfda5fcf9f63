"""One bucket, with patience and clear words: what the rest of this package asks for.

Every request goes through `Patience.until`, so that what may pass is asked for again; when it does not pass, it ends in
a `UserError` that names the path.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import Address
from difffract_jax.storage.remote.failures import Answered, absent, explained
from difffract_jax.storage.remote.gcs import GoogleBucket
from difffract_jax.storage.remote.objects import Stat, check_digests, crc32c_of
from difffract_jax.storage.remote.patience import Patience
from difffract_jax.storage.remote.s3 import AmazonBucket

T = TypeVar("T")
BLOCK = 2**25
"""Bytes of one request of a large read."""
PATIENCE = Patience()
"""How often requests are made, of buckets that are opened from now on."""
_SETTINGS = ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID")


@runtime_checkable
class Client(Protocol):
    """What `gcs` and `s3` offer: one request a call, which raises a `StorageError` when it fails."""

    part: int

    def stat(self, key: str) -> Stat | None:
        """Returns what the bucket says of an object, None if there is none of that key."""
        ...

    def read(self, of: Stat, begin: int, end: int) -> bytes:
        """Returns bytes `begin` to before `end` of an object."""
        ...

    def page(self, prefix: str, token: str) -> tuple[list[Stat], str]:
        """Returns some of the objects whose keys begin with a prefix, and the token of the next page."""
        ...

    def write(self, key: str, content: bytes, *, over: str | None = None) -> None:
        """Writes an object; with `over` only in place of that version, "" for none."""
        ...

    def upload(self, key: str, file: Path, patiently: Callable[[Callable[[], Any]], Any]) -> None:
        """Writes an object from a file in parts."""
        ...

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Removes an object; with `version` only that one."""
        ...


class Bucket:
    """One bucket; keys are those of its objects.

    Attributes:
        at: its address.
        client: what speaks its protocol.
        patience: how often requests are made.
    """

    def __init__(self, at: Address, client: Client, patience: Patience | None = None) -> None:
        """Takes a client; nothing is asked yet."""
        self.at, self.client, self.patience = at._replace(key=""), client, patience or PATIENCE

    def stat(self, key: str) -> Stat | None:
        """Returns size, version and checksum of an object; None if there is none.

        Raises:
            UserError: if the bucket cannot be asked.
        """
        return self._patiently(lambda: self.client.stat(key), key, "read")

    def known(self, key: str) -> Stat:
        """Returns size, version and checksum of an object.

        Raises:
            UserError: if there is none, or the bucket cannot be asked.
        """
        stat = self.stat(key)
        if stat is None:
            raise UserError(absent(self.at / key))
        return stat

    def read(self, key: str) -> bytes:
        """Returns an object's bytes, held against its checksum."""
        return self.read_version(self.known(key))

    def read_version(self, of: Stat) -> bytes:
        """Returns the bytes of one version of an object, held against its checksum.

        Args:
            of: the version, as `stat` returns it.

        Raises:
            UserError: if it cannot be read, or another version is there by now.
        """
        return self.again(lambda: b"".join(self.blocks(of)), of.key)

    def read_range(self, of: Stat, begin: int, end: int, check: Callable[[bytes], None] | None = None) -> bytes:
        """Returns bytes `begin` to before `end` of a version of an object.

        Args:
            of: the version.
            begin: first byte.
            end: past the last byte.
            check: raises `Damaged` for bytes that are to be asked for again.

        Raises:
            UserError: if it cannot be read, or was changed since `of` was asked for.
        """

        def request() -> bytes:
            content = self.client.read(of, begin, end)
            if check is not None:
                check(content)
            return content

        return self.again(request, of.key)

    def again(self, request: Callable[[], T], key: str) -> T:
        """Calls what reads an object until it raises no error that passes.

        Args:
            request: raises `StorageError`; it begins anew each time.
            key: of the object.

        Raises:
            UserError: if the last error does not pass.
        """
        return self._patiently(request, key, "read")

    def blocks(self, of: Stat) -> Iterator[bytes]:
        """Yields an object's bytes in blocks, and holds them against its checksum after the last one.

        Raises:
            Damaged: if they differ from it; what was yielded must be dropped, see `again`.
            UserError: if it cannot be read, or was changed since `of` was asked for.
        """
        md5, crc32c, several = hashlib.md5(), "", of.size > BLOCK
        for begin in range(0, of.size, BLOCK):
            block = self.read_range(of, begin, min(begin + BLOCK, of.size))
            if several and of.md5:
                md5.update(block)
            elif several and of.crc32c:
                crc32c = crc32c_of(block, crc32c)
            yield block
        if several:
            check_digests(of, md5.hexdigest() if of.md5 else "", crc32c)

    def below(self, folder: str) -> list[Stat]:
        """Returns the objects below a folder, in the order of their keys.

        Args:
            folder: of the bucket; "" for all of it.
        """
        prefix, token, listed = f"{folder}/" if folder else "", "", []
        while True:
            page, token = self._patiently(lambda token=token: self.client.page(prefix, token), folder, "listed")
            listed += page
            if not token:
                return sorted(stat for stat in listed if not stat.key.endswith("/"))

    def write(self, key: str, content: bytes) -> None:
        """Writes an object, which is visible whole or not at all."""
        self._patiently(lambda: self.client.write(key, content), key, "written")

    def create(self, key: str, content: bytes) -> bool:
        """Writes an object if there is none of its key; says whether it is ours now.

        Args:
            key: of the object.
            content: that nobody else would write.
        """
        return self._write_over(key, content, "")

    def replace(self, of: Stat, content: bytes) -> bool:
        """Writes an object in place of one version of it; says whether it is ours now, else another one is there.

        Of several that replace the same version at once, one does: the server compares and writes in one step.

        Args:
            of: the version, as `stat` returns it.
            content: that nobody else would write.
        """
        return self._write_over(of.key, content, of.version)

    def _write_over(self, key: str, content: bytes, version: str) -> bool:
        try:
            self._patiently(lambda: self.client.write(key, content, over=version), key, "written")
        except UserError as error:
            if not _is_other(error):
                raise
            return self._holds(key, content)  # our own first try may have arrived, and its answer was lost
        return True

    def _holds(self, key: str, content: bytes) -> bool:
        of = self.stat(key)
        try:
            return of is not None and self.read_version(of) == content
        except UserError:
            if self.stat(key) == of:
                raise
            return False  # another process has written it since, or removed it

    def upload(self, key: str, file: Path) -> None:
        """Writes an object from a file, a large one in parts; it is visible whole or not at all."""
        if file.stat().st_size <= self.client.part:
            return self.write(key, file.read_bytes())
        with explained(self.at / key, "written"):
            self.client.upload(key, file, lambda request: self.patience.until(request, str(self.at / key)))

    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is gone already."""
        self._patiently(lambda: self.client.delete(key), key, "deleted")

    def delete_version(self, of: Stat) -> bool:
        """Removes one version of an object; says whether nothing is there any more, else another one is.

        Args:
            of: the version, as `stat` returns it.
        """
        try:
            self._patiently(lambda: self.client.delete(of.key, version=of.version), of.key, "deleted")
        except UserError as error:
            if not _is_other(error):
                raise
            return self.stat(of.key) is None
        return True

    def _patiently(self, request: Callable[[], T], key: str, doing: str) -> T:
        address = self.at / key if key else self.at
        with explained(address, doing):
            return self.patience.until(request, str(address))


def _is_other(error: UserError) -> bool:
    """Says whether a server refused a condition: the object is not, or no longer, of the version that was named."""
    cause = error.__cause__
    return isinstance(cause, Answered) and (cause.status in (409, 412) or cause.status == 404 and not cause.bucket)


def open_bucket(address: Address) -> Bucket:
    """Returns the bucket of an address, the same for the same credentials and endpoint.

    Raises:
        UserError: if its client is not installed.
    """
    return _opened(address.scheme, address.bucket, tuple(os.environ.get(name, "") for name in _SETTINGS))


@functools.lru_cache(maxsize=16)
def _opened(scheme: str, bucket: str, settings: tuple[str, ...]) -> Bucket:
    del settings  # tell clients apart
    address = Address(scheme, bucket, "")
    with explained(address, "read"):
        return Bucket(address, GoogleBucket(bucket) if scheme == "gs" else AmazonBucket(bucket))
