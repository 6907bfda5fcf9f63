"""Trees on disk: load after save is the identity, and whatever does not fit is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from difffract_jax.config import UserError
from difffract_jax.sharding import make_mesh
from difffract_jax.storage import shards
from difffract_jax.storage.checkpoint import (
    leaf_paths,
    load_tree,
    placement,
    read_config,
    save_tree,
    save_trees,
    tree_hash,
)


class Inner(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs, param_dtype=jnp.bfloat16)
        self.parts = nnx.List([nnx.Linear(2, 3, rngs=rngs)])


class Outer(nnx.Module):
    def __init__(self, *, rngs):
        self.stack = jax.vmap(lambda key: Inner(rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), 3))
        self.scale = nnx.Param(jnp.arange(5.0))


@pytest.fixture(scope="module")
def tree():
    return Outer(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def abstract():
    return jax.eval_shape(lambda: Outer(rngs=nnx.Rngs(0)))


def test_paths_are_dotted_names_without_the_parameter_s_value(abstract):
    paths = {path: leaf.shape for path, leaf in leaf_paths(abstract).items()}
    assert paths == {
        "scale": (5,),
        "stack.parts.0.bias": (3, 3),
        "stack.parts.0.kernel": (3, 2, 3),
        "stack.up.bias": (3, 8),
        "stack.up.kernel": (3, 4, 8),
    }


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_load_after_save_is_the_identity(tree, abstract, tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    save_tree(tree, tmp_path, {"note": "x"})
    loaded = load_tree(tmp_path, abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for path, leaf in leaf_paths(tree).items():
        other = leaf_paths(loaded)[path]
        assert leaf.dtype == other.dtype and np.array_equal(leaf, other)
    assert read_config(tmp_path)["note"] == "x"


def test_the_hash_ignores_sharding_and_notices_one_bit(tree, tmp_path, monkeypatch):
    first = save_tree(tree, tmp_path / "a", {})
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    assert save_tree(tree, tmp_path / "b", {}) == first == tree_hash({"model": tree})
    changed = jax.tree.map(lambda leaf: leaf, tree)
    changed.scale = nnx.Param(jnp.arange(5.0).at[4].set(np.nextafter(np.float32(4), np.float32(5))))
    assert save_tree(changed, tmp_path / "c", {}) != first


def test_changed_weights_fail_the_recorded_hash(tree, abstract, tmp_path):
    save_tree(tree, tmp_path, {})
    path = tmp_path / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="differ from their recorded hash"):
        load_tree(tmp_path, abstract)
    load_tree(tmp_path, abstract, verify=False)


def test_every_difference_from_the_expected_tree_is_named(tree, abstract, tmp_path):
    save_tree({"scale": jnp.ones(4), "extra": jnp.ones(1), "stack": tree.stack}, tmp_path, {})
    with pytest.raises(UserError, match=r"extra is unknown; scale has shape \(4,\), expected \(5,\)"):
        load_tree(tmp_path, abstract)
    save_tree({"stack": tree.stack}, tmp_path, {})
    with pytest.raises(UserError, match="scale is missing"):
        load_tree(tmp_path, abstract)


def test_several_trees_share_a_directory_and_leaves_are_cast_to_the_wanted_type(tree, tmp_path):
    save_trees({"a": {"x": jnp.ones(3)}, "b": {"y": jnp.zeros(2)}}, tmp_path, {})
    half = load_tree(tmp_path, {"x": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}, name="a")
    assert half["x"].dtype == jnp.bfloat16
    assert set(read_config(tmp_path)["content_hashes"]) == {"a", "b"}


def test_leaves_go_where_the_sharding_says(tmp_path):
    mesh = make_mesh({"feature": 4})
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("feature",), ()))
    save_tree({"a": jnp.arange(8.0), "b": jnp.ones(3)}, tmp_path, {})
    abstract = {"a": jax.ShapeDtypeStruct((8,), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    for sharding in ({"a": split, "b": whole}, {"a": split, "b": whole}.get):
        loaded = load_tree(tmp_path, abstract, sharding=sharding)
        assert loaded["a"].sharding == split and loaded["b"].sharding == whole
    assert placement(whole)("anything") == whole
    assert placement(None)("anything") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ("[]", "names no format_version"),
        ('{"d_model": 8}', "names no format_version"),
        (json.dumps({"format_version": 99}), "format_version 99, but this release reads 1"),
    ],
)
def test_a_directory_of_another_kind_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)
