"""Configurations of a pipeline's parts, those aside that `test_pipelines.py` reads with the weights."""

import shutil

import pytest

from converters.configurations import (
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


def test_where_there_is_no_scheduler_it_is_that_of_the_release(tmp_path):
    dev, schnell = (scheduler_of((tmp_path,), PRESETS[f"flux-{name}"]) for name in ("dev", "schnell"))
    assert (dev.shift, dev.use_dynamic_shifting, dev.base_shift, dev.max_shift) == (3.0, True, 0.5, 1.15)
    assert (schnell.shift, schnell.use_dynamic_shifting) == (1.0, False)
    shutil.copytree(PIPELINE / "scheduler", tmp_path / "scheduler")
    assert scheduler_of((tmp_path,), PRESETS["flux-dev"]) == pipeline_config(PIPELINE).scheduler


def test_axes_are_read_beside_the_weights_if_a_transformer_s_configuration_lies_there(tmp_path):
    for weights in ("transformer", "transformer/diffusion_pytorch_model.safetensors"):
        assert rope_axes_beside(PIPELINE / weights) == (4, 6, 6)
    assert rope_axes_beside(tmp_path) is None
    (tmp_path / "config.json").write_text('{"format_version": 1}')
    assert rope_axes_beside(tmp_path) is None
