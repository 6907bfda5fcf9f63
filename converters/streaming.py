"""One layer at a time straight from a checkpoint: the rules of a table at one index of their stacked axis.

A layer is converted whenever it is read, so that nothing has to be written first; the first time it is read, its values
are checked to be finite, as `mapping.load_tree` checks them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from converters.mapping import (
    ArraySource,
    ConversionError,
    Ignored,
    Labels,
    Rule,
    Source,
    expand,
    fill_slice,
    load_leaves,
)
from difffract_jax.models.streaming import Streamed, Take, Weights, aligned, streamed, take_some, with_sources
from difffract_jax.storage.checkpoint import leaf_paths


def stream_module(
    source: Source,
    rules: Sequence[Rule],
    abstract: Any,
    ignored: Sequence[Ignored],
    weights: Weights,
    labels: Labels | None = None,
) -> Any:
    """Returns a module whose stacks are read from a checkpoint layer by layer; everything else of it is converted now.

    Args:
        source: the checkpoint.
        rules: its table.
        abstract: the module's shapes; it names its stacks in `layered`.
        ignored: keys that may be left over.
        weights: where the stacks stay, `host` or `disk`.
        labels: names of stacked layers, see `mapping.expand`.

    Raises:
        ConversionError: as `mapping.load_tree`, but for values that are not finite in the layers on disk: those are
            told when they are read.
    """
    stacks = {name: f"{name}." for name in abstract.layered}
    beside = lambda path: not path.startswith(tuple(stacks.values()))  # noqa: E731
    leaves = load_leaves(source, rules, abstract, beside, ignored=ignored, labels=labels)
    sources = {
        name: ConvertedLayers(source, rules, abstract, prefix, getattr(abstract, name), labels)
        for name, prefix in stacks.items()
    }
    made = with_sources(abstract, sources, weights)
    return jax.tree.unflatten(jax.tree.structure(made), [leaves[path] for path in leaf_paths(made)])


def stream_stack(
    source: Source | ArraySource, rules: Sequence[Rule], like: Any, labels: Labels, weights: Weights
) -> Streamed:
    """Returns a whole tree that is one stack as a streamed one.

    Args:
        source: the checkpoint.
        rules: its table.
        like: the stack's shapes.
        labels: names of the layers, see `mapping.expand`.
        weights: where the stack stays, `host` or `disk`.

    Raises:
        ConversionError: see `stream_module`.
    """
    load_leaves(source, rules, like, lambda path: False, labels=labels)
    return streamed(ConvertedLayers(source, rules, like, "", like, labels), (), weights)


class ConvertedLayers:
    """Layers of a stack in a checkpoint; a `models.streaming.LayerSource`."""

    def __init__(
        self,
        source: Source | ArraySource,
        rules: Sequence[Rule],
        abstract: Any,
        prefix: str,
        like: Any,
        labels: Labels | None = None,
    ) -> None:
        """Names what is read; the checkpoint must have been found to fit the table.

        Args:
            source: the checkpoint.
            rules: its table.
            abstract: shapes and types of the whole tree.
            prefix: what the paths of the stack's leaves begin with, its dot included.
            like: shapes and types of the whole stack.
            labels: names of the layers, where not 0, 1, 2, ...
        """
        self.depth = jax.tree.leaves(like)[0].shape[0]
        self._source, self._prefix, self._like = source, prefix, like
        self._assignments = [one for one in expand(rules, abstract, labels) if one.targets[0].startswith(prefix)]
        self._checked: set[int] = set()

    def read(self, layer: int, take: Take | None = None) -> Any:
        """Returns one layer's arrays, converted.

        Args:
            layer: its number.
            take: which indices of some leaves are wanted; a leaf of which any are is converted whole.

        Raises:
            ConversionError: if there are values that are not finite.
            UserError: if a file has changed or gone.
        """
        self._source.check_unchanged()
        arrays: dict[str, np.ndarray] = {}
        leaves, problems = leaf_paths(self._like), []
        unread = {path for path, (_, chosen) in (take or {}).items() if not chosen.size}
        for assignment in self._assignments:
            paths = [path.removeprefix(self._prefix) for path in assignment.targets]
            if unread.issuperset(paths):
                # Zero strides: of no bytes, as nothing of it is taken.
                arrays |= {p: np.broadcast_to(np.zeros((), leaves[p].dtype), leaves[p].shape[1:]) for p in paths}
                continue
            for path in paths:
                arrays[path] = aligned(leaves[path].shape[1:], leaves[path].dtype)
            parts, new = dict(enumerate(arrays[path] for path in paths)), layer not in self._checked
            problems += fill_slice(parts, self._source, assignment, layer, check=new)
        self._source.check_unchanged()
        if problems:
            raise ConversionError(self._source.name, dict.fromkeys(problems))
        if not unread:
            self._checked.add(layer)
        tree = jax.tree.unflatten(jax.tree.structure(self._like), [arrays[path] for path in leaves])
        return tree if take is None else take_some(tree, take)

    def abstract(self) -> Any:
        """Returns the shapes and types of a layer."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._like)
