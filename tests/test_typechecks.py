"""The checks of annotations that the tests run under find what jaxtyping's own find, and cost less."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import beartype
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, PyTree, TypeCheckError

import typechecks
from difffract_jax.graphs.influence import column_shares
from difffract_jax.models import blocks

TYPED = typechecks.jaxtyped(typechecker=beartype.beartype)
Vector, Square = Float[np.ndarray, " a"], Float[np.ndarray, "a a"]


def zeros(*shape: int) -> Any:
    return np.zeros(shape)


@TYPED
def product(square: Square, vector: Vector, *more: Vector, scale: float = 1.0) -> Vector:
    return scale * (square @ vector)


@TYPED
def grown(vector: Vector) -> Vector:
    return np.append(vector, 1.0)


@TYPED
def counted(number: int) -> Iterator[int]:
    yield from range(number)


def test_this_jaxtyping_has_what_is_replaced() -> None:
    assert typechecks.share(), "jaxtyping has changed: the tests still hold, but take longer"


def test_the_package_is_checked() -> None:
    assert jaxtyping.jaxtyped is typechecks.jaxtyped and hasattr(column_shares, "checks")
    with pytest.raises(TypeCheckError, match="attribution"):
        column_shares(np.zeros(2, int), np.zeros(2, int), 3)


def test_right_arguments_pass_and_results_are_returned() -> None:
    assert product(zeros(2, 2), zeros(2), zeros(2), scale=2.0).shape == (2,)
    assert list(counted(3)) == [0, 1, 2]
    assert inspect.signature(product).parameters["scale"].default == 1.0 and product.__name__ == "product"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((zeros(2, 3), zeros(2)), "square"),
        ((zeros(2, 2), zeros(3)), "vector"),
        ((zeros(2, 2), zeros(2), zeros(3)), "more"),
        ((zeros(2, 2), np.zeros(2, int)), "vector"),
        (("text", zeros(2)), "square"),
    ],
)
def test_wrong_arguments_are_told_as_jaxtyping_tells_them(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(TypeCheckError) as ours:
        product(*arguments)
    with pytest.raises(TypeCheckError) as theirs:
        typechecks.THEIRS(product.__wrapped__, typechecker=beartype.beartype)(*arguments)
    assert str(ours.value) == str(theirs.value) and f"parameter '{named}'" in str(ours.value)


def test_arguments_that_do_not_fit_the_signature_are_refused() -> None:
    with pytest.raises(TypeError):
        product(zeros(2, 2))
    with pytest.raises(TypeError):
        grown(zeros(2), zeros(2))


def test_the_result_has_the_axes_of_the_arguments() -> None:
    with pytest.raises(beartype.roar.BeartypeCallHintReturnViolation, match="grown"):
        grown(zeros(2))


def test_an_inner_call_has_axes_of_its_own() -> None:
    @TYPED
    def outer(vector: Vector) -> Vector:
        product(zeros(3, 3), zeros(3))
        return vector

    assert outer(zeros(2)).shape == (2,)
    with pytest.raises(TypeCheckError):
        outer(zeros(2, 2))
    assert outer(zeros(4)).shape == (4,), "a failure leaves no axes behind"


def test_a_dataclass_checks_its_fields() -> None:
    @TYPED
    @dataclasses.dataclass
    class Pair:
        square: Square
        vector: Vector

    @TYPED
    class Kept(Pair):
        @property
        @TYPED
        def first(self) -> int:
            return "no number"  # type: ignore[return-value]

    assert Kept(zeros(2, 2), zeros(2)).vector.shape == (2,)
    with pytest.raises(TypeCheckError, match="vector"):
        Pair(zeros(2, 2), zeros(3))
    with pytest.raises(beartype.roar.BeartypeCallHintReturnViolation):
        _ = Kept(zeros(2, 2), zeros(2)).first


def test_functions_of_one_code_share_their_checks_and_those_of_other_annotations_do_not() -> None:
    def make(kind: Any) -> Callable[[Any], Any]:
        @TYPED
        def same(value: kind) -> kind:  # type: ignore[valid-type]
            return value

        return same

    whole, again, text = make(int), make(int), make(str)
    assert (whole(1), again(2), text("three")) == (1, 2, "three")
    assert whole.checks() is again.checks() is not text.checks()
    with pytest.raises(TypeCheckError):
        text(4)
    with pytest.raises(TypeCheckError):
        again("five")


@pytest.mark.parametrize(
    ("annotation", "axes"),
    [
        (Vector, True),
        (Vector | None, True),
        (dict[str, tuple[Vector, ...]], True),
        (PyTree[Vector], True),
        (Callable[[int], Vector], True),
        (int | None, False),
        (dict[str, tuple[int, ...]], False),
        (Callable[..., int], False),
        (blocks.Block, False),
    ],
)
def test_axes_are_kept_where_an_annotation_may_have_some(annotation: Any, axes: bool) -> None:
    assert typechecks.has_axes(annotation) is axes
