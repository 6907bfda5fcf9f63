"""A small model of FLUX.1-dev's kind through the shell: guidance, a shifted schedule of more than four steps, LoRAs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_command
from safetensors.numpy import load_file, save_file

from difffract_jax.cli.evaluation import Opened, _on_model
from difffract_jax.config import UserError, resolve
from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.loading import load_pipeline, save_pipeline, save_transcoders
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.settings import EvaluateConfig, TrainConfig
from difffract_jax.transcoders.transcoder import random_transcoders
from tolerances import TOL
from traces import DEV

PROMPT, STEPS = "a red circle", 6
SMALL = ("--edges", 10, "--ablations", 2, "--draws", 1, "--readings", "propagated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, transcoders of it, a LoRA for it, and prompts."""
    folder = tmp_path_factory.mktemp("dev")
    pipe = random_pipeline(seed=2, transformer=DEV)
    small = replace(pipe.config.defaults, height=16, width=16, text_tokens=16, steps=STEPS)
    save_pipeline(pipe._replace(config=replace(pipe.config, defaults=small)), folder / "model")
    save_transcoders(random_transcoders(DEV, features=64), folder / "tcs")
    rng = np.random.default_rng(0)
    tensors = {}
    for block in range(2):
        for name, outer in (("double_blocks_{}_img_mlp_0", 128), ("double_blocks_{}_txt_attn_qkv", 96)):
            module = f"lora_unet_{name.format(block)}"
            tensors[f"{module}.lora_down.weight"] = rng.standard_normal((2, 32)).astype(np.float32)
            tensors[f"{module}.lora_up.weight"] = 0.1 * rng.standard_normal((outer, 2)).astype(np.float32)
            tensors[f"{module}.alpha"] = np.array(2, np.float32)
    save_file(tensors, folder / "style.safetensors")
    (folder / "prompts.txt").write_text("".join(f"a {one} circle\n" for one in ("red", "blue", "green", "dark")) * 8)
    return folder


@pytest.fixture
def refused(monkeypatch: Any, capsys: Any, folder: Path) -> Callable[..., str]:
    """Runs `difffract ARGUMENTS`, which must fail, and returns the sentence."""
    monkeypatch.chdir(folder)

    def run(*arguments: Any) -> str:
        found = partial(run_command, monkeypatch, capsys)(*arguments)
        error = found.err.strip()
        assert found.status == 1 and error.startswith("Error: ") and "\n" not in error
        return error

    return run


TRACE = ("trace", "model", "tcs", PROMPT, "--target", "velocity:", "--step", STEPS - 1, "--max-nodes", 8)


def test_a_graph_knows_its_guidance_and_lora_and_a_difference_shows_what_the_lora_changes(difffract, refused, folder):
    difffract(*TRACE, "--guidance", 2, "--out", "own.npz")
    difffract(*TRACE, "--guidance", 2, "--lora", "style.safetensors:0.5", "--out", "style.npz")
    own, style = (read_graph(folder / f"{name}.npz") for name in ("own", "style"))
    run, told = own.provenance.traced_run, style.provenance.traced_run
    assert run.guidance == told.guidance == 2 and len(run.sigmas) == STEPS + 1
    assert run.sigmas[1] > (STEPS - 1) / STEPS + 0.01, "the schedule is shifted towards noise"
    assert told.base_model == run.model != told.model and [one.scale for one in told.loras] == [0.5]
    assert "style.safetensors:0.5" in style.provenance.sources["model_loras"]
    found = difffract("validate", "model", "tcs", "style.npz", *SMALL)
    assert all(row["holds"] for row in found["exactness"])
    error = refused("validate", "model", "tcs", "own.npz", "--lora", "style.safetensors")
    assert "another model" in error and "without style.safetensors:1 (sha256 " in error
    error = refused("validate", "model", "tcs", "style.npz", "--lora", "style.safetensors:0.25")
    assert "with --lora: style.safetensors:0.5 (sha256 " in error
    difffract("combine", "difference", "style.npz", "own.npz", "--out", "difference.npz")
    between = read_graph(folder / "difference.npz")
    change = style.target_preactivation[0] - own.target_preactivation[0]
    assert change != 0 and np.isclose(between.target_preactivation[0], change)
    assert between.largest_conservation_error <= TOL.conservation_f32
    first, second = between.provenance.combined.graphs
    assert [one.name for one in first.loras] == ["style.safetensors"] and second.loras == ()
    assert between.provenance.known.base_model == run.model
    assert "different models" in refused("combine", "average", "style.npz", "own.npz", "--out", "average.npz")


