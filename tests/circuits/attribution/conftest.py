"""What the tests of attention and of the pooled path as nodes share: one small trace to its velocity, in float64."""

import jax
import pytest

from difffract_jax.circuits.frozen.replacement import Prepared, prepare
from traces import EXPLAINED, Exact, make_exact


@pytest.fixture(scope="session")
def traced() -> Exact:
    """The trace, and what it is of."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        return make_exact(**EXPLAINED)


@pytest.fixture(scope="session")
def prepared(traced: Exact) -> Prepared:
    """Its replacement."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        return prepare(traced.trace, traced.tcs)
