"""The kinds of pipelines that diffusers saves and that are known here: their folders, classes and names."""

from collections.abc import Mapping
from typing import Any

from converters import chroma_pipeline, klein, sd3_pipeline, zimage_pipeline
from converters.pipeline_kind import ModelTables, PipelineKind

CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""Part of a diffusers directory -> the classes it may have."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
"""Folders of the tokenizers."""
RELEASES = "huggingface.co/black-forest-labs/FLUX.1-schnell"
"""Where all parts of a pipeline are."""


FOLDERS = {"transformer": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "vae": "vae"}
"""Part of a pipeline of FLUX.1 -> the folder that holds its weights."""
FLUX1 = PipelineKind(
    "FluxPipeline",
    FOLDERS,
    CLASSES,
    TOKENIZERS,
    f"{RELEASES} or FLUX.1-dev",
    "FLUX.1",
    "FLUX.1-schnell, FLUX.1-dev",
)
KLEIN = PipelineKind(
    "Flux2KleinPipeline",
    klein.FOLDERS,
    klein.CLASSES,
    klein.TOKENIZERS,
    "huggingface.co/black-forest-labs/FLUX.2-klein-4B",
    "FLUX.2-klein",
    "FLUX.2-klein",
)
SD3 = PipelineKind(
    "StableDiffusion3Pipeline",
    sd3_pipeline.FOLDERS,
    sd3_pipeline.CLASSES,
    sd3_pipeline.TOKENIZERS,
    "huggingface.co/stabilityai/stable-diffusion-3.5-medium",
    "Stable Diffusion 3",
    "SD3-medium, SD3.5",
    sd3_pipeline.OPTIONAL,
)
KINDS = {kind.name: kind for kind in (FLUX1, KLEIN, SD3, chroma_pipeline.KIND, zimage_pipeline.KIND)}
"""Class of a pipeline -> what is known of it."""
TRANSFORMERS = tuple(name for kind in KINDS.values() for name in kind.classes["transformer"])
"""Classes of transformers."""
TABLED = {kind.tables.shape: kind for kind in KINDS.values() if kind.tables is not None}
"""Class of a transformer's shape -> its kind, for those with `PipelineKind.tables`."""
LORA_TABLES = {
    part: rules for kind in TABLED.values() if kind.tables for part, rules in kind.tables.lora_tables.items()
}
"""Class of a part of these -> the tables that modules of LoRAs are looked up in."""


def tables_of(shape: Any) -> ModelTables | None:
    """Returns how pipelines of a kind with `PipelineKind.tables` are read; None for other kinds.

    Args:
        shape: of its transformer.
    """
    kind = TABLED.get(type(shape))
    return None if kind is None else kind.tables
