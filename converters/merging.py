"""Changes of weights merged into a module that is loaded, resident, spread or streamed, or into leaves yet to be made.

1. A leaf's slice w becomes cast(wide(w) + sum of changes), where wide is float32, or float64 of float64 weights. The
   sum is taken before the cast, so that several LoRAs round once.
2. Products are NumPy's on the host, of one slice at a time: a streamed layer has the bits that it has in memory.
3. A streamed stack gets a source that changes what the old one reads; in host memory, layers are replaced one by one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from converters.lora import Change
from difffract_jax.models.streaming import HostLayers, LayerSource, Streamed, Take, aligned, is_streamed
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.streaming import Leaf

Changes = Mapping[str, Mapping[int, Sequence[Change]]]
"""Path of a leaf -> number of a slice along its first axis, 0 of a leaf that is not stacked -> what changes it."""
Cut = Callable[[np.ndarray], np.ndarray]
"""From a whole slice to the part of it that is there."""


def merge(module: Any, changes: Iterable[Change]) -> Any:
    """Returns a module with changes merged. Its own arrays are given up one by one, so that no two copies are held.

    Args:
        module: of one part, freshly loaded; it must not be used any more.
        changes: of its part.
    """
    nodes, sorted_changes = leaf_paths(module, is_streamed), by_leaf(changes)
    made = []
    for path, node in nodes.items():
        inside = {
            name.removeprefix(f"{path}."): by for name, by in sorted_changes.items() if name.startswith(f"{path}.")
        }
        if isinstance(node, Streamed) and inside:
            node = _streamed(node, inside)
        elif path in sorted_changes:
            node = _resident(node, path, sorted_changes[path])
        made.append(node)
    return jax.tree.unflatten(jax.tree.structure(module, is_leaf=is_streamed), made)


def merge_leaves(leaves: Mapping[str, Leaf], changes: Iterable[Change]) -> dict[str, Leaf]:
    """Returns leaves that are made with changes merged, slice by slice.

    Args:
        leaves: of one part, by path.
        changes: of its part.
    """
    sorted_changes = by_leaf(changes)
    return {
        path: leaf._replace(make=partial(_made, leaf, path, sorted_changes[path])) if path in sorted_changes else leaf
        for path, leaf in leaves.items()
    }


def _made(leaf: Leaf, path: str, changes: Mapping[int, Sequence[Change]], number: int) -> np.ndarray:
    """Makes a slice of a leaf, with its changes if it has any."""
    values = leaf.make(number)
    return merged_slice(values, path, changes[number]) if number in changes else values


def by_leaf(changes: Iterable[Change]) -> Changes:
    """Sorts changes by the leaves and slices that they change."""
    found: dict[str, dict[int, list[Change]]] = {}
    for change in changes:
        for path in change.targets:
            found.setdefault(path, {}).setdefault(change.number, []).append(change)
    return found


def merged_slice(
    values: np.ndarray, path: str, changes: Sequence[Change], cut: Cut = lambda whole: whole
) -> np.ndarray:
    """Returns a slice of a leaf with its changes.

    Args:
        values: the slice, or a part of it.
        path: of the leaf in the module.
        changes: of the slice.
        cut: takes the part of a whole slice that is there.
    """
    wide = np.promote_types(values.dtype, np.float32)
    total = cut(changes[0].slices(wide)[path])
    for change in changes[1:]:
        total = total + cut(change.slices(wide)[path])
    return (values.astype(wide) + total).astype(values.dtype)


def _resident(leaf: jax.Array, path: str, changes: Mapping[int, Sequence[Change]]) -> jax.Array:
    """Changes a leaf on the devices that it lies on, a block of it for each part that one of them holds."""
    stacked = bool(next(iter(changes.values()))[0].assignment.stack)
    sharding, shape, committed = leaf.sharding, leaf.shape, leaf.committed
    blocks = {}
    for shard in leaf.addressable_shards:
        if str(shard.index) not in blocks:
            blocks[str(shard.index)] = shard.index, np.array(shard.data)
    leaf.delete()
    for index, block in blocks.values():
        first, inner = (index[0].start or 0, index[1:]) if stacked else (0, index)
        rows = block if stacked else block[None]
        for row in range(len(rows)):
            if first + row in changes:
                rows[row] = merged_slice(rows[row], path, changes[first + row], lambda whole, at=inner: whole[at])
    if not committed:
        return jax.device_put(next(iter(blocks.values()))[1])
    return jax.make_array_from_callback(shape, sharding, lambda index: blocks[str(index)][1])


def _streamed(stack: Streamed, changes: Changes) -> Streamed:
    source = MergedLayers(stack.source, changes)
    if isinstance(stack.source, HostLayers):
        for number in range(stack.source.depth):
            stack.source.layers[number] = source.read(number)
        return stack
    return replace(stack, source=source)


class MergedLayers:
    """Layers of another source with changes merged when they are read; a `models.streaming.LayerSource`."""

    def __init__(self, source: LayerSource, changes: Changes) -> None:
        """Names what is read.

        Args:
            source: gives the layers without the changes.
            changes: by paths within the stack.
        """
        self._source, self._changes = source, changes

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return self._source.depth

    def read(self, layer: int, take: Take | None = None) -> Any:
        """Returns one layer's arrays, merged.

        Args:
            layer: its number.
            take: which indices of some leaves are wanted.
        """
        tree = self._source.read(layer, take)
        made = []
        for path, values in leaf_paths(tree).items():
            if layer in self._changes.get(path, {}):
                values = self._merged(values, path, layer, (take or {}).get(path))
            made.append(values)
        return jax.tree.unflatten(jax.tree.structure(tree), made)

    def _merged(self, values: np.ndarray, path: str, layer: int, taken: tuple[int, np.ndarray] | None) -> np.ndarray:
        changes = self._changes[path][layer]
        name = next(one for one in changes[0].assignment.targets if one == path or one.endswith(f".{path}"))
        cut: Cut = (lambda whole: whole) if taken is None else (lambda whole: np.take(whole, taken[1], taken[0]))
        array = aligned(values.shape, values.dtype)
        array[...] = merged_slice(values, name, changes, cut)
        return array

    def abstract(self) -> Any:
        """Returns the shapes and types of a layer."""
        return self._source.abstract()
