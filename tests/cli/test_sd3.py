"""Stable Diffusion 3 through the shell, on a tiny diffusers directory: convert, generate, trace, train, plan."""

from pathlib import Path

import numpy as np
import pytest

from difffract_jax.address import TXT
from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.loading import described_pipeline, load_pipeline, save_transcoders
from difffract_jax.transcoders.transcoder import random_transcoders
from sd3 import tiny_pipeline
from tolerances import TOL

PROMPT = "a red fox"
SIZE = ("--height", 16, "--width", 16, "--text-tokens", 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3.5-medium as diffusers saves it, transcoders of all its sites, and prompts."""
    folder = tmp_path_factory.mktemp("sd3")
    tiny_pipeline("sd3.5-medium").save_pretrained(folder / "diffusers")
    shape = described_pipeline(folder / "diffusers").transformer
    save_transcoders(random_transcoders(shape, features=64), folder / "tcs")
    (folder / "prompts.txt").write_text("".join(f"a {one} circle\n" for one in ("red", "blue", "green", "dark")) * 8)
    return folder


@pytest.mark.slow
def test_a_directory_is_converted_by_either_name_and_makes_an_image(difffract, folder):
    shown = difffract("convert", "flux", "diffusers", "model", "--overwrite")
    assert shown["type"] == "f32" and shown["transformer parameters"] > 0
    difffract("generate", "model", PROMPT, *SIZE, "--steps", 2, "--out", "fox.png")
    assert (folder / "fox.png").stat().st_size > 0
    assert load_pipeline(folder / "model").config.transformer.family == "sd3"


@pytest.mark.slow
def test_a_trace_adds_up_and_names_the_prompt_s_words(difffract, folder):
    arguments = ("diffusers", "tcs", PROMPT, "--target", "velocity:", "--step", 1, "--steps", 2, "--max-nodes", 12)
    difffract("trace", *arguments, *SIZE, "--out", "graph.npz")
    graph = read_graph(folder / "graph.npz")
    assert graph.largest_conservation_error <= TOL.conservation_f32
    assert graph.provenance.traced_run.guidance == 4.5 and set(graph.node_branch.tolist()) == {0, 1}
    assert not np.any((graph.node_block == 2) & (graph.node_stream == TXT))
    tokens = graph.provenance.traced_run.tokens
    assert tokens[:6] == ("<|startoftext|>", "\u2581a", "\u2581r", "e", "d", "\u2581f")
    few = ("--edges", 10, "--ablations", 2, "--draws", 1, "--readings", "propagated")
    report = difffract("validate", "diffusers", "tcs", "graph.npz", *few, "--grade", "graded.npz")
    assert all(row["holds"] for row in report["exactness"])
    graded = read_graph(folder / "graded.npz").provenance.grade
    assert report["grade"]["words"] == str(graded) and graded.no_op <= 1e-6
    assert len(report["grade"]["edits"]) == graded.edits


@pytest.mark.slow
def test_transcoders_are_trained_and_measured(difffract, folder):
    run = ("train", "--model", "diffusers", "--prompts", "prompts.txt", "--sites", "img/*", "--sites", "txt/0")
    small = ("--batch", 16, "--buffer-rows", 64, "--expansion", 2, "--k", 4, "--prompts-at-once", 2, "--warmup", 0)
    length = ("--steps", 2, "--steps-per-image", 2, "--validation-share", 0.3, "--out", "run")
    shown = difffract(*run, *small, *SIZE, *length)
    assert shown["step"] == 2 and (folder / "run" / "transcoders").is_dir()


@pytest.mark.slow
def test_what_a_published_model_needs_is_counted_without_it(difffract):
    shown = difffract("plan", "generate", "sd3.5-medium", "--device", "24GB", "--device", "8GB")
    fits = {(row["device"], row["weights"]): row["fits"] for row in shown["counted"]}
    assert fits["24GB", "streamed"] and not fits["8GB", "resident"]
