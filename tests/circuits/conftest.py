"""Fixtures of the circuit tests."""

import numpy as np
import pytest

from difffract_jax.loading import load_pipeline, load_transcoders
from tolerances import REFERENCE
from traces import MORE_VARIANTS, VARIANTS, Exact, Golden, variant


@pytest.fixture(scope="session")
def golden() -> Golden:
    forward = dict(np.load(REFERENCE / "golden_forward.npz"))
    return Golden(load_pipeline(REFERENCE / "pipeline"), load_transcoders(REFERENCE / "transcoders"), forward)


@pytest.fixture(params=[*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_VARIANTS)])
def exact(x64, request) -> Exact:
    """One trace per variant of what is replaced."""
    return variant(request.param)
