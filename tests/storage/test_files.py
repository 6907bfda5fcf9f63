"""Files: whole or not at all, and a safetensors format that the safetensors library agrees with."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as official

from difffract_jax.config import UserError
from difffract_jax.storage import locks, shards, sums
from difffract_jax.storage.files import TensorFile, atomic_directory, atomic_file, read_array
from difffract_jax.storage.locks import sole_writer
from difffract_jax.storage.shards import open_shards, write_sharded
from difffract_jax.storage.sums import sample_hash

TENSORS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-2, 2, 5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3, np.int64),
    "flags": np.array([True, False, True]),
    "empty": np.zeros((0, 7), np.float32),
}


def write(directory, tensors=TENSORS, stem="model"):
    kinds = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    write_sharded(directory, stem, kinds, tensors.__getitem__)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    write(tmp_path)
    read = official.load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(equal(read[name], TENSORS[name]) for name in TENSORS)


def test_what_the_safetensors_library_writes_is_read(tmp_path):
    official.save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.missing_bytes == 0
    assert all(equal(file[name], TENSORS[name]) for name in TENSORS)


def test_large_sets_are_split_into_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 50)
    write(tmp_path)
    opened = open_shards(tmp_path, "model")
    assert [shard.path.name for shard in opened] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert {name for shard in opened for name in shard.tensors} == TENSORS.keys()


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]", bytes(8)])
def test_a_file_without_a_header_is_refused(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken.safetensors"):
        TensorFile(path)


def test_a_header_that_contradicts_its_shapes_is_refused(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="no valid safetensors header"):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("shape", "offsets"), [([-2, -2], [0, 16]), ([4], [-16, 0]), ([4.0], [0, 16])])
def test_a_header_of_sizes_that_cannot_be_is_refused(tmp_path, shape, offsets):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match="no valid safetensors header"):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0x280, 0x8020, 0x203C])
def test_a_header_that_is_cut_off_is_not_taken_for_another_format(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": ')
    with pytest.raises(UserError, match="is truncated or not a safetensors file"):
        TensorFile(tmp_path / "a.safetensors")


def test_missing_and_truncated_shards_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 50)
    write(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors \(by 2 bytes\)"):
        open_shards(tmp_path, "model")
    second.unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
        open_shards(tmp_path, "model")


@pytest.mark.parametrize("content", ["x", "{}", "[]", '{"weight_map": 1}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="model.safetensors.index.json is not a valid index of shards"):
        open_shards(tmp_path, "model")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_directory_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_directory(tmp_path / "sub" / "out") as partial:
        (partial / "half.txt").write_text("half")
        raise error
    assert list((tmp_path / "sub").iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_file_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        raise error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_finished_directory_replaces_the_old_one_only_when_asked(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic_directory(out) as partial:  # an empty directory may be filled
        (partial / "a.txt").write_text("first")
    with pytest.raises(UserError, match="exists already"), atomic_directory(out):
        pass
    with atomic_directory(out, overwrite=True) as partial:
        (partial / "b.txt").write_text("second")
        assert (out / "a.txt").exists()
    assert [path.name for path in out.iterdir()] == ["b.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def written_by_two(target, number, *, overwrite=False, start=None):
    """Writes ten files that say who wrote them, and tells how it went."""
    try:
        with atomic_directory(target, overwrite=overwrite) as partial:
            if start is not None:
                start.wait(timeout=120)  # both are writing
            for name in range(10):
                with atomic_file(partial / f"{name}.txt") as file:
                    file.write_text(str(number))
        return "written"
    except UserError as error:
        return str(error)


def authors(target):
    return {path.read_text() for path in target.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_writers_at_a_time_the_second_is_told_at_once(tmp_path, overwrite):
    out = tmp_path / "link"
    (tmp_path / "real").mkdir()
    out.symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "real", overwrite=overwrite) as partial:
        (partial / "a.txt").write_text("first")
        with ThreadPoolExecutor(1) as other:
            told = other.submit(written_by_two, out, "second", overwrite=overwrite).result()
    assert "Another process is writing" in told and "name another output" in told
    assert authors(out) == {"first"} and out.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    ("before", "overwrite"), [("absent", False), ("empty", False), ("absent", True), ("full", True)]
)
def test_writers_without_locks_never_mix_their_files(tmp_path, monkeypatch, overwrite, before):
    monkeypatch.setattr(locks, "fcntl", None)
    out = tmp_path / "out"
    if before != "absent":
        out.mkdir()
    if before == "full":
        (out / "old.txt").write_text("old")
    start = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda number: written_by_two(out, number, overwrite=overwrite, start=start), ["0", "1"])
    told = [one for one in both if one != "written"]
    assert len(authors(out)) == 1 and len(list(out.iterdir())) == 10
    assert all("was written by another process meanwhile and stays" in one for one in told)
    assert len(told) == 1 or overwrite
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys, time; from difffract_jax.storage.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as partial:\n"
        "    print('writing', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "writing\n"
        assert "Another process is writing" in written_by_two(tmp_path / "out", "second")
        first.kill()
        first.wait()
    assert written_by_two(tmp_path / "out", "third") == "written"
    assert authors(tmp_path / "out") == {"third"}


def test_an_output_beside_which_no_lock_can_be_made_is_written_without(tmp_path):
    (tmp_path / ".out.lock").mkdir()  # as unwritable as a read-only folder, also for root
    assert written_by_two(tmp_path / "out", "first") == "written"
    with sole_writer(tmp_path / "none" / "out"):
        assert not (tmp_path / "none").exists()


def test_an_old_directory_stays_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("old")
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(1, "not permitted", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), atomic_directory(out, overwrite=True) as partial:
        (partial / "a.txt").write_text("new")
    assert authors(out) == {"old"} and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_sampled_hash_knows_names_sizes_beginnings_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "SAMPLE_BYTES", 16)
    (tmp_path / "part").mkdir()
    write(tmp_path / "part")
    path, seen = tmp_path / "part" / "model.safetensors", {sample_hash(tmp_path)}
    whole = path.read_bytes()
    for changed in (whole[:-1] + b"?", b"?" + whole[1:], whole + b"?"):
        path.write_bytes(changed)
        seen.add(sample_hash(tmp_path))
    path.write_bytes(whole)
    path.rename(tmp_path / "part" / "other.safetensors")
    assert len(seen | {sample_hash(tmp_path)}) == 5
    path.with_name("other.safetensors").rename(path)
    assert sample_hash(tmp_path) in seen


def test_one_array_is_read_and_nothing_else(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    assert read_array(tmp_path / "a.npy").tolist() == [0, 1, 2]
    np.savez(tmp_path / "b.npz", a=np.ones(1), b=np.ones(1))
    with pytest.raises(UserError, match="holds several arrays, but one is wanted"):
        read_array(tmp_path / "b.npz")
    (tmp_path / "c.npy").write_bytes(b"neither")
    (tmp_path / "d.npy").write_bytes(b"")
    for name in ("c.npy", "d.npy"):
        with pytest.raises(UserError, match=f"{name} is not a readable .npy file"):
            read_array(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"GGUF\x03" + bytes(99), "is a GGUF file, quantised; take safetensors in bf16"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(99), "is a PyTorch file"),
        (b"PK\x03\x04" + bytes(26) + b"node_kind.npy" + bytes(99), "is an .npz file of NumPy"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9" + bytes(99), "is a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a placeholder of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"", "is truncated or not a safetensors file"),
        (b"\xff" * 40, "is truncated or not a safetensors file"),
    ],
)
def test_a_file_of_another_format_is_told_by_name(tmp_path, content, what):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=what):
        TensorFile(tmp_path / "a.safetensors")


def test_the_sample_of_one_file_is_its_own(tmp_path):
    write(tmp_path)
    before = sample_hash(tmp_path / "model.safetensors")
    write(tmp_path, TENSORS | {"scalar": np.array(4, np.int64)})
    assert sample_hash(tmp_path / "model.safetensors") != before
