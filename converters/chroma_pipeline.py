"""Chroma as a diffusers directory (`ChromaPipeline`): its folders, and the configuration of all."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.autoencoder import autoencoder_config_from_diffusers
from converters.chroma import CLASS, chroma_config_from_diffusers
from converters.schedules import CLASS as SCHEDULER_CLASS
from converters.schedules import scheduler_config_from_diffusers
from converters.text_encoders import t5_config_from_transformers
from difffract_jax.config import UserError
from difffract_jax.models.chroma_text import ChromaT5Config
from difffract_jax.models.presets import CHROMA_RUN
from difffract_jax.models.qwen3 import NoPooledConfig
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.sampler import ChromaSchedulerConfig

FOLDERS: Mapping[str, str] = {"transformer": "transformer", "t5": "text_encoder", "vae": "vae"}
"""Part of a pipeline -> the folder that holds its weights."""
CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": (CLASS,),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("T5EncoderModel",),
    "scheduler": (SCHEDULER_CLASS,),
}
"""Folder -> the classes it may have."""
TOKENIZERS = ("tokenizer",)


def _t5(attributes: Mapping[str, object]) -> ChromaT5Config:
    """Reads the configuration of T5, and which token fills prompts up."""
    padding = attributes.get("pad_token_id", 0)
    if type(padding) is not int or padding < 0:
        raise UserError(f"The T5 text encoder has pad_token_id={padding!r}, but a whole number is needed.")
    return ChromaT5Config(**vars(t5_config_from_transformers(attributes)), padding_id=padding)


READERS = {
    "transformer": chroma_config_from_diffusers,
    "text_encoder": _t5,
    "vae": autoencoder_config_from_diffusers,
    "scheduler": scheduler_config_from_diffusers,
}
"""Folder -> what its configuration is read by."""


def chroma_config(whose: str, configs: list[Any], index_of_vae: Mapping[str, Any]) -> PipelineConfig:
    """Puts the configurations of a pipeline's parts together.

    Args:
        whose: the parts, for messages.
        configs: of the folders of `READERS`, in order.
        index_of_vae: the contents of the autoencoder's `config.json`, which tells the side of its training images.

    Raises:
        UserError: if the parts do not fit one another.
    """
    transformer, t5, vae, scheduler = configs
    misfits = [
        f"{width} is {ours}, but {whose} is {theirs}"
        for width, ours, whose, theirs in (
            ("the transformer's in_channels", transformer.in_channels, "its out_channels", transformer.out_channels),
            ("the transformer's joint_attention_dim", transformer.text_width, "T5's d_model", t5.d_model),
            ("the transformer's in_channels", transformer.in_channels, "4 latent channels", 4 * vae.latent_channels),
        )
        if ours != theirs
    ]
    if misfits:
        raise UserError(f"{whose} do not fit one another: {'; '.join(misfits)}; take them from one release.")
    size = index_of_vae.get("sample_size")
    side = size if isinstance(size, int) else CHROMA_RUN.height
    run = replace(CHROMA_RUN, height=side, width=side)
    schedule = ChromaSchedulerConfig(**vars(scheduler))
    return PipelineConfig(transformer, t5, NoPooledConfig(), vae, schedule, run)
