"""Files: writes that happen whole or not at all, and the safetensors format, read and written tensor by tensor.

1. `atomic_directory` and `atomic_file` let a caller write beside the target and rename on success. A directory has one
   writer at a time, see `locks.py`.
2. `TensorFile` memory-maps a safetensors file: eight bytes of header length, a JSON header (name -> type, shape, byte
   range), then the bytes. A tensor costs no memory until it is read.
3. `write_tensors` writes that format from an iterator, so that one tensor is in memory at a time; `write_sharded`
   splits large sets into numbered shards with the `STEM.safetensors.index.json` that all readers expect.

NumPy only: nothing here knows about JAX.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.locks import sole_writer

SHARD_BYTES = 4 * 2**30
SAMPLE_BYTES = 2**20
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
            self.tensors = _parse_header(path, file.read(length))
        self._start = 8 + length
        promised = max((info.end for info in self.tensors.values()), default=0)
        # A plain array over the map: `np.memmap` itself would make every slice and transpose a memmap object.
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
        self.missing_bytes = max(0, promised - (size - self._start))

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        raw = self._bytes[self._start + info.begin : self._start + info.end]
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

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


def _parse_header(path: Path, raw: bytes) -> dict[str, TensorInfo]:
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
        for info in tensors.values():
            if not all(type(number) is int and number >= 0 for number in (*info.shape, info.begin, info.end)):
                raise ValueError("a size is not a whole number, or negative")
            if info.dtype in DTYPES and info.end - info.begin != _size(DTYPES[info.dtype], info.shape):
                raise ValueError("a tensor's bytes do not match its shape")
        return tensors
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
            _publish(partial, target, overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_occupied(target: Path) -> bool:
    """Says whether something is there already: a file, or a directory that is not empty."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Gives a complete directory its name by one rename, which fails where another process has filled the target."""
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


def open_shards(directory: Path, name: str) -> list[TensorFile]:
    """Opens the file or shards of one tree; raises `UserError` naming all that are missing or cut off."""
    index = directory / f"{name}.safetensors.index.json"
    names = {f"{name}.safetensors"}
    if index.exists():
        names = _names_in(index)
    absent = sorted(shard for shard in names if not (directory / shard).exists())
    if absent:
        raise UserError(f"{directory} lacks {', '.join(absent)}; copy the directory again.")
    files = [TensorFile(directory / shard) for shard in sorted(names)]
    cut = [f"{file.path} (by {file.missing_bytes} bytes)" for file in files if file.missing_bytes]
    if cut:
        raise UserError(f"Truncated: {', '.join(cut)}; copy the directory again.")
    return files


def _names_in(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{index} is not a valid index of shards; copy the directory again.") from None


def write_tensors(path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], values: Iterable[Any]) -> None:
    """Writes a safetensors file one tensor at a time.

    Args:
        path: the file.
        tensors: name, type and shape of each tensor, in order.
        values: the tensors themselves, in the same order; an iterator may make each when it is asked for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        size = _size(dtype, shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            file.write(raw_bytes(value))


def shard(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups names, in order, so that each group holds at most `limit` bytes; a larger tensor stands alone."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def write_sharded(
    directory: Path, stem: str, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], value: Callable[[str], Any]
) -> None:
    """Writes `STEM.safetensors`, or numbered shards of at most `SHARD_BYTES` with the index that readers expect.

    Args:
        directory: where to.
        stem: name of the file.
        tensors: type and shape of each tensor.
        value: returns a tensor by name; called once for each.
    """
    sizes = {name: _size(*kind) for name, kind in tensors.items()}
    groups = shard(sizes, SHARD_BYTES)
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
        write_tensors(directory / file, [(name, *tensors[name]) for name in names], map(value, names))
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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


def sample_hash(directory: Path, files: Sequence[str] = ()) -> str:
    """Returns a hash of the names, sizes, first and last MiB of safetensors files.

    Args:
        directory: holds them; or a file, whose own it is.
        files: their paths in the directory; all that there are if left out. Others, as the indices of shards, do not
            matter.
    """
    digest = hashlib.sha256()
    home = directory.parent if directory.is_file() else directory
    chosen = [directory] if directory.is_file() else [home / name for name in files if not name.endswith(".json")]
    for path in sorted(chosen or home.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(home).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize
