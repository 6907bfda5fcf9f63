"""Z-Image through the shell, on a tiny diffusers directory: convert, check, generate, trace, train, plan."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zimage import tiny_pipeline

from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.loading import described_pipeline, load_pipeline, save_transcoders
from difffract_jax.transcoders.transcoder import random_transcoders
from tolerances import TOL

PROMPT = "a red fox"
SIZE = ("--height", 32, "--width", 64, "--text-tokens", 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as diffusers saves it, transcoders of all its sites, and prompts."""
    folder = tmp_path_factory.mktemp("zimage")
    tiny_pipeline().save_pretrained(folder / "diffusers")
    shape = described_pipeline(folder / "diffusers").transformer
    save_transcoders(random_transcoders(shape, features=64), folder / "tcs")
    (folder / "prompts.txt").write_text("".join(f"a {one} circle\n" for one in ("red", "blue", "green", "dark")) * 8)
    return folder


@pytest.mark.slow
def test_a_directory_is_converted_and_makes_an_image(difffract, folder):
    shown = difffract("convert", "model", "diffusers", "model", "--overwrite")
    assert shown["type"] == "f32" and shown["transformer parameters"] > 0
    difffract("generate", "model", PROMPT, *SIZE, "--steps", 2, "--out", "fox.png")
    assert (folder / "fox.png").stat().st_size > 0
    assert load_pipeline(folder / "model").config.transformer.family == "zimage"
    difffract("encode", "model", "--prompt", PROMPT, "--text-tokens", 32, "--out", "fox.npz")
    given = ("generate", "model", PROMPT, *SIZE, "--steps", 2)
    difffract(*given, "--embeddings", "fox.npz", "--out", "embedded.png")
    images = [np.asarray(Image.open(folder / f"{name}.png")) for name in ("embedded", "fox")]
    assert np.array_equal(*images)


@pytest.mark.slow
def test_a_trace_adds_up_and_names_the_prompt_s_words(difffract, folder):
    arguments = ("diffusers", "tcs", PROMPT, "--target", "velocity:", "--step", 1, "--steps", 2, "--max-nodes", 12)
    difffract("trace", *arguments, *SIZE, "--out", "graph.npz")
    graph = read_graph(folder / "graph.npz")
    assert graph.largest_conservation_error <= TOL.conservation_f32
    tokens = graph.provenance.traced_run.tokens
    assert (
        tokens[0] == "<|im_start|>" and "".join(tokens[6:15]) == "a\u2581red\u2581fox" and tokens[28:] == ("<pad>",) * 4
    )
    few = ("--edges", 10, "--ablations", 2, "--draws", 1, "--readings", "propagated")
    report = difffract("validate", "diffusers", "tcs", "graph.npz", *few)
    assert all(row["holds"] for row in report["exactness"])


@pytest.mark.slow
def test_transcoders_are_trained_and_measured(difffract, folder):
    run = ("train", "--model", "diffusers", "--prompts", "prompts.txt", "--sites", "txt/*", "--sites", "single/0")
    small = ("--batch", 16, "--buffer-rows", 64, "--expansion", 2, "--k", 4, "--prompts-at-once", 2, "--warmup", 0)
    length = ("--steps", 2, "--steps-per-image", 2, "--validation-share", 0.3, "--out", "run")
    shown = difffract(*run, *small, *SIZE, *length)
    assert shown["step"] == 2 and (folder / "run" / "transcoders").is_dir()


def test_what_the_published_model_needs_is_counted_without_it(difffract):
    shown = difffract("plan", "generate", "z-image-turbo", "--device", "40GB", "--device", "8GB")
    fits = {(row["device"], row["weights"]): row["fits"] for row in shown["counted"]}
    assert fits["40GB", "resident"] and fits["8GB", "streamed"] and not fits["8GB", "resident"]
