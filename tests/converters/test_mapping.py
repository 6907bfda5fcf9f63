"""The rule engine: both directions, placement, memory, and every kind of misfit reported together."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from converters.mapping import (
    ArraySource,
    ConversionError,
    Ignored,
    Rule,
    Source,
    check_coverage,
    expand,
    fuse_qkv,
    load_tree,
    save_tree,
    source_shapes,
    transpose,
)
from difffract_jax.sharding import make_mesh
from difffract_jax.storage.checkpoint import leaf_paths

LAYERS, WIDTH = 3, 4
RULES = (
    Rule("embed.weight", "embed.table"),
    Rule(tuple(f"blocks.{{layer}}.to_{name}.weight" for name in "qkv"), "blocks.qkv.kernel", fuse_qkv),
    Rule("blocks.{layer}.norm.weight", "blocks.norm.scale"),
    Rule("ends.{side}.weight", "ends.{side}.kernel", transpose),
    Rule("optional.weight", "optional.kernel", transpose),
)
IGNORED = (Ignored("buffers.*", "constants"),)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


ABSTRACT = {
    "embed": {"table": shape(7, WIDTH)},
    "blocks": {"qkv": {"kernel": shape(LAYERS, WIDTH, 3 * WIDTH)}, "norm": {"scale": shape(LAYERS, WIDTH)}},
    "ends": {"left": {"kernel": shape(WIDTH, 2)}, "right": {"kernel": shape(WIDTH, 5)}},
}


def state(seed=0):
    """Returns a PyTorch-like state dict that fits `ABSTRACT`."""
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (7, WIDTH), "ends.left.weight": (2, WIDTH), "ends.right.weight": (5, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"blocks.{layer}.to_{name}.weight": (WIDTH, WIDTH) for name in "qkv"}
        shapes[f"blocks.{layer}.norm.weight"] = (WIDTH,)
    return {key: rng.normal(size=size).astype(np.float32) for key, size in shapes.items()}


def load(tensors, **options):
    return load_tree(ArraySource("tensors", tensors), RULES, ABSTRACT, ignored=IGNORED, **options)


def problems_of(tensors):
    with pytest.raises(ConversionError) as caught:
        load(tensors)
    return caught.value


def test_leaves_are_filled_as_the_rules_say():
    tensors = state()
    tree = load(tensors | {"buffers.positions": np.arange(9)})
    assert np.array_equal(tree["embed"]["table"], tensors["embed.weight"])
    assert np.array_equal(tree["ends"]["right"]["kernel"], tensors["ends.right.weight"].T)
    for layer in range(LAYERS):
        q, k, v = (tensors[f"blocks.{layer}.to_{name}.weight"].T for name in "qkv")
        assert np.array_equal(tree["blocks"]["qkv"]["kernel"][layer], np.concatenate([q, k, v], axis=1))


def test_backward_returns_the_same_tensors_with_the_promised_shapes():
    tensors = state()
    back = dict(save_tree(load(tensors), RULES))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    assert source_shapes(RULES, ABSTRACT) == {key: value.shape for key, value in tensors.items()}


def test_stacked_layers_may_have_names_instead_of_numbers():
    labels = {"layer": ("a", "m", "z")}
    renamed = {
        key.replace(f"blocks.{number}.", f"blocks.{label}."): value
        for key, value in state().items()
        for number, label in enumerate(labels["layer"])
        if f"blocks.{number}." in key or "blocks" not in key
    }
    tree = load(renamed, labels=labels)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(load(state())), strict=True))
    assert dict(save_tree(tree, RULES, labels)).keys() == renamed.keys()


def test_a_rule_may_stack_over_two_axes():
    rules = (Rule("grid.{row}.{column}.weight", "grid.kernel", transpose),)
    tensors = {f"grid.{r}.{c}.weight": np.full((5, 4), 10 * r + c, np.float32) for r in range(2) for c in range(3)}
    tree = load_tree(ArraySource("grid", tensors), rules, {"grid": {"kernel": shape(2, 3, 4, 5)}})
    assert np.array_equal(tree["grid"]["kernel"][:, :, 0, 0], [[0, 1, 2], [10, 11, 12]])
    assert dict(save_tree(tree, rules)).keys() == tensors.keys()


def test_a_rule_whose_leaf_is_absent_takes_no_part():
    assert all("optional" not in assignment.targets[0] for assignment in expand(RULES, ABSTRACT))
    with_leaf = ABSTRACT | {"optional": {"kernel": shape(2, 2)}}
    assert check_coverage(source_shapes(RULES, ABSTRACT), RULES, with_leaf) == ["missing optional.weight"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_leaves_take_the_type_that_is_asked_for(dtype):
    tree = load({key: value.astype(ml_dtypes.bfloat16) for key, value in state().items()}, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    assert np.array_equal(tree["embed"]["table"], state()["embed.weight"].astype(ml_dtypes.bfloat16))


def test_leaves_go_onto_their_sharding():
    sharding = NamedSharding(make_mesh({"feature": 4}), PartitionSpec(None, None, "feature"))
    tree = load(state(), sharding={"blocks.qkv.kernel": sharding}.get)
    assert tree["blocks"]["qkv"]["kernel"].sharding == sharding
    assert np.array_equal(tree["blocks"]["qkv"]["kernel"], load(state())["blocks"]["qkv"]["kernel"])


def test_all_problems_are_told_together():
    tensors = state() | {"extra.weight": np.ones(2, np.float32)}
    del tensors["blocks.1.norm.weight"]
    tensors["embed.weight"] = np.ones((6, WIDTH), np.float32)
    tensors["ends.left.weight"] = np.arange(8).reshape(2, 4)
    tensors["blocks.0.norm.weight"] = np.array([1, 2, np.inf, 3], np.float32)
    error = problems_of(tensors)
    assert set(error.problems) == {
        "missing blocks.1.norm.weight",
        "unknown extra.weight",
        "embed.weight has shape (6, 4), expected (7, 4)",
        "ends.left.weight has type int64, expected a float",
        "blocks.0.norm.weight holds values that are not finite",
    }
    assert str(error).startswith("tensors cannot be converted, 5 problems: missing blocks.1.norm.weight; ")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value):
    tensors = state()
    tensors["blocks.2.to_k.weight"][1, 2] = value
    tensors["ends.left.weight"][0, 0] = value
    assert set(problems_of(tensors).problems) == {
        "blocks.2.to_k.weight holds values that are not finite",
        "ends.left.weight holds values that are not finite",
    }


def test_values_too_large_for_the_wanted_type_are_refused():
    tensors = state() | {"ends.left.weight": np.full((2, WIDTH), 1e39, np.float64)}
    assert problems_of(tensors).problems == ("ends.left.weight holds values too large for float32",)


def test_a_wrong_shape_in_a_fused_leaf_says_what_was_expected():
    tensors = state()
    tensors["blocks.1.to_k.weight"] = np.ones((WIDTH, 5), np.float32)
    (problem,) = problems_of(tensors).problems
    assert problem.startswith(
        "blocks.1.to_q.weight + blocks.1.to_k.weight + blocks.1.to_v.weight of shape (4, 4) and (4, 5)"
    )


def test_more_or_fewer_layers_are_missing_or_unknown_keys():
    more = {"blocks.3.norm.weight": np.ones(WIDTH, np.float32)}
    assert problems_of(state() | more).problems == ("unknown blocks.3.norm.weight",)
    fewer = {key: value for key, value in state().items() if not key.startswith("blocks.2.")}
    error = problems_of(fewer)
    assert set(error.problems) == {f"missing blocks.2.{name}.weight" for name in ("to_q", "to_k", "to_v", "norm")}


def test_a_long_list_of_problems_is_cut_short_with_a_count():
    error = problems_of({f"other.{number}": np.ones(1, np.float32) for number in range(20)})
    total = len(error.problems)
    assert total == 20 + len(state())
    assert str(error).endswith(f"(+{total - 12} more).")


def test_mistakes_in_a_table_are_found():
    shapes = source_shapes(RULES, ABSTRACT)
    twice = (*RULES, Rule("embed.weight", "embed.table"))
    assert check_coverage(shapes, twice, ABSTRACT) == [
        "embed.weight is used by two rules",
        "leaf embed.table is filled by two rules",
    ]
    assert check_coverage(shapes, RULES[1:], ABSTRACT) == [
        "unknown embed.weight",
        "leaf embed.table is filled by no rule",
    ]
    astray = (*RULES, Rule("x", ("embed.table", "embed.nothing")))
    assert "rule for embed.nothing has no such leaf" in check_coverage(shapes, astray, ABSTRACT)


def test_broken_shards_are_reported_with_everything_else(tmp_path):
    tensors = state()
    tensors["embed.weight"] = tensors["embed.weight"][:3].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:-5])
    with pytest.raises(ConversionError) as caught:
        load_tree(Source(tmp_path), RULES, ABSTRACT)
    assert caught.value.problems == (
        "model.safetensors is truncated, its last 5 bytes are missing; download it again",
        "embed.weight has shape (3, 4), expected (7, 4)",
    )


def test_host_memory_stays_at_the_output_plus_one_tensor(tmp_path):
    layers, width = 12, 128
    rules = (Rule("blocks.{layer}.weight", "blocks.kernel", transpose), Rule("other.weight", "other.kernel", transpose))
    tensors = {f"blocks.{layer}.weight": np.ones((width, width), np.float32) for layer in range(layers)}
    tensors["other.weight"] = np.ones((width, layers * width), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    abstract = {"blocks": {"kernel": shape(layers, width, width)}, "other": {"kernel": shape(layers * width, width)}}
    leaf = layers * width * width * 4
    load_tree(Source(tmp_path), rules, abstract)  # what JAX allocates once is not counted
    tracemalloc.start()
    tree = load_tree(Source(tmp_path), rules, abstract)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # NumPy's buffers are what is traced: one leaf at a time, or both where `device_put` takes the buffer over.
    assert peak < 2 * leaf + 2 * width * width * 4 + 10**5
    assert sum(leaf.nbytes for leaf in leaf_paths(tree).values()) == 2 * leaf
