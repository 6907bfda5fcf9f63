"""FLUX.2-klein through the shell, on a tiny diffusers directory: convert, generate, trace, train, plan."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from safetensors.numpy import save_file

from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.loading import described_pipeline, load_pipeline, save_transcoders
from difffract_jax.transcoders.transcoder import random_transcoders
from klein import tiny_pipeline
from tolerances import TOL

PROMPT = "a red fox"
SIZE = ("--height", 16, "--width", 16, "--text-tokens", 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as diffusers saves it, transcoders of it, and prompts."""
    folder = tmp_path_factory.mktemp("klein")
    tiny_pipeline().save_pretrained(folder / "diffusers")
    tiny_pipeline(distilled=False).save_pretrained(folder / "base")
    shape = described_pipeline(folder / "diffusers").transformer
    sites = {"img": (0, 1), "txt": (1,), "joint": (0, 1)}
    save_transcoders(random_transcoders(shape, features=64, sites=sites), folder / "tcs")
    module = "lora_unet_double_blocks_0_img_mlp_0"
    arrays = {f"{module}.lora_{one}.weight": np.ones((2, 2), np.float32) for one in ("up", "down")}
    save_file(arrays, folder / "style.safetensors")
    (folder / "prompts.txt").write_text("".join(f"a {one} circle\n" for one in ("red", "blue", "green", "dark")) * 8)
    return folder


@pytest.mark.slow
def test_a_directory_is_converted_and_makes_an_image(difffract, folder):
    shown = difffract("convert", "model", "diffusers", "model", "--overwrite")
    assert shown["transformer parameters"] == 109_248 and shown["type"] == "f32"
    difffract("generate", "model", PROMPT, *SIZE, "--out", "fox.png")
    assert (folder / "fox.png").stat().st_size > 0
    assert load_pipeline(folder / "model").config.transformer.family == "flux2"


def test_a_transformer_alone_is_told_by_its_class(difffract, folder):
    shown = difffract("convert", "model", "diffusers/transformer", "alone", "--overwrite")
    assert shown["transformer parameters"] == 109_248
    assert json.loads((folder / "alone" / "config.json").read_text())["config"]["family"] == "flux2"


@pytest.mark.slow
def test_a_trace_reaches_single_stream_sites_and_adds_up(difffract, folder):
    arguments = ("diffusers", "tcs", PROMPT, "--target", "velocity:", "--step", 3, "--max-nodes", 12, *SIZE)
    difffract("trace", *arguments, "--out", "graph.npz")
    graph = read_graph(folder / "graph.npz")
    assert graph.largest_conservation_error <= TOL.conservation_f32
    assert graph.provenance.traced_run.guidance is None
    assert len(set(graph.node_block[graph.node_block >= 0])) > 2
    few = ("--edges", 10, "--ablations", 2, "--draws", 1, "--readings", "propagated")
    report = difffract("validate", "diffusers", "tcs", "graph.npz", *few)
    assert all(row["holds"] for row in report["exactness"])


@pytest.mark.slow
def test_a_base_model_is_traced_pruned_and_shown_in_both_branches(difffract, folder):
    run = (*SIZE, "--steps", 2, "--guidance", 2.5, "--negative-prompt", "a grey fox")
    asked = ("base", "tcs", PROMPT, *run, "--step", 1, "--max-nodes", 12)
    difffract("trace", *asked, "--target", "velocity:", "--out", "both.npz")
    graph = read_graph(folder / "both.npz")
    assert graph.largest_conservation_error <= TOL.conservation_f32
    assert {*graph.node_branch.tolist()} == {0, 1}
    difffract("prune", "both.npz", "--out", "pruned.npz", "--node-threshold", 0.9)
    pruned = read_graph(folder / "pruned.npz")
    assert {*pruned.node_branch.tolist()} == {0, 1}
    difffract("view", "pruned.npz", "--out", "page.html")


@pytest.mark.slow
def test_transcoders_of_gated_mlps_are_trained_and_measured(difffract, folder):
    run = (
        "train",
        "--model",
        "diffusers",
        "--prompts",
        "prompts.txt",
        "--sites",
        "img/1",
        "--sites",
        "single/0",
        "--out",
        "run",
    )
    small = ("--batch", 16, "--buffer-rows", 64, "--expansion", 2, "--k", 4, "--prompts-at-once", 2, "--warmup", 0)
    difffract(*run, *small, *SIZE, "--steps", 2, "--validation-share", 0.3)
    shown = difffract("evaluate", "run", "--prompts-count", 1, "--velocity-count", 1, "--images", 0, "--scored", 0)
    assert np.isfinite(shown["fvu"])


@pytest.mark.slow
def test_what_klein_needs_is_counted_without_it(difffract):
    shown = difffract("plan", "generate", "flux2-klein", "--device", "24GB", "--device", "16GB")
    fits = {(row["device"], row["weights"]): row["fits"] for row in shown["counted"]}
    assert fits == {("24GB", "resident"): True, ("16GB", "resident"): False} | {
        (device, "streamed"): True for device in ("24GB", "16GB")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "diffusers", PROMPT, "--guidance", 3.5), "This model takes no guidance scale"),
        (
            ("generate", "diffusers", PROMPT, "--lora", "style.safetensors"),
            "style.safetensors is a LoRA of another model",
        ),
        (
            ("trace", "diffusers", "tcs", PROMPT, "--target", "img/1/f3", "--pooled", "explained", *SIZE, "--steps", 1),
            "Nothing pooled from the prompt enters this model",
        ),
        (("generate", "diffusers", PROMPT, "--negative-prompt", "grey"), "This model takes no negative prompt"),
        (("generate", "base", PROMPT, "--guidance", 1, "--negative-prompt", "grey"), "A negative prompt is read by"),
    ],
    ids=["guidance", "lora", "pooled", "negative", "alone"],
)
def test_what_klein_has_not_is_one_sentence(monkeypatch, capsys, folder, arguments, message):
    monkeypatch.chdir(folder)
    found = run_command(monkeypatch, capsys, *arguments)
    error = found.err.strip()
    assert found.status == 1 and error.startswith("Error: ") and "\n" not in error
    assert message in error
