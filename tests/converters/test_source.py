"""Checkpoint files: found, read lazily, and every broken shard named once."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.source import ArraySource, Source
from difffract_jax.config import UserError
from difffract_jax.storage.files import TensorFile

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
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    source = Source(tmp_path / "a.safetensors")
    assert source.problems == ["a has type F8_E4M3, expected one of F64, F32, F16, BF16"]
    assert not source.readable("a")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no diffusion_pytorch_model.safetensors or model.safetensors \(found nothing\)"),
        ({"pytorch_model.bin": "x"}, r"found pytorch_model.bin\); other formats must be saved as safetensors first"),
        ({"model.safetensors.index.json": "{}"}, "not a valid index"),
        ({"model.safetensors": "x"}, "truncated or no safetensors file"),
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
