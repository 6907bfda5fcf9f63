"""The kinds of pipelines that diffusers saves and that are known here: their folders, classes and names."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from converters import chroma_pipeline, klein, sd3_pipeline

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


class PipelineKind(NamedTuple):
    """A kind of pipeline that diffusers saves.

    Attributes:
        name: its class.
        folders: part of a pipeline -> the folder that holds its weights.
        classes: folder -> the classes it may have.
        tokenizers: folders of the tokenizers.
        releases: where all its parts are.
        models: what it is called in messages.
        optional: folders that it may lack.
    """

    name: str
    folders: Mapping[str, str]
    classes: Mapping[str, tuple[str, ...]]
    tokenizers: tuple[str, ...]
    releases: str
    models: str
    optional: tuple[str, ...] = ()

    def folders_in(self, home: Path) -> dict[str, str]:
        """Returns part -> folder, without those that a directory may lack and does, and without incomplete encoders."""
        there = {part: one for part, one in self.folders.items() if one not in self.optional or (home / one).is_dir()}
        lacking = self.lacks_encoders(home)
        return {part: one for part, one in there.items() if not (lacking and one in self.encoders)}

    @property
    def encoders(self) -> tuple[str, ...]:
        """Folders of the text encoders."""
        return tuple(folder for folder in self.classes if folder.startswith("text_encoder"))

    def lacks_encoders(self, home: Path) -> bool:
        """Says whether a directory lacks a text encoder that it must have to read prompts."""
        return not all((home / one).is_dir() for one in self.encoders if one not in self.optional)


FOLDERS = {"transformer": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "vae": "vae"}
"""Part of a pipeline of FLUX.1 -> the folder that holds its weights."""
FLUX1 = PipelineKind("FluxPipeline", FOLDERS, CLASSES, TOKENIZERS, f"{RELEASES} or FLUX.1-dev", "FLUX.1")
KLEIN = PipelineKind(
    "Flux2KleinPipeline",
    klein.FOLDERS,
    klein.CLASSES,
    klein.TOKENIZERS,
    "huggingface.co/black-forest-labs/FLUX.2-klein-4B",
    "FLUX.2-klein",
)
SD3 = PipelineKind(
    "StableDiffusion3Pipeline",
    sd3_pipeline.FOLDERS,
    sd3_pipeline.CLASSES,
    sd3_pipeline.TOKENIZERS,
    "huggingface.co/stabilityai/stable-diffusion-3.5-medium",
    "Stable Diffusion 3",
    sd3_pipeline.OPTIONAL,
)
CHROMA = PipelineKind(
    "ChromaPipeline",
    chroma_pipeline.FOLDERS,
    chroma_pipeline.CLASSES,
    chroma_pipeline.TOKENIZERS,
    "huggingface.co/lodestones/Chroma1-HD",
    "Chroma",
)
KINDS = {kind.name: kind for kind in (FLUX1, KLEIN, SD3, CHROMA)}
"""Class of a pipeline -> what is known of it."""
TRANSFORMERS = tuple(name for kind in KINDS.values() for name in kind.classes["transformer"])
"""Classes of transformers."""
