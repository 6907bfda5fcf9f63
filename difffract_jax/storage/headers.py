"""The safetensors format: what a file begins with, and where its tensors lie.

A file has eight bytes of header length, a JSON header (name -> type, shape, byte range), then the bytes. Of tensors
that are cut into tiles (`tiles.py`) the header has the shape as it is stored, and the file's metadata how they are cut.

NumPy only: nothing here knows about JAX.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage import tiles
from difffract_jax.storage.tiles import Tiling

LONGEST_HEADER = 10**8
"""Bytes; the format's own limit, which the first bytes of files of other formats exceed when read as a length."""

SHORTEST, LONGEST = 2**16, 2**20
"""Bytes of the units by which a file in a bucket is fetched: from which on a matrix is one alone, and the most."""

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
        tiling: how it is cut into tiles, in which order its bytes then lie.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    tiling: Tiling | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in which its bytes lie."""
        return self.shape if self.tiling is None else self.tiling.stored(self.shape)


def described(beginning: bytes) -> str:
    """Says what a file is that is not a safetensors file, and what to do, by its first bytes.

    Args:
        beginning: the first bytes.
    """
    if beginning.startswith(b"PK") and b".npy" in beginning:
        return "is an .npz file of NumPy, such as a graph, not the weights of a model; give a .safetensors file"
    known = [text for magic, text in _BEGINNINGS if beginning.lstrip().startswith(magic)]
    # A header's length, as any byte, may be that of another format; but the header itself opens with a brace.
    if known and (beginning[8:9] != b"{" or beginning.startswith(b"GGUF")):
        return known[0]
    return "is truncated or not a safetensors file; download or copy it again"


def parse_header(path: Path, raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns what a header lists: where each tensor lies, by name, and the file's metadata.

    Args:
        path: of the file, for the sentence.
        raw: the header.

    Raises:
        UserError: if it is no header of this format.
    """
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
        for name, tiling in tiles.read(metadata).items():
            tensors[name] = tensors[name]._replace(shape=tiling.shape(tensors[name].shape), tiling=tiling)
        for info in tensors.values():
            if not all(type(number) is int and number >= 0 for number in (*info.shape, info.begin, info.end)):
                raise ValueError("a size is not a whole number, or negative")
            if info.dtype in DTYPES and info.end - info.begin != size_of(DTYPES[info.dtype], info.shape):
                raise ValueError("a tensor's bytes do not match its shape")
        return tensors, metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} has no valid safetensors header; download or copy it again.") from None


def beginning_of_file(
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], tilings: Mapping[str, Tiling] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Returns what a safetensors file begins with, and where in the file each tensor does.

    Args:
        tensors: name, type and shape of each tensor, in order.
        tilings: how some of them are cut into tiles.
    """
    listed = list(tensors)
    cut = {name: tilings[name] for name, *_ in listed if name in tilings} if tilings else {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | tiles.written(cut)}
    places: dict[str, int] = {}
    offset = 0
    for name, dtype, shape in listed:
        size = size_of(dtype, shape)
        stored = cut[name].stored(shape) if name in cut else shape
        header[name] = {"dtype": _CODES[dtype], "shape": list(stored), "data_offsets": [offset, offset + size]}
        places[name] = offset
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
    beginning = len(text).to_bytes(8, "little") + text
    return beginning, {name: len(beginning) + place for name, place in places.items()}


def units_of(path: Path) -> list[int]:
    """Returns where the units of a safetensors file end that are fetched and checked one by one; the last is its size.

    A matrix, or a tile of one, is a unit; what is shorter than `SHORTEST` shares one with what is short beside it, and
    none is longer than `LONGEST`.

    Args:
        path: of the file.

    Raises:
        UserError: if it is no such file.
    """
    size, ends = path.stat().st_size, list[int]()
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        tensors, _ = parse_header(path, file.read(start - 8) if start <= min(size, LONGEST_HEADER) else b"")
    bounds = [start]
    for info in sorted(tensors.values(), key=lambda info: info.begin):
        itemsize = DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 1
        shape = info.shape if info.dtype in DTYPES else (info.end - info.begin,)
        bounds += [start + info.begin + cut for cut in tiles.cuts(shape, itemsize, info.tiling)]
    last = before = 0
    for bound in [*(bound for bound in bounds if bound < size), size]:
        # What is small goes together, but never with what is not: who needs a bias would read a tile of a matrix.
        ends_here = (before,) * (before > last and bound - before >= SHORTEST)
        ends_here += (bound,) * (bound - (ends_here or (last,))[0] >= SHORTEST or bound == size)
        for end in ends_here:
            ends += [*range(last + LONGEST, end, LONGEST), *[end] * (end > last)]
            last = max(last, end)  # of a file that is not valid tensors may overlap
        before = bound
    return ends


def size_of(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Returns the bytes of an array."""
    return math.prod(shape) * dtype.itemsize
