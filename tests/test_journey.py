"""What a newcomer does, by the command line alone: convert, generate, trace, prune, compare, export; what goes wrong.

Every failure must be one sentence and leave nothing behind.
"""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from commands import done, run_json
from diffusers import FluxPipeline
from page_folders import make_folder
from PIL import Image
from safetensors.numpy import load_file, save_file

from difffract_jax.graphs.graph import Graph
from difffract_jax.storage.checkpoint import read_config
from tolerances import REFERENCE, TOL

PIPELINE, TRANSCODERS = REFERENCE / "pipeline", REFERENCE / "transcoders"
PROMPT = "a red fox at dawn, oil painting"
SIZE = ("--height", 96, "--width", 96, "--text-tokens", 16)
TRACE = (PROMPT, "--target", "img/2/f326", "--step", 1, "--seed", 7, "--noise", "torch", "--include-padding", *SIZE)
LIMITS = ("--max-nodes", 80, "--expansion-batch", 10, "--min-attribution", 1e-4)


@pytest.fixture
def difffract(monkeypatch, capsys):
    """Runs `difffract ARGUMENTS --json` in this process; returns status, result, and what it said."""

    return partial(run_json, monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("journey")


def test_a_converted_model_and_the_directory_itself_give_the_reference_s_circuit(difffract, made):
    counts = done(difffract("convert", "flux", PIPELINE, made / "flux"))
    assert counts["transformer parameters"] == sum(
        tensor.size for file in (PIPELINE / "transformer").glob("*.safetensors") for tensor in load_file(file).values()
    )
    done(difffract("convert", "transcoders", TRANSCODERS, made / "tcs"))
    pages = make_folder(
        made / "pages", read_config(made / "tcs")["content_hash"], {"img/2": [326], "img/1": range(512)}
    )
    for number, (model, tcs) in enumerate([(made / "flux", made / "tcs"), (PIPELINE, TRANSCODERS)]):
        graph, shown = made / f"{number}.npz", () if number else ("--pages", pages)
        told = done(difffract("trace", model, tcs, *TRACE, *LIMITS, "--out", graph, *shown))
        assert told["target"] == "img/2/f326@14" and told["conservation error"] <= TOL.conservation_f32
        assert [row["page"] for row in told.get("pages", [])] == [f"{pages}/index.html#img/2/f326"] * (1 - number)
        sources = {row["from"]: row.get("page") for row in told["strongest sources"]}
        paged = {name: f"{pages}/index.html#{name.partition('@')[0]}" for name in sources if name.startswith("img/1/f")}
        assert sources == dict.fromkeys(sources) | ({} if number else paged) and paged
        done(difffract("prune", graph, "--mode", "difffract", "--out", made / "pruned.npz"))
        done(difffract("export", made / "pruned.npz", "--out", made / "pruned.json"))
        golden = json.loads((REFERENCE / "golden_graph_0.json").read_text())
        for file, kind in ((graph, "aggregated"), (made / "pruned.json", "pruned")):
            (made / "theirs.json").write_text(json.dumps(golden[kind]))
            found = done(difffract("compare", file, made / "theirs.json"))
            assert not found["nodes_only_in_a"] + found["nodes_only_in_b"]
            assert found["edges_only_in_a"] == found["edges_only_in_b"] == 0
            assert found["largest_error"] <= TOL.edge
    a, b = (Graph.load(made / f"{number}.npz") for number in (0, 1))
    assert np.array_equal(a.edge_attribution, b.edge_attribution)
    assert a.provenance.settings["seed"] == 7 and a.provenance.sources["model"] and a.provenance.versions["jax"]


def test_a_file_of_several_parts_is_completed_by_a_base_of_one_variant(difffract, tmp_path):
    base, file = tmp_path / "base", tmp_path / "all-in-one.safetensors"
    shutil.copytree(PIPELINE, base, copy_function=shutil.copyfile)
    tensors = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    for path in [*base.glob("text_encoder*/model.safetensors"), *base.glob("vae/*.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))
        shutil.copyfile(path.with_suffix(".fp16.safetensors"), path.with_suffix(".ema.safetensors"))
    save_file({f"model.{key}": value for key, value in tensors.items()} | {"vae.x": np.ones(1)}, file)
    status, _, err = difffract("convert", "flux", file, tmp_path / "out", "--base", base)
    assert status == 1 and "in the variants ema and fp16; choose one with --variant ema" in err
    status, _, err = difffract("convert", "flux", file, tmp_path / "out", "--base", base, "--variant", "fp16")
    assert status == 0 and err == f"Note: {file} holds other parts too, which are left aside (vae).\n"
    done(difffract("convert", "flux", PIPELINE, tmp_path / "plain"))
    hashes = [json.loads((tmp_path / out / "config.json").read_text())["content_hash"] for out in ("out", "plain")]
    assert hashes[0] == hashes[1]


def test_the_image_of_a_seed_is_the_one_that_diffusers_makes(difffract, made):
    done(difffract("generate", PIPELINE, PROMPT, "--seed", 3, "--noise", "torch", *SIZE, "--out", made / "a.png"))
    theirs = FluxPipeline.from_pretrained(PIPELINE, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    image = theirs(
        PROMPT,
        generator=torch.Generator("cpu").manual_seed(3),
        num_inference_steps=4,
        guidance_scale=0.0,
        height=96,
        width=96,
        max_sequence_length=16,
        output_type="np",
    ).images[0]
    with Image.open(made / "a.png") as ours:
        assert np.max(np.abs(np.asarray(ours, float) - 255 * image)) <= 1
        assert json.loads(ours.text["difffract_jax"])["settings"]["seed"] == 3


def test_noise_from_a_file_is_the_noise_of_the_run(difffract, made):
    np.save(made / "noise.npy", np.load(REFERENCE / "golden_forward.npz")["p0_initial_latents"])
    for name, more in (("file", ("--latents", made / "noise.npy")), ("torch", ("--noise", "torch", "--seed", 7))):
        done(difffract("generate", PIPELINE, PROMPT, *more, *SIZE, "--out", made / f"{name}.png"))
    images = [np.asarray(Image.open(made / f"{name}.png")) for name in ("file", "torch")]
    assert np.array_equal(*images)


def test_the_demonstration_runs_and_says_what_it_is(difffract, tmp_path):
    told = done(difffract("demo", "--out", tmp_path / "demo"))
    assert "trained on synthetic scenes" in told["note"] and told["conservation error"] <= TOL.conservation_f32
    assert told["as asked"] == "yes" and told["the image shows"] == "blue ring, red square"
    files = ["graph.html", "graph.images.png", "graph.npz", "image.png", "pruned.npz", "report.html"]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [*files, "steered", "validation"]
    # The features that detect the colour are needed for it, and as many at random are not.
    original, off, random = told["the edit"]
    assert original["as asked"] == random["as asked"] == "4 of 4" and int(off["as asked"][0]) <= 1
    assert off["blue in the traced box, first seed"] < 0 < random["blue in the traced box, first seed"]
    assert told["edges against interventions"] <= TOL.direct_f32
    kept, removed, change, _ = (row["figure"] for row in told["the target itself"])
    assert min(kept, removed) > 0.5 and change > 0.4
    assert all(row["as many at random"] < 0.2 for row in told["the target itself"][:2])
    page = (tmp_path / "demo" / "report.html").read_text()
    for part in ("The image", "The circuit", "An edit, before and after", "How far to trust it", "How it was made"):
        assert f"<h2>{part}</h2>" in page
    assert page.count('src="data:image/png') >= 12 and "http" not in page
    assert page.count("colour blue (0.") + page.count("colour blue (1.") >= 8  # the cards explain the target
    # The report of the command, of what the demonstration wrote, is its own but for the words at its head.
    parts = {"--validation": "validation", "--edit": "steered"}
    arguments = [text for option, name in parts.items() for text in (option, tmp_path / "demo" / name)]
    done(difffract("report", tmp_path / "demo" / "graph.npz", *arguments, "--out", tmp_path / "again.html"))
    ours, theirs = (text[text.index("<section>") :] for text in (page, (tmp_path / "again.html").read_text()))
    assert ours == theirs


def test_a_check_tells_every_error_and_fails_where_one_is_too_large(difffract):
    status, out, err = difffract("convert", "check", PIPELINE, "--tolerance", 1e-9)
    assert all(1e-9 < row["error"] < row["bar"] * 1e4 for row in json.loads(out)["blocks"])
    assert status == 1 and "10 of 10 parts differ from PyTorch's: t5, clip, embeddings, double 0" in err


def test_a_prompt_that_does_not_fit_says_what_was_cut(difffract, made):
    prompt = "a red fox " * 10 + "at dawn"
    done_with = difffract("generate", PIPELINE, prompt, "--steps", 1, *SIZE, "--out", made / "cut.png")
    assert done_with[0] == 0
    assert "Warning: the prompt is longer than the text length; cut off was: '" in done_with[2]
    assert "at dawn'. Raise --text-tokens." in done_with[2]


@pytest.fixture
def broken(tmp_path):
    """A copy of the pipeline to break."""
    return shutil.copytree(PIPELINE, tmp_path / "broken", copy_function=shutil.copyfile)


def change_weights(directory, part, change):
    path = next((directory / part).glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def missing_shard(home):
    path = home / "transformer" / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(path), "diffusion_pytorch_model-00001-of-00002.safetensors")}
    path.unlink()
    (home / "transformer" / f"{path.name}.index.json").write_text(json.dumps(index))


def truncated(home):
    path = home / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def several(home):
    def change(tensors):
        del tensors["x_embedder.bias"]
        tensors["extra.weight"] = np.ones(2, np.float32)
        tensors["proj_out.bias"] = np.ones(3, np.float32)
        tensors["context_embedder.bias"][0] = np.nan

    change_weights(home, "transformer", change)


BROKEN = {
    "missing shard": (missing_shard, ["diffusion_pytorch_model-00001-of-00002.safetensors"]),
    "truncated shard": (
        truncated,
        ["vae: diffusion_pytorch_model.safetensors is truncated, its last 100 bytes are missing"],
    ),
    "several problems": (
        several,
        ["missing x_embedder.bias", "unknown extra.weight", "proj_out.bias has shape (3,)", "not finite"],
    ),
    "unsupported value": (
        lambda home: change_json(home / "transformer" / "config.json", patch_size=2),
        ["patch_size=2"],
    ),
    "unknown setting": (
        lambda home: change_json(home / "transformer" / "config.json", dual_attention_layers=[0]),
        ["not understood: dual_attention_layers"],
    ),
    "another architecture": (
        lambda home: change_json(home / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        ["is a StableDiffusionXLPipeline, but only FluxPipeline"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_whole(difffract, broken, name):
    spoil, told = BROKEN[name]
    spoil(broken)
    status, out, err = difffract("convert", "flux", broken, broken.parent / "out")
    assert (status, out) == (1, "")
    assert err.startswith("Error: ") and "Traceback" not in err
    assert not [part for part in told if part not in err], err
    assert [path.name for path in broken.parent.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((PIPELINE, TRANSCODERS, PROMPT, "--target", "img/2/f326", "--step", 4), "step must lie in [0, 4)"),
        (
            (PIPELINE, TRANSCODERS, PROMPT, "--target", "img/5/f1"),
            "There is no transcoder at img/5; blocks with one: 0",
        ),
        ((PIPELINE, TRANSCODERS, PROMPT, "--target", "img/2/f9999"), "the transcoders have features 0 to 511"),
        ((PIPELINE, TRANSCODERS, PROMPT, "--target", "img/2/326"), "is not a feature; write STREAM/BLOCK/fN"),
        ((PIPELINE, TRANSCODERS, PROMPT, "--target", "velocity:box=0,0,8,999"), "is empty or leaves the image"),
        ((PIPELINE, REFERENCE / "saes", PROMPT, "--target", "img/2/f1"), "these are SAEs; give a directory of"),
        ((PIPELINE, PIPELINE, PROMPT, "--target", "img/2/f1"), "holds no config.json"),
        ((TRANSCODERS, TRANSCODERS, PROMPT, "--target", "img/2/f1"), "holds no config.json"),
        ((PIPELINE, "nowhere", PROMPT, "--target", "img/2/f1"), "nowhere is not a directory"),
        (
            ("organism", TRANSCODERS, PROMPT, "--target", "img/1/f1"),
            "sites img/2, txt/2, but the model has img/0 to img/1",
        ),
        (("organism", "organism-saes", PROMPT, "--target", "img/1/f1"), "these are SAEs; give a directory of"),
        ((PIPELINE, TRANSCODERS, PROMPT, "--target", "img/2/f1", "--height", 100), "multiples of 16 pixels"),
        ((PIPELINE, TRANSCODERS, PROMPT, "--target", "img/2/f1", "--latents", "no.npy"), "no.npy"),
        ((PIPELINE, TRANSCODERS, PROMPT, "--target", "img/2/f1", "--latents", __file__), "is not a readable .npy file"),
    ],
)
def test_a_trace_that_cannot_be_is_one_sentence(difffract, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    status, out, err = difffract("trace", *arguments, "--text-tokens", 16)
    assert (status, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("Error: ") and told in last and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_feature_that_is_inactive_says_where_it_would_be_active(difffract, tmp_path):
    common = (PIPELINE, TRANSCODERS, PROMPT, "--step", 1, "--seed", 7, "--noise", "torch", *SIZE)
    status, _, err = difffract("trace", *common, "--target", "img/2/f326@8", "--out", tmp_path / "g.npz")
    assert status == 1 and "img/2/f326@8 is inactive there; it is active at the positions (values): 14 (3.05)" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("g.npz", b"", "is not a graph file: it is empty"),
        ("g.npz", b"PK\x03\x04 something else", "is not a readable .npz file"),
        ("g.json", b"{}", "is no"),
        ("g.json", b"[1, 2", "is no"),
        ("g.txt", b"hello", "is not a graph file: it begins with b'hello'"),
    ],
)
def test_a_file_that_is_no_graph_is_refused(difffract, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    status, out, err = difffract("compare", tmp_path / name, tmp_path / name)
    assert (status, out) == (1, "") and err.startswith("Error: ") and told in err and err.count("\n") == 1


def test_torch_files_that_do_not_fit_leave_nothing_behind(difffract, tmp_path):
    source = shutil.copytree(TRANSCODERS, tmp_path / "tcs")
    path = source / "transcoder_img_1.pt"
    path.write_bytes(path.read_bytes()[:2000])
    status, _, err = difffract("convert", "transcoders", source, tmp_path / "out")
    assert status == 1 and "transcoder_img_1.pt is truncated" in err
    assert [item.name for item in tmp_path.iterdir()] == ["tcs"]
