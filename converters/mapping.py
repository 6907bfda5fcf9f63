"""The rule engine: a checkpoint becomes a tree of weights by a table that can be read aloud.

1. A `Rule` says which source keys make which leaf, and by which `Transform`. Placeholders stand for one part of a name:
   those in the source alone count the layers that are stacked on the leaf's leading axes, in order of appearance; those
   in both are copied from one to the other. Layers are numbered from 0 unless `labels` names them otherwise.
2. `expand` applies a table to an abstract tree (`jax.eval_shape` of the constructor): the leaves' paths and shapes say
   which source keys there must be. Nothing depends on what the checkpoint happens to hold.
3. `check_coverage` compares: every source key is used exactly once or `Ignored` for a stated reason, every leaf is
   filled exactly once, every transformed shape is the leaf's shape. It needs shapes only, so a full-size model is
   proved without weights.
4. `load_tree` fills leaf by leaf from the memory map: one host buffer of the leaf's size, slice by slice, cast, checked
   to be finite, put onto its sharding, freed. All problems are told together in one `ConversionError`.
5. `save_tree` runs the same table backwards, tensor by tensor.

Tables are read with `transforms.py` beside them; `source.py` reads the checkpoints.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from converters.source import ArraySource, Source
from converters.transforms import (
    Transform,
    conv,
    fuse_qkv,
    linear_from_conv1x1,
    same,
    split_attention_mlp,
    split_qkv_up,
    swap_scale_shift,
    transpose,
)
from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import cap, leaf_paths, placement

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
    "load_leaves",
    "linear_from_conv1x1",
    "load_tree",
    "same",
    "save_tree",
    "source_shapes",
    "split_attention_mlp",
    "split_qkv_up",
    "swap_scale_shift",
    "transpose",
]

Shape = tuple[int, ...]
Labels = Mapping[str, Sequence[str]]


class ConversionError(UserError):
    """A checkpoint that does not fit; the message names every problem, up to a dozen.

    Attributes:
        what: the checkpoint or the part of it that was converted.
        problems: all problems, in full.
    """

    def __init__(self, what: str, problems: Iterable[str]):
        self.what, self.problems = what, tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{what} cannot be converted, {count}: {'; '.join(cap(list(self.problems)))}.")


class Rule(NamedTuple):
    """One row of a table; see the module docstring for placeholders.

    Attributes:
        source: pattern of the source keys, or several that are used together.
        target: pattern of the leaf paths, or several that are made together.
        transform: how the ones become the others.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    transform: Transform = same


class Ignored(NamedTuple):
    """Source keys that no rule uses, on purpose.

    Attributes:
        source: pattern of the keys; `*` stands for any text.
        reason: why they are not needed.
    """

    source: str
    reason: str


class Assignment(NamedTuple):
    """A rule at one choice of the placeholders that source and target share.

    Attributes:
        rule: the rule.
        targets: the leaf paths it makes.
        stack: extents of the stacked axes, () when there are none.
        sources: for every index of `stack`, in row-major order, the source keys.
    """

    rule: Rule
    targets: tuple[str, ...]
    stack: Shape
    sources: tuple[tuple[str, ...], ...]


def expand(rules: Sequence[Rule], abstract: Any, labels: Labels | None = None) -> list[Assignment]:
    """Applies a table to the leaves of an abstract tree: which source keys make which leaves.

    A rule whose first target matches no leaf has no part in this tree (guidance in a model without guidance).

    Args:
        rules: the table.
        abstract: the tree, or its shapes.
        labels: placeholder of a stacked axis -> what its layers are called, where not 0, 1, 2, ...
    """
    leaves = leaf_paths(abstract)
    found = []
    for rule in rules:
        targets = _tuple(rule.target)
        stacked = [name for name in _placeholders(_tuple(rule.source)[0]) if name not in _placeholders(targets[0])]
        for path, leaf in leaves.items():
            if match := _regex(targets[0]).fullmatch(path):
                found.append(_assign(rule, match.groupdict(), stacked, leaf.shape[: len(stacked)], labels or {}))
    return found


def _assign(rule: Rule, shared: Mapping[str, str], stacked: Sequence[str], stack: Shape, labels: Labels) -> Assignment:
    sources = []
    axes = [labels.get(name, [str(i) for i in range(size)]) for name, size in zip(stacked, stack, strict=False)]
    for index in itertools.product(*axes):
        values = {**shared, **dict(zip(stacked, index, strict=False))}
        sources.append(tuple(_fill(pattern, values) for pattern in _tuple(rule.source)))
    return Assignment(rule, tuple(_fill(pattern, shared) for pattern in _tuple(rule.target)), stack, tuple(sources))


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
    leaves = leaf_paths(abstract)
    assignments = expand(rules, abstract, labels)
    used = [key for assignment in assignments for keys in assignment.sources for key in keys]
    filled = [path for assignment in assignments for path in assignment.targets]
    expected = set(used)
    problems = [f"missing {key}" for key in dict.fromkeys(used) if key not in shapes]
    problems += [f"unknown {key}" for key in shapes if key not in expected and not is_ignored(key, ignored)]
    problems += [f"{key} is used by two rules" for key in _repeated(used)]
    problems += [f"leaf {path} is filled by two rules" for path in _repeated(filled)]
    problems += [f"leaf {path} is filled by no rule" for path in leaves if path not in filled]
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


