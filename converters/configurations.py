"""The configurations of a diffusers pipeline: what its `model_index.json` and the `config.json` of its parts say.

1. `model_index.json` must name a pipeline that is known (`kinds`) and the classes of its parts, and the parts must be
   there; a base, which completes a transformer, needs the other parts alone.
2. Every part's configuration is read by its allow-list; the problems of all are reported together.
3. The parts must fit one another.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import klein, sd3_pipeline
from converters.autoencoder import autoencoder_config_from_diffusers
from converters.flux import flux_config_from_diffusers
from converters.kinds import FLUX1, KINDS, KLEIN, RELEASES, SD3, TRANSFORMERS
from converters.pipeline_kind import PipelineKind
from converters.schedules import scheduler_config_from_diffusers
from converters.text_encoders import clip_config_from_transformers, t5_config_from_transformers
from difffract_jax.config import UserError, nearest
from difffract_jax.models.absent import AbsentConfig
from difffract_jax.models.autoencoder import AutoencoderConfig
from difffract_jax.models.chroma import ChromaConfig
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.runs import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.sd3 import Sd3Config


def is_diffusers_directory(path: Path) -> bool:
    """Says whether a path is a pipeline saved by diffusers."""
    return (path / "model_index.json").is_file()


def kind_of(home: Path) -> PipelineKind:
    """Returns which kind of pipeline a diffusers directory is.

    Args:
        home: the directory.

    Raises:
        UserError: if it is of another kind, with the one whose name is nearest.
    """
    if not is_diffusers_directory(home) and (home / "config.json").is_file():
        part = read_json(home / "config.json", "a part of a pipeline").get("_class_name")
        if part is not None and part not in TRANSFORMERS:
            raise UserError(
                f"{home} holds a {part}, but only the transformers {' and '.join(TRANSFORMERS)} can be converted"
                f"{nearest(str(part), TRANSFORMERS)}"
            )
    index = read_json(home / "model_index.json", "a diffusers pipeline directory")
    name = str(index.get("_class_name"))
    if name not in KINDS:
        *first, last = (f"{kind.name} ({kind.published})" for kind in KINDS.values())
        raise UserError(
            f"{home} is a {name}, but only {', '.join(first)} and {last} can be converted{nearest(name, tuple(KINDS))}"
        )
    return KINDS[name]


def check_architecture(home: Path, *, encoders: bool = True) -> PipelineKind:
    """Refuses what is not a pipeline of diffusers that is known, or lacks some of its parts; returns which it is.

    Args:
        home: the directory.
        encoders: whether the text encoders must be there, too.
    """
    kind = kind_of(home)
    index = read_json(home / "model_index.json", "a diffusers pipeline directory")
    spared = kind.optional if encoders else (*kind.optional, *kind.encoders)
    needed = [part for part in (*kind.classes, *kind.tokenizers) if part not in spared]
    unnamed = [part for part in kind.classes if _class_named(index, part) is None]
    lacking = [part for part in needed if part in unnamed or not (home / part).is_dir()]
    if lacking and not kind.completed:  # which no base completes
        raise UserError(
            f"{home} lacks {', '.join(lacking)}; copy these folders, and their lines of model_index.json, from the "
            f"release that it was made from ({kind.releases})."
        )
    if lacking == ["transformer"]:
        raise UserError(
            f"{home} lacks the transformer; give its file or folder instead, and this directory with --base."
        )
    if lacking:
        raise UserError(
            f"{home} lacks {', '.join(lacking)}; copy these folders, and their lines of model_index.json, from the "
            f"release that it was made from ({kind.releases}), or give that release too, with --base."
        )
    _check_classes(home, index, tuple(kind.classes), kind)
    return kind


def _class_named(index: Mapping[str, Any], part: str) -> str | None:
    """Returns the class of a part, as in ["diffusers", "AutoencoderKL"]; None where there is none."""
    entry = index.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None


def _check_classes(home: Path, index: Mapping[str, Any], parts: tuple[str, ...], kind: PipelineKind = FLUX1) -> None:
    classes = {part: _class_named(index, part) for part in parts}
    wrong = [
        f"{part} is {name} instead of {' or '.join(kind.classes[part])}"
        for part, name in classes.items()
        if name is not None and name not in kind.classes[part]
    ]
    if wrong:
        raise UserError(f"{home} is not a plain {kind.models} pipeline: {'; '.join(wrong)}.")


def check_base(home: Path) -> PipelineKind:
    """Refuses a directory that cannot complete a transformer: it needs all other parts but the scheduler.

    Args:
        home: the directory; one without a `model_index.json` counts as FLUX.1's.

    Returns:
        Which kind of pipeline it completes.
    """
    if not home.is_dir():
        raise UserError(
            f"The base {home} is not a directory; give a diffusers directory of FLUX.1, FLUX.2-klein, Stable "
            "Diffusion 3 or Chroma."
        )
    index = read_json(home / "model_index.json", "a pipeline") if is_diffusers_directory(home) else {}
    kind = KINDS.get(str(index.get("_class_name")), FLUX1)
    if not kind.completed:
        *first, last = (each.models for each in KINDS.values() if each.completed)
        raise UserError(
            f"The base {home} is a {kind.name}, but only transformers of {', '.join(first)} and {last} can be "
            "completed; give the whole directory as the model."
        )
    given = tuple(part for part in kind.classes if part not in ("transformer", "scheduler"))
    needed = [part for part in (*given, *kind.tokenizers) if part not in kind.optional]
    lacking = [part for part in needed if not (home / part).is_dir()]
    if lacking:
        raise UserError(
            f"{home} lacks {', '.join(lacking)}, so that it cannot be a base; give a diffusers directory of "
            f"{kind.models}, as from {kind.releases}, which may lack the transformer."
        )
    if index:
        _check_classes(home, index, given, kind)
    return kind


def pipeline_config(home: Path) -> PipelineConfig:
    """Reads the configurations of all parts of a diffusers directory and checks that they fit one another.

    Raises:
        UserError: with the problems of all of them.
    """
    if is_diffusers_directory(home) and kind_of(home) is KLEIN:
        lacking = KLEIN.lacks_encoders(home)
        parts = [part for part in (*klein.READERS, "scheduler") if not (lacking and part in KLEIN.encoders)]
        read = read_configs(home, parts, klein.READERS)
        if lacking:
            read.insert(1, AbsentConfig(d_model=read[0].text_width))
        index = read_json(home / "model_index.json", "a diffusers pipeline directory")
        return klein.klein_config(home, read, index, read_json(home / "vae" / "config.json", "an autoencoder"))
    if is_diffusers_directory(home) and kind_of(home) is SD3:
        configs = sd3_parts(home, (*sd3_pipeline.READERS, "scheduler"))
        return sd3_pipeline.sd3_config(f"The parts of {home}", configs, sd3_sample_size(home))
    if is_diffusers_directory(home) and (kind := kind_of(home)).tables is not None:
        lacking, tables = kind.lacks_encoders(home), kind.tables
        parts = [part for part in tables.readers if not (lacking and part in kind.encoders)]
        read = read_configs(home, parts, tables.readers)
        if lacking:
            read.insert(1, AbsentConfig(d_model=read[0].text_width))
        index_of_vae = read_json(home / "vae" / "config.json", "an autoencoder")
        return tables.config(f"The parts of {home}", home, read, index_of_vae)
    if FLUX1.lacks_encoders(home):
        transformer, vae, scheduler = read_configs(home, ("transformer", "vae", "scheduler"))
        t5, clip = AbsentConfig(d_model=transformer.text_width), AbsentConfig(d_model=transformer.pooled_width)
    else:
        transformer, t5, clip, vae, scheduler = read_configs(home, tuple(_CONFIGS))
    check_fit(f"The parts of {home}", transformer, t5, clip, vae)
    return PipelineConfig(transformer, t5, clip, vae, scheduler, defaults_of(home, transformer))


def sd3_parts(home: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Reads the configurations of some folders of a directory of Stable Diffusion 3.

    Args:
        home: the directory.
        parts: folders.

    Returns:
        Folder -> what was read there, without what the directory may lack and does.
    """
    lacking = SD3.lacks_encoders(home)
    there = [part for part in parts if part not in SD3.optional or (home / part).is_dir()]
    there = [part for part in there if not (lacking and part in SD3.encoders)]
    return dict(zip(there, read_configs(home, there, sd3_pipeline.READERS), strict=True))


