"""Files: writes that happen whole or not at all, and the safetensors format, read and written tensor by tensor.

1. `atomic_directory` and `atomic_file` let a caller write beside the target and rename on success. A directory has one
   writer at a time, see `locks.py`. A remote target is written on this machine and then published, see
   `remote.outputs`.
2. `TensorFile` memory-maps a safetensors file, see `headers.py`. A tensor costs no memory until it is read. Of one that
   is a copy of a remote one, only what is read is fetched, see `remote.ranges`.
3. `write_tensors` writes that format from an iterator, so that one tensor is in memory at a time; `shards.py` splits
   large sets into several files.

NumPy only: nothing here knows about JAX.
"""

import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.headers import (
    DTYPES,
    LONGEST_HEADER,
    TensorInfo,
    beginning_of_file,
    described,
    parse_header,
    size_of,
)
from difffract_jax.storage.locks import sole_writer
from difffract_jax.storage.remote.addresses import is_remote, parse_address
from difffract_jax.storage.remote.cache import local_file
from difffract_jax.storage.remote.outputs import refuse_taken, remote_directory, remote_file
from difffract_jax.storage.remote.publication import is_taken
from difffract_jax.storage.remote.ranges import origin_of
from difffract_jax.storage.tiles import Index, Tiling, full_index, part_of, spans, tiled


class TensorFile:
    """One safetensors file, memory-mapped: `file[name]` is a read-only view that costs no memory until it is read.

    Attributes:
        path: the file.
        tensors: what its header lists, by name.
        metadata: texts that the header holds besides, by name.
        missing_bytes: how many of the promised bytes the file lacks; 0 for a whole file.
    """

    def __init__(self, path: Path):
        """Reads the header; raises `UserError` when even that is cut off, or the file is of another format."""
        self.path, self._origin = path, origin_of(path)
        self._stamp = self._state()
        size = path.stat().st_size
        self._fetch(0, min(size, 8))
        with path.open("rb", buffering=0) as file:  # a buffer would hold what is fetched only afterwards
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                file.seek(0)
                raise UserError(f"{path} {described(file.read(80))}.")
            self._fetch(8, 8 + length)
            self.tensors, self.metadata = parse_header(path, file.read(length))
        self._start = 8 + length
        promised = max((info.end for info in self.tensors.values()), default=0)
        # A plain array over the map: `np.memmap` itself would make every slice and transpose a memmap object.
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
        self.missing_bytes = max(0, promised - (size - self._start))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, ())

    def part(self, name: str, index: Sequence[slice], numbers: Sequence[int] | None = None) -> np.ndarray:
        """Returns a part of a tensor; of a remote file, little else is fetched.

        Args:
            name: of the tensor.
            index: slices of step 1 of the first axes.
            numbers: places on the first axis that are taken for all of it; all if left out.

        Returns:
            A view that costs no memory until it is read; a copy of some `numbers`, and of what is stored in tiles.
        """
        info = self.tensors[name]
        shape = info.shape if numbers is None else (len(numbers), *info.shape[1:])
        wanted = full_index(index, shape)
        parts = [wanted]
        if numbers is not None:
            places = (range(info.shape[0])[number] for number in numbers[wanted[0]])
            parts = [(slice(place, place + 1), *wanted[1:]) for place in places]
        self._fetch_parts(info, parts)
        taken = [self._taken(info, part) for part in parts]
        if numbers is None:
            return taken[0]
        empty = np.empty((0, *(one.stop - one.start for one in wanted[1:])), DTYPES[info.dtype])
        return np.concatenate(taken) if taken else empty

    def some(self, name: str, numbers: Sequence[int]) -> np.ndarray:
        """Returns a copy of slices of a tensor along its first axis; of a remote file, nothing else is fetched.

        Args:
            name: of the tensor.
            numbers: which slices.
        """
        return self.part(name, (), numbers)

    def layer(self, name: str, number: int) -> np.ndarray:
        """Returns one slice of a tensor along its first axis, as `part` does.

        Args:
            name: of the tensor.
            number: of the slice.
        """
        place = range(self.tensors[name].shape[0])[number]
        return self.part(name, (slice(place, place + 1),))[0]

    def _taken(self, info: TensorInfo, index: Index) -> np.ndarray:
        raw = self._bytes[self._start + info.begin : self._start + info.end]
        stored = raw.view(DTYPES[info.dtype]).reshape(info.stored)
        if info.tiling is None:
            return stored[index] if index else stored  # of a scalar, `[()]` would be no array
        return part_of(stored, info.shape, info.tiling, index)

    def _fetch_parts(self, info: TensorInfo, parts: Sequence[Index]) -> None:
        if self._origin is not None:
            first, itemsize = self._start + info.begin, DTYPES[info.dtype].itemsize
            found = [span for part in parts for span in spans(info.shape, itemsize, info.tiling, part)]
            self._origin.fill([(first + begin, first + end) for begin, end in found])

    def _fetch(self, begin: int, end: int) -> None:
        """Makes sure that bytes are here, of a file that is a copy of a remote one."""
        if self._origin is not None:
            self._origin.fill([(begin, end)])

    @property
    def fetched(self) -> int:
        """Bytes that this process has fetched for it; 0 of a file that was here."""
        return 0 if self._origin is None else self._origin.fetched

    @property
    def is_checked(self) -> bool:
        """Whether every byte of it was, or will be, held against a sum that its publication recorded."""
        return self._origin is not None and self._origin.is_checked

    def _state(self) -> tuple[int, ...]:
        """Returns what tells one state of the file from another; one that is being filled changes its time only."""
        status = self.path.stat()
        return status.st_dev, status.st_ino, status.st_size, 0 if self._origin else status.st_mtime_ns

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's type, which must be one that is understood."""
        return DTYPES[self.tensors[name].dtype]

    def read(self, name: str, number: int | None = None) -> np.ndarray:
        """Reads a tensor into memory; of a file that has become shorter, the map would end the process.

        Args:
            name: of the tensor.
            number: which slice along its first axis; all if left out.

        Raises:
            UserError: if the file is gone, or shorter than it was.
        """
        info = self.tensors[name]
        if info.tiling is not None:
            self.check_unchanged()
            return self[name] if number is None else np.ascontiguousarray(self.layer(name, number))
        shape = info.shape if number is None else info.shape[1:]
        count, start = size_of(DTYPES[info.dtype], shape), self._start + info.begin
        self._fetch(start + (number or 0) * count, start + (number or 0) * count + count)
        try:
            raw = np.fromfile(self.path, np.uint8, count, offset=start + (number or 0) * count)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more ({error.strerror}); put it back.") from None
        if len(raw) < count:
            raise UserError(f"{self.path} has become shorter while it was read; download or copy it again.")
        return raw.view(DTYPES[info.dtype]).reshape(shape)

    def check_unchanged(self) -> None:
        """Refuses a file that has gone or become another since it was opened: to read on in its map ends the process.

        Raises:
            UserError: saying which of the two.
        """
        try:
            now = self._state()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read any more ({error.strerror}), but its weights are read bit by bit; put it "
                "back, and run the command again."
            ) from None
        if now != self._stamp:
            raise UserError(
                f"{self.path} has changed while its weights were read bit by bit; let the program that writes it "
                "finish, and run the command again."
            )


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hands out a temporary directory that becomes `path` when the block ends well, and is removed otherwise.

    An interrupt counts as a failure too. An existing target is refused unless it is empty or `overwrite` is given, and
    then replaced only once the new one is complete. Of several writers at a time the first one holds the target.

    Raises:
        UserError: if the target is occupied, or another process is writing it or has written it meanwhile.
    """
    if is_remote(path):
        with remote_directory(path, overwrite=overwrite) as local:
            yield local
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with sole_writer(target):
        check_vacant(path, overwrite=overwrite)
        partial = target.with_name(f".{target.name}.{_token()}.partial")
        partial.mkdir()
        try:
            yield partial
            publish(partial, target, overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_occupied(target: Path) -> bool:
    """Says whether something is there already: a file, or a directory that is not empty."""
    if is_remote(target):
        return is_taken(parse_address(target))
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Gives a complete directory its name by one rename, which fails where another process has filled the target.

    Args:
        partial: the directory.
        target: its name.
        overwrite: replace what has that name.
    """
    replaced = partial.with_suffix(".replaced")
    if overwrite:
        with suppress(FileNotFoundError):
            target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        taken = is_occupied(target)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        if not taken:
            raise
        raise UserError(f"{target} was written by another process meanwhile and stays; name another output.") from None
    finally:
        if replaced.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.unlink(missing_ok=True)


