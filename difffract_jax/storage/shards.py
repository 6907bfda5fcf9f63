"""Large sets of tensors in numbered shards, with the `STEM.safetensors.index.json` that all readers expect."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.files import TensorFile, write_tensors
from difffract_jax.storage.headers import size_of
from difffract_jax.storage.tiles import Tiling

SHARD_BYTES = 4 * 2**30


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
    directory: Path,
    stem: str,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    value: Callable[[str], Any],
    tilings: Mapping[str, Tiling] | None = None,
) -> None:
    """Writes `STEM.safetensors`, or numbered shards of at most `SHARD_BYTES` with the index that readers expect.

    Args:
        directory: where to.
        stem: name of the file.
        tensors: type and shape of each tensor.
        value: returns a tensor by name; called once for each.
        tilings: how some of them are cut into tiles, by name.
    """
    files = shard_files(stem, tensors)
    for file, names in files.items():
        write_tensors(directory / file, [(name, *tensors[name]) for name in names], map(value, names), tilings)
    write_index(directory, stem, tensors, files)


def shard_files(stem: str, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, list[str]]:
    """Returns the files that `write_sharded` writes, each with the names of its tensors in order.

    Args:
        stem: name of the file.
        tensors: type and shape of each tensor.
    """
    groups = shard({name: size_of(*kind) for name, kind in tensors.items()}, SHARD_BYTES)
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}


def write_index(
    directory: Path,
    stem: str,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    files: Mapping[str, Sequence[str]],
) -> None:
    """Writes the index of several shards; a file alone has none.

    Args:
        directory: where to.
        stem: what the names of the shards begin with.
        tensors: type and shape of each tensor.
        files: from `shard_files`.
    """
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(size_of(*kind) for kind in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
