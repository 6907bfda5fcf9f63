"""A module's state dict in what people save around it: records of training, wrappers of the module.

1. `find_state` looks through nested mappings for those that hold tensors, as in {"model_state_dict": {...}, "step": 5}.
   One is wanted; where there are several, the one that has the key that every module of this kind has.
2. `unwrapped` takes what wrappers put before every key (`module.` of DistributedDataParallel, `_orig_mod.` of
   torch.compile, `model.` of a trainer), as far as all keys share it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

V = TypeVar("V")
DEPTH = 4
"""Mappings within mappings that are searched."""
COMPILED = "_orig_mod."
"""What torch.compile puts before the keys of a module, wherever it stands in another."""


class NotFound(ValueError):
    """There is no state dict, or there are several; the message says which."""


def find_state(content: Any, is_tensor: Callable[[Any], bool], wanted: str) -> dict[str, Any]:
    """Finds the state dict in the content of a file.

    Args:
        content: of the file.
        is_tensor: says whether a value is a tensor.
        wanted: key of the module, before which wrappers may stand, that tells one state dict of several.

    Returns:
        Its tensors; what stands beside them, as numbers and settings, is left out.

    Raises:
        NotFound: if it has none, or several that could be meant.
    """
    tensors = {path: _tensors(one, is_tensor) for path, one in _mappings(content, ())}
    states = {path: state for path, state in tensors.items() if state}
    fitting = {path: state for path, state in states.items() if any(_is_key(key, wanted) for key in state)}
    chosen = fitting or states
    if not chosen:
        raise NotFound("holds no state dict of tensors")
    if len(chosen) > 1:
        names = [".".join(path) or "its top level" for path in chosen]
        raise NotFound(f"holds {len(names)} state dicts, {' and '.join(names)}, of which one must be saved alone")
    return next(iter(chosen.values()))


def _mappings(content: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yields every mapping in a file's content, with the keys that lead to it."""
    if isinstance(content, Mapping) and len(path) <= DEPTH:
        yield path, content
        for key, value in content.items():
            yield from _mappings(value, (*path, str(key)))


def _tensors(mapping: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    return {str(key): value for key, value in mapping.items() if is_tensor(value)}


def _is_key(key: str, wanted: str) -> bool:
    return key == wanted or key.endswith(f".{wanted}")


def unwrapped(state: Mapping[str, V], wanted: str) -> dict[str, V]:
    """Returns a state dict under the module's own keys.

    Args:
        state: the state dict.
        wanted: key of the module, which tells what stands before its keys; without it nothing is taken away.

    Raises:
        NotFound: if the key is there several times, after different prefixes.
    """
    plain = {key.replace(COMPILED, ""): value for key, value in state.items()}
    if len(plain) < len(state):
        plain = dict(state)  # the same module compiled and not: its keys are reported as they are
    prefixes = [key.removesuffix(wanted) for key in plain if _is_key(key, wanted)]
    if len(prefixes) > 1:
        names = [prefix.removesuffix(".") or "its top level" for prefix in prefixes]
        raise NotFound(f"holds {len(names)} modules, {' and '.join(names)}, of which one must be saved alone")
    if not prefixes or not all(key.startswith(prefixes[0]) for key in plain):
        return plain
    return {key.removeprefix(prefixes[0]): value for key, value in plain.items()}
