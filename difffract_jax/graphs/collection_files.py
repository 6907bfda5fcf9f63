"""Where the files of a collection of graphs lie: a directory of this machine, or one in a bucket.

1. `LocalFiles` appends to an index, and holds it by a lock beside it.
2. `BucketFiles` writes an index anew with every line, as objects do not grow, and holds it by a claim whose holder
   shows signs of life, `claims/INDEX/difffract-writing.json`: that of a process that was killed is taken over. A
   process that was taken over itself is stopped before it writes again.
3. Graphs go through `Graph.save` and `Graph.load`, which know both kinds of path.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from difffract_jax.config import UserError
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.locks import sole_writer
from difffract_jax.storage.remote.addresses import Address, is_remote, parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.cache import fetch
from difffract_jax.storage.remote.claims import claimed
from difffract_jax.storage.remote.publication import Listing, listing

_CLAIMS = "claims"


@runtime_checkable
class CollectionFiles(Protocol):
    """What a collection asks of the place that it lies in.

    Attributes:
        path: of the collection, as it was given.
    """

    path: Path

    def names(self) -> list[str]:
        """Returns the names of files and folders directly in the collection, those apart that only hold it."""
        ...

    def text(self, name: str) -> str | None:
        """Returns what a file holds; None if there is none."""
        ...

    def begin(self, name: str, text: str) -> None:
        """Writes a file if there is none; in a bucket, of several processes at once, all find that of one."""
        ...

    def write(self, name: str, text: str) -> None:
        """Writes a file whole, over one that is there."""
        ...

    def append(self, name: str, text: str, line: str) -> None:
        """Adds a line to a file that this process holds.

        Args:
            name: of the file.
            text: what it holds.
            line: to add.
        """
        ...

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Holds a file for a block against other processes."""
        ...


def files_of(path: str | Path) -> CollectionFiles:
    """Returns the files of a collection; nothing is read or written yet.

    Args:
        path: of this machine or in a bucket.
    """
    return BucketFiles(Path(path)) if is_remote(path) else LocalFiles(Path(path))


@dataclass(frozen=True)
class LocalFiles:
    """Files in a directory of this machine; see `CollectionFiles`."""

    path: Path

    def names(self) -> list[str]:
        """Returns what lies directly in it; see `CollectionFiles`.

        Raises:
            UserError: if it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} exists already and is not a collection of graphs; name another output.")
        every = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(each.name for each in every if not each.name.startswith("."))

    def text(self, name: str) -> str | None:
        """Returns what a file holds; None if there is none."""
        file = self.path / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def begin(self, name: str, text: str) -> None:
        """Writes a file if there is none."""
        if not (self.path / name).is_file():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        """Writes a file whole."""
        with atomic_file(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8")

    def append(self, name: str, text: str, line: str) -> None:
        """Adds a line to a file that holds `text`."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line)

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Holds a file for a block."""
        with sole_writer(self.path / name):
            yield


class BucketFiles:
    """Files in a directory of a bucket; see `CollectionFiles`."""

    def __init__(self, path: Path) -> None:
        """Names the directory."""
        self.path, self._at, self._check = path, _address(path), _unheld

    def names(self) -> list[str]:
        """Returns what lies directly in it; see `CollectionFiles`."""
        start = len(self._at.key) + 1
        tops = {stat.key[start:].partition("/")[0] for stat in open_bucket(self._at).below(self._at.key)}
        return sorted(tops - {_CLAIMS})

    def text(self, name: str) -> str | None:
        """Returns what a file holds; None if there is none."""
        bucket, key = open_bucket(self._at), (self._at / name).key
        while (of := bucket.stat(key)) is not None:
            try:
                return bucket.read_version(of).decode()
            except UserError:
                if bucket.stat(key) == of:
                    raise
                # Another share has written its index anew meanwhile, which is read then.
        return None

    def begin(self, name: str, text: str) -> None:
        """Writes a file if there is none."""
        bucket, key = open_bucket(self._at), (self._at / name).key
        if bucket.stat(key) is None:
            bucket.create(key, text.encode())

    def write(self, name: str, text: str) -> None:
        """Writes a file whole."""
        self._check()
        open_bucket(self._at).write((self._at / name).key, text.encode())

    def append(self, name: str, text: str, line: str) -> None:
        """Adds a line to a file that holds `text`."""
        self.write(name, text + line)

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Holds a file for a block."""
        with claimed(self._at / f"{_CLAIMS}/{name}") as claim:
            self._check = claim.check
            try:
                yield
            finally:
                self._check = _unheld


def fetched(path: Path, names: Callable[[Listing], list[str]]) -> Path:
    """Returns where files of a collection in a bucket can be read on this machine; others may write it meanwhile.

    Args:
        path: of the collection.
        names: which of the files that are listed.

    Raises:
        UserError: if there is nothing, or it cannot be fetched.
    """
    listed = listing(_address(path))
    while True:
        try:
            return fetch(listed, names(listed))
        except UserError:
            before, listed = listed, listing(listed.at)
            if listed.identity == before.identity:
                raise


def _address(path: Path) -> Address:
    at = parse_address(path)
    if not at.key:
        raise UserError(f"{at} is a whole bucket; name a folder in it, as in {at}/NAME.")
    return at


def _unheld() -> None:
    """Finds nothing wrong: what is written needs no claim."""
