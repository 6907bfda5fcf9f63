"""Pipelines written for diffusers: its classes load them, and every tensor is the one that was converted."""

import json
import warnings

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from safetensors.numpy import load_file
from transformers import CLIPTextModel, T5EncoderModel
from zimage import tiny_pipeline as tiny_zimage

from chroma import tiny_pipeline as tiny_chroma
from converters.export import export_pipeline
from converters.pipelines import convert_pipeline
from difffract_jax.storage import shards
from klein import tiny_pipeline as tiny_klein
from sd3 import tiny_pipeline as tiny_sd3
from tolerances import REFERENCE, TOL, relative_error

PIPELINE = REFERENCE / "pipeline"


@pytest.fixture(scope="module")
def pipe():
    return convert_pipeline(PIPELINE)


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    export_pipeline(pipe, out)
    return out


def test_every_tensor_comes_back_identical(exported):
    for path in PIPELINE.glob("*/*.safetensors"):
        ours, theirs = load_file(exported / path.relative_to(PIPELINE)), load_file(path)
        # The embedding may be stored twice by transformers; once is enough to load.
        assert theirs.keys() - ours.keys() <= {"encoder.embed_tokens.weight"}
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_a_configuration_says_what_the_original_said(exported):
    for path in PIPELINE.glob("*/*config.json"):
        if "tokenizer" not in path.parent.name:
            ours, theirs = json.loads((exported / path.relative_to(PIPELINE)).read_text()), json.loads(path.read_text())
            written = {key: value for key, value in ours.items() if key != "out_channels" or value != 16}
            assert {key: theirs[key] for key in written} == written


def test_the_libraries_load_what_is_written(exported):
    assert FluxTransformer2DModel.from_pretrained(exported / "transformer").config.num_layers == 3
    assert AutoencoderKL.from_pretrained(exported / "vae").config.scaling_factor == 0.3611
    assert T5EncoderModel.from_pretrained(exported / "text_encoder_2").config.d_model == 32
    assert CLIPTextModel.from_pretrained(exported / "text_encoder").config.hidden_size == 24
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(exported / "scheduler").config.shift == 1.0


def test_converting_what_was_exported_is_the_identity_also_in_shards(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10**5)
    export_pipeline(pipe, tmp_path / "out")
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1
    again = convert_pipeline(tmp_path / "out")
    assert again.config == pipe.config
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again[:4]), jax.tree.leaves(pipe[:4]), strict=True))


def equal(ours, theirs):
    """Two pipelines have one configuration and the same weights, bit for bit."""
    assert ours.config == theirs.config
    pairs = zip(jax.tree.leaves(ours[:4]), jax.tree.leaves(theirs[:4]), strict=True)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def stored(folder):
    """Every tensor of a directory by its folder and key."""
    files = folder.glob("*/*.safetensors")
    return {f"{path.parent.name}/{key}": one for path in files for key, one in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("t5", [True, False])
def test_sd3_comes_back_bit_for_bit_and_diffusers_loads_it(tmp_path, t5):
    theirs = tiny_sd3("sd3.5-medium" if t5 else "sd3-medium", t5=t5)
    theirs.save_pretrained(tmp_path / "diffusers")
    pipe = convert_pipeline(tmp_path / "diffusers")
    export_pipeline(pipe, tmp_path / "out")
    equal(convert_pipeline(tmp_path / "out"), pipe)
    made, given = stored(tmp_path / "out"), stored(tmp_path / "diffusers")
    # transformers may write T5's embedding twice; once is enough to load.
    assert given.keys() - made.keys() <= {"text_encoder_3/encoder.embed_tokens.weight"} and made.keys() <= given.keys()
    assert all(np.array_equal(made[key], given[key]) for key in made)
    # As its own directories without T5: diffusers wants to be told.
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **absent)
    assert (again.text_encoder_3 is None) == (again.tokenizer_3 is None) == (not t5)
    options = {"prompt_2": None, "prompt_3": None, "max_sequence_length": 8, "do_classifier_free_guidance": False}
    with torch.no_grad():
        texts = [one.encode_prompt("a red fox", **options) for one in (theirs, again)]
    for number in (0, 2):  # the text and the pooled embedding; how memory is aligned changes PyTorch's last bits
        assert relative_error(texts[1][number].numpy(), texts[0][number].numpy()) <= TOL.f32_block


