"""FLUX.2-klein as a diffusers directory (`Flux2KleinPipeline`): its folders, and the configuration of the whole.

1. `klein_config` reads the parts' configurations and checks that they fit one another. The token that fills prompts up
   is the tokenizer's, and the schedule is FLUX.2's whatever the scheduler's own shift.
2. Base models, which are not distilled, take guidance by two branches: two evaluations a step, with the prompt and with
   a negative one, the empty prompt if nothing else is said. `model_index.json` tells which of the two a directory is.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.autoencoder import autoencoder_config_from_diffusers
from converters.flux2 import flux2_config_from_diffusers
from converters.qwen3 import qwen3_config_from_transformers
from difffract_jax.config import UserError
from difffract_jax.models.absent import AbsentConfig
from difffract_jax.models.autoencoder import Flux2AutoencoderConfig
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.presets import KLEIN_BASE_RUN, KLEIN_RUN
from difffract_jax.models.qwen3 import NoPooledConfig, Qwen3Config
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.sampler import Flux2SchedulerConfig, SchedulerConfig
from difffract_jax.text_files import decoded

FOLDERS: Mapping[str, str] = {"transformer": "transformer", "t5": "text_encoder", "vae": "vae"}
"""Part of a pipeline -> the folder that holds its weights."""
CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("Flux2Transformer2DModel",),
    "vae": ("AutoencoderKLFlux2",),
    "text_encoder": ("Qwen3ForCausalLM",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""Folder -> the classes it may have."""
TOKENIZERS = ("tokenizer",)
READERS = {
    "transformer": flux2_config_from_diffusers,
    "text_encoder": qwen3_config_from_transformers,
    "vae": autoencoder_config_from_diffusers,
}
"""Folder -> what its configuration is read by, beside the scheduler's."""


def klein_config(
    home: Path,
    configs: list[Any],
    index: Mapping[str, Any],
    index_of_vae: Mapping[str, Any],
    what: str | None = None,
) -> PipelineConfig:
    """Puts the configurations of a directory together.

    Args:
        home: the directory.
        configs: of transformer, text encoder, `AbsentConfig` if there is none, autoencoder and scheduler.
        index: the contents of the directory's `model_index.json`, which tells whether the model is distilled.
        index_of_vae: the contents of the autoencoder's `config.json`, which tells the side of its training images.
        what: whose parts they are, for messages; the directory's if left out.

    Raises:
        UserError: if the parts do not fit one another.
    """
    transformer, encoder, vae, scheduler = configs
    _check_fit(what or f"The parts of {home}", transformer, encoder, vae)
    clip: Any = NoPooledConfig()
    if isinstance(encoder, AbsentConfig):
        clip = AbsentConfig(d_model=clip.d_model)
    else:
        encoder = Qwen3Config(**{**vars(encoder), "padding_id": padding_id(home / "tokenizer")})
    size = index_of_vae.get("sample_size")
    # As in diffusers, a directory that does not say is a base model.
    run = KLEIN_RUN if index.get("is_distilled", False) else KLEIN_BASE_RUN
    side = size if isinstance(size, int) else run.height
    defaults = replace(run, height=side, width=side)
    return PipelineConfig(transformer, encoder, clip, vae, klein_schedule(scheduler), defaults)


def klein_schedule(scheduler: SchedulerConfig) -> Flux2SchedulerConfig:
    """Returns a scheduler's configuration with FLUX.2's shift, as diffusers' pipeline sets it.

    Args:
        scheduler: as its own file has it.
    """
    return Flux2SchedulerConfig(**vars(scheduler))


def padding_id(home: Path) -> int:
    """Reads off a tokenizer's files which token fills prompts up.

    Args:
        home: directory of the tokenizer.

    Raises:
        UserError: if they do not say.
    """
    try:
        named = json.loads(decoded((home / "tokenizer_config.json").read_bytes()))["pad_token"]
        listed = json.loads(decoded((home / "tokenizer.json").read_bytes()))
        token = named["content"] if isinstance(named, dict) else str(named)
        added = {one["content"]: one["id"] for one in listed.get("added_tokens", [])}
        return int(added[token] if token in added else listed["model"]["vocab"][token])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"The tokenizer in {home} does not say which token fills prompts up (pad_token in tokenizer_config.json, "
            "and its number in tokenizer.json); copy it again from the pipeline."
        ) from None


def _check_fit(
    what: str, transformer: Flux2Config, encoder: Qwen3Config | AbsentConfig, vae: Flux2AutoencoderConfig
) -> None:
    states = 3 if isinstance(encoder, AbsentConfig) else len(encoder.read_layers)
    misfits = [
        f"{width} is {ours}, but {whose} is {theirs}"
        for width, ours, whose, theirs in (
            ("the transformer's in_channels", transformer.in_channels, "its out_channels", transformer.out_channels),
            (
                "the transformer's joint_attention_dim",
                transformer.text_width,
                f"{states} times Qwen3's hidden_size",
                encoder.d_model,
            ),
            ("the transformer's in_channels", transformer.in_channels, "4 latent channels", 4 * vae.latent_channels),
        )
        if ours != theirs
    ]
    if misfits:
        raise UserError(f"{what} do not fit one another: {'; '.join(misfits)}; take them from one release.")