def is_ignored(key: str, ignored: Sequence[Ignored]) -> bool:
    """Says whether one of the `ignored` patterns matches the key."""
    return any(_regex(item.source).fullmatch(key) for item in ignored)


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
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in leaf_paths(abstract)])


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
        The leaves by path.
    """
    assignments, leaves, target = expand(rules, abstract, labels), leaf_paths(abstract), placement(sharding)
    used = [key for item in assignments for keys in item.sources for key in keys if source.readable(key)]
    problems = [*source.problems, *check_coverage(source.shapes(), rules, abstract, ignored, labels)]
    problems += [f"{key} has type {source.dtype(key)}, expected a float" for key in used if not source.is_float(key)]
    if problems:
        raise ConversionError(source.name, problems + _not_finite(source, used))
    arrays: dict[str, jax.Array] = {}
    for assignment in assignments:
        for place, path in enumerate(assignment.targets):
            if not wanted(path):
                continue
            buffer = np.empty(leaves[path].shape, leaves[path].dtype if dtype is None else dtype)
            problems += _fill_leaf(buffer, source, assignment, place)
            # Once something is wrong the tree will not be used: only the check goes on.
            if not problems:
                arrays[path] = jax.device_put(buffer, target(path))
    if problems:
        raise ConversionError(source.name, dict.fromkeys(problems))
    return arrays


def _fill_leaf(buffer: np.ndarray, source: Source | ArraySource, assignment: Assignment, place: int) -> list[str]:
    """Fills one leaf's buffer slice by slice; returns which slices hold values that are not finite."""
    problems = []
    slices = buffer.reshape(-1, *buffer.shape[len(assignment.stack) :])
    for part, keys in zip(slices, assignment.sources, strict=True):
        # An overflow in the cast leaves infinities, which are reported below with their key.
        with np.errstate(over="ignore"):
            part[...] = assignment.rule.transform.forward(_of_one_type([source[key] for key in keys]))[place]
        if not np.isfinite(part).all():
            guilty = _not_finite(source, keys)
            problems += guilty or [f"{' + '.join(keys)} holds values too large for {buffer.dtype}"]
    return problems


def fill_slice(
    parts: Sequence[np.ndarray], source: Source | ArraySource, assignment: Assignment, number: int, *, check: bool
) -> list[str]:
    """Fills the slices of all leaves of an assignment at one index of its stack.

    Args:
        parts: one array per target.
        source: the checkpoint.
        assignment: from `expand`.
        number: of the index, in row-major order.
        check: whether to look for values that are not finite.

    Returns:
        Which tensors hold such values.
    """
    keys = assignment.sources[number]
    with np.errstate(over="ignore"):
        made = assignment.rule.transform.forward(_of_one_type([source[key] for key in keys]))
        for part, value in zip(parts, made, strict=True):
            part[...] = value
    if not check or all(np.isfinite(part).all() for part in parts):
        return []
    return _not_finite(source, keys) or [f"{' + '.join(keys)} holds values too large for {parts[0].dtype}"]


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


def source_shapes(rules: Sequence[Rule], abstract: Any) -> dict[str, Shape]:
    """Returns the key and shape of every tensor that `save_tree` would yield for a tree of these shapes."""
    leaves = leaf_paths(abstract)
    shapes: dict[str, Shape] = {}
    for assignment in expand(rules, abstract):
        slices = [leaves[path].shape[len(assignment.stack) :] for path in assignment.targets]
        tensors = assignment.rule.transform.backward(
            tuple(np.broadcast_to(np.zeros((), np.uint8), shape) for shape in slices)
        )
        for keys in assignment.sources:
            shapes |= {key: tensor.shape for key, tensor in zip(keys, tensors, strict=True)}
    return shapes


def _tuple(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


@cache
def _placeholders(pattern: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\{(\w+)\}", pattern)))


@cache  # every rule is held against every leaf, and one pattern is translated in 20 microseconds
def _regex(pattern: str) -> re.Pattern[str]:
    """Translates a pattern: a placeholder is one part of a dotted name, `*` any text."""
    text = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(pattern))
    return re.compile(text.replace(r"\*", ".*"))


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], pattern)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name in set(names) if names.count(name) > 1) if len(set(names)) < len(names) else []
