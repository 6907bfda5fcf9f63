"""The reference's `.pt` files: read as their own keys say, written back bit for bit, misfits named file by file."""

import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters import torch_files
from converters.mapping import ConversionError
from converters.torch_files import read_state, write_state
from converters.transcoders import export_transcoders, is_torch_directory, transcoders_from_torch
from difffract_jax.config import UserError
from tolerances import REFERENCE

KEYS = ("time_mlp.0", "time_mlp.2", "mod_linear", "encoder", "decoder")


def make(path, width=6, features=20, time=4, seed=0):
    """Writes one file of the reference's layout with random values."""
    rng = np.random.default_rng(seed)
    sizes = {"time_mlp.0": (time, time), "time_mlp.2": (time, time), "mod_linear": (2 * width, time)}
    sizes |= {"encoder": (features, width), "decoder": (width, features)}
    state = {f"{key}.weight": rng.normal(size=size).astype(np.float32) for key, size in sizes.items()}
    state |= {f"{key}.bias": rng.normal(size=size[:1]).astype(np.float32) for key, size in sizes.items()}
    write_state(path, state)
    return state


@pytest.fixture
def directory(tmp_path):
    for number, site in enumerate(("img_0", "img_3", "txt_18")):
        make(tmp_path / f"transcoder_{site}.pt", seed=number)
    return tmp_path


def test_layers_need_not_be_contiguous_and_each_leaf_is_its_tensor(directory):
    tcs = transcoders_from_torch(directory)
    assert tcs.sites.groups == {"img": (0, 3), "txt": (18,)}
    img = tcs.stacks["img"]
    assert (tcs.config.d_model, tcs.config.features, tcs.config.time_embed) == (6, 20, 4)
    assert (tcs.config.conditioning, tcs.config.role) == ("film_raw_t", "transcoder")
    state = read_state(directory / "transcoder_img_3.pt")
    leaves = (img.time_in, img.time_out, img.film, img.enc, img.dec)
    for key, leaf in zip(KEYS, leaves, strict=True):
        assert np.array_equal(leaf.kernel[1], state[f"{key}.weight"].T)
        assert np.array_equal(leaf.bias[1], state[f"{key}.bias"])


def test_one_stream_may_be_absent(tmp_path):
    make(tmp_path / "sae_txt_2.pt")
    tcs = transcoders_from_torch(tmp_path)
    assert list(tcs.stacks) == ["txt"] and tcs.sites.groups == {"txt": (2,)} and tcs.config.role == "sae"


@pytest.mark.parametrize("name", ["transcoders", "saes"])
def test_the_reference_s_files_come_back_bit_for_bit(tmp_path, name):
    export_transcoders(transcoders_from_torch(REFERENCE / name), tmp_path / "out")
    originals = sorted((REFERENCE / name).glob("*.pt"))
    assert [path.name for path in originals] == sorted(path.name for path in (tmp_path / "out").iterdir())
    for path in originals:
        ours, theirs = (torch.load(p, weights_only=True) for p in (tmp_path / "out" / path.name, path))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_identity_of_a_set_is_that_of_its_weights(directory, tmp_path_factory):
    first = transcoders_from_torch(directory)
    copy = tmp_path_factory.mktemp("copy") / "out"
    export_transcoders(first, copy)
    assert transcoders_from_torch(copy).source == first.source
    make(copy / "transcoder_img_0.pt", seed=9)
    assert transcoders_from_torch(copy).source != first.source


def test_weights_take_the_type_that_is_asked_for(directory):
    tcs = transcoders_from_torch(directory, dtype=jax.numpy.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(tcs.stacks["img"])} == {jax.numpy.bfloat16.dtype}


def test_all_problems_of_all_files_are_told_together(directory):
    make(directory / "transcoder_img_1.pt", width=8)
    state = make(directory / "transcoder_txt_18.pt", seed=2)
    del state["decoder.bias"]
    state["encoder.weight"][0, 0] = np.nan
    write_state(directory / "transcoder_txt_18.pt", state | {"threshold": np.ones(1, np.float32)})
    (directory / "transcoder_img_5.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ConversionError) as caught:
        transcoders_from_torch(directory)
    told = "\n".join(caught.value.problems)
    for problem in (
        "transcoder_img_5.pt is truncated or not a state dict of tensors",
        "transcoder_img_1.encoder.weight has shape (20, 8), expected (20, 6)",
        "missing transcoder_txt_18.decoder.bias",
        "unknown transcoder_txt_18.threshold",
        "transcoder_txt_18.encoder.weight holds values that are not finite",
    ):
        assert problem in told


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transcoder_img_0.pt", "transcoder_img_00.pt"),
        ("transcoder_img_0.pt", "transcoder_img_0.pth"),
        ("transcoder_img_0.pt", "transcoder_img_0_final.pt"),
    ],
)
def test_two_files_of_one_site_are_refused_by_name(directory, first, second):
    shutil.copy(directory / first, directory / second)
    with pytest.raises(ConversionError) as caught:
        transcoders_from_torch(directory)
    (told,) = caught.value.problems
    assert first in told and second in told and told.endswith("are both of img/0; keep one of them")


