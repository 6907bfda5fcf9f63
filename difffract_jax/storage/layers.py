"""One layer at a time from a directory of ours: a slice of every stacked tensor of a memory-mapped file.

A tensor `[layer, ...]` lies in one piece, so that layer i of it does, too. What is read is copied into memory of the
process and cast on the way; the pages of the file are the system's to keep or drop.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.files import TensorFile

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]


class FileLayers:
    """Layers of a tree that `storage.checkpoint.save_trees` wrote; a `models.streaming.LayerSource`."""

    def __init__(self, files: Mapping[str, TensorFile], prefix: str, like: Any, allocate: Allocate) -> None:
        """Names what is read.

        Args:
            files: by path of a tensor, the file that holds it.
            prefix: what the paths of the stack's tensors begin with, its dot included.
            like: shapes and types of the whole stack; layers are cast to these types.
            allocate: returns an empty array of a shape and type.
        """
        self.depth = jax.tree.leaves(like)[0].shape[0]
        self._structure = jax.tree.structure(like)
        self._leaves = {f"{prefix}{path}": leaf for path, leaf in leaf_paths(like).items()}
        self._files, self._prefix, self._allocate = files, prefix, allocate

    def read(self, layer: int, take: Mapping[str, tuple[int, np.ndarray]] | None = None) -> Any:
        """Returns one layer's arrays.

        Args:
            layer: its number.
            take: path of a leaf -> axis, and the indices along it that are wanted; nothing else of it is read.

        Raises:
            UserError: if a file has changed or gone.
        """
        self._check_unchanged()
        arrays = [self._read(name, leaf.dtype, layer, take or {}) for name, leaf in self._leaves.items()]
        self._check_unchanged()
        return jax.tree.unflatten(self._structure, arrays)

    def _read(self, name: str, dtype: Any, layer: int, take: Mapping[str, tuple[int, np.ndarray]]) -> np.ndarray:
        mapped = self._files[name].layer(name, layer)
        path = name.removeprefix(self._prefix)
        if path in take:
            axis, chosen = take[path]
            return np.take(mapped, chosen, axis).astype(dtype)
        array = self._allocate(mapped.shape, dtype)
        array[...] = mapped
        return array

    def _check_unchanged(self) -> None:
        for file in {id(file): file for file in map(self._files.__getitem__, self._leaves)}.values():
            file.check_unchanged()

    def abstract(self) -> Any:
        """Returns the shapes and types of a layer."""
        leaves = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in self._leaves.values()]
        return jax.tree.unflatten(self._structure, leaves)
