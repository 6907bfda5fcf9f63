"""Commands look before they load: what cannot fit is told in a sentence, with what would."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from commands import Run, run_command

from difffract_jax.cli import preflight
from difffract_jax.memory import Memory
from difffract_jax.models.presets import preset_config
from difffract_jax.storage.checkpoint import FORMAT_VERSION
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import TranscoderConfig

GB = 10**9
PROMPT = "a red fox"


@pytest.fixture
def flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The descriptions of FLUX.1[schnell] and of transcoders of all its sites, without weights."""
    shape = TranscoderConfig(d_model=3072, features=49_152, time_embed=256)
    sites = sites_of({"img": range(19), "txt": range(19), "joint": range(38)})
    described = {
        "flux": {"kind": "pipeline", "config": asdict(preset_config("flux-schnell"))},
        "transcoders": {"kind": "transcoders", "config": asdict(shape), "layers": sites.to_json()},
    }
    for name, record in described.items():
        (tmp_path / name).mkdir()
        told = {"format_version": FORMAT_VERSION, "content_hash": "0", "content_hashes": {}} | record
        (tmp_path / name / "config.json").write_text(json.dumps(told), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def difffract(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs `difffract ARGUMENTS` in this process, whose loading says so, on a host with 16 GB."""

    def load(*names: object, **options: object) -> None:
        raise FileNotFoundError(2, "was loaded", "weights")

    monkeypatch.setattr("difffract_jax.loading.load_pipeline", load)
    monkeypatch.setattr(preflight, "memory_for", lambda device: Memory(16 * GB, 16 * GB, "the machine"))
    return partial(run_command, monkeypatch, capsys)


LINES = {
    "generate": ("generate", "flux", PROMPT, "--weights", "device"),
    "trace": ("trace", "flux", "transcoders", PROMPT, "--weights", "device", "--target", "img/3/f1"),
    "steer": ("steer", "flux", "transcoders", PROMPT, "--weights", "device", "--edit", "img/3/f1=zero"),
    "features": ("features", "flux", "transcoders", PROMPT, "--weights", "device"),
    "effects": ("effects", "flux", "transcoders", PROMPT, "--target", "pixels:color=red", "--weights", "device"),
}


@pytest.mark.parametrize("command", LINES)
def test_what_cannot_fit_is_refused_before_it_is_loaded(
    command: str, flux: Path, difffract: Callable[..., Run]
) -> None:
    run = difffract(*LINES[command])
    assert run.status == 1 and run.err.startswith(f"Error: {command} needs at least ") and run.err.count("\n") == 1
    assert "model 62.8 GiB" in run.err and "of the machine 14.9 GiB are free" in run.err
    assert f"`difffract plan {command}`" in run.err and "--no-preflight" in run.err


def test_streaming_is_advised_and_needs_little(flux: Path, difffract: Callable[..., Run]) -> None:
    assert "; with --weights disk" in difffract(*LINES["trace"]).err
    run = difffract(*LINES["trace"][:4], "--weights", "disk", "--target", "img/3/f1")
    assert run.err.endswith("Error: weights: was loaded.\n")


def test_the_text_encoders_do_not_count_where_embeddings_are_given(flux: Path, difffract: Callable[..., Run]) -> None:
    run = difffract(*LINES["generate"], "--embeddings", "embeddings.npz")
    assert "model 44.6 GiB" in run.err


def test_it_can_be_tried_all_the_same(flux: Path, difffract: Callable[..., Run]) -> None:
    run = difffract(*LINES["generate"], "--no-preflight")
    assert run.err == "Error: weights: was loaded.\n"
    assert "needs at least" in difffract(*LINES["generate"]).err  # the next command looks again


def test_what_fits_is_loaded(flux: Path, difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "memory_for", lambda device: Memory(999 * GB, 999 * GB, "the machine"))
    for line in LINES.values():
        assert difffract(*line).err == "Error: weights: was loaded.\n"


def test_what_may_not_fit_is_a_note(flux: Path, difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "memory_for", lambda device: Memory(68 * GB, 68 * GB, "the machine"))
    run = difffract(*LINES["generate"])
    assert run.err.startswith("Note: generate needs about ") and "may not fit" in run.err
    assert run.err.endswith("Error: weights: was loaded.\n")


def test_only_the_transcoders_that_are_used_count(
    flux: Path, difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The model takes 62.8 GiB, a transcoder 1.1: with those of four blocks it fits, with all 76 it does not.
    monkeypatch.setattr(preflight, "memory_for", lambda device: Memory(120 * GB, 120 * GB, "the machine"))
    low = difffract(*LINES["trace"])
    assert low.err.endswith("Error: weights: was loaded.\n")
    high = difffract(*LINES["trace"][:-1], "single/37/f1")
    assert "transcoders 86.0 GiB" in high.err
    chosen = difffract(*LINES["trace"][:-1], "single/37/f1", "--sites", "single/36-37")
    assert chosen.err.endswith("Error: weights: was loaded.\n")


def test_a_training_that_cannot_fit_is_refused_before_its_model_is_loaded(
    flux: Path, difffract: Callable[..., Run]
) -> None:
    (flux / "prompts.txt").write_text("\n".join(f"fox number {i}" for i in range(200)), encoding="utf-8")
    line = ("train", "--model", "flux", "--prompts", "prompts.txt", "--sites", "img/3")
    run = difffract(*line)
    assert run.status == 1 and run.err.startswith("Error: train needs at least ") and run.err.count("\n") == 1
    assert "state 3.4 GiB" in run.err and "14.9 GiB are free" in run.err and "--no-preflight" in run.err
    assert difffract(*line, "--dry-run").status == 0 and not (flux / "run").exists()


def test_a_harvest_that_cannot_fit_is_refused(flux: Path, difffract: Callable[..., Run]) -> None:
    (flux / "harvest.yaml").write_text("{model: flux, prompts: prompts.txt, out: rows}", encoding="utf-8")
    run = difffract("harvest", "harvest.yaml")
    assert run.status == 1 and run.err.startswith("Error: harvest needs at least ") and "model 62.8 GiB" in run.err


def test_the_embedded_model_is_not_counted(difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "memory_for", lambda device: Memory(1, 1, "the machine"))
    assert difffract("generate", "organism", PROMPT).err == "Error: weights: was loaded.\n"
