"""The reference's `.pt` files: read as their own keys say, written back bit for bit, misfits named file by file."""

import shutil

import jax
import numpy as np
import pytest
import torch

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
    make(directory / "optimizer.pt")
    with pytest.raises(ConversionError) as caught:
        transcoders_from_torch(directory)
    told = "\n".join(caught.value.problems)
    for problem in (
        "optimizer.pt is not named like transcoder_img_0.pt",
        "transcoder_img_5.pt is truncated or no state dict of tensors",
        "transcoder_img_1.encoder.weight has shape (20, 8), expected (20, 6)",
        "missing transcoder_txt_18.decoder.bias",
        "unknown transcoder_txt_18.threshold",
        "transcoder_txt_18.encoder.weight holds values that are not finite",
    ):
        assert problem in told


def test_mixed_roles_and_double_sites_are_refused(directory):
    make(directory / "transcoder_img_00.pt")
    with pytest.raises(ConversionError, match="two files are of one site"):
        transcoders_from_torch(directory)
    make(directory / "sae_img_1.pt")
    with pytest.raises(ConversionError, match="transcoders and SAEs lie in one directory"):
        transcoders_from_torch(directory)


def test_a_directory_without_files_or_sizes_is_refused(tmp_path):
    assert not is_torch_directory(tmp_path) and not is_torch_directory(tmp_path / "nothing")
    with pytest.raises(ConversionError, match="it holds no .pt files"):
        transcoders_from_torch(tmp_path)
    write_state(tmp_path / "transcoder_img_0.pt", {"encoder.bias": np.ones(3, np.float32)})
    assert is_torch_directory(tmp_path)
    with pytest.raises(ConversionError, match="missing matrix encoder.weight, which tells the sizes"):
        transcoders_from_torch(tmp_path)


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
