"""Harvesting, training and evaluating with a model whose blocks are streamed: what resident ones give, to rounding."""

import json

import numpy as np
import pytest
from commands import run_command

from difffract_jax.loading import load_pipeline, load_transcoders, save_pipeline
from difffract_jax.models.streaming import streams_layers
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.harvest import collect_rows
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sources import open_sampler

SMALL = ("steps=4", "batch=32", "buffer_rows=128", "tokens_per_step=8", "steps_per_image=2", "height=16", "width=24")
SMALL += ("k=4", "expansion=2", "time_embed=8", "prompts_at_once=2", "sites=[img/1,single/0]", "validation_share=0.3")
CLOSE = 1e-4
"""Of the largest number: float32 sums in another order, since blocks are programs of their own."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and prompts."""
    home = tmp_path_factory.mktemp("streamed")
    save_pipeline(random_pipeline(), home / "model")
    prompts = [f"a {colour} thing number {n}" for n in range(4) for colour in ("red", "green", "blue")]
    (home / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return home


def close(ours, theirs):
    ours, theirs = (np.asarray(one, np.float64) for one in (ours, theirs))
    assert np.max(np.abs(ours - theirs)) <= CLOSE * np.max(np.abs(theirs))


def test_rows_are_the_same(home):
    values = dict(each.split("=") for each in SMALL if not each.startswith("sites"))
    settings = TrainConfig(model=str(home / "model"), prompts=str(home / "prompts.txt"), sites=("img/*",), **values)
    found = []
    for weights in ("device", "disk"):
        pipe = load_pipeline(home / "model", weights=weights)
        assert streams_layers(pipe.transformer) == (weights == "disk")
        found.append(collect_rows(open_sampler(settings, pipe, "train"), "img", range(2)))
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs)


@pytest.fixture(scope="module")
def runs(home):
    """The same training with the model resident, and with its blocks on disk, and an evaluation of each."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for weights in ("device", "disk"):
            out = home / weights
            sets = (*SMALL, f"model={home / 'model'}", f"prompts={home / 'prompts.txt'}", f"out={out}")
            (home / f"{weights}.yaml").write_text(
                "\n".join(each.replace("=", ": ", 1) for each in (*sets, f"weights={weights}")), encoding="utf-8"
            )
            lines = (
                ("train", home / f"{weights}.yaml"),
                ("evaluate", out, *("--prompts-count", 2, "--velocity-count", 1, "--images", 1)),
            )
            for line in lines:
                run = run_command(patch, _Silent(), *line)
                assert run.status == 0
            found.append((out, json.loads((out / "report" / "evaluation.json").read_text(encoding="utf-8"))))
    return found


class _Silent:
    def readouterr(self):
        return "", ""


@pytest.mark.slow
def test_transcoders_are_the_same(runs):
    resident, streamed = (load_transcoders(out / "transcoders") for out, _ in runs)
    for name, stack in streamed.stacks.items():
        close(stack.dec.kernel[...], resident.stacks[name].dec.kernel[...])


@pytest.mark.slow
def test_what_is_recovered_is_the_same(runs):
    resident, streamed = (recovered(report) for _, report in runs)
    assert resident and len(streamed) == len(resident)
    np.testing.assert_allclose(streamed, resident, atol=CLOSE * max(map(abs, resident)))


def recovered(report):
    """Returns every number of that name, in order."""
    if isinstance(report, list):
        return [number for part in report for number in recovered(part)]
    if not isinstance(report, dict):
        return []
    own = [report["recovered"]] if isinstance(report.get("recovered"), float) else []
    return own + [number for part in report.values() for number in recovered(part)]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_mesh_is_refused_with_blocks_that_are_fetched(home, monkeypatch, capsys, dry):
    line = ("train", "--model", home / "model", "--prompts", home / "prompts.txt", "--out", home / "mesh", *dry)
    run = run_command(monkeypatch, capsys, *line, "--weights", "disk", "--mesh", "data=2")
    assert run.status == 1 and "fetches a model's blocks to one device, but the mesh has 2" in run.err


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_model_that_is_made_in_memory_has_no_blocks_to_fetch(home, monkeypatch, capsys, dry):
    (home / "tiny.yaml").write_text("{model: tiny, weights: disk, batch: 32}", encoding="utf-8")
    run = run_command(
        monkeypatch, capsys, "train", home / "tiny.yaml", "--set", f"prompts={home / 'prompts.txt'}", *dry
    )
    assert run.status == 1 and "weights: disk fetches a model's blocks from its files, but `tiny` has none" in run.err


def test_rows_have_no_model_whose_blocks_could_be_fetched(home, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", np.ones((64, 4), np.float32))
    np.save(tmp_path / "y.npy", np.ones((64, 4), np.float32))
    line = ("train", "--rows", tmp_path, "--batch", "8", "--buffer-rows", "32", "--dry-run")
    run = run_command(monkeypatch, capsys, *line, "--weights", "disk")
    assert run.status == 0, run.err
    assert run.err.count("Note: weights: disk has no effect here: rows are read, and no model.") == 1
    assert not run_command(monkeypatch, capsys, *line).err
