"""A checkpoint's tensors by name, memory-mapped: one safetensors file, or a directory with shards and their index.

1. `weight_files` finds the files: the file given, or those of a directory.
2. Only headers are read. Every shard that is missing, cut off or without a valid header becomes one entry of
   `problems`; the tensors it should hold still count as present, so that it is not reported tensor by tensor.
3. Keys lose what wrappers put into them (`torch.compile`'s `_orig_mod.`). A prefix that all wanted keys share is
   stripped, and keys without it are left out; so are the scales of fp8 weights, which `quantised` explains.
4. `source[key]` is a read-only view of the map; of an fp8 weight it is an array, widened and scaled.

`ArraySource` is the same for arrays that are in memory already, or mapped from another kind of file.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from converters import quantised
from converters.weight_files import WeightFiles, locate
from difffract_jax.config import UserError
from difffract_jax.storage.files import TensorFile
from difffract_jax.storage.headers import DTYPES

FLOATS = ("F64", "F32", "F16", "BF16", *quantised.FP8)
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Names that `torch.compile`, FSDP and activation checkpointing put between those of a module and its child."""


class Source:
    """A checkpoint that is read lazily; see the module docstring.

    Attributes:
        name: what to call it in messages.
        problems: everything that is wrong with the files themselves.
    """

    def __init__(self, path: str | Path, prefix: str = "", variant: str | None = None):
        """Opens a checkpoint.

        Args:
            path: a `.safetensors` file, or a directory that holds one or several.
            prefix: prefix of the keys that are wanted; it is stripped.
            variant: which of a directory's variants to read, as in fp16; see `weight_files`.

        Raises:
            UserError: if there is no file to read, or several to choose from.
        """
        self.name = str(path)
        self._broken: list[str] = []
        self._files: dict[str, TensorFile | None] = {}
        self._open(locate(Path(path), variant))
        raw = {_WRAPPERS.sub("", key): key for key in self._files}
        hidden = self._files.keys() - set(raw.values())
        self._broken += [f"{key} is there twice, with and without a wrapper's name" for key in sorted(hidden)]
        self._select(raw, prefix)

    def under(self, prefix: str, aside: tuple[str, ...] = ()) -> "Source":
        """Returns the part of this checkpoint whose keys begin with `prefix`, without those that begin with `aside`."""
        part = copy.copy(self)
        part._select({key: raw for key, raw in self._raw.items() if not key.startswith(aside)}, prefix)
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Returns every key's shape; None where it cannot be known."""
        return {key: self.shape(key) for key in self}

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Returns a tensor's shape; None when its shard cannot be read."""
        file = self._files[self._raw[key]]
        return file.tensors[self._raw[key]].shape if file else None

    def dtype(self, key: str) -> str | None:
        """Returns a tensor's type as safetensors calls it, as in BF16; None when its shard cannot be read."""
        file = self._files[self._raw[key]]
        return file.tensors[self._raw[key]].dtype if file else None

    def names(self) -> list[str]:
        """Returns what the files call the tensors, also those that belong to fp8 weights and are left out as keys."""
        return list(self._raw.values())

    def all_dtypes(self) -> dict[str, str | None]:
        """Returns every tensor's type, also of those that belong to fp8 weights and are left out as keys."""
        return {key: self.dtype(key) for key in self._raw}

    def readable(self, key: str) -> bool:
        """Says whether the tensor is there, whole and of a type that is understood."""
        file = self._files.get(self._raw.get(key, ""))
        return file is not None and not file.missing_bytes and self.dtype(key) in DTYPES

    def is_float(self, key: str) -> bool:
        """Says whether the tensor holds floating point numbers; True when its shard cannot be read."""
        return self.dtype(key) in (*FLOATS, None)

    def __getitem__(self, key: str) -> np.ndarray:
        tensor = self._tensor(key)
        if self.dtype(key) not in quantised.FP8:
            return tensor
        scale = self._scales.get(key)
        return quantised.widen(tensor, None if scale is None else self._tensor(scale))

    def check_unchanged(self) -> None:
        """Raises `UserError` if a file has changed or gone since it was opened."""
        for file in {id(file): file for file in self._files.values() if file is not None}.values():
            file.check_unchanged()

    def read(self, key: str) -> np.ndarray:
        """Reads a tensor into memory, as `source[key]` is; see `TensorFile.read`."""
        if self.dtype(key) in quantised.FP8:
            return self[key]
        return self._file(key).read(self._raw[key])

    def kinds(self) -> set[np.dtype]:
        """Returns the types of its floating point numbers."""
        return {DTYPES[str(self.dtype(key))] for key in self if self.dtype(key) in FLOATS}

    def files(self) -> list[Path]:
        """Returns the files that hold the tensors."""
        return sorted({file.path for key in self if (file := self._files[self._raw[key]])})

    def _tensor(self, key: str) -> np.ndarray:
        return self._file(key)[self._raw[key]]

    def _file(self, key: str) -> TensorFile:
        file = self._files[self._raw[key]]
        assert file is not None, key
        return file

    def _select(self, raw: Mapping[str, str], prefix: str) -> None:
        """Takes the keys that begin with a prefix; `raw` is how the files call them."""
        self._raw = {key.removeprefix(prefix): name for key, name in raw.items() if key.startswith(prefix)}
        self._scales = quantised.scale_keys(self._raw)
        hidden = {*self._scales.values(), *quantised.hint_keys(self._raw)}
        self._keys = [key for key in self._raw if key not in hidden]
        self.problems = [*self._broken, *self._wrong_types(), *self._wrong_scales()]

    def _open(self, files: WeightFiles) -> None:
        """Opens the files; what is wrong with one of several is a problem, and with a file alone an error."""
        if len(files.names) == 1 and not files.index:
            self._add(TensorFile(files.home / files.names[0]))
            return
        for name in files.names:
            self._open_shard(files.home / name, [key for key, shard in files.listed.items() if shard == name])
        absent = [key for key in files.listed if key not in self._files]
        if absent:
            self._broken.append(f"{files.index} lists {_first(absent)}, which its shards lack; download them again")

    def _open_shard(self, path: Path, keys: list[str]) -> None:
        """Opens a shard that the index says holds `keys`."""
        try:
            file = TensorFile(path)
        except FileNotFoundError:
            self._broken.append(f"shard {path.name} is missing, which holds {len(keys)} tensors; download it again")
        except UserError as error:
            self._broken.append(f"shard {str(error).removeprefix(f'{path.parent}/').rstrip('.')}")
        else:
            self._add(file)
            return
        self._files |= dict.fromkeys(keys)

    def _add(self, file: TensorFile) -> None:
        if file.missing_bytes:
            self._broken.append(
                f"{file.path.name} is truncated, its last {file.missing_bytes} bytes are missing; download it again"
            )
        self._broken += [f"{key} is in two shards" for key in file.tensors if key in self._files]
        self._files |= dict.fromkeys(file.tensors, file)

    def _wrong_types(self) -> list[str]:
        unknown: dict[str, list[str]] = {}
        for key in self:
            code = self.dtype(key)
            if code is not None and code not in DTYPES:
                unknown.setdefault(code, []).append(key)
        return [
            f"{_first(keys)} has type {code}, expected one of {', '.join(FLOATS)}" for code, keys in unknown.items()
        ]

    def _wrong_scales(self) -> list[str]:
        """Tells of scales that fit no weight, and of those whose weight is not fp8; each kind in one sentence."""
        pairs = self._scales.items()
        readable = {weight: scale for weight, scale in pairs if self.readable(weight) and self.readable(scale)}
        misfit = [
            weight
            for weight, scale in readable.items()
            if not self.is_float(scale) or not quantised.scale_fits(self.shape(weight) or (), self.shape(scale) or ())
        ]
        # What is reported here stops the load, but other tensors are still checked until then, without these scales.
        self._scales = {weight: scale for weight, scale in readable.items() if weight not in misfit}
        doubtful = [
            weight
            for weight, scale in self._scales.items()
            if self.dtype(weight) not in quantised.FP8 and (self._tensor(scale).astype(np.float32) != 1).any()
        ]
        problems = []
        if misfit:
            scales = [readable[weight] for weight in misfit]
            problems.append(
                f"{_first(scales)} of shape {self.shape(scales[0])} is neither "
                f"one number nor one per row of its weight; {quantised.BF16_FILES}"
            )
        if doubtful:
            problems.append(
                f"{_first(doubtful)} of type {self.dtype(doubtful[0])} has a scale but is not fp8, so that it is not "
                "known whether the scale is already in it; take the file that this one was made from"
            )
        return problems


