"""Z-Image as a diffusers directory (`ZImagePipeline`): its folders, the configuration of all, and how each is read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.autoencoder import autoencoder_config_from_diffusers
from converters.described import SCHEDULER, qwen3_described
from converters.klein import padding_id
from converters.pipeline_kind import ModelTables, PipelineKind
from converters.qwen3 import QWEN3_TRANSFORMERS, behind_last, qwen3_config_from_transformers
from converters.schedules import CLASS as SCHEDULER_CLASS
from converters.schedules import scheduler_config_from_diffusers
from converters.torch_zimage import CHECK
from converters.zimage import (
    CLASS,
    ZIMAGE_DIFFUSERS,
    ZIMAGE_ORIGINAL,
    zimage_config_from_diffusers,
    zimage_config_to_diffusers,
)
from difffract_jax.config import UserError
from difffract_jax.models.absent import AbsentConfig
from difffract_jax.models.presets import ZIMAGE_RUN
from difffract_jax.models.qwen3 import NoPooledConfig
from difffract_jax.models.runs import PipelineConfig, smallest_side
from difffract_jax.models.sampler import PATCH
from difffract_jax.models.zimage import ZImageMMDiT
from difffract_jax.models.zimage_blocks import ZImageConfig
from difffract_jax.models.zimage_text import ZImageQwen3Config

HEADLESS = "Qwen3Model"
"""The class that the release's `model_index.json` names; its files may have the head, too."""


def _qwen3(attributes: Mapping[str, object]) -> ZImageQwen3Config:
    """Reads the configuration of Qwen3; the token that fills prompts up is the tokenizer's."""
    read = qwen3_config_from_transformers(attributes, before_last=True)
    return ZImageQwen3Config(**{name: value for name, value in vars(read).items() if name != "family"})


READERS = {
    "transformer": zimage_config_from_diffusers,
    "text_encoder": _qwen3,
    "vae": autoencoder_config_from_diffusers,
    "scheduler": scheduler_config_from_diffusers,
}
"""Folder -> what its configuration is read by."""


def zimage_config(whose: str, home: Path, configs: list[Any], index_of_vae: Mapping[str, Any]) -> PipelineConfig:
    """Puts the configurations of a directory together.

    Args:
        whose: the parts, for messages.
        home: the directory.
        configs: of the folders of `READERS`, in order.
        index_of_vae: the contents of the autoencoder's `config.json`, which tells the side of its training images: the
            default one of a run, or the next that the model can have.

    Raises:
        UserError: if the parts do not fit one another.
    """
    transformer, encoder, vae, scheduler = configs
    misfits = [
        f"{width} is {ours}, but {other} is {theirs}"
        for width, ours, other, theirs in (
            ("the transformer's cap_feat_dim", transformer.text_width - 1, "Qwen3's hidden_size", encoder.d_model - 1),
            ("the transformer's in_channels", transformer.in_channels // 4, "latent_channels", vae.latent_channels),
        )
        if ours != theirs
    ]
    if misfits:
        raise UserError(f"{whose} do not fit one another: {'; '.join(misfits)}; take them from one release.")
    if not isinstance(encoder, AbsentConfig):
        encoder = replace(encoder, padding_id=padding_id(home / "tokenizer"))
    size = index_of_vae.get("sample_size")
    unit = smallest_side(transformer.image_unit) * PATCH * vae.factor
    side = -(-(size if isinstance(size, int) else ZIMAGE_RUN.height) // unit) * unit
    run = replace(ZIMAGE_RUN, height=side, width=side)
    return PipelineConfig(transformer, encoder, NoPooledConfig(), vae, scheduler, run)


def _described(config: PipelineConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the `config.json` of the transformer, and that of Qwen3."""
    shape = config.transformer
    assert isinstance(shape, ZImageConfig)
    return zimage_config_to_diffusers(shape), qwen3_described(config.t5)


KIND = PipelineKind(
    "ZImagePipeline",
    {"transformer": "transformer", "t5": "text_encoder", "vae": "vae"},
    {
        "transformer": (CLASS,),
        "vae": ("AutoencoderKL",),
        "text_encoder": (HEADLESS, "Qwen3ForCausalLM"),
        "scheduler": (SCHEDULER_CLASS,),
    },
    ("tokenizer",),
    "huggingface.co/Tongyi-MAI/Z-Image-Turbo",
    "Z-Image",
    "Z-Image-Turbo",
    tables=ModelTables(
        readers=READERS,
        config=zimage_config,
        shape=ZImageConfig,
        module=ZImageMMDiT,
        rules=ZIMAGE_DIFFUSERS,
        encoder=lambda encoder: (QWEN3_TRANSFORMERS, behind_last(encoder)),
        lora_tables={ZImageMMDiT: (ZIMAGE_DIFFUSERS, ZIMAGE_ORIGINAL)},
        index={
            "_class_name": "ZImagePipeline",
            "scheduler": SCHEDULER,
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", CLASS],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        described=_described,
        anchor=r"layers\.0\.adaLN_modulation\.0",
        names=r"(layers|(noise|context)_refiner)[._]\d+[._](attention[._](to_[qkv]|out|qkv)|adaLN_modulation[._]0)\b",
        check=CHECK,
    ),
)
"""What diffusers calls it, and how it is read."""
