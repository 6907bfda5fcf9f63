"""Rows of any origin as arrays: x [rows, d_model], y [rows, d_model_out] and t [rows], read from files and checked.

    DIR/x.npy  y.npy  t.npy                    one shard; several as A.x.npy A.y.npy A.t.npy, or x_A.npy and so on
    DIR/A.npz, DIR/A.safetensors               a shard each, with the arrays x, y and t

t is the denoising time in [0, 1] and may be left out everywhere: 0 then. Any floating-point type will do. `.npy` and
`.safetensors` are memory-mapped; a `.npz` is read whole.

1. `read_directory` finds the shards and checks their shapes and types, which costs no reading.
2. `check_values` looks for what no row may hold. It is asked for every block before training sees it, and for all of
   them at once when the rows are opened, unless they are very many.
"""

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.files import TensorFile
from difffract_jax.storage.headers import DTYPES
from difffract_jax.transcoders.objective import widths

_NPY = re.compile(r"(?:(?P<before>.+)[._-])?(?P<what>[xyt])(?:[._-](?P<after>.+))?\.npy")
_LAYOUT = (
    "give a directory with x.npy, y.npy and, if wanted, t.npy, or .npz or .safetensors files with arrays of these names"
)
FLOATS = (*map(np.dtype, (np.float16, np.float32, np.float64)), np.dtype(ml_dtypes.bfloat16))


class Shard(NamedTuple):
    """Rows that came together.

    Attributes:
        name: what to call it in an error.
        x: what the transcoder reads, [rows, d_model].
        y: what it shall return, [rows, d_model_out].
        t: denoising time of each row, [rows]; None for 0 everywhere.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    t: np.ndarray | None

    @property
    def width(self) -> tuple[int, int]:
        """Channels of x and of y."""
        return self.x.shape[1], self.y.shape[1]


def read_directory(directory: Path) -> tuple[Shard, ...]:
    """Opens a directory of arrays.

    Raises:
        UserError: if there are none, or some that no rows are made of; the first that is wrong is named.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory of rows: it holds no config.json and no arrays; {_LAYOUT}.")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted(directory.iterdir()):
        name = _NPY.fullmatch(path.name)
        if name is not None:
            key = "*".join(part or "" for part in (name["before"], name["after"]))
            parts.setdefault(key, {})[name["what"]] = _read_npy(path)
        elif path.suffix in (".npz", ".safetensors"):
            parts[path.name] = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    shards = tuple(shard_of(arrays, _shard_name(directory, key)) for key, arrays in parts.items())
    if not shards:
        raise UserError(f"{directory} holds no config.json of harvested rows and no arrays; {_LAYOUT}.")
    check_alike(shards)
    return shards


