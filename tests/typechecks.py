"""Annotations are checked as by jaxtyping's import hook, at a fraction of what its checks cost.

The hook wraps every function of the package. jaxtyping prepares a function's checks when its module is imported, which
took five seconds in each process, most of it for functions that no test of the process calls; and each time that a
function is defined in another. At each call it binds the arguments by `inspect.Signature`, and checks them once
before the call and once more with the result. That was a sixth of the time of the tests.

Here

1. a function's checks are made when it is first called, and once for all functions of the same code and annotations;
2. the arguments are checked once, before the call, and the result by itself, after it, within the same axes;
3. nothing is bound, axes are kept only where an annotation has any, and functions without annotations are not wrapped.

What is checked, by which type checker, stays the same. What a wrong argument is told is jaxtyping's own message.

This replaces a function of jaxtyping's and uses others that are not public. Where a release lacks them, nothing is
replaced, the tests take longer, and `test_typechecks.py` says so.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jaxtyping
from beartype.roar import BeartypeCallHintViolation
from jax._src import traceback_util
from jaxtyping import _decorator, _storage

Checker = Callable[[Any], Any]
NEEDED = ("_destring_annotation", "_make_fn_with_signature", "jaxtyped")
THEIRS = jaxtyping.jaxtyped


class Checks(NamedTuple):
    """What is checked around the calls of a function.

    Attributes:
        arguments: is called with the function's arguments; None if none is annotated.
        result: is called with the result as the keyword `name`; None if it is not annotated.
        name: of that keyword.
        axes: whether an annotation names axes, which must be the same in all of them.
    """

    arguments: Callable[..., Any] | None
    result: Callable[..., Any] | None
    name: str
    axes: bool


MADE: dict[Any, Checks] = {}
"""By code and annotations: a function within another is defined anew whenever the other is called."""


def share() -> bool:
    """Lets functions that are imported from now on be checked so; returns whether this jaxtyping has what it takes."""
    able = all(hasattr(_decorator, name) for name in NEEDED) and hasattr(_storage, "push_shape_memo")
    if able:
        traceback_util.register_exclusion(__file__)
        # The hook's code looks the first up, what it does for classes and properties the second.
        jaxtyping.jaxtyped = _decorator.jaxtyped = jaxtyped
    return able


def jaxtyped(fn: Any = None, *, typechecker: Checker | None = None) -> Any:
    """Returns a function that checks its arguments and its result; does with anything else what jaxtyping does."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if not isinstance(fn, types.FunctionType) or typechecker is None:
        return THEIRS(fn, typechecker=typechecker)
    if not fn.__annotations__ or hasattr(fn, "checks") or getattr(fn, "__no_type_check__", False):
        return fn
    return _checked(fn, typechecker)


def _checked(fn: Callable[..., Any], typechecker: Checker) -> Callable[..., Any]:
    checks: Checks | None = None
    push, pop = _storage.push_shape_memo, _storage.pop_shape_memo

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checks
        if checks is None:
            checks = _checks(fn, typechecker)
        arguments, result, name, axes = checks
        if axes:
            push({})
        try:
            if arguments is not None:
                try:
                    arguments(*args, **kwargs)
                except (BeartypeCallHintViolation, TypeError):  # the latter where arguments do not fit the signature
                    return THEIRS(fn, typechecker=typechecker)(*args, **kwargs)  # raises with jaxtyping's message
            out = fn(*args, **kwargs)
            if result is not None:
                result(**{name: out})
            return out
        finally:
            if axes:
                pop()

    checked.checks = lambda: checks or _checks(fn, typechecker)  # type: ignore[attr-defined]
    return checked


def _checks(fn: Callable[..., Any], typechecker: Checker) -> Checks:
    """Returns what is checked around calls of a function, of which another with its code may have been asked for."""
    try:
        key = fn.__code__, fn.__module__, tuple(fn.__annotations__.items())  # type: ignore[attr-defined]
        return MADE[key]
    except TypeError:  # an annotation that has no hash
        return _make(fn, typechecker)
    except KeyError:
        return MADE.setdefault(key, _make(fn, typechecker))


def _make(fn: Callable[..., Any], typechecker: Checker) -> Checks:
    given = inspect.signature(fn)
    hints = {name: _resolved(fn, one.annotation) for name, one in given.parameters.items()}
    returned = _resolved(fn, given.return_annotation)
    parameters = [one.replace(annotation=hints[name]) for name, one in given.parameters.items()]
    words = getattr(fn, "__name__", "function"), getattr(fn, "__qualname__", "function"), fn.__module__
    arguments, result, name = None, None, ""
    if any(one is not inspect.Parameter.empty for one in hints.values()):
        signature = inspect.Signature(parameters)
        arguments = typechecker(_decorator._make_fn_with_signature(*words, signature, output=False))
    if returned is not inspect.Signature.empty:
        signature = inspect.Signature(return_annotation=returned)
        stub, name = _decorator._make_fn_with_signature(*words, signature, output=True)
        result = typechecker(stub)
    return Checks(arguments, result, name, any(map(has_axes, (*hints.values(), returned))))


def _resolved(fn: Callable[..., Any], annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    return _decorator._destring_annotation(annotation, fn.__globals__)  # type: ignore[attr-defined]


def has_axes(annotation: Any) -> bool:
    """Returns whether an annotation may name axes or the structure of a tree: jaxtyping's types, and unknown ones."""
    if annotation is None or annotation is Any or annotation is inspect.Signature.empty or annotation is Ellipsis:
        return False
    if isinstance(annotation, list):  # of a Callable's parameters
        return any(map(has_axes, annotation))
    if arguments := typing.get_args(annotation):
        return typing.get_origin(annotation) is not typing.Literal and any(map(has_axes, arguments))
    return not isinstance(annotation, type) or type(annotation).__module__.partition(".")[0] == "jaxtyping"
