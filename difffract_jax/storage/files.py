"""Files: writes that happen whole or not at all, and the safetensors format, read and written tensor by tensor.

1. `atomic_directory` and `atomic_file` let a caller write beside the target and rename on success. A directory has one
   writer at a time, see `locks.py`.
2. `TensorFile` memory-maps a safetensors file: eight bytes of header length, a JSON header (name -> type, shape, byte
   range), then the bytes. A tensor costs no memory until it is read.
3. `write_tensors` writes that format from an iterator, so that one tensor is in memory at a time; `shards.py` splits
   large sets into several files.

NumPy only: nothing here knows about JAX.
"""

import json
import math
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.locks import sole_writer

LONGEST_HEADER = 10**8
"""Bytes; the format's own limit, which the first bytes of files of other formats exceed when read as a length."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The types of the safetensors format that are understood, as NumPy types."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}

_BEGINNINGS = (
    (b"\x93NUMPY", "is an array of NumPy, not the weights of a model; give a .safetensors file"),
    (b"GGUF", "is a GGUF file, quantised; take safetensors in bf16, as huggingface.co/black-forest-labs has them"),
    (b"PK\x03\x04", "is a PyTorch file; load it with PyTorch and write its tensors with safetensors.torch.save_file"),
    (b"\x80", "is a PyTorch file; load it with PyTorch and write its tensors with safetensors.torch.save_file"),
    (b"version https://git-lfs", "is a placeholder of Git LFS and not the weights; run `git lfs pull` beside it"),
    (b"<", "is a web page and not the weights; download it again, logged in where the model asks for it"),
)
"""What files that are taken for safetensors begin with, what they are, and what to do."""


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    Attributes:
        dtype: its type, a key of `DTYPES` or a code that is not understood.
        shape: its shape.
        begin: offset of its first byte from the end of the header.
        end: offset past its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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
        self.path = path
        self._stamp = _stamp(path.stat())
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                file.seek(0)
                raise UserError(f"{path} {_described(file.read(80))}.")
            self.tensors, self.metadata = _parse_header(path, file.read(length))
        self._start = 8 + length
        promised = max((info.end for info in self.tensors.values()), default=0)
        # A plain array over the map: `np.memmap` itself would make every slice and transpose a memmap object.
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
        self.missing_bytes = max(0, promised - (size - self._start))

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        raw = self._bytes[self._start + info.begin : self._start + info.end]
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

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
        shape = info.shape if number is None else info.shape[1:]
        count, start = size_of(DTYPES[info.dtype], shape), self._start + info.begin
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
            now = _stamp(self.path.stat())
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


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Returns what tells one state of a file from another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _described(beginning: bytes) -> str:
    """Says what a file is that is not a safetensors file, and what to do, by its first bytes."""
    if beginning.startswith(b"PK") and b".npy" in beginning:
        return "is an .npz file of NumPy, such as a graph, not the weights of a model; give a .safetensors file"
    known = [text for magic, text in _BEGINNINGS if beginning.lstrip().startswith(magic)]
    # A header's length, as any byte, may be that of another format; but the header itself opens with a brace.
    if known and (beginning[8:9] != b"{" or beginning.startswith(b"GGUF")):
        return known[0]
    return "is truncated or not a safetensors file; download or copy it again"


def _parse_header(path: Path, raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
        for info in tensors.values():
            if not all(type(number) is int and number >= 0 for number in (*info.shape, info.begin, info.end)):
                raise ValueError("a size is not a whole number, or negative")
            if info.dtype in DTYPES and info.end - info.begin != size_of(DTYPES[info.dtype], info.shape):
                raise ValueError("a tensor's bytes do not match its shape")
        return tensors, metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} has no valid safetensors header; download or copy it again.") from None


@contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hands out a temporary directory that becomes `path` when the block ends well, and is removed otherwise.

    An interrupt counts as a failure too. An existing target is refused unless it is empty or `overwrite` is given, and
    then replaced only once the new one is complete. Of several writers at a time the first one holds the target.

    Raises:
        UserError: if the target is occupied, or another process is writing it or has written it meanwhile.
    """
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


def check_vacant(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuses an output directory that exists and is not empty, unless `overwrite` is given; for use before work."""
    if is_occupied(Path(path)) and not overwrite:
        raise UserError(f"{path} exists already; name another output, or pass --overwrite to replace it.")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Hands out a temporary file path that becomes `path` when the block ends well, and is removed otherwise."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as `np.savez` and Pillow go by it.
    partial = target.with_name(f".{target.stem}.{_token()}.partial{target.suffix}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], values: Iterable[Any]) -> None:
    """Writes a safetensors file one tensor at a time.

    Args:
        path: the file.
        tensors: name, type and shape of each tensor, in order.
        values: the tensors themselves, in the same order; an iterator may make each when it is asked for.
    """
    with path.open("wb") as file:
        file.write(beginning_of_file(tensors)[0])
        for value in values:
            file.write(raw_bytes(value))


def beginning_of_file(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Returns what a safetensors file begins with, and where in the file each tensor does.

    Args:
        tensors: name, type and shape of each tensor, in order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    for name, dtype, shape in tensors:
        size = size_of(dtype, shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        places[name] = offset
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
    beginning = len(text).to_bytes(8, "little") + text
    return beginning, {name: len(beginning) + place for name, place in places.items()}


def raw_bytes(value: Any) -> memoryview:
    """Returns the bytes of an array, without a copy when it is contiguous; bfloat16 has no buffer of its own."""
    return memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]


def read_array(path: Path) -> np.ndarray:
    """Reads the one array of a `.npy` file; anything else is a `UserError`."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is not a readable .npy file; write it with numpy.save.") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays, but one is wanted; write it with numpy.save.")
    return array


def size_of(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Returns the bytes of an array."""
    return math.prod(shape) * dtype.itemsize
