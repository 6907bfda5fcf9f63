"""A directory without text encoders makes the images of a complete one from embeddings, and refuses prompts."""

import shutil

import numpy as np
import pytest
from commands import run_command
from safetensors.numpy import save_file

from converters.export import export_pipeline
from difffract_jax.config import UserError
from difffract_jax.loading import described_pipeline, load_pipeline
from difffract_jax.models.embeddings import embed_prompts, read_embeddings, with_embeddings, write_embeddings
from difffract_jax.models.pipeline import generate
from difffract_jax.models.sd3_text import NoText
from klein import tiny_pipeline as tiny_klein
from sd3 import CLIP_LENGTH
from sd3 import tiny_pipeline as tiny_sd3
from tolerances import REFERENCE

PROMPT = "a red fox"
SIZE = {"height": 32, "width": 32, "steps": 2}
MODELS = {
    "FLUX.1": (None, ("text_encoder", "text_encoder_2"), 16),
    "FLUX.2-klein": (tiny_klein, ("text_encoder",), 40),
    "Stable Diffusion 3": (
        lambda: tiny_sd3("sd3.5-medium"),
        ("text_encoder", "text_encoder_2", "text_encoder_3"),
        CLIP_LENGTH + 12,
    ),
    "a CLIP alone": (lambda: tiny_sd3("sd3-medium", t5=False), ("text_encoder",), CLIP_LENGTH + 12),
}


def without_encoders(name, folder):
    """A complete directory, one that lacks text encoders, and the text's length."""
    make, lacking, tokens = MODELS[name]
    if make is None:
        shutil.copytree(REFERENCE / "pipeline", folder / "full")
    else:
        make().save_pretrained(folder / "full")
    shutil.copytree(folder / "full", folder / "bare", ignore=shutil.ignore_patterns(*lacking))
    return folder / "full", folder / "bare", tokens


@pytest.mark.parametrize(
    "name", ["FLUX.1", *(pytest.param(one, marks=pytest.mark.slow) for one in MODELS if one != "FLUX.1")]
)
def test_images_from_embeddings_are_those_of_a_complete_directory(tmp_path, caplog, name):
    full, bare, tokens = without_encoders(name, tmp_path)
    complete = load_pipeline(full)
    run = complete.plan(**SIZE, text_tokens=tokens)
    write_embeddings(embed_prompts(complete, [PROMPT], tokens), tmp_path / "prompts.npz")
    with pytest.raises(UserError, match="lacks text_encoder.*; copy these folders, .*, with --base"):
        load_pipeline(bare)
    for weights in ("device", "disk"):
        pipe = load_pipeline(bare, encoders=False, weights=weights)
        assert pipe.config == described_pipeline(bare) and pipe.config.defaults.steps == complete.config.defaults.steps
        with pytest.raises(UserError, match="This model has no text encoders, .* --embeddings FILE"):
            generate(pipe, PROMPT, run=run)
        given = with_embeddings(pipe, read_embeddings(tmp_path / "prompts.npz"))
        assert "nothing tells whether the embeddings in" in caplog.messages[-1]
        made, wanted = (generate(one, PROMPT, run=run) for one in (given, complete))
        if weights == "device":
            assert np.array_equal(made.latents, wanted.latents)
        assert np.max(np.abs(made.image.astype(int) - wanted.image)) <= 1
    with pytest.raises(UserError, match='holds no embedding of the prompt "a blue dog"'):
        generate(given, "a blue dog", run=run)


def test_what_needs_the_encoders_says_that_they_are_not_there(tmp_path):
    _, bare, _ = without_encoders("FLUX.1", tmp_path)
    pipe = load_pipeline(bare, encoders=False)
    assert "text encoder" in repr(pipe) and "T5" not in repr(pipe)
    with pytest.raises(UserError, match="this pipeline was loaded without them or takes prompts from a file"):
        export_pipeline(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    halves = {f"{name}.lora_down.weight": (2, 24), f"{name}.lora_up.weight": (24, 2)}
    save_file({key: np.zeros(shape, np.float32) for key, shape in halves.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors changes text encoders .lora_te1_.*, but the model has none"):
        load_pipeline(bare, encoders=False, lora=[tmp_path / "x.safetensors"])


def test_a_repository_without_encoders_is_described_as_a_directory_is(tmp_path, hub):
    _, bare, _ = without_encoders("FLUX.1", tmp_path)
    files = {path.relative_to(bare).as_posix(): path.read_bytes() for path in bare.rglob("*") if path.is_file()}
    hub.add("someone/bare", files)
    assert described_pipeline("hf:someone/bare") == described_pipeline(bare)
    with pytest.raises(UserError, match="lacks text_encoder"):
        load_pipeline("hf:someone/bare")


@pytest.mark.slow
def test_streaming_a_model_without_t5_reads_what_there_is(tmp_path):
    tiny_sd3("sd3-medium", t5=False).save_pretrained(tmp_path / "full")
    resident, streamed = (load_pipeline(tmp_path / "full", weights=weights) for weights in ("device", "disk"))
    assert isinstance(streamed.t5, NoText)
    run = resident.plan(**SIZE, text_tokens=CLIP_LENGTH + 12)
    images = [generate(pipe, PROMPT, run=run).image.astype(int) for pipe in (resident, streamed)]
    assert np.max(np.abs(images[0] - images[1])) <= 1


@pytest.mark.slow
def test_the_shell_makes_an_image_from_embeddings_alone(tmp_path, monkeypatch, capsys):
    full, bare, tokens = without_encoders("Stable Diffusion 3", tmp_path)
    monkeypatch.chdir(tmp_path)
    encoded = run_command(monkeypatch, capsys, "encode", full, "--prompt", PROMPT, "--text-tokens", tokens)
    assert encoded.status == 0
    size = ("--height", 32, "--width", 32, "--steps", 2, "--text-tokens", tokens)
    given = ("--embeddings", "embeddings.npz", "--weights", "auto")
    images = []
    for folder, more in ((full, ()), (bare, given)):
        made = run_command(monkeypatch, capsys, "generate", folder, PROMPT, *size, *more, "--out", f"{folder.name}.png")
        assert made.status == 0
        images.append((tmp_path / f"{folder.name}.png").read_bytes())
    refused = run_command(monkeypatch, capsys, "generate", bare, PROMPT, *size)
    assert refused.status == 1 and "lacks text_encoder, text_encoder_2" in refused.err
    assert "Traceback" not in refused.err
