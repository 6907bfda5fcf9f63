"""Stable Diffusion 3 as a diffusers directory (`StableDiffusion3Pipeline`): its folders, and the configuration of all.

1. `sd3_config` puts the parts' configurations together and checks that they fit one another.
2. T5 may be missing, with its tokenizer: zeros stand for its states then, as in diffusers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.autoencoder import autoencoder_config_from_diffusers
from converters.sd3 import CLASS, sd3_config_from_diffusers
from converters.text_encoders import clip_config_from_transformers, t5_config_from_transformers
from difffract_jax.config import UserError
from difffract_jax.models.absent import AbsentConfig
from difffract_jax.models.clip import CLIPConfig
from difffract_jax.models.presets import sd3_run
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.sampler import PATCH, Sd3SchedulerConfig
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.models.sd3_text import SD3_CLIPS, NoTextConfig, TwoClipsConfig

FOLDERS: Mapping[str, str] = {
    "transformer": "transformer",
    "t5": "text_encoder_3",
    "clip": "text_encoder",
    "clip_2": "text_encoder_2",
    "vae": "vae",
}
"""Part of a pipeline -> the folder that holds its weights; both CLIPs are one part."""
CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": (CLASS,),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""Folder -> the classes it may have."""
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
OPTIONAL = ("text_encoder_3", "tokenizer_3")
"""Folders that a directory may lack."""


def projected_clip(attributes: Mapping[str, object]) -> tuple[CLIPConfig, int]:
    """Reads the configuration of a `CLIPTextModelWithProjection`.

    Args:
        attributes: the contents of its `config.json`.

    Returns:
        The shape of the text encoder, and channels of the projected vector.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    width = attributes.get("projection_dim", 512)
    if type(width) is not int or width < 1:
        raise UserError(f"The CLIP text encoder has projection_dim={width!r}, but a whole number is needed.")
    return clip_config_from_transformers(attributes), width


READERS = {
    "transformer": sd3_config_from_diffusers,
    "text_encoder": projected_clip,
    "text_encoder_2": projected_clip,
    "text_encoder_3": t5_config_from_transformers,
    "vae": autoencoder_config_from_diffusers,
}
"""Folder -> what its configuration is read by, beside the scheduler's."""


def sd3_config(what: str, configs: Mapping[str, Any], size: Any) -> PipelineConfig:
    """Puts the configurations of the parts together.

    Args:
        what: whose parts they are, for messages.
        configs: folder -> what was read there; of `text_encoder_3` nothing where it is missing, of all text encoders
            nothing where a CLIP is.
        size: side of the training images, in latents; 128 if it is no whole number.

    Raises:
        UserError: if the parts do not fit one another.
    """
    transformer, vae = configs["transformer"], configs["vae"]
    clips, t5, states = _encoders(transformer, configs)
    read, given = transformer.in_channels, transformer.out_channels
    misfits = [
        f"{width} is {ours}, but {whose} is {theirs}"
        for width, ours, whose, theirs in (
            ("the transformer's in_channels", read, "its out_channels", given),
            ("the transformer's joint_attention_dim", transformer.text_width, "T5's d_model", t5.d_model),
            ("the transformer's pooled_projection_dim", transformer.pooled_width, "both CLIPs'", clips.d_model),
            ("the transformer's in_channels", read, "4 latent channels", 4 * vae.latent_channels),
        )
        if ours != theirs
    ]
    if isinstance(clips, TwoClipsConfig):
        first, second = clips.first, clips.second
        if first.positions != second.positions:
            misfits.append(
                f"the first CLIP's max_position_embeddings is {first.positions}, but the second's is {second.positions}"
            )
        if first.d_model + second.d_model > transformer.text_width:
            misfits.append(f"both CLIPs are {first.d_model + second.d_model} wide, the text {transformer.text_width}")
    if misfits:
        raise UserError(f"{what} do not fit one another: {'; '.join(misfits)}; take them from one release.")
    side = (size if isinstance(size, int) else 128) // PATCH * PATCH * vae.factor
    run = sd3_run(transformer)
    tokens = states + run.text_tokens - SD3_CLIPS.states
    defaults = replace(run, height=side, width=side, text_tokens=tokens)
    return PipelineConfig(transformer, t5, clips, vae, Sd3SchedulerConfig(**vars(configs["scheduler"])), defaults)


def _encoders(transformer: Sd3Config, configs: Mapping[str, Any]) -> tuple[Any, Any, int]:
    """Returns the shapes of both CLIPs and of T5, and the text tokens that the CLIPs give."""
    if "text_encoder" not in configs:
        clips = AbsentConfig(d_model=transformer.pooled_width)
        return clips, AbsentConfig(d_model=transformer.text_width), SD3_CLIPS.states
    (first, width), (second, second_width) = configs["text_encoder"], configs["text_encoder_2"]
    clips = TwoClipsConfig(first=first, second=second, projections=(width, second_width))
    return clips, configs.get("text_encoder_3", NoTextConfig(d_model=transformer.text_width)), first.positions