def _token() -> str:
    """Returns a part of a temporary name that no other process or thread uses."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def make_directory(path: Path) -> None:
    """Makes a directory that files are then written into; buckets have none to make."""
    if not is_remote(path):
        path.mkdir(exist_ok=True)


def check_vacant(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuses an output directory that exists and is not empty, unless `overwrite` is given; for use before work."""
    if is_remote(path):
        refuse_taken(path, overwrite=overwrite)
    elif is_occupied(Path(path)) and not overwrite:
        raise UserError(f"{path} exists already; name another output, or pass --overwrite to replace it.")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Hands out a temporary file path that becomes `path` when the block ends well, and is removed otherwise."""
    if is_remote(path):
        with remote_file(path) as local:
            yield local
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as `np.savez` and Pillow go by it.
    partial = target.with_name(f".{target.stem}.{_token()}.partial{target.suffix}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
    values: Iterable[Any],
    tilings: Mapping[str, Tiling] | None = None,
) -> None:
    """Writes a safetensors file one tensor at a time.

    Args:
        path: the file.
        tensors: name, type and shape of each tensor, in order.
        values: the tensors themselves, in the same order; an iterator may make each when it is asked for.
        tilings: how some of them are cut into tiles, by name; see `tiles.py`.
    """
    listed, cut = list(tensors), tilings or {}
    with path.open("wb") as file:
        file.write(beginning_of_file(listed, cut)[0])
        for (name, *_), value in zip(listed, values, strict=True):
            file.write(raw_bytes(tiled(np.asarray(value), cut[name]) if name in cut else value))


def raw_bytes(value: Any) -> memoryview:
    """Returns the bytes of an array, without a copy when it is contiguous; bfloat16 has no buffer of its own."""
    return memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]


def read_array(path: Path) -> np.ndarray:
    """Reads the one array of a `.npy` file; anything else is a `UserError`."""
    try:
        array = np.load(local_file(path), allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is not a readable .npy file; write it with numpy.save.") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays, but one is wanted; write it with numpy.save.")
    return array
