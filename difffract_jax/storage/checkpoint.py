"""Trees of weights on disk: safetensors, a `config.json`, a content hash, and writes that happen whole or not at all.

1. `leaf_paths` names every array of a tree: `double.img.attn.qkv.kernel`.
2. `save_trees` writes one `NAME.safetensors` per tree, tensor by tensor, so that no second copy of the weights is ever
   in memory; past `SHARD_BYTES` a tree is split into numbered shards with the usual `NAME.safetensors.index.json`.
3. `config.json` comes last: format_version, the content hash of each tree and of all together, then the caller's facts.
   A directory without it is therefore never taken for a finished one.
4. `load_tree` memory-maps the shards, compares names, shapes and types with the abstract tree, verifies the hash, and
   puts leaf after leaf onto its sharding.
5. In buckets matrices are cut into tiles (`tiles.py`), so that a host reads its shard of them and little else.

Callers wrap a save in `atomic_directory` of `files.py`, offered here too. The content hash is the SHA-256 of every
tensor's name, type, shape and bytes, in the order of the names: the same weights have the same hash however they are
sharded.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from difffract_jax.config import UserError
from difffract_jax.storage.files import TensorFile, atomic_directory, atomic_file, raw_bytes
from difffract_jax.storage.headers import DTYPES
from difffract_jax.storage.shards import open_shards, write_sharded
from difffract_jax.storage.tiles import Tiling

__all__ = [
    "FORMAT_VERSION",
    "TILED_VERSION",
    "VERIFY_BELOW_BYTES",
    "ShardingsOf",
    "Tilings",
    "atomic_directory",
    "atomic_file",
    "cap",
    "content_hash",
    "heading",
    "leaf_paths",
    "load_tree",
    "open_tree",
    "placement",
    "put",
    "read_config",
    "read_leaf",
    "save_tree",
    "save_trees",
    "tree_hash",
    "write_config",
]

FORMAT_VERSION, TILED_VERSION = 1, 2
"""Of directories; with weights that are cut into tiles (`tiles.py`) the second, which older releases refuse."""
Tilings = Mapping[str, Mapping[str, Tiling]]
"""Name of a tree -> path of a leaf -> how it is cut; leaves that it lacks lie row by row."""
VERIFY_BELOW_BYTES = 200 * 10**6
"""Weights smaller than this are hashed on every load; larger ones only when asked, as hashing 24 GB takes a minute."""


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, in the tree's order; and what `is_leaf` takes for one, by its own.

    Names are joined by dots, list indices are numbers, and the `.value` of a Flax parameter is left out.

    Example:
        >>> leaf_paths({"up": {"kernel": 1}, "layers": [2, 3]})
        {'layers.0': 2, 'layers.1': 3, 'up.kernel': 1}
    """
    return {_path_text(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def _path_text(path: tuple[Any, ...]) -> str:
    parts = [_key_text(key) for key in path]
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts)


def _key_text(key: Any) -> str:
    match key:
        case jax.tree_util.GetAttrKey():
            return key.name
        case jax.tree_util.SequenceKey():
            return str(key.idx)
        case _:
            return str(key.key)


@dataclass(frozen=True)
class ShardingsOf:
    """Stands for shardings that hang on the shapes of the weights.

    Attributes:
        tree: from an abstract tree to the tree of its shardings.
    """

    tree: Callable[[Any], Any]


def placement(sharding: Any, abstract: Any = None) -> Callable[[str], Any]:
    """Returns the function path -> sharding for whatever stands for one.

    Args:
        sharding: None (the default device), one sharding for every leaf, a function of the path, a tree of shardings
            with the structure of the weights, or `ShardingsOf`.
        abstract: the weights or their shapes, which `ShardingsOf` needs.

    Returns:
        The function; what it returns is a `Sharding` or None.
    """
    if isinstance(sharding, ShardingsOf):
        sharding = sharding.tree(abstract)
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return lambda path: sharding
    if callable(sharding) and jax.tree_util.all_leaves([sharding]):  # a module of shardings may be callable as well
        return sharding
    return leaf_paths(sharding).__getitem__


def save_tree(tree: Any, directory: Path, config: Mapping[str, Any], *, name: str = "model") -> str:
    """Writes one tree and its `config.json`; returns the content hash. See `save_trees`."""
    return save_trees({name: tree}, directory, config)


def save_trees(
    trees: Mapping[str, Any], directory: Path, config: Mapping[str, Any], tilings: Tilings | None = None
) -> str:
    """Writes several trees into one directory, then its `config.json`.

    Args:
        trees: name of the file -> tree of arrays.
        directory: where to; made when missing. Use `atomic_directory` around this to leave nothing half-written.
        config: facts to store; keys `format_version`, `content_hash` and `content_hashes` are added.
        tilings: how some leaves are cut into tiles.

    Returns:
        The content hash over all trees, which is the same however they are cut.
    """
    directory.mkdir(parents=True, exist_ok=True)
    cut = tilings or {}
    hashes = {name: _write_shards(leaf_paths(tree), directory, name, cut.get(name, {})) for name, tree in trees.items()}
    return write_config(directory, hashes, config, tiled=any(cut.values()))


def write_config(directory: Path, hashes: Mapping[str, str], config: Mapping[str, Any], *, tiled: bool = False) -> str:
    """Writes the `config.json` of a directory whose weights are written; returns the content hash over all.

    Args:
        directory: the directory.
        hashes: name of each tree -> its content hash.
        config: facts to store.
        tiled: whether weights are cut into tiles.
    """
    total = _combine(hashes)
    version = TILED_VERSION if tiled else FORMAT_VERSION
    record = {"format_version": version, "content_hash": total, "content_hashes": hashes, **config}
    with atomic_file(directory / "config.json") as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return total


def read_config(directory: Path) -> dict[str, Any]:
    """Reads a directory's `config.json`; refuses formats of another version with a sentence that says what to do."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no config.json, so difffract did not write it; give a converted or diffusers directory."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the directory again.") from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if version is None:
        raise UserError(f"{path} names no format_version, so difffract did not write it; give the converted directory.")
    if version not in (FORMAT_VERSION, TILED_VERSION):
        raise UserError(
            f"{path} has format_version {version}, but this release reads {FORMAT_VERSION} and {TILED_VERSION}; "
            "convert the source again."
        )
    return config


def load_tree(
    directory: Path,
    abstract: Any,
    *,
    name: str = "model",
    sharding: Any = None,
    verify: bool | None = None,
    layers: Sequence[int] | None = None,
) -> Any:
    """Loads one tree that `save_tree` or `save_trees` wrote.

    Args:
        directory: the directory.
        abstract: a tree of the wanted structure with shapes and types, from `jax.eval_shape` of the constructor.
            A leaf is cast when its type differs from the file's.
        name: name of the tree's file.
        sharding: where the leaves go, see `placement`.
        verify: compare the content hash; left out, it is compared for weights under `VERIFY_BELOW_BYTES`.
        layers: places on the leading axis of every array that are wanted; others are not read, but to compare the hash.
    """
    tensors, target = open_tree(directory, abstract, name=name, verify=verify), placement(sharding, abstract)
    arrays = [read_leaf(tensors[p], p, leaf, target(p), layers) for p, leaf in leaf_paths(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def read_leaf(
    file: TensorFile, path: str, leaf: Any, sharding: Any = None, layers: Sequence[int] | None = None
) -> jax.Array:
    """Reads a leaf to where a sharding wants it; of one that several processes share, each what its devices need.

    Args:
        file: that holds it.
        path: of the leaf.
        leaf: its shape, and the type that it shall have.
        sharding: where it goes; None for the default device.
        layers: places on its leading axis that are wanted; all if left out.
    """
    if sharding is None or getattr(sharding, "is_fully_addressable", True):
        return put(file.part(path, (), layers), leaf.dtype, sharding)
    shape = tuple(leaf.shape) if layers is None else (len(layers), *leaf.shape[1:])
    return jax.make_array_from_callback(
        shape, sharding, lambda index: np.array(file.part(path, index, layers), leaf.dtype)
    )


def put(array: np.ndarray, dtype: Any, sharding: Any, *, owned: bool = False) -> jax.Array:
    """Puts an array that every process has where a sharding wants it; each reads the parts of its own devices alone.

    Args:
        array: on the host; it may be a file's map, of which nothing stays in use.
        dtype: type that it shall have.
        sharding: where it goes; None for the default device.
        owned: whether nobody else uses the array's memory, which may then be taken over.
    """
    # What is copied out of a map is: a zero-copy `device_put` would keep the weights tied to the file.
    if sharding is None or getattr(sharding, "is_fully_addressable", True):
        own = (owned or array.base is None) and array.dtype == dtype
        return jax.device_put(array if own else np.array(array, dtype), sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index], dtype))


def open_tree(
    directory: Path, abstract: Any, *, name: str = "model", verify: bool | None = None
) -> dict[str, TensorFile]:
    """Finds the tensors of a tree that `save_tree` or `save_trees` wrote, and checks them; reads none.

    Args:
        directory: this and the rest as for `load_tree`.
        abstract: the whole tree.
        name: of the tree's file.
        verify: compare the content hash.

    Returns:
        By path the file that holds it.
    """
    recorded = read_config(directory).get("content_hashes", {}).get(name)
    files = open_shards(directory, name)
    tensors = {key: file for file in files for key in file.tensors}
    problems = _compare(tensors, leaf_paths(abstract))
    if problems:
        raise UserError(f"{directory / name}.safetensors does not fit its config: {'; '.join(cap(problems))}.")
    if verify is None:
        # What comes from a bucket part by part has a sum of each part, and is never read as a whole.
        small = sum(file.path.stat().st_size for file in files) < VERIFY_BELOW_BYTES
        verify = small and not all(file.is_checked for file in files)
    if verify and recorded != content_hash({key: file[key] for key, file in tensors.items()}):
        raise UserError(
            f"The weights in {directory / name}.safetensors differ from their recorded hash; copy them again."
        )
    return tensors


def cap(problems: list[str], most: int = 12) -> list[str]:
    """Shortens a list of problems to what fits a terminal, saying how many more there are."""
    return problems if len(problems) <= most else [*problems[:most], f"(+{len(problems) - most} more)"]


def _write_shards(leaves: Mapping[str, Any], directory: Path, name: str, tilings: Mapping[str, Tiling]) -> str:
    kinds = {path: (np.dtype(leaf.dtype), leaf.shape) for path, leaf in leaves.items()}
    write_sharded(directory, name, kinds, leaves.__getitem__, tilings)
    return content_hash(leaves)


def content_hash(tensors: Mapping[str, Any]) -> str:
    """Returns the hash of named arrays described in the module docstring."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(heading(name, np.dtype(value.dtype), tuple(value.shape)))
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)  # other processes hold parts of it
        digest.update(raw_bytes(value))
    return digest.hexdigest()


def heading(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Returns what the content hash takes in before an array's bytes."""
    return f"{name} {dtype.name} {shape}\n".encode()


def tree_hash(trees: Mapping[str, Any]) -> str:
    """Returns the content hash that `save_trees` would record for these trees: their identity, saved or not."""
    return _combine({name: content_hash(leaf_paths(tree)) for name, tree in trees.items()})


def _combine(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


def _compare(tensors: Mapping[str, TensorFile], leaves: Mapping[str, Any]) -> list[str]:
    """Names every difference between the tensors of the files and the leaves wanted."""
    problems = [f"{path} is missing" for path in leaves if path not in tensors]
    problems += [f"{path} is unknown" for path in tensors if path not in leaves]
    for path in tensors.keys() & leaves.keys():
        info = tensors[path].tensors[path]
        if info.shape != tuple(leaves[path].shape):
            problems.append(f"{path} has shape {info.shape}, expected {tuple(leaves[path].shape)}")
        elif info.dtype not in DTYPES:
            problems.append(f"{path} has type {info.dtype}, which is not understood")
    return sorted(problems)