def test_transcoders_and_saes_in_one_directory_are_refused_by_name(directory):
    make(directory / "sae_img_1.pt")
    with pytest.raises(ConversionError, match="SAEs lie in one directory, sae_img_1.pt and transcoder_txt_18.pt; keep"):
        transcoders_from_torch(directory)


def test_a_directory_without_files_or_sizes_is_refused(tmp_path):
    assert not is_torch_directory(tmp_path) and not is_torch_directory(tmp_path / "nothing")
    with pytest.raises(ConversionError, match=r"no file is named like transcoder_img_0\.pt \(it is empty\)"):
        transcoders_from_torch(tmp_path)
    make(tmp_path / "weights.pth")
    assert is_torch_directory(tmp_path)
    with pytest.raises(ConversionError, match=r"named like transcoder_img_0\.pt \(found weights\.pth\)"):
        transcoders_from_torch(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_torch_directory(tmp_path)
    write_state(tmp_path / "transcoder_img_0.pt", {"encoder.bias": np.ones(3, np.float32)})
    assert is_torch_directory(tmp_path)
    with pytest.raises(ConversionError, match="missing matrix encoder.weight, which tells the sizes; it holds enc"):
        transcoders_from_torch(tmp_path)


def test_what_is_not_named_like_a_transcoder_is_left_aside_and_named_once(directory, caplog):
    for name in (".DS_Store", "._transcoder_img_0.pt"):
        (directory / name).write_bytes(b"\0\5\x16\7")
    for name in ("README.md", "optimizer.pt", "scheduler.pt", "training.json", "config.json", "labels.json"):
        (directory / name).write_text("stray")
    assert transcoders_from_torch(directory).sites.groups == {"img": (0, 3), "txt": (18,)}
    (line,) = caplog.messages
    assert line == (
        f"Note: in {directory}, README.md, optimizer.pt, scheduler.pt, training.json were left aside, not named like "
        "transcoder_img_0.pt."
    )


@pytest.mark.parametrize("ending", [".pth", ".bin", ".ckpt", "_final.pt", "_step_1000.pt", "_ema.pth"])
def test_files_may_have_other_endings(tmp_path, directory, ending, caplog):
    out = tmp_path / "renamed"
    out.mkdir()
    for path in directory.glob("*.pt"):
        shutil.copy(path, out / path.name.replace(".pt", ending))
    assert transcoders_from_torch(out).source == transcoders_from_torch(directory).source
    assert not caplog.messages


def wrapped(directory, out, wrap):
    """Saves the files of a directory anew, each as `wrap` makes it of its state dict."""
    out.mkdir()
    for path in directory.glob("*.pt"):
        torch.save(wrap(torch.load(path, weights_only=True)), out / path.name)
    return transcoders_from_torch(out)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model."])
def test_wrappers_and_records_of_training_do_not_matter(tmp_path, directory, prefix):
    def checkpoint(state):
        keys = {f"{prefix}{key}": torch.nn.Parameter(value) for key, value in state.items()}
        moments = {0: {"exp_avg": torch.ones(3), "step": torch.ones(())}}
        return {"model_state_dict": keys, "step": 5, "config": {"k": 1}, "optimizer_state_dict": {"state": moments}}

    made = wrapped(directory, tmp_path / "wrapped", checkpoint)
    assert made.source == transcoders_from_torch(directory).source


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64", "float8_e4m3fn"])
def test_weights_of_every_float_are_read(tmp_path, directory, name):
    kind = getattr(torch, name)
    made = wrapped(directory, tmp_path / "narrow", lambda state: {key: value.to(kind) for key, value in state.items()})
    state = torch.load(directory / "transcoder_img_0.pt", weights_only=True)
    expected = state["encoder.weight"].to(kind).float().numpy().T
    assert np.array_equal(made.stacks["img"].enc.kernel[0], expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_safetensors_are_read_without_pytorch(tmp_path, directory, kind, monkeypatch):
    out = tmp_path / "safe"
    out.mkdir()
    for path in directory.glob("*.pt"):
        state = {f"module.{key}": value.to(kind) for key, value in torch.load(path, weights_only=True).items()}
        # The content tells what a file is, whatever it is called.
        save_file(state, out / (path.name if "txt" in path.name else f"{path.stem}.safetensors"))
    expected = state["module.encoder.weight"].float().numpy().T

    def missing(name):
        raise AssertionError(name)

    monkeypatch.setattr(torch_files, "load_module", missing)
    made = transcoders_from_torch(out)
    assert made.sites.groups == {"img": (0, 3), "txt": (18,)}
    stem = path.stem.split("_")
    place = made.sites.groups[stem[1]].index(int(stem[2]))
    assert np.array_equal(made.stacks[stem[1]].enc.kernel[place], expected)


def test_a_damaged_safetensors_file_is_refused(directory):
    save_file({"encoder.weight": torch.ones(20, 6)}, directory / "transcoder_img_1.safetensors")
    whole = (directory / "transcoder_img_1.safetensors").read_bytes()
    (directory / "transcoder_img_1.safetensors").write_bytes(whole[:-40])
    (directory / "transcoder_img_2.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ConversionError) as caught:
        transcoders_from_torch(directory)
    told = "\n".join(caught.value.problems)
    assert "transcoder_img_1.safetensors is truncated, its last 40 bytes are missing" in told
    assert "transcoder_img_2.pt is a placeholder of Git LFS" in told


def test_keys_in_which_all_files_differ_are_told_once(tmp_path, directory):
    def other(state):
        return {key: value for key, value in state.items() if key != "decoder.bias"} | {"b_dec": torch.ones(6)}

    with pytest.raises(ConversionError) as caught:
        wrapped(directory, tmp_path / "other", other)
    assert caught.value.problems == (
        "all 3 files lack decoder.bias",
        "all 3 files hold b_dec, which the reference's module does not have",
    )


def test_without_pytorch_there_is_one_problem(directory, monkeypatch):
    def missing(name):
        raise UserError(f"This needs {name}.")

    monkeypatch.setattr(torch_files, "load_module", missing)
    with pytest.raises(ConversionError) as caught:
        transcoders_from_torch(directory)
    assert caught.value.problems == ("This needs torch",)


def test_a_link_that_leads_nowhere_is_a_problem(directory):
    (directory / "transcoder_img_9.pt").symlink_to(directory / "nothing.pt")
    with pytest.raises(ConversionError, match=r"transcoder_img_9\.pt is a link to a file that is not there"):
        transcoders_from_torch(directory)


def test_transposed_matrices_are_told_in_one_sentence(tmp_path, directory):
    def transposed(state):
        return {key: value.T.contiguous() if key.endswith("coder.weight") else value for key, value in state.items()}

    with pytest.raises(ConversionError) as caught:
        wrapped(directory, tmp_path / "transposed", transposed)
    (told,) = caught.value.problems
    assert told.startswith(
        "encoder.weight, decoder.weight of transcoder_img_0.pt, transcoder_img_3.pt, transcoder_txt_"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning": "film"}, "conditioning='film'"),
        ({"skip": True}, "skip=True"),
    ],
)
def test_what_the_reference_cannot_compute_is_not_written(directory, tmp_path_factory, change, message):
    tcs = transcoders_from_torch(directory)
    out = tmp_path_factory.mktemp("out") / "files"
    changed = type(tcs.config)(**(vars(tcs.config) | change))
    with pytest.raises(UserError, match=message):
        export_transcoders(tcs._replace(config=changed), out)
    assert not out.exists()


def test_a_failed_export_leaves_nothing(directory, tmp_path, tmp_path_factory, monkeypatch):
    tcs = transcoders_from_torch(directory)
    out = tmp_path_factory.mktemp("out") / "files"

    def interrupt(path, state):
        raise KeyboardInterrupt

    monkeypatch.setattr("converters.transcoders.write_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_transcoders(tcs, out)
    assert list(out.parent.iterdir()) == []


def test_the_reference_files_can_be_copied_one_by_one(tmp_path):
    shutil.copy(REFERENCE / "transcoders" / "transcoder_txt_1.pt", tmp_path)
    assert transcoders_from_torch(tmp_path).sites.groups == {"txt": (1,)}
