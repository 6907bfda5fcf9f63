"""The configurations of a diffusers pipeline: what its `model_index.json` and the `config.json` of its parts say.

1. `model_index.json` must name a `FluxPipeline` and the classes of its parts, and the parts must be there; a base,
   which completes a transformer, needs the other parts alone.
2. Every part's configuration is read by its allow-list; the problems of all are reported together.
3. The parts must fit one another.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.allow_list import AllowList, read_attributes
from converters.autoencoder import autoencoder_config_from_diffusers
from converters.flux import flux_config_from_diffusers
from converters.text_encoders import clip_config_from_transformers, t5_config_from_transformers
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import AutoencoderConfig
from difffract_jax.models.clip import CLIPConfig
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.pipeline import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.t5 import T5Config

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

_SCHEDULER = AllowList(
    component="scheduler",
    read={
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "num_train_timesteps": 1000,
    },
    fixed={
        "_class_name": ("FlowMatchEulerDiscreteScheduler",),
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "stochastic_sampling": (False,),
        "time_shift_type": ("exponential",),
        "use_beta_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_karras_sigmas": (False,),
    },
    inert=frozenset(("_diffusers_version",)),
)


def is_diffusers_directory(path: Path) -> bool:
    """Says whether a path is a pipeline saved by diffusers."""
    return (path / "model_index.json").is_file()


def check_architecture(home: Path) -> None:
    """Refuses what is not a FLUX.1 pipeline of diffusers, or lacks some of its parts."""
    index = read_json(home / "model_index.json", "a diffusers pipeline directory")
    name = index.get("_class_name")
    if name != "FluxPipeline":
        raise UserError(f"{home} is a {name}, but only FluxPipeline (FLUX.1-schnell, FLUX.1-dev) can be converted.")
    unnamed = [part for part in CLASSES if _class_named(index, part) is None]
    lacking = [part for part in (*CLASSES, *TOKENIZERS) if part in unnamed or not (home / part).is_dir()]
    if lacking == ["transformer"]:
        raise UserError(
            f"{home} lacks the transformer; give its file or folder instead, and this directory with --base."
        )
    if lacking:
        raise UserError(
            f"{home} lacks {', '.join(lacking)}; copy these folders, and their lines of model_index.json, from the "
            f"release that it was made from ({RELEASES} or FLUX.1-dev), or give that release too, with --base."
        )
    _check_classes(home, index, tuple(CLASSES))


def _class_named(index: Mapping[str, Any], part: str) -> str | None:
    """Returns the class of a part, as in ["diffusers", "AutoencoderKL"]; None where there is none."""
    entry = index.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None


def _check_classes(home: Path, index: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    classes = {part: _class_named(index, part) for part in parts}
    wrong = [
        f"{part} is {name} instead of {' or '.join(CLASSES[part])}"
        for part, name in classes.items()
        if name is not None and name not in CLASSES[part]
    ]
    if wrong:
        raise UserError(f"{home} is not a plain FLUX.1 pipeline: {'; '.join(wrong)}.")


def check_base(home: Path) -> None:
    """Refuses a directory that cannot complete a transformer: it needs all other parts, the scheduler excepted."""
    if not home.is_dir():
        raise UserError(f"The base {home} is not a directory; give a diffusers directory of FLUX.1.")
    needed = ("text_encoder", "text_encoder_2", "vae", *TOKENIZERS)
    lacking = [part for part in needed if not (home / part).is_dir()]
    if lacking:
        raise UserError(
            f"{home} lacks {', '.join(lacking)}, so that it cannot be a base; give a diffusers directory of FLUX.1, as "
            f"from {RELEASES}, which may lack the transformer."
        )
    if (home / "model_index.json").is_file():
        _check_classes(
            home, read_json(home / "model_index.json", "a pipeline"), ("text_encoder", "text_encoder_2", "vae")
        )


def pipeline_config(home: Path) -> PipelineConfig:
    """Reads the configurations of all parts of a diffusers directory and checks that they fit one another.

    Raises:
        UserError: with the problems of all of them.
    """
    transformer, t5, clip, vae, scheduler = read_configs(home, tuple(_CONFIGS))
    check_fit(f"The parts of {home}", transformer, t5, clip, vae)
    return PipelineConfig(transformer, t5, clip, vae, scheduler, defaults_of(home, transformer))


def read_configs(home: Path, parts: Sequence[str]) -> list[Any]:
    """Reads the configurations of the named folders; the problems of all are reported together."""
    configs: list[Any] = []
    problems: list[str] = []
    for folder in parts:
        file = "scheduler_config.json" if folder == "scheduler" else "config.json"
        try:
            configs.append(_CONFIGS[folder](read_json(home / folder / file, f"a {folder}")))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(" ".join(problems))
    return configs


def check_fit(what: str, transformer: FluxConfig, t5: T5Config, clip: CLIPConfig, vae: AutoencoderConfig) -> None:
    """Refuses parts of different widths; `what` says whose they are."""
    read, given = transformer.in_channels, transformer.out_channels
    if read != given:
        raise UserError(
            f"{what} hold a transformer that reads {read} channels and gives {given}, as FLUX.1-Fill, -Canny and "
            f"-Depth do, which read an image besides; take FLUX.1-schnell or FLUX.1-dev: {RELEASES}."
        )
    misfits = [
        f"{width} is {ours}, but {whose} is {theirs}"
        for width, ours, whose, theirs in (
            ("the transformer's joint_attention_dim", transformer.text_width, "T5's d_model", t5.d_model),
            ("the transformer's pooled_projection_dim", transformer.pooled_width, "CLIP's hidden_size", clip.d_model),
            ("the transformer's in_channels", transformer.in_channels, "4 latent channels", 4 * vae.latent_channels),
        )
        if ours != theirs
    ]
    if misfits:
        raise UserError(f"{what} do not fit one another: {'; '.join(misfits)}; take them from one release.")


def scheduler_config_from_diffusers(attributes: Mapping[str, object]) -> SchedulerConfig:
    """Reads the configuration of a `FlowMatchEulerDiscreteScheduler`."""
    read: dict[str, Any] = read_attributes(attributes, _SCHEDULER)
    return SchedulerConfig(**read)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object; says what it belongs to when it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a mark first
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so {path.parent} is not {what}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; download it again.")
    return content


_CONFIGS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "transformer": flux_config_from_diffusers,
    "text_encoder_2": t5_config_from_transformers,
    "text_encoder": clip_config_from_transformers,
    "vae": autoencoder_config_from_diffusers,
    "scheduler": scheduler_config_from_diffusers,
}
"""Folder -> what its configuration is read by."""


def defaults_of(home: Path, transformer: FluxConfig) -> GenerationDefaults:
    """Chooses what a run takes that names nothing else; no file of the pipeline says it outright.

    The autoencoder's `sample_size` is the side of its training images; schnell is distilled to 4 steps and 256 text
    tokens, dev to a guidance scale of 3.5 and used with 28 steps and 512 tokens.
    """
    size = read_json(home / "vae" / "config.json", "an autoencoder").get("sample_size")
    size = size if isinstance(size, int) else 1024
    tokenizer = home / "tokenizer_2" / "tokenizer_config.json"
    longest = read_json(tokenizer, "a tokenizer").get("model_max_length") if tokenizer.is_file() else None
    tokens, steps, guidance = (512, 28, 3.5) if transformer.guidance else (256, 4, 0.0)
    if isinstance(longest, int | float):  # transformers writes 1e30 for no limit
        tokens = int(min(longest, tokens))
    return GenerationDefaults(height=size, width=size, text_tokens=tokens, steps=steps, guidance=guidance)


def rope_axes_beside(path: Path) -> tuple[int, ...] | None:
    """Reads the axes of position off the configuration beside a transformer's weights, if there is one.

    Args:
        path: file of the weights, or their directory.
    """
    file = (path.parent if path.is_file() else path) / "config.json"
    attributes = read_json(file, "a transformer") if file.is_file() else {}
    return flux_config_from_diffusers(attributes).rope_axes if "_class_name" in attributes else None


def scheduler_of(homes: Sequence[Path], transformer: FluxConfig) -> SchedulerConfig:
    """Reads the scheduler of the first directory that has one; else that of the release with such a transformer."""
    for home in homes:
        if (home / "scheduler").is_dir():
            return read_configs(home, ("scheduler",))[0]
    return SchedulerConfig(shift=3.0, use_dynamic_shifting=True) if transformer.guidance else SchedulerConfig()
