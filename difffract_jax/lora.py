"""LoRAs that are merged into a pipeline when it is loaded or converted.

1. `open_loras` reads files named as FILE or FILE:SCALE, here or on the hub, before any weight of the model is.
2. `check_loras` finds every change in the model's shapes, so that what does not fit is told before it is loaded, too.
3. `with_loras` merges them, wherever the weights lie, and gives the pipeline an identity of its own: a graph that was
   traced with a LoRA is told apart from one without, and knows the model that both have in common.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from converters.lora import Change, match
from converters.lora_files import Module, read_lora
from converters.merging import merge
from difffract_jax.config import UserError
from difffract_jax.directories import lora_file
from difffract_jax.estimate.weights import abstract_parts
from difffract_jax.graphs.loras import MergedLora, merged_identity
from difffract_jax.models.pipeline import Pipeline

PARTS = ("transformer", "clip", "t5")
"""Parts of a pipeline that a LoRA can change."""


class OpenedLora(NamedTuple):
    """A LoRA that was read.

    Attributes:
        info: what it is.
        modules: what its file says.
    """

    info: MergedLora
    modules: tuple[Module, ...]


def parse_lora(text: str) -> tuple[str, float]:
    """Reads FILE or FILE:SCALE.

    Args:
        text: as on the command line.

    Returns:
        The file, and the scale: 1 if none is named.

    Raises:
        UserError: if the scale is not a finite number.

    Example:
        >>> parse_lora("style.safetensors:0.8"), parse_lora("hf:someone/style/style.safetensors")
        (('style.safetensors', 0.8), ('hf:someone/style/style.safetensors', 1.0))
    """
    file, colon, scale = text.rpartition(":")
    if not colon or file == "hf" or "/" in scale or scale.endswith(".safetensors"):
        return text, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"The scale of a LoRA is a number, as in {file}:0.8, but {text} ends in {scale!r}.")
    return file, number


def open_loras(loras: Sequence[str | Path]) -> list[OpenedLora]:
    """Reads LoRAs.

    Args:
        loras: each FILE or FILE:SCALE; a file is a `.safetensors` file, PEFT's directory, or one on the hub,
            hf:OWNER/NAME/FILE.

    Raises:
        UserError: if one is not there, or no LoRA; in one sentence.
    """
    opened = []
    for text in loras:
        name, scale = parse_lora(str(text))
        place = lora_file(name)
        modules = read_lora(place.path)
        file = place.path / "adapter_model.safetensors" if place.path.is_dir() else place.path
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        opened.append(OpenedLora(MergedLora(name=place.origin or file.name, sha256=digest, scale=scale), modules))
    return opened


def check_loras(opened: Sequence[OpenedLora], shapes: Mapping[str, Any]) -> dict[str, list[Change]]:
    """Finds what LoRAs change in a model.

    Args:
        opened: the LoRAs.
        shapes: part -> its shape, as in `PipelineConfig`; of a transformer alone, its own.

    Returns:
        Part -> its changes.

    Raises:
        UserError: if one is of another model.
    """
    abstract = abstract_parts({name: shapes[name] for name in PARTS if name in shapes}, "float32")
    changes: dict[str, list[Change]] = {}
    for lora in opened:
        for part, more in match(lora.info.name, lora.modules, lora.info.scale, abstract).items():
            changes.setdefault(part, []).extend(more)
    return changes


def with_loras(pipe: Pipeline, opened: Sequence[OpenedLora]) -> Pipeline:
    """Returns a pipeline with LoRAs merged into its weights.

    Args:
        pipe: freshly loaded; the parts that are changed must not be used any more.
        opened: the LoRAs; none returns the pipeline as it is.

    Raises:
        UserError: if one is of another model.
    """
    if not opened:
        return pipe
    changes = check_loras(opened, {name: getattr(pipe.config, name) for name in PARTS})
    merged = {part: merge(getattr(pipe, part), found) for part, found in changes.items()}
    infos = (*pipe.loras, *(lora.info for lora in opened))
    base = pipe.base or pipe.source
    return pipe._replace(**merged, source=merged_identity(base, infos), base=base, loras=infos)
