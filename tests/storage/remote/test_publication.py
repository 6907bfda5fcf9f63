"""Directories in buckets are there whole or not at all, have one writer, and copies of them are bounded."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bucket_servers import Proxy
from difffract_jax.config import UserError
from difffract_jax.storage import headers
from difffract_jax.storage.files import (
    TensorFile,
    atomic_directory,
    atomic_file,
    check_vacant,
    is_occupied,
    read_array,
    write_tensors,
)
from difffract_jax.storage.locks import sole_writer
from difffract_jax.storage.remote import cache, objects, publication, ranges
from difffract_jax.storage.remote.addresses import parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.cache import local_directory, local_file, make_room
from difffract_jax.storage.remote.publication import CLAIM, MARKER, listing
from difffract_jax.storage.resumable import resumable_directory
from difffract_jax.storage.tiles import Tiling

Either = tuple[str, Proxy]


def keys(url: str) -> list[str]:
    at = parse_address(url)
    return [stat.key.removeprefix(f"{at.key}/") for stat in open_bucket(at).below(at.key)]


def put(url: str, content: bytes) -> None:
    at = parse_address(url)
    open_bucket(at).write(at.key, content)


def test_a_directory_is_published_and_read_back(either: Either) -> None:
    url = f"{either[0]}://bucket/published/whole"
    with atomic_directory(url) as partial:
        (partial / "deep").mkdir()
        (partial / "a.txt").write_bytes(b"one")
        (partial / "deep" / "b.bin").write_bytes(bytes(1000))
        assert not is_occupied(Path(url)), "nothing is there before the block ends"
    assert keys(url) == ["a.txt", "deep/b.bin", MARKER]
    here = local_directory(Path(url))
    assert (here / "a.txt").read_bytes() == b"one" and (here / "deep" / "b.bin").read_bytes() == bytes(1000)
    assert not (here / MARKER).exists() and is_occupied(Path(url))
    with pytest.raises(UserError, match=f"{url} exists already; name another output, or pass --overwrite"):
        check_vacant(url)
    with atomic_directory(url, overwrite=True) as partial:
        (partial / "c.txt").write_bytes(b"new")
    assert keys(url) == ["c.txt", MARKER]
    assert [path.name for path in local_directory(url).iterdir()] == ["c.txt"]


def test_what_fails_on_the_way_leaves_nothing(either: Either) -> None:
    scheme, proxy = either
    url = f"{scheme}://bucket/published/broken"
    proxy.fault = lambda method, path: 403 if method in ("POST", "PUT") and "second" in path else None
    if scheme == "gs":  # whose names of objects stand in the body
        proxy.fault = lambda method, path: 403 if method == "POST" and len(keys_sent) > 2 else None
        keys_sent = proxy.log
        proxy.log.clear()
    with pytest.raises(UserError, match="do not allow it"), atomic_directory(url) as partial:
        for name in ("first", "second"):
            (partial / name).write_bytes(name.encode())
    proxy.fault = lambda method, path: None
    assert keys(url) == []
    with pytest.raises(ZeroDivisionError), atomic_directory(url) as partial:
        (partial / "first").write_bytes(b"1")
        raise ZeroDivisionError
    assert keys(url) == []


def test_readers_ignore_what_has_a_claim_and_no_marker(gs: Proxy) -> None:
    url = "gs://bucket/published/killed"
    put(f"{url}/weights", b"half")
    put(f"{url}/{CLAIM}", json.dumps({"process": 7, "host": "pod-3", "token": "t"}).encode())
    with pytest.raises(UserError, match=f"{url} is not finished: process 7 on pod-3 began to write it") as caught:
        local_directory(url)
    assert f"remove {url}/{CLAIM}" in str(caught.value)
    with pytest.raises(UserError, match=f"{url} exists already"), atomic_directory(url):
        raise AssertionError("a half-written directory is not vacant")
    with atomic_directory(url, overwrite=True) as partial:
        (partial / "weights").write_bytes(b"whole")
    assert (local_directory(url) / "weights").read_bytes() == b"whole" and keys(url) == [MARKER, "weights"]


def test_two_writers_of_one_place_are_told_apart(gs: Proxy, tmp_path: Path) -> None:
    url, at = "gs://bucket/published/two", parse_address("gs://bucket/published/two")
    with sole_writer(url):
        put(f"{url}/report.md", b"text")
        with pytest.raises(UserError, match=rf"Another process is writing {url}: process {os.getpid()} on "):
            publication.publish(tmp_path, at)
        with pytest.raises(UserError, match=f"Another process is writing {url}"), sole_writer(Path(url)):
            raise AssertionError("held")
    assert listing(at).files.keys() == {"report.md"} and keys(url) == [MARKER, "report.md"]
    (tmp_path / "report.md").write_bytes(b"mine")
    upload = publication.upload

    def taken_over(*given):
        put(f"{url}/{CLAIM}", b"theirs")
        return upload(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publication, "upload", taken_over)
        with pytest.raises(UserError, match=f"{url} was taken over by another process"):
            publication.publish(tmp_path, at, overwrite=True)
    assert MARKER not in keys(url)


def test_what_another_process_finishes_at_the_same_moment_stays(
    gs: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "gs://bucket/published/meanwhile"
    with atomic_directory(url) as partial:
        (partial / "a").write_bytes(b"theirs")
    monkeypatch.setattr(publication, "is_taken", lambda at: False)  # as it was when it was asked
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{url} was written by another process meanwhile and stays"):
        publication.publish(tmp_path, parse_address(url))
    assert keys(url) == ["a", MARKER] and (local_directory(url) / "a").read_bytes() == b"theirs"


def test_what_others_copied_there_is_read_as_it_is(either: Either) -> None:
    url = f"{either[0]}://bucket/copied/there"
    put(f"{url}/a", b"1")
    assert (local_directory(url) / "a").read_bytes() == b"1"
    put(f"{url}/a", b"2")
    assert (local_directory(url) / "a").read_bytes() == b"2", "what changed is fetched anew"
    with pytest.raises(UserError, match=f"{url}/none holds nothing"):
        local_directory(f"{url}/none")


def test_files_are_fetched_once_and_written_whole(either: Either) -> None:
    scheme, proxy = either
    url = f"{scheme}://bucket/files/array.npy"
    with atomic_file(url) as partial:
        np.save(partial, np.arange(6))
        assert not is_occupied(Path(url))
    proxy.log.clear()
    assert read_array(Path(url)).tolist() == [0, 1, 2, 3, 4, 5]
    first = len(proxy.log)
    assert local_file(url) == local_file(url) and len(proxy.log) == first + 2  # two questions whether it changed
    with pytest.raises(ZeroDivisionError), atomic_file(url) as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    assert read_array(Path(url)).size == 6
    left, alive, kept = (
        cache.root() / name for name in ("staging/1-killed", "staging/2-alive", "unpublished/3-forgotten")
    )
    for folder in (left, alive, kept):
        folder.mkdir(parents=True)
        os.utime(folder, (1, 1))
    lock = cache._lock(alive, exclusive=False)
    with atomic_file(f"{scheme}://bucket/files/other") as partial:
        partial.write_bytes(b"1")
    assert not left.exists() and not kept.exists() and alive.exists(), "another process holds what it writes"
    assert lock is not None
    os.close(lock)
    cache.clear()
    assert not alive.exists()
    assert not [path for path in cache.root().rglob("*") if path.is_file() and "staging" in path.parts]


def test_a_marker_that_lies_or_is_broken_is_refused(gs: Proxy) -> None:
    url = "gs://bucket/published/marked"
    with atomic_directory(url) as partial:
        (partial / "a").write_bytes(b"right")
    put(f"{url}/a", b"wrong")
    with pytest.raises(UserError, match=f"{url}/a was read, but its bytes differ from its checksum.*SHA-256"):
        local_directory(url)
    put(f"{url}/a", b"longer")
    with pytest.raises(UserError, match=f"{url}/a is not what its directory lists"):
        local_directory(url)
    put(f"{url}/{MARKER}", b"{}")
    with pytest.raises(UserError, match=f"{url}/{MARKER} is not a valid commit marker"):
        local_directory(url)


def test_a_conversion_goes_on_where_it_was_and_is_then_published(gs: Proxy) -> None:
    url, runs = "gs://bucket/published/resumed", []
    for _ in range(2):
        try:
            with resumable_directory(url) as output:
                output.begin("the same work", 1)
                if "a.bin" not in output.finished:
                    runs.append("a.bin")
                    (output.files / "a.bin").write_bytes(b"a")
                    output.finish("a.bin", 1)
                if len(runs) == 1:
                    runs.append("interrupted")
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert keys(url) == []
    assert runs == ["a.bin", "interrupted"] and keys(url) == ["a.bin", MARKER]
    assert not list((cache.root() / "outputs").iterdir())


def test_what_is_complete_and_cannot_be_published_is_kept(gs: Proxy) -> None:
    file, folder, long = (f"gs://bucket/published/{name}" for name in ("kept.txt", "kept", "long"))
    forbidden = {"POST": 403}

    def finished() -> bool:
        with resumable_directory(long) as output:
            output.begin("the same work", 1)
            before = bool(output.finished)
            (output.files / "a.bin").write_bytes(b"a")
            output.finish("a.bin", 1)
        return before

    with (
        pytest.raises(UserError, match="do not allow it.* is complete, and kept in ") as told,
        atomic_file(file) as made,
    ):
        gs.fault = lambda method, path: forbidden.get(method)
        made.write_text("hours of work")
    assert Path(str(told.value).rpartition("kept in ")[2].removesuffix(".")).read_text() == "hours of work"
    gs.fault = lambda method, path: None
    with (
        pytest.raises(UserError, match="do not allow it.* is complete, and kept in ") as told,
        atomic_directory(folder) as made,
    ):
        gs.fault = lambda method, path: forbidden.get(method)
        (made / "b").write_text("more")
    assert (Path(str(told.value).rpartition("kept in ")[2].removesuffix(".")) / "b").read_text() == "more"
    with pytest.raises(UserError, match="do not allow it"):
        finished()
    gs.fault = lambda method, path: None
    assert finished() and keys(long) == ["a.bin", MARKER], "nothing is left to do but to publish it"
    assert not list((cache.root() / "outputs").iterdir())


def test_the_cache_is_bounded(gs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_handed_out", set())
    for name in ("old", "new"):
        put(f"gs://bucket/bounded/{name}", bytes(100_000))
    old = local_file("gs://bucket/bounded/old")
    os.utime(old.parent, (1, 1))
    monkeypatch.setenv(cache.MOST, "150kB")
    new = local_file("gs://bucket/bounded/new")
    assert old.exists() and new.exists(), "what this process reads stays"
    cache._handed_out.clear()
    make_room(0)
    assert not old.exists() and new.exists()
    monkeypatch.setenv(cache.MOST, "much")
    with pytest.raises(UserError, match="DIFFFRACT_REMOTE_CACHE_BYTES must be a size"):
        make_room(0)


def test_a_directory_that_another_process_reads_stays(gs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_handed_out", set())
    put("gs://bucket/read/weights", bytes(100_000))
    home = local_directory("gs://bucket/read")
    cache._handed_out.clear()  # as in another process
    monkeypatch.setenv(cache.MOST, "1kB")
    make_room(0)
    assert (home / "weights").exists()
    os.close(cache._held.pop(home))
    make_room(0)
    assert not home.exists() and (local_directory("gs://bucket/read") / "weights").exists()


def test_a_copy_that_a_power_cut_left_short_is_fetched_again(gs: Proxy) -> None:
    put("gs://bucket/short/file", b"content")
    local_file("gs://bucket/short/file").write_bytes(b"")
    assert local_file("gs://bucket/short/file").read_bytes() == b"content"


def test_a_file_that_another_process_lays_out_at_the_same_time_keeps_what_it_holds(
    gs: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (objects, ranges):
        monkeypatch.setattr(module, "BLOCK", 2**12)
    weights = np.arange(2**12, dtype=np.float32)
    write_tensors(tmp_path / "m", [("w", weights.dtype, weights.shape)], [weights])
    put("gs://bucket/laid/m.safetensors", (tmp_path / "m").read_bytes())
    at = parse_address("gs://bucket/laid/m.safetensors")
    path, stat = tmp_path / "copy" / "m.safetensors", open_bucket(at).known(at.key)
    ranges.lay_out(path, at, stat)
    file = TensorFile(path)
    ranges.lay_out(path, at, stat)
    np.testing.assert_array_equal(file["w"], weights)
    np.testing.assert_array_equal(TensorFile(path)["w"], weights)
    path.write_bytes(b"cut off")
    ranges.lay_out(path, at, stat)
    np.testing.assert_array_equal(TensorFile(path)["w"], weights)


def without_units(url: str) -> None:
    """Makes a directory one whose marker an older release has written."""
    at = parse_address(url) / MARKER
    marker = json.loads(open_bucket(at).read(at.key))
    for entry in marker["files"].values():
        assert len(entry.pop("ends")) == len(entry.pop("sums")) > 1
    put(str(at), json.dumps(marker).encode())


@pytest.mark.parametrize("units", [True, False])
def test_of_large_weights_only_the_parts_are_fetched_that_are_read(
    either: Either, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    scheme, proxy = either
    monkeypatch.setattr(cache, "SPARSE_FROM", 1)
    for module in (objects, ranges, publication):
        monkeypatch.setattr(module, "BLOCK", 2**12)
    for name in ("SHORTEST", "LONGEST"):
        monkeypatch.setattr(headers, name, 2**12)
    url = f"{scheme}://bucket/published/weights"
    weights = np.random.default_rng(0).normal(size=(16, 64, 64)).astype(np.float32)
    with atomic_directory(url, overwrite=True) as partial:
        tensors = [("w", weights.dtype, weights.shape), ("v", weights.dtype, weights.shape)]
        write_tensors(partial / "m.safetensors", tensors, [weights, -weights])
    if not units:
        without_units(url)
    path = local_directory(url, by_range=True) / "m.safetensors"
    file = TensorFile(path)
    np.testing.assert_array_equal(file.some("w", [3, 9]), weights[[3, 9]])
    np.testing.assert_array_equal(file.layer("v", 2), -weights[2])
    asked = 3 * weights[0].nbytes
    fetched = file.fetched
    assert fetched <= asked + 5 * 2**12 < 0.2 * path.stat().st_size
    file.check_unchanged()
    # The next process asks for nothing that is there, then for the rest; a block damaged on the way comes again.
    proxy.log.clear()
    again = TensorFile(local_directory(url, by_range=True) / "m.safetensors")
    np.testing.assert_array_equal(again.read("w", 9), weights[9])
    assert not any(ranged for *_, ranged in proxy.log) and again.fetched == 0
    flipped: list[str] = []

    def flip(method: str, path: str) -> str | None:
        data = method == "GET" and ("alt=media" in path or path.endswith("m.safetensors")) and len(flipped) < 3
        flipped.extend(["once"] * data)
        return "flip" if data else None

    proxy.fault = flip
    np.testing.assert_array_equal(again["v"], -weights)
    assert len(flipped) == 3
    with atomic_directory(url, overwrite=True) as partial:
        write_tensors(partial / "m.safetensors", tensors, [2 * weights, weights])
    with pytest.raises(UserError, match="was changed by another process while it was read"):
        again["w"]
    np.testing.assert_array_equal(TensorFile(local_directory(url, by_range=True) / "m.safetensors")["w"], 2 * weights)


@pytest.mark.parametrize("of", ["columns", "rows", "both"])
def test_of_weights_in_tiles_a_host_fetches_its_shard_and_little_else(
    gs: Proxy, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    monkeypatch.setattr(cache, "SPARSE_FROM", 1)
    for name in ("SHORTEST", "LONGEST"):
        monkeypatch.setattr(headers, name, 2**10)
    url, weights = f"gs://bucket/published/tiled-{of}", np.random.default_rng(0).normal(size=(4, 128, 256))
    with atomic_directory(url) as partial:
        tensors = [("bias", weights.dtype, (4, 8)), ("w", weights.dtype, weights.shape)]
        write_tensors(partial / "m.safetensors", tensors, [weights[:, 0, :8], weights], {"w": Tiling(4, 8, True)})
    file = TensorFile(local_directory(url, by_range=True) / "m.safetensors")
    rows = slice(32, 64) if of != "columns" else slice(None)
    columns = slice(64, 128) if of != "rows" else slice(None)
    shard = file.part("w", (slice(None), rows, columns))
    assert np.array_equal(shard, weights[:, rows, columns])
    assert shard.nbytes <= file.fetched <= shard.nbytes + 2**11, "no more than the header besides"
    assert np.array_equal(file["w"], weights) and np.array_equal(file["bias"], weights[:, 0, :8]) and file.is_checked
    gs.log.clear()
    again = TensorFile(local_directory(url, by_range=True) / "m.safetensors")
    assert np.array_equal(again["w"], weights) and not any(ranged for *_, ranged in gs.log), "all of it is there"


def test_a_marker_whose_units_do_not_make_the_file_is_refused(gs: Proxy) -> None:
    url, value = "gs://bucket/published/odd", np.zeros(8, np.float32)
    with atomic_directory(url) as partial:
        write_tensors(partial / "m.safetensors", [("w", value.dtype, value.shape)], [value])
        (partial / "no.safetensors").write_bytes(b"not of that format")
    at = parse_address(url) / MARKER
    marker = json.loads(open_bucket(at).read(at.key))
    assert marker["files"]["no.safetensors"]["ends"] == [] and (local_directory(url) / "no.safetensors").is_file()
    for ends in ([1], [], [1, 1]):
        marker["files"]["m.safetensors"]["ends"] = ends
        put(str(at), json.dumps(marker).encode())
        with pytest.raises(UserError, match=f"{at} is not a valid commit marker"):
            listing(parse_address(url))
