"""`difffract doctor` tells what is there, and ends well whatever is not."""

import json
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Run, run_command

from difffract_jax.cli import doctor
from difffract_jax.memory import host_memory

GIB = 2**30
ROOT = Path(__file__).parents[2]


@pytest.fixture
def difffract(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs `difffract ARGUMENTS` in this process."""
    return partial(run_command, monkeypatch, capsys)


def gpu(memory: int) -> str:
    """Code that answers as JAX would on a machine with two GPUs."""
    return f'print("[\\"gpu\\", [[\\"gpu\\", \\"NVIDIA L4\\", {memory}], [\\"gpu\\", \\"NVIDIA L4\\", {memory}]]]")'


def test_it_tells_devices_versions_memory_disk_extras_and_what_fits(
    difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    run = difffract("doctor", "--json")
    assert run.status == 0, run.err
    told = json.loads(run.out)
    assert told["devices"][0]["platform"] == "cpu" and told["versions"]["jax"] and told["versions"]["difffract_jax"]
    assert told["memory"]["host"] == host_memory().total and "trouble" not in told
    assert [row["kept"].split(",")[0] for row in told["disk"]] == [
        "working directory",
        "compiled programs",
        "models of the hub",
    ]
    works = {row["work"]: row for row in told["what fits"]}
    assert works["organism: trace"]["resident fits"] is True
    flux = works["FLUX.1-schnell: generate, 1024 px"]
    assert flux["streamed needs"] < 8 * GIB < 31 * GIB < flux["resident needs"]
    assert works[doctor.TRAINED]["streamed needs"] < works[doctor.TRAINED]["resident needs"]
    assert difffract("doctor").out.count("FLUX.1-schnell") == 4


def test_a_gpu_is_counted_for(monkeypatch: pytest.MonkeyPatch, difffract: Callable[..., Run]) -> None:
    monkeypatch.setattr(doctor, "devices", partial(doctor.devices, gpu(20 * GIB)))
    told = json.loads(difffract("doctor", "--json").out)
    assert told["devices"] == [{"platform": "gpu", "kind": "NVIDIA L4", "count": 2, "memory for JAX": 20 * GIB}]
    rows = [row for row in told["what fits"] if row["on"] == "gpu NVIDIA L4" and "generate" in row["work"]]
    assert all(row["streamed fits"] and not row["resident fits"] for row in rows) and len(rows) == 2


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import time; time.sleep(60)", "did not find its devices within 1 s"),
        ("raise RuntimeError('no TPU platform')", "JAX cannot start: RuntimeError: no TPU platform"),
        ("import os; os.abort()", "JAX cannot start"),
        ("print('{')", "JAX cannot start"),
    ],
)
def test_what_hangs_or_fails_is_a_line(
    code: str, told: str, monkeypatch: pytest.MonkeyPatch, difffract: Callable[..., Run]
) -> None:
    monkeypatch.setattr(doctor, "devices", partial(doctor.devices, code, 1.0 if "sleep" in code else 60.0))
    run = difffract("doctor", "--json")
    assert run.status == 0 and told in json.loads(run.out)["trouble"]


def test_a_driver_that_fails_or_is_absent_is_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor._driver() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'no devices' >&2\nexit 9\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(program))
    assert doctor._driver() == "nvidia-smi fails: no devices"
    program.write_text("#!/bin/sh\necho '580.1, NVIDIA L4, 23034 MiB'\n", encoding="utf-8")
    assert doctor._driver() == "580.1, NVIDIA L4, 23034 MiB"


def test_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert doctor.EXTRAS.keys() == extras.keys() - {"cuda", "test", "test-s3", "docs", "dev"}
    assert extras["cuda"] == extras["cuda13"] and extras["cuda12"] == ["jax[cuda12]>=0.10"]


def test_the_size_of_a_cache_counts_files_once(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(bytes(1000))
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "a")
    assert doctor._size(tmp_path) == 1000 and doctor._size(tmp_path / "absent") == 0