def _shard_name(directory: Path, key: str) -> str:
    """Returns what to call a shard: its file, or the pattern of its `.npy` files."""
    before, star, after = key.partition("*")
    return str(directory / (f"{before}{'.' * bool(before)}*{'.' * bool(after)}{after}.npy" if star else key))


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(path, "NumPy array", error) from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # NumPy leaves a damaged archive open that it opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in ("x", "y", "t")}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise _unreadable(path, ".npz archive", error) from None


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:120].rstrip(".")
    return UserError(f"{path} cannot be read as a {kind} of numbers ({said}); write or copy it again.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    file = TensorFile(path)
    if file.missing_bytes:
        raise UserError(f"{path} is cut off by {file.missing_bytes} bytes; write or copy it again.")
    wanted = [name for name in ("x", "y", "t") if name in file.tensors]
    unknown = [name for name in wanted if file.tensors[name].dtype not in DTYPES]
    if unknown:
        raise UserError(f"{path} holds {unknown[0]} as {file.tensors[unknown[0]].dtype}; {_types()}.")
    return {name: file[name] for name in wanted}


def shard_of(arrays: Mapping[str, Any], name: str) -> Shard:
    """Makes a shard of arrays x, y and, if there is one, t.

    Args:
        arrays: by name; anything that NumPy makes an array of.
        name: of the shard.

    Raises:
        UserError: if one is missing, of another rank or type, or has another number of rows.
    """
    missing = [what for what in ("x", "y") if arrays.get(what) is None]
    if missing:
        raise UserError(f"{name} holds no array {missing[0]}; rows are x, y and, if wanted, t.")
    x, y = (_checked(arrays[what], what, name, 2) for what in ("x", "y"))
    t = None if arrays.get("t") is None else _checked(arrays["t"], "t", name, 1)
    for what, array in (("y", y), ("t", t)):
        if array is not None and len(array) != len(x):
            raise UserError(
                f"{name} has {len(x)} rows of x but {len(array)} of {what}; row i of each must be of the same moment."
            )
    return Shard(name, x, y, t)


def _checked(value: Any, what: str, name: str, rank: int) -> np.ndarray:
    """Returns an array of a rank that holds floating-point numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{what} of {name} cannot be made an array ({' '.join(str(error).split())[:120]}).") from None
    if array.dtype not in FLOATS:
        raise UserError(f"{what} of {name} holds {array.dtype}; {_types()}.")
    if array.ndim != rank:
        wanted = "[rows, channels]" if rank == 2 else "[rows]"
        raise UserError(f"{what} of {name} has shape {list(array.shape)}, but must be {wanted}; reshape it.")
    if not array.size:
        raise UserError(f"{what} of {name} is empty, of shape {list(array.shape)}; leave it out, or write its rows.")
    return array


def _types() -> str:
    return f"rows must be floating-point numbers, {', '.join(str(dtype) for dtype in FLOATS)}"


def check_alike(shards: Sequence[Shard]) -> None:
    """Refuses shards that are no parts of one whole: of several widths, or some with times and some without.

    Raises:
        UserError: naming two that differ.
    """
    first = shards[0]
    for one in shards[1:]:
        for what, ours, others in zip("xy", first.width, one.width, strict=True):
            if ours != others:
                raise UserError(
                    f"{what} has {ours} channels in {first.name} but {others} in {one.name}; all rows of a training "
                    "have the same."
                )
        if (first.t is None) != (one.t is None):
            with_t, without = (one, first) if first.t is None else (first, one)
            raise UserError(f"{with_t.name} has times t, but {without.name} has none; give them to all or to none.")


def check_values(shard: Shard, begin: int, end: int) -> None:
    """Refuses rows that are not finite in float32, and times outside [0, 1].

    Args:
        shard: whose rows.
        begin: the first.
        end: past the last.

    Raises:
        UserError: naming the first such row.
    """
    for what in ("x", "y", "t"):
        array = getattr(shard, what)
        if array is None:
            continue
        with np.errstate(over="ignore"):
            part = np.asarray(array[begin:end]).astype(np.float32)
        bad = ~np.isfinite(part)
        if bad.any():
            row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
            raise UserError(f"{what} of {shard.name} is not finite in row {begin + row}; leave out or mend such rows.")
        if what == "t" and not np.all((part >= 0) & (part <= 1)):
            row = int(np.argmax((part < 0) | (part > 1)))
            raise UserError(
                f"t of {shard.name} is {part[row]:g} in row {begin + row}, but times lie in [0, 1]; divide them."
            )


def float_rows(shard: Shard, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, y and t of some rows in float32."""
    x, y = (np.asarray(array[begin:end]).astype(np.float32) for array in (shard.x, shard.y))
    t = np.zeros(len(x)) if shard.t is None else np.asarray(shard.t[begin:end])
    return x, y, t.astype(np.float32)


def width_text(width: Any) -> str:
    """Returns a width in words: 64, or 64 to 48 where x and y differ."""
    x, y = widths(width)
    return f"{x}" if x == y else f"{x} to {y}"
