"""Tables of rules: which tensors of a checkpoint make which leaves of a tree, in patterns that can be read aloud.

`mapping` applies them; its docstring explains placeholders, stacked axes and coverage.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from converters.transforms import Transform, same
from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import cap, leaf_paths

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
    """One row of a table; see `mapping` for placeholders.

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
        targets = names_in(rule.target)
        stacked = [name for name in _placeholders(names_in(rule.source)[0]) if name not in _placeholders(targets[0])]
        # A pattern without placeholders is a path, and needs no search.
        candidates = leaves if _placeholders(targets[0]) else leaves.keys() & {targets[0]}
        for path in candidates:
            if match := _regex(targets[0]).fullmatch(path):
                shape = leaves[path].shape[: len(stacked)]
                found.append(_assign(rule, match.groupdict(), stacked, shape, labels or {}))
    return found


def _assign(rule: Rule, shared: Mapping[str, str], stacked: Sequence[str], stack: Shape, labels: Labels) -> Assignment:
    sources = []
    axes = [labels.get(name, [str(i) for i in range(size)]) for name, size in zip(stacked, stack, strict=False)]
    for index in itertools.product(*axes):
        values = {**shared, **dict(zip(stacked, index, strict=False))}
        sources.append(tuple(_filled(pattern, values) for pattern in names_in(rule.source)))
    return Assignment(rule, tuple(_filled(pattern, shared) for pattern in names_in(rule.target)), stack, tuple(sources))


def is_ignored(key: str, ignored: Sequence[Ignored]) -> bool:
    """Says whether one of the `ignored` patterns matches the key."""
    return any(_regex(item.source).fullmatch(key) for item in ignored)


def names_in(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    """Returns the one pattern, or the several, of a rule's side."""
    return (patterns,) if isinstance(patterns, str) else patterns


@cache
def _placeholders(pattern: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\{(\w+)\}", pattern)))


@cache  # every rule is held against every leaf, and one pattern is translated in 20 microseconds
def _regex(pattern: str) -> re.Pattern[str]:
    """Translates a pattern: a placeholder is one part of a dotted name, `*` any text."""
    text = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(pattern))
    return re.compile(text.replace(r"\*", ".*"))


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], pattern)
