"""Conversion to disk: what the whole model would be saved as, in little memory, through every kind of interruption."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command
from safetensors.numpy import load_file, save_file

from converters.mapping import ConversionError, Rule, Source, open_tree, transpose
from difffract_jax import conversion
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_flux, convert_transcoders
from difffract_jax.loading import load_pipeline, load_transcoders, save_pipeline, save_transcoders
from difffract_jax.storage import files as files_module
from difffract_jax.storage import resumable, shards, streaming
from tolerances import REFERENCE

PIPELINE, TRANSCODERS = REFERENCE / "pipeline", REFERENCE / "transcoders"


STOPPED = """
import os, sys
from difffract_jax import conversion
from difffract_jax.cli.main import main

number, convert = int(sys.argv.pop()), conversion.convert_flux

def stop(done, total):
    if done > 0.7 * total:
        os.kill(os.getpid(), number)

conversion.convert_flux = lambda *args, **given: convert(*args, **given | {"progress": stop})
main()
"""
"""The command line, which gets the signal of its last argument when 70% of the bytes are written."""


def hashes(directory: Path) -> dict[str, str]:
    """Returns the hash of every file below a directory, by its path."""
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def copied(directory: Path, to: Path) -> Path:
    return shutil.copytree(directory, to, copy_function=shutil.copyfile)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(PIPELINE)


class Interrupt:
    """Progress that interrupts once so many bytes are written."""

    def __init__(self, share: float, error: type[BaseException] = KeyboardInterrupt):
        self.share, self.error, self.steps = share, error, []

    def __call__(self, done: int, total: int) -> None:
        self.steps.append(done)
        if done > self.share * total:
            raise self.error


@pytest.mark.parametrize("shard_bytes", [2**32, 200_000], ids=["whole", "shards"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_what_is_converted_is_what_would_be_saved_byte_for_byte(tmp_path, monkeypatch, dtype, shard_bytes):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    whole = load_pipeline(PIPELINE, dtype=dtype)
    save_pipeline(whole, tmp_path / "saved")
    steps = []
    made = convert_flux(
        PIPELINE, tmp_path / "made", dtype=dtype, progress=lambda done, total: steps.append((done, total))
    )
    assert hashes(tmp_path / "made") == hashes(tmp_path / "saved")
    assert ("transformer.safetensors.index.json" in left(tmp_path / "made")) == (shard_bytes < 2**32)
    assert made.source == whole.source and made.path == tmp_path / "made" and made.config == whole.config
    assert made.parameters["vae"] == sum(leaf.size for leaf in jax.tree.leaves(whole.vae))
    assert set(made.dtypes.values()) == {jnp.dtype(dtype).name}
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] == sum(
        leaf.nbytes for leaf in jax.tree.leaves(whole[:4])
    )
    assert left(tmp_path) == ["made", "saved"]


def test_weights_keep_their_type_unless_told_otherwise(tmp_path):
    source = copied(PIPELINE, tmp_path / "source")
    half = source / "text_encoder" / "model.safetensors"
    save_file(
        {key: value.astype(jnp.bfloat16) for key, value in load_file(half).items() if value.dtype.kind == "f"}, half
    )
    made = convert_flux(source, tmp_path / "made")
    assert made.dtypes == {"transformer": "float32", "t5": "float32", "clip": "bfloat16", "vae": "float32"}
    assert set(convert_flux(source, tmp_path / "made", dtype=jnp.float32, overwrite=True).dtypes.values()) == {
        "float32"
    }


def test_the_commands_say_what_they_wrote(tmp_path, monkeypatch, capsys):
    run = run_command(monkeypatch, capsys, "convert", "flux", PIPELINE, tmp_path / "a", "--dtype", "bf16", "--json")
    said = json.loads(run.out)
    assert run.status == 0 and said["type"] == "bf16" and said["converted"] == str(tmp_path / "a")
    assert said["transformer parameters"] > said["clip parameters"] > 0
    run = run_command(monkeypatch, capsys, "convert", "transcoders", TRANSCODERS, tmp_path / "b", "--json")
    said = json.loads(run.out)
    assert run.status == 0 and (said["type"], said["img layers"], said["features"]) == ("f32", [0, 1, 2], 512)


def test_an_occupied_output_is_refused_unless_it_may_be_replaced(tmp_path, pipe):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        convert_flux(PIPELINE, tmp_path / "out")
    assert left(tmp_path / "out") == ["notes"]
    made = convert_flux(PIPELINE, tmp_path / "out", overwrite=True)
    assert load_pipeline(made.path).source == pipe.source and left(tmp_path) == ["out"]


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_an_interrupted_conversion_goes_on_and_gives_the_same(tmp_path, caplog, monkeypatch, share, pipe):
    caplog.set_level("INFO")
    save_pipeline(pipe, tmp_path / "saved")
    with pytest.raises(KeyboardInterrupt):
        convert_flux(PIPELINE, tmp_path / "made", progress=Interrupt(share))
    kept = [name for name in left(tmp_path) if name != "saved"]
    assert len(kept) == 1 and kept[0].startswith(".made.") and kept[0].endswith(".partial")
    assert f"are kept in {tmp_path / kept[0]}; the same call goes on from there" in caplog.text
    finished = len((tmp_path / kept[0] / "journal.jsonl").read_text(encoding="utf-8").splitlines())
    made = []
    real = streaming._write_slices
    monkeypatch.setattr(streaming, "_write_slices", lambda *args: made.append(args) or real(*args))
    whole = convert_flux(PIPELINE, tmp_path / "made")
    leaves = sum(len(jax.tree.leaves(part)) for part in pipe[:4])
    assert finished > 3 and len(made) == leaves - finished
    assert hashes(tmp_path / "made") == hashes(tmp_path / "saved") and whole.source == pipe.source
    assert left(tmp_path) == ["made", "saved"]


def test_finished_leaves_that_were_damaged_are_made_again(tmp_path, pipe):
    save_pipeline(pipe, tmp_path / "saved")
    with pytest.raises(KeyboardInterrupt):
        convert_flux(PIPELINE, tmp_path / "made", progress=Interrupt(0.9))
    (home,) = tmp_path.glob(".made.*.partial")
    with (home / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write('["vae/enc')  # a line that was cut off
    weights = home / "files" / "transformer.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    shorter = home / "files" / "t5.safetensors"
    shorter.write_bytes(shorter.read_bytes()[:-7])
    convert_flux(PIPELINE, tmp_path / "made")
    assert hashes(tmp_path / "made") == hashes(tmp_path / "saved")


def test_work_with_other_settings_or_on_another_source_is_not_used(tmp_path, caplog):
    caplog.set_level("INFO")
    source = copied(PIPELINE, tmp_path / "source")
    for change in (dict(dtype=jnp.bfloat16), {}):
        with pytest.raises(KeyboardInterrupt):
            convert_flux(source, tmp_path / "made", progress=Interrupt(0.9), **change)
    first, second = (home for home in (*tmp_path.glob(".made.*.partial"), None))
    assert second is None and "with other settings, is removed" in caplog.text
    os.utime(source / "vae" / "diffusion_pytorch_model.safetensors", ns=(0, 0))
    with pytest.raises(KeyboardInterrupt):
        convert_flux(source, tmp_path / "made", progress=Interrupt(0.9))
    (third,) = tmp_path.glob(".made.*.partial")
    assert third != first


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL],
    ids=["int", "term", "kill"],
)
def test_a_process_that_is_stopped_leaves_work_that_goes_on(tmp_path, number, pipe):
    run = subprocess.run(
        [sys.executable, "-c", STOPPED, "convert", "flux", str(PIPELINE), str(tmp_path / "made"), str(int(number))],
        capture_output=True,
        text=True,
    )
    assert run.returncode in (130, -number) and "Traceback" not in run.stderr
    if number == signal.SIGINT:
        assert run.returncode == 130 and "the same call goes on from there" in run.stderr
    (home,) = tmp_path.glob(".made.*.partial")
    assert (home / "journal.jsonl").is_file()
    assert convert_flux(PIPELINE, tmp_path / "made").source == pipe.source
    assert left(tmp_path) == ["made"]


def test_a_disk_that_fills_up_is_one_sentence_and_the_same_call_goes_on(tmp_path, monkeypatch, capsys, pipe):
    real = streaming._write_slices

    def full(leaf, tiling, file, offset):
        if file.name == "t5.safetensors" and leaf.nbytes > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(leaf, tiling, file, offset)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_write_slices", full)
        run = run_command(monkeypatch, capsys, "convert", "flux", PIPELINE, tmp_path / "made")
    assert run.status == 1 and f"The disk of {tmp_path / 'made'} is full; make room and run the same again." in run.err
    assert not (tmp_path / "made").exists() and len(left(tmp_path)) == 1
    assert convert_flux(PIPELINE, tmp_path / "made").source == pipe.source


def test_a_disk_without_enough_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(load_pipeline(PIPELINE)[:4]))
    with pytest.raises(UserError, match=r"made needs 3?[\d,]+ bytes, but its disk has 1,000; make room") as caught:
        convert_flux(PIPELINE, tmp_path / "made")
    assert 0 <= needed - int(str(caught.value).split(" needs ")[1].split(" ")[0].replace(",", "")) < 10**5
    assert not left(tmp_path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-70_000]), "has changed while it was converted"),
        (lambda path: path.unlink(), "has vanished while it was converted; put it back, then run this again"),
        (lambda path: os.utime(path, ns=(1, 1)), "has changed while it was converted; start again"),
    ],
    ids=["shorter", "gone", "touched"],
)
def test_a_source_that_changes_meanwhile_is_one_sentence(tmp_path, monkeypatch, capsys, harm, message):
    source = copied(PIPELINE, tmp_path / "source")
    victim = source / "text_encoder_2" / "model.safetensors"
    real = conversion.stream_trees

    def harmed(*args, advance, **given):
        def watch(done, total):
            if done > 0.5 * total and watch.harm is not None:
                watch.harm(victim)
                watch.harm = None

        watch.harm = harm
        return real(*args, advance=watch, **given)

    monkeypatch.setattr(conversion, "stream_trees", harmed)
    run = run_command(monkeypatch, capsys, "convert", "flux", source, tmp_path / "made")
    assert run.status == 1 and f"Error: {victim} {message}" in run.err and "Traceback" not in run.err
    assert not (tmp_path / "made").exists()
    # What was read of a file that has vanished was what it is when it is put back.
    assert (len(list(tmp_path.glob(".made.*.partial"))) == 1) == (not victim.exists())


def test_a_tensor_is_read_whole_or_not_at_all(tmp_path):
    save_file({"x": np.arange(6, dtype=np.float32).reshape(3, 2)}, tmp_path / "a.safetensors")
    file = files_module.TensorFile(tmp_path / "a.safetensors")
    assert np.array_equal(file.read("x"), file["x"]) and np.array_equal(file.read("x", 2), [4, 5])
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    assert np.array_equal(file.read("x", 1), [2, 3])
    for number in (2, None):
        with pytest.raises(UserError, match="has become shorter while it was read"):
            file.read("x", number)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        file.read("x")


def test_values_that_are_not_finite_are_told_together_and_nothing_stays(tmp_path):
    source = copied(PIPELINE, tmp_path / "source")
    for part, number in (("vae", np.nan), ("transformer", np.inf)):
        path = source / part / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        key = sorted(tensors)[-1]
        tensors[key].reshape(-1)[-1] = number
        save_file(tensors, path)
    with pytest.raises(ConversionError) as caught:
        convert_flux(source, tmp_path / "made")
    assert len(caught.value.problems) == 2 and all("not finite" in problem for problem in caught.value.problems)
    assert left(tmp_path) == ["source"]


def test_problems_of_all_parts_are_told_before_anything_is_written(tmp_path):
    source = copied(PIPELINE, tmp_path / "source")
    for part in ("vae", "transformer"):
        path = source / part / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConversionError) as caught:
        convert_flux(source, tmp_path / "made")
    assert sum("truncated" in problem for problem in caught.value.problems) == 2
    assert left(tmp_path) == ["source"]


def test_a_slice_is_in_memory_at_a_time_and_not_the_model(tmp_path):
    layers, width = 12, 1024
    tensors = {f"blocks.{layer}.weight": np.full((width, width), layer, np.float32) for layer in range(layers)}
    save_file(tensors, tmp_path / "a.safetensors")
    del tensors
    leaves = open_tree(
        Source(tmp_path / "a.safetensors"),
        (Rule("blocks.{layer}.weight", "blocks.kernel", transpose),),
        {"blocks": {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16)}},
        mapped=False,
    )
    tracemalloc.start()
    with resumable.resumable_directory(tmp_path / "out") as output:
        output.begin("a", 1)
        streaming.stream_trees({"model": leaves}, output, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A layer as it is stored, 4 MB, its values in bfloat16, 2 MB, and which of them are finite, 1 MB.
    assert peak < 9 * 2**20
    made = files_module.TensorFile(tmp_path / "out" / "model.safetensors")["blocks.kernel"]
    assert made.shape == (layers, width, width) and np.array_equal(made[:, 5, 7], np.arange(layers))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["transcoders", "saes"])
def test_transcoders_are_what_would_be_saved_byte_for_byte_and_come_back(tmp_path, name, dtype):
    tcs = load_transcoders(REFERENCE / name, dtype=dtype or jnp.float32)
    save_transcoders(tcs, tmp_path / "saved")
    made = convert_transcoders(REFERENCE / name, tmp_path / "made", dtype=dtype)
    assert hashes(tmp_path / "made") == hashes(tmp_path / "saved")
    assert (made.source, made.sites, made.config) == (tcs.source, tcs.sites, tcs.config)
    back = convert_transcoders(tmp_path / "made", tmp_path / "back", to_torch=True)
    assert back.source == "" and back.dtypes == made.dtypes
    assert all(name.endswith(".pt") for name in left(tmp_path / "back"))
    assert load_transcoders(tmp_path / "back", dtype=dtype or jnp.float32).source == tcs.source
    again = convert_transcoders(tmp_path / "back", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "saved") and again.source == tcs.source
    assert left(tmp_path) == ["again", "back", "made", "saved"]


def test_some_sites_of_a_directory_of_ours_in_another_type(tmp_path):
    convert_transcoders(TRANSCODERS, tmp_path / "all")
    some = convert_transcoders(tmp_path / "all", tmp_path / "some", sites=["img/1-2", "txt/0"], dtype=jnp.bfloat16)
    expected = load_transcoders(tmp_path / "all", sites=["img/1-2", "txt/0"], dtype=jnp.bfloat16)
    assert some.sites == expected.sites and some.sites.names == ("img/1", "img/2", "txt/0")
    assert load_transcoders(tmp_path / "some", dtype=jnp.bfloat16, verify=True).source == some.source
    for a, b in zip(
        jax.tree.leaves(load_transcoders(tmp_path / "some", dtype=jnp.bfloat16).stacks),
        jax.tree.leaves(expected.stacks),
        strict=True,
    ):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("to_torch", [False, True], ids=["ours", "torch"])
def test_an_interrupted_set_of_transcoders_goes_on(tmp_path, to_torch):
    source = convert_transcoders(TRANSCODERS, tmp_path / "source").path if to_torch else TRANSCODERS
    with pytest.raises(KeyboardInterrupt):
        convert_transcoders(source, tmp_path / "made", to_torch=to_torch, progress=Interrupt(0.5))
    (home,) = tmp_path.glob(".made.*.partial")
    finished = (home / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    if to_torch:  # a finished file that was damaged is written again
        first = home / "files" / json.loads(finished[0])[0]
        first.write_bytes(first.read_bytes()[:-1])
    made = convert_transcoders(source, tmp_path / "made", to_torch=to_torch)
    assert finished and load_transcoders(made.path).source == load_transcoders(TRANSCODERS).source
    assert not list(tmp_path.glob(".made*"))


def test_a_damaged_directory_of_ours_is_not_converted(tmp_path):
    path = convert_transcoders(TRANSCODERS, tmp_path / "source").path / "img.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"weights in .*img.safetensors differ from their recorded hash"):
        convert_transcoders(tmp_path / "source", tmp_path / "made")
    assert left(tmp_path) == ["source"]
