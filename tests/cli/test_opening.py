"""Where a command's weights stay: as asked, by what fits, and refused where not even two blocks do."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command
from PIL import Image

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.cli import opening
from difffract_jax.cli.encoding import EncodeConfig
from difffract_jax.cli.opening import open_model, place_of
from difffract_jax.cli.settings import HeadsConfig, SteerConfig
from difffract_jax.config import GenerateConfig
from difffract_jax.loading import save_pipeline, save_transcoders
from difffract_jax.memory import allow, memory_for
from difffract_jax.models.streaming import streams_layers
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.storage.layers import FileLayers
from difffract_jax.trace_settings import TraceConfig
from difffract_jax.transcoders.transcoder import random_transcoders
from tolerances import REFERENCE

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("opening")
    pipe = random_pipeline()
    save_pipeline(pipe, home / "model")
    save_transcoders(random_transcoders(pipe.config.transformer), home / "transcoders")
    return home


def test_steps_that_are_named_count():
    given = {"model": "organism", "transcoders": "organism"}
    works = [opening._work("dashboards", given | more, host=True) for more in ({}, {"steps": 9})]
    assert [work.scanned for work in works] == [4, 9]


def test_auto_streams_what_does_not_fit_and_says_so(monkeypatch, capsys, model, tmp_path):
    images = []
    for name, options in {"whole": (), "streamed": ("--memory", "400KB", "--no-preflight")}.items():
        out = tmp_path / f"{name}.png"
        run = run_command(monkeypatch, capsys, "generate", model / "model", PROMPT, "--out", out, *options)
        assert run.status == 0, run.err
        assert ("Weights: disk. With all of them on the device, generate needs about" in run.err) == (name != "whole")
        images.append(np.asarray(Image.open(out)))
    np.testing.assert_array_equal(*images)


def test_memory_for_less_than_two_blocks_is_refused(monkeypatch, capsys, model, tmp_path):
    tight = ("--memory", "20KB", "--no-preflight", "--out", tmp_path / "a.png")
    run = run_command(monkeypatch, capsys, "generate", model / "model", PROMPT, *tight)
    assert run.status == 1
    assert "the largest block of the model takes" in run.err and "two are in memory at a time" in run.err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("memory", "told"),
    [("abc", "--memory must be a size with its unit"), ("1KB", "the largest block of the model takes")],
)
def test_the_embedded_model_is_held_to_memory_too(monkeypatch, capsys, tmp_path, memory, told):
    out = tmp_path / "a.png"
    run = run_command(monkeypatch, capsys, "generate", "organism", PROMPT, "--memory", memory, "--out", out)
    assert run.status == 1 and told in run.err
    assert not out.exists()


def test_embeddings_take_the_place_of_the_encoders(monkeypatch, capsys, model, tmp_path):
    embeddings, graph = tmp_path / "embeddings.npz", tmp_path / "graph.npz"
    run = run_command(
        monkeypatch, capsys, "encode", model / "model", "--prompt", PROMPT, "--out", embeddings, "--weights", "disk"
    )
    assert run.status == 0 and "prompts" in run.out, run.err
    given = ("--embeddings", embeddings, "--weights", "disk", "--target", "img/1/f3", "--max-nodes", "3")
    rest = ("--out", graph, "--min-attribution", "0")
    arguments = (model / "model", model / "transcoders")
    run = run_command(monkeypatch, capsys, "trace", *arguments, PROMPT, *given, *rest)
    assert run.status == 0 or "is inactive" in run.err, run.err
    run = run_command(monkeypatch, capsys, "trace", *arguments, "another prompt", *given, *rest)
    assert run.status == 1 and 'holds no embedding of the prompt "another prompt"' in run.err


def test_a_dry_run_of_encode_shows_its_settings(monkeypatch, capsys, model):
    run = run_command(monkeypatch, capsys, "encode", model / "model", "--prompt", PROMPT, "--dry-run", "--json")
    assert run.status == 0
    assert json.loads(run.out)["settings"]["prompt"] == [PROMPT]


def test_embeddings_leave_the_blocks_of_t5_on_disk(monkeypatch, capsys, model, tmp_path):
    embeddings = tmp_path / "embeddings.npz"
    arguments = (model / "model", "--prompt", PROMPT, "--out", embeddings)
    run = run_command(monkeypatch, capsys, "encode", *arguments)
    assert run.status == 0, run.err
    read = []
    monkeypatch.setattr(FileLayers, "read", lambda source, layer, take=None: read.append(layer))
    monkeypatch.setattr("difffract_jax.cli.opening.with_embeddings", lambda pipe, found: read.append(pipe) or pipe)
    settings = GenerateConfig(model=str(model / "model"), prompt=PROMPT, weights="device", embeddings=embeddings)
    opened = open_model("generate", settings)
    assert read == [opened.pipe]
    assert streams_layers(opened.pipe.t5) and not streams_layers(opened.pipe.transformer)


def test_where_all_but_the_text_encoder_fits_its_blocks_alone_are_read_from_disk(monkeypatch, capsys, model):
    needed = lambda work: SimpleNamespace(needed=1_000_000 if "t5" in work.shapes else 100_000)  # noqa: E731
    monkeypatch.setattr(opening, "count", needed)
    settings = GenerateConfig(model=str(model / "model"), prompt=PROMPT, memory="500KB")
    try:
        pipe = open_model("generate", settings).pipe
    finally:
        allow(None)
    assert streams_layers(pipe.t5) and not streams_layers(pipe.transformer)
    told = capsys.readouterr().err
    assert told.startswith("Weights: device; of the text encoder, disk. With all of them on the device, generate needs")
    monkeypatch.setattr(opening, "count", lambda work: SimpleNamespace(needed=1_000_000))
    assert place_of("generate", settings) == "disk"


def test_encode_leaves_the_blocks_of_the_transformer_on_disk(model):
    settings = EncodeConfig(model=str(model / "model"), prompt=(PROMPT,), weights="device")
    pipe = open_model("encode", settings).pipe
    assert streams_layers(pipe.transformer) and not streams_layers(pipe.t5)
    settings = EncodeConfig(model=str(model / "model"), prompt=(PROMPT,), weights="disk")
    assert streams_layers(open_model("encode", settings).pipe.t5)


def test_a_transformer_with_a_base_is_counted_too(capsys, monkeypatch, tmp_path):
    transformer, pipeline = REFERENCE / "pipeline" / "transformer", REFERENCE / "pipeline"
    settings = GenerateConfig(model=str(transformer), base=pipeline, prompt=PROMPT, memory="1500KB")
    assert place_of("generate", settings) == "disk"
    assert "Weights: disk. With all of them on the device, generate needs about" in capsys.readouterr().err
    assert place_of("generate", settings.model_copy(update={"memory": "1GB"})) == "device"
    run = run_command(
        monkeypatch,
        capsys,
        *("generate", transformer, PROMPT, "--base", pipeline, "--weights", "device", "--memory", "1500KB"),
        *("--out", tmp_path / "a.png"),
    )
    assert run.status == 1 and run.err.startswith("Error: generate needs at least")
    assert not (tmp_path / "a.png").exists()


def test_memory_is_what_the_library_may_use_too(model):
    settings = GenerateConfig(model=str(model / "model"), prompt=PROMPT, memory="500KB")
    try:
        open_model("generate", settings)
        assert memory_for(jax.devices()[0]).available == 500_000
        open_model("generate", settings.model_copy(update={"memory": None}))
        assert memory_for(jax.devices()[0]).available > 500_000
    finally:
        allow(None)


def test_what_is_counted_is_what_the_command_loads_and_runs(monkeypatch, model):
    counted = []
    monkeypatch.setattr(opening, "count", lambda work: counted.append(work) or SimpleNamespace(needed=0))
    given = {"model": str(model / "model"), "transcoders": str(model / "transcoders")}
    trace = TraceConfig(**given, prompt=PROMPT, target="img/0/f1")
    assert place_of("trace", trace, output=False, targets=[Feature("img", 0, 1)]) == "device"
    steer = SteerConfig(**given, prompt=PROMPT, edit=("img/1/f1=zero",))
    assert place_of("steer", steer, sites=("img/1",)) == "device"
    heads = HeadsConfig(**given, graph=model / "graph.npz")
    assert place_of("heads", heads, grid=(7, 5), text_tokens=9, dtype="bf16") == "device"
    assert [work.tcs.sites.names for work in counted[:2]] == [("img/0", "txt/0"), ("img/1",)]
    assert (counted[2].grid, counted[2].text_tokens, counted[2].dtype) == ((7, 5), 9, jnp.bfloat16)
