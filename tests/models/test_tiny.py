"""Random weights: none trivial, large ones drawn on the device alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.models.tiny import LARGE, random_weights

SHAPES = {"kernel": (2048, LARGE // 1024), "scale": (2, LARGE // 2), "bias": (8,)}


@pytest.mark.parametrize("on_device", [False, True])
def test_kernels_keep_variance_and_scales_lie_around_one(on_device):
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    drawn = random_weights(abstract, 3, on_device=on_device)
    assert {name: leaf.shape for name, leaf in drawn.items()} == SHAPES
    found = {name: np.asarray(leaf, np.float64) for name, leaf in drawn.items()}
    # The mean of 2^20 numbers and their spread miss by some 1e-3 of the spread; bfloat16 rounds by 2e-3 at most.
    assert found["kernel"].mean() == pytest.approx(0, abs=1e-3)
    assert found["kernel"].std() * np.sqrt(2048) == pytest.approx(1, abs=5e-3)
    assert (found["scale"].mean(), found["scale"].std()) == pytest.approx((1, 0.1), abs=3e-3)
    again = random_weights(abstract, 3, on_device=on_device)
    other = random_weights(abstract, 4, on_device=on_device)
    assert all((drawn[name] == again[name]).all() and (drawn[name] != other[name]).any() for name in SHAPES)
