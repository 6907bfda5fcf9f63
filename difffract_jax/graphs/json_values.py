"""Frozen dataclasses as JSON values and back, so that files of other releases lose nothing (pure Python).

1. `to_json_values` returns JSON values; fields at their default are left out, so that what is not known has no key.
2. `typed` reads one value as its type, converts nothing but lists into tuples, and says what is wrong with it.
3. `beyond` finds what a record holds that was not understood, at whatever depth; `merge_json` puts it back.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError


def to_json_values(value: Any) -> Any:
    """Returns a value as JSON values: dataclasses and named tuples as dictionaries, tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_json_values(getattr(value, one.name)) for one in fields(value) if not _unsaid(value, one)}
    names = getattr(value, "_fields", None)
    if isinstance(value, tuple) and names is not None:
        return {name: to_json_values(inner) for name, inner in zip(names, value, strict=True)}
    if isinstance(value, Mapping):
        return {key: to_json_values(inner) for key, inner in value.items()}
    return [to_json_values(inner) for inner in value] if isinstance(value, tuple | list) else value


def _unsaid(value: Any, one: Any) -> bool:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    return default is not MISSING and getattr(value, one.name) == default


@cache
def _reader(kind: Any) -> Any:
    return TypeAdapter(kind)


def typed(kind: Any, value: Any, key: str) -> Any:
    """Returns a JSON value as its type.

    Args:
        kind: a type, such as a dataclass or `tuple[int, ...]`; keys that a dataclass lacks are passed over.
        value: JSON values.
        key: where the value stands.

    Raises:
        ValueError: saying which value is wrong, and what it should be.

    Example:
        >>> typed(tuple[int, ...], [1, 2], "steps")
        (1, 2)
    """
    try:
        # Through text: only there a list may stand for a tuple while nothing else is converted.
        return _reader(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        # Where a value may be of several types, pydantic puts the type's name into the path.
        place = ".".join(str(part) for part in (key, *first["loc"]) if part != "str" and "[" not in str(part))
        if first["type"].startswith("missing"):
            raise ValueError(f"{place} is missing") from None
        shown, wanted = json.dumps(first["input"])[:60], first["msg"].removeprefix("Input ")
        raise ValueError(f"{place} is {shown}, but {wanted}") from None


def beyond(record: Any, known: Any) -> Any:
    """Returns what a record holds beyond what was understood; an empty dictionary if that is all.

    Args:
        record: JSON values.
        known: those of them that were understood.

    Example:
        >>> beyond({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2}})
        {'b': {'d': 3}}
    """
    if isinstance(record, dict) and isinstance(known, dict):
        rest = {key: beyond(value, known[key]) if key in known else value for key, value in record.items()}
        return {key: value for key, value in rest.items() if key not in known or value != {}}
    if isinstance(record, list) and isinstance(known, list) and len(record) == len(known):
        rest = [beyond(*pair) for pair in zip(record, known, strict=True)]
        return rest if any(one != {} for one in rest) else {}
    return {}


def merge_json(known: Any, more: Any) -> Any:
    """Returns JSON values with what `beyond` found put back; where both say something, what was understood stands.

    Args:
        known: what was understood.
        more: from `beyond`.
    """
    if isinstance(known, dict) and isinstance(more, dict):
        return known | {key: merge_json(known[key], value) if key in known else value for key, value in more.items()}
    if isinstance(known, list) and isinstance(more, list) and len(known) == len(more):
        return [merge_json(*pair) for pair in zip(known, more, strict=True)]
    return known