class JoinedSource(Source):
    """Several checkpoints as one, with the name of each before its keys."""

    def __init__(self, name: str, parts: Mapping[str, Source]):
        """Takes checkpoints that are open.

        Args:
            name: what to call them in messages.
            parts: name of each -> the checkpoint.
        """
        self.name, self._parts = name, dict(parts)
        self.problems = [problem for part in self._parts.values() for problem in part.problems]

    def _of(self, key: str) -> tuple[Source, str]:
        part, _, rest = key.partition(".")
        return self._parts[part], rest

    def __iter__(self) -> Iterator[str]:
        return (f"{name}.{key}" for name, part in self._parts.items() for key in part)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Returns a tensor's shape; None when its shard cannot be read."""
        part, rest = self._of(key)
        return part.shape(rest)

    def dtype(self, key: str) -> str | None:
        """Returns a tensor's type as safetensors calls it; None when its shard cannot be read."""
        part, rest = self._of(key)
        return part.dtype(rest)

    def readable(self, key: str) -> bool:
        """Says whether the tensor is there, whole and of a type that is understood."""
        part, _, rest = key.partition(".")
        return part in self._parts and self._parts[part].readable(rest)

    def __getitem__(self, key: str) -> np.ndarray:
        part, rest = self._of(key)
        return part[rest]

    def read(self, key: str) -> np.ndarray:
        """Reads a tensor into memory."""
        part, rest = self._of(key)
        return part.read(rest)

    def check_unchanged(self) -> None:
        """Raises `UserError` if a file has changed or gone since it was opened."""
        for part in self._parts.values():
            part.check_unchanged()

    def files(self) -> list[Path]:
        """Returns the files that hold the tensors."""
        return [file for part in self._parts.values() for file in part.files()]


def _first(keys: list[str]) -> str:
    """Names the first of several keys, and how many more there are."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} (and {len(keys) - 1} more)"


def stored_dtype(kinds: Iterable[np.dtype]) -> np.dtype:
    """Returns the type that weights are kept in without loss: bfloat16 where all are, or else float32.

    Args:
        kinds: type of each.
    """
    half = np.dtype(ml_dtypes.bfloat16)
    return half if set(kinds) == {half} else np.dtype(np.float32)


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

    def check_unchanged(self) -> None:
        """Does nothing: what is in memory does not change."""

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

    def kinds(self) -> set[np.dtype]:
        """Returns the types of its floating point numbers."""
        return {self._arrays[key].dtype for key in self._arrays if self.is_float(key)}

    def files(self) -> list[Path]:
        """Returns no files: the arrays are in memory."""
        return []

    def read(self, key: str) -> np.ndarray:
        """Returns an array, which is in memory, or mapped, as it was given."""
        return self._arrays[key]
