"""Checkpoint files: found, read lazily, and every broken shard named once."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.source import ArraySource, Source
from difffract_jax.config import UserError
from difffract_jax.storage.files import TensorFile, write_tensors

TENSORS = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(4, ml_dtypes.bfloat16)}


def write_shards(directory, shards):
    """Writes shards as the Hugging Face libraries do; `shards` maps file name to tensors."""
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    write_shards(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}, "two.safetensors": {"b": TENSORS["b"]}})
    return tmp_path


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_file_and_its_directory_read_alike(tmp_path, stem):
    path = tmp_path / f"{stem}.safetensors"
    save_file(TENSORS, path)
    for source in (Source(path), Source(tmp_path)):
        assert source.problems == []
        assert source.shapes() == {"a": (2, 3), "b": (4,)}
        assert [source.dtype(key) for key in source] == ["F32", "BF16"]
        assert all(np.array_equal(source[key], TENSORS[key]) for key in TENSORS)


def test_shards_are_read_through_their_index(sharded):
    source = Source(sharded)
    assert source.problems == []
    assert set(source) == {"a", "b"}
    assert all(np.array_equal(source[key], TENSORS[key]) for key in TENSORS)


def test_tensors_are_views_of_the_map_that_cannot_be_written(sharded):
    assert not Source(sharded)["a"].flags.writeable
    assert Source(sharded)["a"].base is not None


def test_a_prefix_is_stripped_and_other_keys_are_left_out(tmp_path):
    path = tmp_path / "all.safetensors"
    save_file({f"model.{key}": value for key, value in TENSORS.items()} | {"vae.x": np.ones(1)}, path)
    source = Source(path, prefix="model.")
    assert set(source) == {"a", "b"}
    assert source.shape("a") == (2, 3) and source.readable("a") and not source.readable("vae.x")


def test_a_missing_shard_is_one_problem_and_its_tensors_count_as_present(sharded):
    (sharded / "two.safetensors").unlink()
    source = Source(sharded)
    assert source.problems == ["shard two.safetensors is missing, which holds 1 tensors; download it again"]
    assert source.shapes() == {"a": (2, 3), "b": None}
    assert source.readable("a") and not source.readable("b") and source.is_float("b")


@pytest.mark.parametrize(
    ("keep", "message"), [(-1, "its last 1 bytes are missing"), (20, "two.safetensors is truncated")]
)
def test_a_truncated_shard_is_one_problem(sharded, keep, message):
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    source = Source(sharded)
    assert len(source.problems) == 1 and message in source.problems[0]
    assert not source.readable("b")


def test_a_tensor_in_two_shards_is_a_problem(tmp_path):
    write_shards(tmp_path, {"one.safetensors": TENSORS, "two.safetensors": {"b": TENSORS["b"]}})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Source(tmp_path).problems == ["b is in two shards"]


def test_a_type_that_is_not_understood_is_a_problem(tmp_path):
    header = b'{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    source = Source(tmp_path / "a.safetensors")
    assert source.problems == ["a has type C64, expected one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2"]
    assert not source.readable("a")


def fp8(*shape):
    return np.linspace(-400, 400, int(np.prod(shape)), dtype=np.float32).reshape(shape).astype(ml_dtypes.float8_e4m3fn)


def opened(path, tensors):
    write_tensors(path, [(key, np.dtype(value.dtype), value.shape) for key, value in tensors.items()], tensors.values())
    return Source(path)


def test_fp8_weights_are_widened_and_their_scales_multiplied_in(tmp_path):
    weights = {
        "plain.weight": fp8(2, 3),
        "one.weight": fp8(2, 3),
        "rows.weight": fp8(2, 3).astype(ml_dtypes.float8_e5m2),
    }
    scales = {
        "one.scale_weight": np.float32(0.3).reshape(()),
        "rows.weight_scale": np.array([[0.1], [3.0]], np.float32),
    }
    hints = {"one.scale_input": np.ones(1, np.float32), "rows.input_scale": np.ones(1, np.float32)}
    hints["scaled_fp8"] = np.zeros(0, ml_dtypes.float8_e4m3fn)
    source = opened(tmp_path / "a.safetensors", weights | scales | hints | {"one.bias": np.ones(2, np.float32)})
    assert source.problems == [] and list(source) == [*weights, "one.bias"]
    assert all(source.is_float(key) and source.readable(key) for key in weights)
    wide = {key: value.astype(np.float32) for key, value in weights.items()}
    wide["one.weight"] *= np.float32(0.3)
    wide["rows.weight"] *= scales["rows.weight_scale"]
    assert all(source[key].dtype == np.float32 and np.array_equal(source[key], wide[key]) for key in wide)


def test_what_is_left_over_of_scaled_fp8_does_not_matter(tmp_path):
    left = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn), "a.scale_weight": np.ones((), np.float32)}
    source = opened(tmp_path / "a.safetensors", left | {"a.weight": TENSORS["a"]})
    assert source.problems == [] and list(source) == ["a.weight"]
    assert np.array_equal(source["a.weight"], TENSORS["a"])


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (fp8(2, 3), np.ones(3, np.float32), r"a.scale_weight of shape \(3,\) is neither one number nor one per row"),
        (fp8(2, 3), np.ones(2, np.uint8), r"a.scale_weight of shape \(2,\) is neither"),
        (
            TENSORS["a"],
            np.full(2, 0.5, np.float32),
            "a.weight of type F32 has a scale but is not fp8, so that it is not known",
        ),
    ],
)
def test_a_scale_that_cannot_be_applied_is_one_problem(tmp_path, weight, scale, message):
    source = opened(tmp_path / "a.safetensors", {"a.weight": weight, "a.scale_weight": scale})
    (problem,) = source.problems
    assert re.match(message, problem)
    assert source["a.weight"].shape == (2, 3)  # other problems are still looked for


def test_wrappers_of_modules_do_not_show_in_the_keys(tmp_path):
    tensors = {"a._orig_mod.b.weight": np.ones(1), "_fsdp_wrapped_module.c": np.ones(1), "my_orig_mod.d": np.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(Source(tmp_path / "a.safetensors")) == {"a.b.weight", "c", "my_orig_mod.d"}
    save_file(tensors | {"c": np.ones(1)}, tmp_path / "a.safetensors")
    (problem,) = Source(tmp_path / "a.safetensors").problems
    assert "c is there twice" in problem


def test_what_an_index_lists_and_no_shard_holds_is_one_problem(sharded):
    index = sharded / "model.safetensors.index.json"
    listed = {"a": "one.safetensors", "b": "two.safetensors", "ghost.weight": "two.safetensors"}
    index.write_bytes(b"\xef\xbb\xbf" + json.dumps({"weight_map": listed}).encode())
    (problem,) = Source(sharded).problems
    assert "model.safetensors.index.json lists ghost.weight, which its shards lack" in problem


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no diffusion_pytorch_model.safetensors or model.safetensors \(found nothing\)"),
        ({"weights.msgpack": "x"}, r"found weights.msgpack\); other formats must be saved as safetensors first"),
        ({"pytorch_model.bin": "x"}, r"holds PyTorch's pytorch_model.bin"),
        ({"model.safetensors.index.json": "{}"}, "not a valid index"),
        ({"model.safetensors.index.json": '{"weight_map": {}}'}, "not a valid index"),
        ({"model.safetensors": "x"}, "truncated or not a safetensors file"),
        ({"model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "a placeholder of Git LFS"),
    ],
)
def test_a_directory_without_weights_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Source(tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Source(tmp_path / "nothing")


def test_arrays_in_memory_have_the_same_interface(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    source, arrays = Source(tmp_path / "a.safetensors"), ArraySource("here", TENSORS | {"n": np.arange(3)})
    assert arrays.problems == [] and arrays.shapes() == source.shapes() | {"n": (3,)}
    assert arrays.is_float("b") and not arrays.is_float("n") and arrays.dtype("n") == "int64"
    assert arrays.readable("a") and not arrays.readable("z")
    assert np.array_equal(arrays["a"], TensorFile(tmp_path / "a.safetensors")["a"])
