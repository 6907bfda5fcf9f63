"""A checkpoint's tensors by name, memory-mapped: one safetensors file, or a directory with shards and their index.

1. `Source` finds the files: the file given, or in a directory the index `STEM.safetensors.index.json`, or
   `STEM.safetensors`, for the stems that diffusers and transformers write.
2. Only headers are read. Every shard that is missing, cut off or without a valid header becomes one entry of
   `problems`; the tensors it should hold still count as present, so that it is not reported tensor by tensor.
3. A prefix that all wanted keys share is stripped, and keys without it are left out.
4. `source[key]` is a read-only view of the map.

`ArraySource` is the same for arrays that are in memory already, or mapped from another kind of file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.files import DTYPES, TensorFile

STEMS = ("diffusion_pytorch_model", "model")
FLOATS = ("F64", "F32", "F16", "BF16")


class Source:
    """A checkpoint that is read lazily; see the module docstring.

    Attributes:
        name: what to call it in messages.
        problems: everything that is wrong with the files themselves.
    """

    def __init__(self, path: str | Path, prefix: str = ""):
        """Opens a checkpoint.

        Args:
            path: a `.safetensors` file, or a directory that holds one or several with an index.
            prefix: prefix of the keys that are wanted; it is stripped.
        """
        self.name = str(path)
        self.problems: list[str] = []
        self._files: dict[str, TensorFile | None] = {}
        self._prefix = prefix
        file, weight_map = _locate(Path(path))
        for shard in dict.fromkeys(weight_map.values()):
            self._open(file.parent / shard, [key for key, name in weight_map.items() if name == shard])
        if not weight_map:
            self._add(TensorFile(file))
        self._check_types()

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._files if key.startswith(self._prefix))

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Returns every key's shape; None where it cannot be known."""
        return {key: self.shape(key) for key in self}

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Returns a tensor's shape; None when its shard cannot be read."""
        file = self._files[self._prefix + key]
        return file.tensors[self._prefix + key].shape if file else None

    def dtype(self, key: str) -> str | None:
        """Returns a tensor's type as safetensors calls it, as in BF16; None when its shard cannot be read."""
        file = self._files[self._prefix + key]
        return file.tensors[self._prefix + key].dtype if file else None

    def readable(self, key: str) -> bool:
        """Says whether the tensor is there, whole and of a type that is understood."""
        file = self._files.get(self._prefix + key)
        return file is not None and not file.missing_bytes and self.dtype(key) in DTYPES

    def is_float(self, key: str) -> bool:
        """Says whether the tensor holds floating point numbers; True when its shard cannot be read."""
        return self.dtype(key) in (*FLOATS, None)

    def __getitem__(self, key: str) -> np.ndarray:
        file = self._files[self._prefix + key]
        assert file is not None, key
        return file[self._prefix + key]

    def _open(self, path: Path, keys: list[str]) -> None:
        """Opens a shard that the index says holds `keys`."""
        try:
            file = TensorFile(path)
        except FileNotFoundError:
            self.problems.append(f"shard {path.name} is missing, which holds {len(keys)} tensors; download it again")
        except UserError:
            self.problems.append(f"shard {path.name} is truncated or no safetensors file; download it again")
        else:
            self._add(file)
            return
        self._files |= dict.fromkeys(keys)

    def _add(self, file: TensorFile) -> None:
        if file.missing_bytes:
            self.problems.append(
                f"{file.path.name} is truncated, its last {file.missing_bytes} bytes are missing; download it again"
            )
        self.problems += [f"{key} is in two shards" for key in file.tensors if key in self._files]
        self._files |= dict.fromkeys(file.tensors, file)

    def _check_types(self) -> None:
        for key in self:
            code = self.dtype(key)
            if code is not None and code not in DTYPES:
                self.problems.append(f"{key} has type {code}, expected one of {', '.join(FLOATS)}")


class ArraySource:
    """Named arrays with the interface of `Source`.

    Attributes:
        name: what to call them in messages.
        problems: everything that is wrong with the files they came from.
    """

    def __init__(self, name: str, arrays: Mapping[str, np.ndarray], problems: Iterable[str] = ()):
        """Takes the arrays as they are."""
        self.name, self.problems = name, list(problems)
        self._arrays = arrays

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Returns every key's shape."""
        return {key: array.shape for key, array in self._arrays.items()}

    def dtype(self, key: str) -> str:
        """Returns an array's type."""
        return self._arrays[key].dtype.name

    def readable(self, key: str) -> bool:
        """Says whether the array is there."""
        return key in self._arrays

    def is_float(self, key: str) -> bool:
        """Says whether the array holds floating point numbers."""
        return self._arrays[key].dtype in [DTYPES[code] for code in FLOATS]

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]


def _locate(path: Path) -> tuple[Path, dict[str, str]]:
    """Returns the file, or the index and its key -> shard table."""
    if path.is_file():
        return path, {}
    if not path.exists():
        raise UserError(f"{path} does not exist; give a directory or a .safetensors file.")
    for stem in STEMS:
        index = path / f"{stem}.safetensors.index.json"
        if index.exists():
            return index, _read_index(index)
        if (path / f"{stem}.safetensors").exists():
            return path / f"{stem}.safetensors", {}
    found = ", ".join(sorted(item.name for item in path.iterdir())) or "nothing"
    raise UserError(
        f"{path} holds no {' or '.join(f'{stem}.safetensors' for stem in STEMS)} (found {found}); "
        "other formats must be saved as safetensors first."
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is not a valid index of shards; download it again.") from None
