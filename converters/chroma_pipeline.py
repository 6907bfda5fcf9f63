"""Chroma as a diffusers directory (`ChromaPipeline`): its folders, the configuration of all, and how each is read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.autoencoder import autoencoder_config_from_diffusers
from converters.chroma import (
    CHROMA_DIFFUSERS,
    CHROMA_LAYOUTS,
    CHROMA_ORIGINAL,
    CLASS,
    NUMBER,
    NumberedSource,
    chroma_config_from_diffusers,
    chroma_config_from_shapes,
    chroma_config_to_diffusers,
)
from converters.described import SCHEDULER, t5_described
from converters.pipeline_kind import ModelTables, PipelineKind
from converters.schedules import CLASS as SCHEDULER_CLASS
from converters.schedules import scheduler_config_from_diffusers
from converters.text_encoders import T5_TRANSFORMERS, t5_config_from_transformers, t5_tables
from converters.torch_chroma import CHECK
from difffract_jax.config import UserError
from difffract_jax.models.chroma import ChromaConfig, ChromaMMDiT
from difffract_jax.models.chroma_text import ChromaT5Config, ChromaT5Encoder
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


def chroma_config(whose: str, home: Path, configs: list[Any], index_of_vae: Mapping[str, Any]) -> PipelineConfig:
    """Puts the configurations of a pipeline's parts together.

    Args:
        whose: the parts, for messages.
        home: directory of all parts but the transformer, which tells nothing more.
        configs: of the folders of `READERS`, in order.
        index_of_vae: the contents of the autoencoder's `config.json`, which tells the side of its training images.

    Raises:
        UserError: if the parts do not fit one another.
    """
    del home
    transformer, t5, vae, scheduler = configs
    misfits = [
        f"{width} is {ours}, but {other} is {theirs}"
        for width, ours, other, theirs in (
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


def _described(config: PipelineConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the `config.json` of the transformer, and that of T5."""
    shape, t5 = config.transformer, config.t5
    assert isinstance(shape, ChromaConfig) and isinstance(t5, ChromaT5Config)
    return chroma_config_to_diffusers(shape), t5_described(t5) | {"pad_token_id": t5.padding_id}


KIND = PipelineKind(
    "ChromaPipeline",
    FOLDERS,
    CLASSES,
    TOKENIZERS,
    "huggingface.co/lodestones/Chroma1-HD",
    "Chroma",
    "Chroma1-HD",
    tables=ModelTables(
        readers=READERS,
        config=chroma_config,
        shape=ChromaConfig,
        module=ChromaMMDiT,
        rules=CHROMA_DIFFUSERS,
        encoder=lambda t5: (t5_tables([] if t5.config.gated else ["shared.weight", ".DenseReluDense.wi."]).rules, {}),
        lora_tables={ChromaMMDiT: (CHROMA_DIFFUSERS, CHROMA_ORIGINAL), ChromaT5Encoder: (T5_TRANSFORMERS,)},
        index={
            "_class_name": "ChromaPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "scheduler": SCHEDULER,
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", CLASS],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        described=_described,
        anchor=r"distilled_guidance_layer\.in_proj",
        names="distilled_guidance_layer",
        check=CHECK,
        source=NumberedSource,
        added=NUMBER,
        layouts=CHROMA_LAYOUTS,
        sizes=chroma_config_from_shapes,
    ),
)
"""What diffusers calls it, and how it is read."""
