"""Layers read one at a time are the slices of the stacked tensors, cast; and a file that changes is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.models.streaming import aligned
from difffract_jax.storage.checkpoint import open_tree, save_tree
from difffract_jax.storage.layers import FileLayers


@pytest.fixture
def stack(tmp_path):
    draw = np.random.default_rng(0).standard_normal
    tree = {"stack": {"up": jnp.asarray(draw((3, 4, 5))), "bias": jnp.asarray(draw((3, 5)))}, "beside": jnp.ones(2)}
    save_tree(tree, tmp_path, {})
    return tree, open_tree(tmp_path, tree), tmp_path


def layers_of(stack, dtype=jnp.float32):
    tree, files, _ = stack
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree["stack"])
    return FileLayers(files, "stack.", like, aligned)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_layer_is_its_slice_in_the_type_that_is_wanted(stack, dtype):
    layers = layers_of(stack, dtype)
    assert layers.depth == 3
    for number in range(3):
        found = layers.read(number)
        for name, leaf in found.items():
            assert leaf.dtype == dtype and leaf.ctypes.data % 64 == 0
            np.testing.assert_array_equal(leaf, np.asarray(stack[0]["stack"][name][number]).astype(dtype))
        assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(lambda leaf: leaf.shape, layers.abstract())


def test_some_indices_of_a_leaf_are_read_alone(stack):
    found = layers_of(stack).read(1, {"up": (1, np.array([4, 0]))})
    np.testing.assert_array_equal(found["up"], np.asarray(stack[0]["stack"]["up"][1])[:, [4, 0]])
    np.testing.assert_array_equal(found["bias"], stack[0]["stack"]["bias"][1])


@pytest.mark.parametrize("change", ["removed", "cut", "replaced"])
def test_a_file_that_changes_meanwhile_is_told(stack, change):
    layers, path = layers_of(stack), stack[2] / "model.safetensors"
    layers.read(0)
    if change == "removed":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors (cannot be read any more|has changed)"):
        layers.read(1)