@pytest.mark.parametrize("distilled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_klein_comes_back_bit_for_bit_and_diffusers_loads_it(tmp_path, distilled):
    theirs = tiny_klein(distilled)
    theirs.save_pretrained(tmp_path / "diffusers")
    pipe = convert_pipeline(tmp_path / "diffusers")
    export_pipeline(pipe, tmp_path / "out")
    equal(convert_pipeline(tmp_path / "out"), pipe)
    made, given = stored(tmp_path / "out"), stored(tmp_path / "diffusers")
    behind = ("text_encoder/model.layers.27.", "text_encoder/model.layers.28.", "text_encoder/model.norm.")
    read = {key for key in given if not key.startswith(behind)}
    assert read <= made.keys() and all(np.array_equal(made[key], given[key]) for key in read)
    assert made.keys() - given.keys() == set()
    again = Flux2KleinPipeline.from_pretrained(tmp_path / "out")
    assert again.config.is_distilled is distilled and again.text_encoder.config.num_hidden_layers == 28
    with torch.no_grad():
        texts = [one.encode_prompt("a red fox", max_sequence_length=40)[0] for one in (theirs, again)]
    assert relative_error(texts[1].numpy(), texts[0].numpy()) <= TOL.f32_block


@pytest.mark.parametrize("headed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_zimage_comes_back_but_for_the_layer_that_is_not_read_and_diffusers_loads_it(tmp_path, headed):
    tiny_zimage(headed).save_pretrained(tmp_path / "diffusers")
    pipe = convert_pipeline(tmp_path / "diffusers")
    export_pipeline(pipe, tmp_path / "out")
    equal(convert_pipeline(tmp_path / "out"), pipe)
    made, given = stored(tmp_path / "out"), stored(tmp_path / "diffusers")
    encoder = "text_encoder/"
    if not headed:
        given = {key.replace(encoder, f"{encoder}model."): tensor for key, tensor in given.items()}
    behind = (f"{encoder}model.layers.2.", f"{encoder}model.norm.")
    read = {key for key in given if not key.startswith(behind)}
    assert made.keys() == given.keys() and all(np.array_equal(made[key], given[key]) for key in read)
    theirs, again = (ZImagePipeline.from_pretrained(tmp_path / name) for name in ("diffusers", "out"))
    options = {"do_classifier_free_guidance": False, "max_sequence_length": 40}
    with torch.no_grad():
        texts = [one.encode_prompt("a red fox", **options)[0][0] for one in (theirs, again)]
    assert relative_error(texts[1].numpy(), texts[0].numpy()) <= TOL.f32_block


def test_chroma_comes_back_bit_for_bit_and_diffusers_loads_it(tmp_path):
    tiny_chroma(use_beta_sigmas=True).save_pretrained(tmp_path / "diffusers")
    pipe = convert_pipeline(tmp_path / "diffusers")
    export_pipeline(pipe, tmp_path / "out")
    equal(convert_pipeline(tmp_path / "out"), pipe)
    made, given = stored(tmp_path / "out"), stored(tmp_path / "diffusers")
    # transformers may write T5's embedding twice; once is enough to load.
    assert given.keys() - made.keys() <= {"text_encoder/encoder.embed_tokens.weight"} and made.keys() <= given.keys()
    assert all(np.array_equal(made[key], given[key]) for key in made)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        theirs, again = (ChromaPipeline.from_pretrained(tmp_path / name) for name in ("diffusers", "out"))
    assert again.scheduler.config.use_beta_sigmas and again.scheduler.config.shift == theirs.scheduler.config.shift
    with torch.no_grad():
        texts = [
            one.encode_prompt("a red fox", max_sequence_length=20, do_classifier_free_guidance=False)
            for one in (theirs, again)
        ]
    assert relative_error(texts[1][0].numpy(), texts[0][0].numpy()) <= TOL.f32_block
    assert torch.equal(texts[1][2], texts[0][2]), "padding is the same"
