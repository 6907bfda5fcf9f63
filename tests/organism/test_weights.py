"""The shipped model: a diffusers pipeline like any other, small, whole, and as good as its card says."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from difffract_jax.config import UserError
from difffract_jax.directories import ORGANISM
from difffract_jax.loading import load_pipeline
from difffract_jax.models.pipeline import generate
from difffract_jax.organism.evaluate import draw_images, held_out, see
from difffract_jax.organism.scorer import judge
from difffract_jax.organism.vocabulary import make_tokenizers

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def shipped():
    return load_pipeline("organism")


def test_diffusers_loads_the_shipped_directory_and_draws_the_same_image(shipped):
    theirs = FluxPipeline.from_pretrained(ORGANISM, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((36, 32)).astype(np.float32)
    ours = generate(shipped, PROMPT, latents=noise).image
    image = theirs(
        prompt=PROMPT,
        height=48,
        width=48,
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=shipped.config.defaults.text_tokens,
        latents=torch.from_numpy(noise)[None],
        output_type="np",
    ).images[0]
    assert np.max(np.abs(ours.astype(int) - np.round(255 * image).astype(int))) <= 1


def test_the_defaults_are_the_ones_it_was_trained_for(shipped):
    defaults = shipped.config.defaults
    assert (defaults.height, defaults.width, defaults.text_tokens, defaults.steps) == (48, 48, 20, 4)
    assert defaults.guidance == 0 and not shipped.config.transformer.guidance


def test_the_shipped_tokenizers_are_those_of_the_vocabulary(shipped, tmp_path):
    made = make_tokenizers()
    made.clip.save_pretrained(tmp_path / "tokenizer")
    made.t5.save_pretrained(tmp_path / "tokenizer_2")
    for folder in ("tokenizer", "tokenizer_2"):
        again, kept = (json.loads((home / folder / "tokenizer.json").read_text()) for home in (tmp_path, ORGANISM))
        assert again["model"] == kept["model"]


def test_it_binds_colours_to_shapes_on_captions_it_has_never_seen(shipped):
    """The card counts a thousand; of 96, fewer than 88 right would be a broken model, not bad luck."""
    asked = held_out(96, "two shapes")
    assert judge(asked, see(draw_images(shipped, asked, batch=32))).right.sum() >= 88


def test_it_takes_under_ten_megabytes():
    assert sum(path.stat().st_size for path in ORGANISM.rglob("*") if path.is_file()) < 10 * 10**6


def test_damaged_weights_are_refused_by_name(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ORGANISM, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(UserError) as caught:
        load_pipeline(copy)
    assert "transformer/diffusion_pytorch_model.safetensors differs; vae/config.json is missing" in str(caught.value)


def test_a_prompt_with_an_unknown_word_is_refused_by_name(shipped):
    with pytest.raises(UserError, match="lacks `elefant`; did you mean"):
        generate(shipped, "a red elefant")
