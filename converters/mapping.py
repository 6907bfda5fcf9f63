"""The rule engine: a checkpoint becomes a tree of weights by a table that can be read aloud.

1. A `Rule` says which source keys make which leaf, and by which `Transform`. Placeholders stand for one part of a name:
   those in the source alone count the layers that are stacked on the leaf's leading axes, in order of appearance; those
   in both are copied from one to the other. Layers are numbered from 0 unless `labels` names them otherwise.
2. `expand` applies a table to an abstract tree (`jax.eval_shape` of the constructor): the leaves' paths and shapes say
   which source keys there must be. Nothing depends on what the checkpoint happens to hold.
3. `check_coverage` compares: every source key is used exactly once or `Ignored` for a stated reason, every leaf is
   filled exactly once, every transformed shape is the leaf's shape. It needs shapes only, so a full-size model is
   proved without weights.
4. `open_tree` checks that, and says how each leaf is made, slice by slice: read, transformed, cast, checked to be
   finite. `load_tree` makes them all and puts each onto its sharding; others write them without holding them. All
   problems are told together in one `ConversionError`.
5. `save_tree` runs the same table backwards, tensor by tensor.

Tables are read with `transforms.py` beside them; `source.py` reads the checkpoints.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from converters.rules import Assignment, ConversionError, Ignored, Labels, Rule, Shape, expand, is_ignored
from converters.source import ArraySource, Source
from converters.transforms import (
    Transform,
    conv,
    fuse_qkv,
    join_patch,
    linear_from_conv1x1,
    pack_columns,
    pack_rows,
    same,
    split_attention_mlp,
    split_gate_up,
    split_qkv_gate_up,
    split_qkv_up,
    square,
    swap_scale_shift,
    transpose,
)
from difffract_jax.storage.checkpoint import leaf_paths, placement, put
from difffract_jax.storage.streaming import Leaf

__all__ = [
    "ArraySource",
    "Assignment",
    "ConversionError",
    "Ignored",
    "Rule",
    "Source",
    "Transform",
    "check_coverage",
    "conv",
    "expand",
    "fill_slice",
    "fuse_qkv",
    "is_ignored",
    "join_patch",
    "linear_from_conv1x1",
    "load_leaves",
    "load_tree",
    "open_tree",
    "pack_columns",
    "pack_rows",
    "problems_of",
    "same",
    "save_tree",
    "source_shapes",
    "split_attention_mlp",
    "split_gate_up",
    "split_qkv_gate_up",
    "split_qkv_up",
    "square",
    "swap_scale_shift",
    "tensor_shapes",
    "transpose",
]

TILE = 128
"""Rows and columns of a transposed matrix that are copied together."""


def check_coverage(
    shapes: Mapping[str, Shape | None],
    rules: Sequence[Rule],
    abstract: Any,
    ignored: Sequence[Ignored] = (),
    labels: Labels | None = None,
) -> list[str]:
    """Compares a checkpoint's keys and shapes with what a table needs; returns every problem, none when it fits.

    Args:
        shapes: shape of every source key; None where it cannot be read, which counts as present.
        rules: the table.
        abstract: tree of shapes, from `jax.eval_shape` of the constructor.
        ignored: keys that may be left over.
        labels: names of stacked layers, see `expand`.
    """
    return _coverage_problems(shapes, expand(rules, abstract, labels), leaf_paths(abstract), ignored)


def _coverage_problems(
    shapes: Mapping[str, Shape | None],
    assignments: Sequence[Assignment],
    leaves: Mapping[str, Any],
    ignored: Sequence[Ignored],
) -> list[str]:
    used = [key for assignment in assignments for keys in assignment.sources for key in keys]
    filled = [path for assignment in assignments for path in assignment.targets]
    expected, covered = set(used), set(filled)
    problems = [f"missing {key}" for key in dict.fromkeys(used) if key not in shapes]
    problems += [f"unknown {key}" for key in shapes if key not in expected and not is_ignored(key, ignored)]
    problems += [f"{key} is used by two rules" for key in _repeated(used)]
    problems += [f"leaf {path} is filled by two rules" for path in _repeated(filled)]
    problems += [f"leaf {path} is filled by no rule" for path in leaves if path not in covered]
    problems += [f"rule for {path} has no such leaf" for path in filled if path not in leaves]
    return problems + _shape_problems(shapes, assignments, leaves)


def _shape_problems(
    shapes: Mapping[str, Shape | None], assignments: Sequence[Assignment], leaves: Mapping[str, Any]
) -> list[str]:
    problems: list[str] = []
    seen: dict[tuple[Any, ...], str] = {}
    for assignment in assignments:
        wanted = tuple(
            tuple(leaves[p].shape[len(assignment.stack) :]) if p in leaves else () for p in assignment.targets
        )
        for keys in assignment.sources:
            given = tuple(shape for key in keys if (shape := shapes.get(key)) is not None)
            if len(given) < len(keys):
                continue
            case = (assignment.rule.transform, given, wanted)
            if case not in seen:  # layers of a stack are alike, so one of each kind is worked out
                seen[case] = _misfit(*case)
            if seen[case]:
                problems.append(f"{' + '.join(keys)} {seen[case]}")
    return problems


def _misfit(transform: Transform, given: tuple[Shape, ...], wanted: tuple[Shape, ...]) -> str:
    """Says how tensors of the given shapes fail to become slices of the wanted shapes; '' when they do."""
    shown = " and ".join(map(str, given))
    # Zero strides: a full-size tensor that takes one byte, until a transform concatenates it.
    tensors = tuple(np.broadcast_to(np.zeros((), np.uint8), shape) for shape in given)
    try:
        made = tuple(tensor.shape for tensor in transform.forward(tensors))
    except (ValueError, IndexError):
        return f"of shape {shown} cannot be transformed ({transform.name})"
    if made == wanted:
        return ""
    backward = transform.backward(tuple(np.broadcast_to(np.zeros((), np.uint8), shape) for shape in wanted))
    return f"has shape {shown}, expected {' and '.join(str(tensor.shape) for tensor in backward)}"


def load_tree(
    source: Source | ArraySource,
    rules: Sequence[Rule],
    abstract: Any,
    *,
    ignored: Sequence[Ignored] = (),
    labels: Labels | None = None,
    dtype: Any = None,
    sharding: Any = None,
) -> Any:
    """Converts a checkpoint into a tree with the structure of `abstract`.

    Args:
        source: the checkpoint.
        rules: its table.
        abstract: tree of shapes and types, from `jax.eval_shape` of the constructor.
        ignored: keys that may be left over.
        labels: names of stacked layers, see `expand`.
        dtype: type of the leaves; left out, the abstract leaves' own.
        sharding: where leaves go: None, one sharding, a function of the path, or a tree of shardings.

    Raises:
        ConversionError: naming every missing, unknown, doubly used, misshapen, unreadable or non-finite tensor.
    """
    options = {"ignored": ignored, "labels": labels, "dtype": dtype, "sharding": sharding}
    arrays = load_leaves(source, rules, abstract, lambda path: True, **options)
    return jax.tree.unflatten(jax.tree.structure(abstract), list(arrays.values()))


def load_leaves(
    source: Source | ArraySource,
    rules: Sequence[Rule],
    abstract: Any,
    wanted: Callable[[str], bool],
    *,
    ignored: Sequence[Ignored] = (),
    labels: Labels | None = None,
    dtype: Any = None,
    sharding: Any = None,
) -> dict[str, jax.Array]:
    """Converts some leaves of a checkpoint, after it has been checked as a whole.

    Args:
        source: this and the rest as for `load_tree`.
        rules: its table.
        abstract: the whole tree's shapes.
        wanted: says of a path whether its leaf is.
        ignored: keys that may be left over.
        labels: names of stacked layers.
        dtype: type of the leaves.
        sharding: where leaves go.

    Returns:
        The leaves by path, in the tree's order.
    """
    target = placement(sharding, abstract)
    opened = open_tree(source, rules, abstract, ignored=ignored, labels=labels, dtype=dtype)
    leaves = {path: leaf for path, leaf in opened.items() if wanted(path)}
    try:
        return {
            path: put(array := leaf.array(), array.dtype, target(path), owned=True) for path, leaf in leaves.items()
        }
    except ConversionError as error:
        raise ConversionError(source.name, problems_of(leaves.values())) from error


def open_tree(
    source: Source | ArraySource,
    rules: Sequence[Rule],
    abstract: Any,
    *,
    ignored: Sequence[Ignored] = (),
    labels: Labels | None = None,
    dtype: Any = None,
    mapped: bool = True,
) -> dict[str, Leaf]:
    """Checks a checkpoint, and says how each leaf of a tree is made of it.

    Args:
        source: the checkpoint.
        rules: its table.
        abstract: tree of shapes and types.
        ignored: keys that may be left over.
        labels: names of stacked layers.
        dtype: type of the leaves; left out, the abstract leaves' own.
        mapped: take tensors from the memory map; or else read each into memory, so that a file that shrinks meanwhile
            is an error and does not end the process.

    Returns:
        Path -> leaf, in the order of `abstract`. Making one raises `ConversionError` if its values are not finite.

    Raises:
        ConversionError: naming every missing, unknown, doubly used, misshapen or unreadable tensor; of others that are
            not finite, too.
    """
    assignments, leaves = expand(rules, abstract, labels), leaf_paths(abstract)
    used = [key for item in assignments for keys in item.sources for key in keys if source.readable(key)]
    problems = [*source.problems, *_coverage_problems(source.shapes(), assignments, leaves, ignored)]
    problems += [f"{key} has type {source.dtype(key)}, expected a float" for key in used if not source.is_float(key)]
    if problems:
        raise ConversionError(source.name, problems + _not_finite(source, used))
    read = source.__getitem__ if mapped else source.read
    made: dict[str, Leaf] = {}
    for item in assignments:
        for place, path in enumerate(item.targets):
            kind = np.dtype(leaves[path].dtype if dtype is None else dtype)
            shape = tuple(leaves[path].shape)
            make = partial(_make_slice, source, read, item, place, shape[len(item.stack) :], kind)
            made[path] = Leaf(kind, shape, len(item.sources), make)
    return {path: made[path] for path in leaves}


def problems_of(leaves: Iterable[Leaf]) -> list[str]:
    """Makes every leaf and returns what is wrong with their values, each problem once."""
    problems: dict[str, None] = {}
    for leaf in leaves:
        for number in range(leaf.count):
            try:
                leaf.make(number)
            except ConversionError as error:
                problems |= dict.fromkeys(error.problems)
    return list(problems)


def _make_slice(
    source: Source | ArraySource,
    read: Callable[[str], np.ndarray],
    assignment: Assignment,
    place: int,
    shape: Shape,
    dtype: np.dtype,
    number: int,
) -> np.ndarray:
    """Makes one slice of a leaf; values that are not finite are a `ConversionError` with their keys."""
    made = np.empty(shape, dtype)
    problems = fill_slice({place: made}, source, assignment, number, read=read)
    if problems:
        raise ConversionError(source.name, problems)
    return made


def _fill(made: np.ndarray, values: np.ndarray) -> None:
    """Copies values, cast; of a matrix that is transposed in tiles, so that each line of memory is read once."""
    if made.ndim != 2 or values.flags.c_contiguous:
        made[...] = values
        return
    for row in range(0, made.shape[0], TILE):
        for column in range(0, made.shape[1], TILE):
            tile = slice(row, row + TILE), slice(column, column + TILE)
            made[tile] = values[tile]


def fill_slice(
    parts: Mapping[int, np.ndarray],
    source: Source | ArraySource,
    assignment: Assignment,
    number: int,
    *,
    read: Callable[[str], np.ndarray] | None = None,
    check: bool = True,
) -> list[str]:
    """Fills slices of an assignment's leaves at one index of its stack.

    Args:
        parts: number of a target -> the array that is filled.
        source: the checkpoint.
        assignment: from `expand`.
        number: of the index, in row-major order.
        read: gives a tensor by its key; `source[key]` if left out.
        check: whether to look for values that are not finite.

    Returns:
        Which tensors hold such values.
    """
    keys, read = assignment.sources[number], read or source.__getitem__
    # An overflow in the cast leaves infinities, which are reported below with their key.
    with np.errstate(over="ignore"):
        made = assignment.rule.transform.forward(_of_one_type([read(key) for key in keys]))
        for place, part in parts.items():
            _fill(part, made[place])
    del made  # before the next array of that size
    if not check or all(np.isfinite(part).all() for part in parts.values()):
        return []
    kind = next(iter(parts.values())).dtype
    return _not_finite(source, keys) or [f"{' + '.join(keys)} holds values too large for {kind}"]


def _of_one_type(tensors: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Widens tensors that are used together and differ in type: NumPy joins no bfloat16 to a float16."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return tuple(tensors)
    wide = np.float64 if any(tensor.dtype == np.float64 for tensor in tensors) else np.float32
    return tuple(tensor.astype(wide) for tensor in tensors)


def _not_finite(source: Source | ArraySource, keys: Iterable[str]) -> list[str]:
    return [f"{key} holds values that are not finite" for key in keys if not np.isfinite(source[key]).all()]


def save_tree(module: Any, rules: Sequence[Rule], labels: Labels | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Runs a table backwards: yields source key and tensor, one at a time, from a tree of weights."""
    leaves = leaf_paths(module)
    for assignment in expand(rules, module, labels):
        for number, keys in enumerate(assignment.sources):
            index = np.unravel_index(number, assignment.stack) if assignment.stack else ()
            slices = tuple(np.asarray(leaves[path][index]) for path in assignment.targets)
            yield from zip(keys, assignment.rule.transform.backward(slices), strict=True)


def source_shapes(rules: Sequence[Rule], abstract: Any, labels: Labels | None = None) -> dict[str, Shape]:
    """Returns the key and shape of every tensor that `save_tree` would yield for a tree of these shapes."""
    leaves = leaf_paths(abstract)
    shapes: dict[str, Shape] = {}
    for assignment in expand(rules, abstract, labels):
        tensors = tensor_shapes(assignment, leaves)
        for keys in assignment.sources:
            shapes |= dict(zip(keys, tensors, strict=True))
    return shapes


def tensor_shapes(assignment: Assignment, leaves: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Returns the shapes of the source tensors that make one slice of an assignment's leaves.

    Args:
        assignment: from `expand`.
        leaves: of the tree, or their shapes, by path.
    """
    slices = [leaves[path].shape[len(assignment.stack) :] for path in assignment.targets]
    empty = (np.broadcast_to(np.zeros((), np.uint8), shape) for shape in slices)
    return tuple(tensor.shape for tensor in assignment.rule.transform.backward(tuple(empty)))


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name in set(names) if names.count(name) > 1) if len(set(names)) < len(names) else []