def test_transcoders_are_trained_and_measured_under_guidance_and_a_lora(difffract, refused, folder):
    run = ("train", "--model", "model", "--prompts", "prompts.txt", "--sites", "img/1", "--out", "run", "--steps", 2)
    run += ("--validation-share", 0.3)
    small = ("--batch", 16, "--buffer-rows", 64, "--expansion", 2, "--k", 4, "--prompts-at-once", 2, "--warmup", 0)
    difffract(*run, *small, "--guidance", 2.5, "--lora", "style.safetensors:0.5")
    record = json.loads((folder / "run" / "train.json").read_text())
    assert record["settings"]["guidance"] == 2.5 and record["settings"]["lora"] == ["style.safetensors:0.5"]
    merged = load_pipeline(folder / "model", lora=[folder / "style.safetensors:0.5"])
    assert record["sources"]["model"] == merged.source and record["sources"]["model_base"] == merged.base
    error = refused("train", "--resume", "--out", "run", "--steps", 2, "--guidance", 3)
    assert "begun with other settings (guidance: 2.5 -> 3.0)" in error
    shutil.copy(folder / "style.safetensors", folder / "kept")
    retrained = {key: np.asarray(2 * value) for key, value in load_file(folder / "kept").items()}
    save_file(retrained, folder / "style.safetensors")
    assert "begun with the LoRA style.safetensors:0.5 (sha256 " in refused("train", "--resume", "--out", "run")
    shutil.move(folder / "kept", folder / "style.safetensors")
    few = ("--prompts-count", 1, "--velocity-count", 1, "--images", 0, "--scored", 0)
    found = difffract("evaluate", "run", *few)
    report = json.loads((folder / "run" / "report" / "evaluation.json").read_text())
    assert np.isfinite(found["fvu"]) and report["provenance"]["sources"]["model"] == merged.source


def test_effects_are_those_on_the_last_of_the_model_s_own_steps_and_edits_take_guidance(difffract):
    found = difffract("effects", "model", "tcs", PROMPT, "--target", "velocity:", "--guidance", 2, "--top", 1)
    assert found["step"] == STEPS - 1
    difffract("steer", "model", "tcs", PROMPT, "--edit", "img/1/f3=zero", "--guidance", 2, "--batch", 1)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "organism", PROMPT),
        ("trace", "organism", "organism", PROMPT, "--target", "img/1/f1"),
        ("steer", "organism", "organism", PROMPT, "--edit", "img/1/f1=zero"),
        ("features", "organism", "organism", PROMPT),
        ("effects", "organism", "organism", PROMPT, "--target", "velocity:"),
        ("dashboards", "organism", "organism", "--prompts", 2),
        ("train", "--model", "organism", "--steps", 1),
    ],
    ids=lambda command: command[0],
)
def test_guidance_for_a_model_that_takes_none_is_refused_before_it_is_loaded(refused, monkeypatch, command):
    monkeypatch.setattr("difffract_jax.loading._load", lambda *names, **options: pytest.fail("weights were read"))
    error = refused(*command, "--guidance", 3.5)
    assert "This model takes no guidance scale (FLUX.1-dev does), but got 3.5; leave it out." in error


def test_what_is_named_wins_over_the_training_and_trainings_must_agree():
    trained = [resolve(TrainConfig, {"model": "m", "guidance": scale, "lora": ["a"]}) for scale in (2, 3)]
    sets = [Opened(f"run-{scale}", one, None) for scale, one in zip((2, 3), trained, strict=True)]
    base = EvaluateConfig(run=Path("run"))
    as_trained = _on_model(base, None, sets[:1])
    assert (as_trained.guidance, as_trained.lora) == (2, ("a",))
    given = _on_model(base.model_copy(update={"guidance": 6.0, "lora": ("b:2",)}), None, sets)
    assert (given.guidance, given.lora) == (6, ("b:2",))
    with pytest.raises(UserError, match=r"trained with another guidance each \(2\.0 and 3\.0\); name one with --guid"):
        _on_model(base, None, sets)