def sd3_sample_size(home: Path) -> Any:
    """Returns the side of training images in latents, as the transformer's `config.json` has it; else 128."""
    file = home / "transformer" / "config.json"
    return read_json(file, "a transformer").get("sample_size", 128) if file.is_file() else 128


def read_configs(
    home: Path, parts: Sequence[str], readers: Mapping[str, Callable[[dict[str, Any]], Any]] | None = None
) -> list[Any]:
    """Reads the configurations of the named folders; the problems of all are reported together.

    Args:
        home: the directory.
        parts: folders.
        readers: folder -> what its configuration is read by; FLUX.1's if left out.
    """
    configs: list[Any] = []
    problems: list[str] = []
    for folder in parts:
        file = "scheduler_config.json" if folder == "scheduler" else "config.json"
        try:
            read = (_CONFIGS | dict(readers or {}))[folder]
            configs.append(read(read_json(home / folder / file, f"a {folder}")))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(" ".join(problems))
    return configs


def check_fit(what: str, transformer: FluxConfig, t5: Any, clip: Any, vae: AutoencoderConfig) -> None:
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


_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
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


def flux2_attributes_beside(path: Path) -> dict[str, Any] | None:
    """Returns the configuration beside a transformer's weights, if it is one of FLUX.2.

    Args:
        path: file of the weights, or their directory.
    """
    return _attributes_beside(path, KLEIN)


def sd3_attributes_beside(path: Path) -> dict[str, Any] | None:
    """Returns the configuration beside a transformer's weights, if it is one of Stable Diffusion 3.

    Args:
        path: file of the weights, or their directory.
    """
    return _attributes_beside(path, SD3)


def tabled_beside(path: Path) -> tuple[PipelineKind, dict[str, Any]] | None:
    """Returns the configuration beside a transformer's weights, and its kind, if that is one with `tables`.

    Args:
        path: file of the weights, or their directory.
    """
    found = ((kind, _attributes_beside(path, kind)) for kind in KINDS.values() if kind.tables is not None)
    return next(((kind, attributes) for kind, attributes in found if attributes is not None), None)


def _attributes_beside(path: Path, kind: PipelineKind) -> dict[str, Any] | None:
    file = (path.parent if path.is_file() else path) / "config.json"
    attributes = read_json(file, "a transformer") if file.is_file() else {}
    return attributes if attributes.get("_class_name") in kind.classes["transformer"] else None


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
    if isinstance(transformer, Sd3Config):
        return SchedulerConfig(shift=3.0)
    if isinstance(transformer, ChromaConfig):
        return SchedulerConfig(use_beta_sigmas=True)
    return SchedulerConfig(shift=3.0, use_dynamic_shifting=True) if transformer.guidance else SchedulerConfig()
