"""PyTorch's side: state dicts, the noise of a seed, and a clear sentence where torch is missing or a file is broken."""

import importlib
import zipfile
from argparse import Namespace

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from converters import torch_files
from converters.torch_files import (
    TransformerInputs,
    read_state,
    record_decoding,
    record_transformer,
    torch_noise,
    write_state,
)
from converters.torch_text import record_text
from difffract_jax.config import UserError
from tolerances import REFERENCE

PIPELINE = REFERENCE / "pipeline"


def test_state_dicts_come_back_identical(tmp_path):
    state = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    write_state(tmp_path / "a.pt", state)
    read = read_state(tmp_path / "a.pt")
    assert all(read[key].dtype == state[key].dtype and np.array_equal(read[key], state[key]) for key in state)


def test_state_dicts_of_old_pytorch_are_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert np.array_equal(read_state(tmp_path / "a.pt")["a"], [1, 1])


def test_pickles_of_later_protocols_and_torchscript_are_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(UserError, match="a.pt is pickled by protocol 4 or later"):
        read_state(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:  # what PyTorch takes for TorchScript
        archive.writestr("b/constants.pkl", b"")
        archive.writestr("b/data.pkl", b"")
        archive.writestr("b/version", b"3")
    with pytest.raises(UserError, match="b.pt is a program of TorchScript, which is not opened"):
        read_state(tmp_path / "b.pt")


class Surprise:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        *((content, "holds no state dict of tensors; save one") for content in ([1, 2], {"a": 1}, torch.ones(2))),
        ({"a": Surprise()}, r"holds an object of class \S*print, which is not opened"),
        (
            {"m": {"a": torch.ones(2)}, "args": Namespace(lr=1)},
            r"holds an object of class argparse\.Namespace, which",
        ),
        ({"m": {"a": torch.ones(2)}, "n": {"a": torch.ones(2)}}, "holds 2 state dicts, m and n, of which one"),
    ],
)
def test_anything_but_tensors_by_name_is_refused_and_nothing_is_executed(tmp_path, content, told, capsys):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt {told}"):
        read_state(tmp_path / "a.pt", "a")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("beginning", [b".", b"s", b"h\x05.", b"hello", b"\x80\x02}q\x00."])
def test_what_is_not_a_pickle_of_tensors_is_one_sentence(tmp_path, beginning):
    (tmp_path / "a.pt").write_bytes(beginning)
    with pytest.raises(UserError, match="a.pt is truncated or not a state dict|a.pt holds no state dict"):
        read_state(tmp_path / "a.pt")


def test_the_reason_is_given_and_not_pytorch_s_advice_to_open_it_unsafely(tmp_path):
    (tmp_path / "a.pt").write_bytes(b'{"a": 1}')
    with pytest.raises(UserError, match=r"not a state dict of tensors \(Unsupported operand 123\)"):
        read_state(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(UserError, match="holds an object of class os.system, which is not opened"):
        read_state(tmp_path / "a.pt")


def test_tensors_that_are_not_plain_arrays_are_refused(tmp_path):
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt holds tensors that are not plain arrays, as sparse"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_every_float_is_read_exactly(tmp_path, name):
    values = torch.tensor([0.5, -2.0, 0.0625, 448.0]).to(getattr(torch, name))
    torch.save({"a": torch.nn.Parameter(values)}, tmp_path / "a.pt")
    assert np.array_equal(read_state(tmp_path / "a.pt")["a"].astype(np.float64), values.double().numpy())


@pytest.mark.parametrize("keep", [0, 3, 200, -40])
def test_a_truncated_file_is_refused(tmp_path, keep):
    write_state(tmp_path / "a.pt", {"a": np.ones(100, np.float32)})
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:keep])
    with pytest.raises(UserError, match="a.pt is truncated or not a state dict of tensors"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_noise_is_what_diffusers_draws(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    expected = randn_tensor((1, 4, 12, 10), generator=generator, device=torch.device("cpu"), dtype=torch.float32)
    assert np.array_equal(torch_noise(seed, 4, 12, 10), expected.numpy())


@pytest.mark.parametrize("name", ["torch", "diffusers"])
def test_a_missing_package_is_one_sentence(monkeypatch, name):
    def missing(wanted):
        raise ModuleNotFoundError(f"No module named '{wanted}'", name=wanted)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        UserError, match=rf"needs {name}, which is not installed; run: pip install 'difffract_jax\[torch\]'"
    ):
        torch_files.load_module(name)


def test_a_package_that_is_broken_inside_says_so(monkeypatch):
    def broken(wanted):
        raise ModuleNotFoundError("No module named 'inner'", name="inner")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="inner"):
        torch_files.load_module("torch")


def test_every_part_of_the_pytorch_pipeline_is_recorded():
    text = record_text(PIPELINE, np.arange(2, 7), np.arange(3, 10))
    assert (text.t5.shape, text.clip.shape, text.pooled.shape) == ((5, 32), (7, 24), (24,))
    latents = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    record = record_transformer(PIPELINE, TransformerInputs(latents, text.t5, text.pooled, 0.5, None, (2, 3)))
    assert (len(record.double), len(record.single), record.velocity.shape) == (3, 2, (6, 16))
    for before, after in zip((*record.double, *record.single), (*record.double[1:], *record.single), strict=False):
        assert np.array_equal(before.img_out, after.img) and np.array_equal(before.txt_out, after.txt)
    assert record_decoding(PIPELINE, np.ones((3, 2, 4), np.float32)).shape == (24, 16, 3)
