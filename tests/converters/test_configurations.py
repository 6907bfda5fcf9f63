"""Configurations of a pipeline's parts, those aside that `test_pipelines.py` reads with the weights."""

import json
import shutil

import pytest

from converters.configurations import (
    check_architecture,
    pipeline_config,
    rope_axes_beside,
    scheduler_config_from_diffusers,
    scheduler_of,
)
from difffract_jax.config import UserError
from difffract_jax.models.presets import PRESETS
from tolerances import REFERENCE

PIPELINE = REFERENCE / "pipeline"


def test_the_scheduler_s_configuration_is_read():
    config = scheduler_config_from_diffusers({"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.2})
    assert (config.shift, config.use_dynamic_shifting, config.max_shift) == (3.0, True, 1.2)
    with pytest.raises(UserError, match="time_shift_type='linear'"):
        scheduler_config_from_diffusers({"time_shift_type": "linear"})
    with pytest.raises(UserError, match="use_beta_sigmas='yes'"):
        scheduler_config_from_diffusers({"use_beta_sigmas": "yes"})


def test_levels_are_respaced_in_one_way_alone():
    assert scheduler_config_from_diffusers({"use_karras_sigmas": True}).use_karras_sigmas
    with pytest.raises(UserError, match="has use_beta_sigmas and use_karras_sigmas, of which one alone can be true"):
        scheduler_config_from_diffusers({"use_beta_sigmas": True, "use_karras_sigmas": True})


@pytest.mark.parametrize("entry", ["AutoencoderKL", {"class": "AutoencoderKL"}, [], [None, None]])
def test_an_index_that_names_no_class_of_a_part_is_one_sentence(tmp_path, entry):
    shutil.copytree(PIPELINE, tmp_path / "pipeline", copy_function=shutil.copyfile)
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": entry}))
    with pytest.raises(UserError, match="lacks vae; copy these folders, and their lines of model_index.json"):
        check_architecture(tmp_path / "pipeline")


def test_where_there_is_no_scheduler_it_is_that_of_the_release(tmp_path):
    dev, schnell = (scheduler_of((tmp_path,), PRESETS[f"flux-{name}"]) for name in ("dev", "schnell"))
    assert (dev.shift, dev.use_dynamic_shifting, dev.base_shift, dev.max_shift) == (3.0, True, 0.5, 1.15)
    assert (schnell.shift, schnell.use_dynamic_shifting) == (1.0, False)
    shutil.copytree(PIPELINE / "scheduler", tmp_path / "scheduler")
    assert scheduler_of((tmp_path,), PRESETS["flux-dev"]) == pipeline_config(PIPELINE).scheduler


@pytest.mark.parametrize("longest", [None, 1e30, 16])
def test_a_tokenizer_may_name_no_longest_prompt(tmp_path, longest):
    shutil.copytree(PIPELINE, tmp_path / "pipeline", copy_function=shutil.copyfile)
    named = tmp_path / "pipeline" / "tokenizer_2" / "tokenizer_config.json"
    named.write_text(json.dumps({"model_max_length": longest}))
    assert pipeline_config(tmp_path / "pipeline").defaults.text_tokens == (longest if longest == 16 else 256)
    named.unlink()
    assert pipeline_config(tmp_path / "pipeline").defaults.text_tokens == 256


def test_axes_are_read_beside_the_weights_if_a_transformer_s_configuration_lies_there(tmp_path):
    for weights in ("transformer", "transformer/diffusion_pytorch_model.safetensors"):
        assert rope_axes_beside(PIPELINE / weights) == (4, 6, 6)
    assert rope_axes_beside(tmp_path) is None
    (tmp_path / "config.json").write_text('{"format_version": 1}')
    assert rope_axes_beside(tmp_path) is None
