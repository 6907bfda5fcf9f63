"""Whole FLUX.1 pipelines from diffusers directories, and transformers from single files.

1. `model_index.json` must name a `FluxPipeline` and the classes of its parts; anything else is refused in one sentence.
2. Every part's `config.json` is read by its allow-list, and the parts must fit one another.
3. The parts are converted in turn, leaf by leaf. The problems of all configurations, or of all weights, are told
   together.
4. A single file is a transformer alone: `convert_transformer` converts it, and with a `base` directory, which gives the
   text encoders, the autoencoder and the tokenizers, it becomes a pipeline.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from converters.allow_list import AllowList, read_attributes
from converters.autoencoder import AUTOENCODER_DIFFUSERS, autoencoder_config_from_diffusers
from converters.flux import (
    FLUX_DIFFUSERS,
    FLUX_SINGLE_FILE,
    SINGLE_FILE_PREFIX,
    flux_config_from_diffusers,
    flux_config_from_shapes,
)
from converters.mapping import ConversionError, Ignored, Rule, Source, load_tree
from converters.text_encoders import (
    clip_config_from_transformers,
    clip_tables,
    t5_config_from_transformers,
    t5_tables,
)
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.mmdit import FluxConfig, MMDiT
from difffract_jax.models.pipeline import GenerationDefaults, Pipeline, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.models.tokenizers import Tokenizers, load_tokenizers

T = TypeVar("T")
Sharding = Callable[[str, Any], Any]
"""Part ("transformer", "t5", "clip" or "vae") and its abstract tree -> where its leaves go, as `placement` takes it."""

ROPE_AXES = (16, 56, 56)
"""How FLUX.1 divides a head's dimensions among the axes of position."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
}
"""Part of a diffusers directory -> the classes it may have."""

FOLDERS: Mapping[str, str] = {
    "transformer": "transformer",
    "t5": "text_encoder_2",
    "clip": "text_encoder",
    "vae": "vae",
}
"""Part of a pipeline -> the folder of a diffusers directory that holds it."""

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


class PartRules(NamedTuple):
    """How one part of a pipeline is converted.

    Attributes:
        abstract: its module's shapes.
        rules: its table.
        ignored: keys that may be left over.
    """

    abstract: Any
    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()


def is_diffusers_directory(path: Path) -> bool:
    """Says whether a path is a pipeline saved by diffusers."""
    return (path / "model_index.json").is_file()


def convert_pipeline(
    source: str | Path, *, base: str | Path | None = None, dtype: Any = jnp.float32, sharding: Sharding | None = None
) -> Pipeline:
    """Converts a pipeline.

    Args:
        source: a diffusers directory, or a single-file transformer when `base` is given.
        base: diffusers directory whose other parts complete a single file.
        dtype: type of the weights.
        sharding: where the leaves go, see `Sharding`.

    Raises:
        UserError: when it is not a FLUX.1 pipeline or a configuration is not understood.
        ConversionError: naming every problem of the weights of all parts.
    """
    source = Path(source)
    home = source if base is None else Path(base)
    check_architecture(home)
    config = pipeline_config(home)
    tokenizers = load_tokenizers(home)
    files = {name: home / folder for name, folder in FOLDERS.items()}
    if base is not None:
        return _complete(source, config, tokenizers, files, dtype, sharding)
    modules = _convert_parts(config, files, dtype, sharding, tuple(FOLDERS))
    return Pipeline(**modules, tokenizers=tokenizers, config=config)


def convert_transformer(
    file: str | Path,
    *,
    rope_axes: tuple[int, ...] | None = None,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
) -> tuple[MMDiT, FluxConfig]:
    """Converts a single file in the original layout, which holds a transformer alone.

    Args:
        file: the safetensors file; its keys may have ComfyUI's prefix.
        rope_axes: how a head's dimensions are divided among the axes of position, which no tensor tells;
            those of FLUX.1 if left out.
        dtype: type of the weights.
        sharding: where the leaves go.
    """
    probe = Source(file)
    prefixed = any(key.startswith(SINGLE_FILE_PREFIX) for key in probe)
    source = Source(file, prefix=SINGLE_FILE_PREFIX) if prefixed else probe
    config = flux_config_from_shapes(source.shapes(), ROPE_AXES if rope_axes is None else rope_axes)
    part = PartRules(abstract_module(MMDiT, config, dtype), FLUX_SINGLE_FILE)
    return _load_part("transformer", source, part, sharding), config


@cache
def abstract_module(module: Callable[..., Any], config: Any, dtype: Any = jnp.float32) -> Any:
    """Returns a module's shapes without making its weights; traced once, so nothing may write into them."""
    return jax.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), dtype=dtype))


def check_architecture(home: Path) -> None:
    """Refuses what is not a FLUX.1 pipeline of diffusers."""
    index = read_json(home / "model_index.json", "a diffusers pipeline directory")
    name = index.get("_class_name")
    if name != "FluxPipeline":
        raise UserError(f"{home} is a {name}, but only FluxPipeline (FLUX.1-schnell, FLUX.1-dev) can be converted.")
    wrong = []
    for part, classes in CLASSES.items():
        found = (index.get(part) or (None, None))[1]
        if found not in classes:
            wrong.append(f"{part} is {found} instead of {' or '.join(classes)}")
    if wrong:
        raise UserError(f"{home} is not a plain FLUX.1 pipeline: {'; '.join(wrong)}.")


def pipeline_config(home: Path) -> PipelineConfig:
    """Reads the configurations of all parts and checks that they fit one another.

    Raises:
        UserError: with the problems of all of them.
    """
    problems: list[str] = []

    def read(folder: str, convert: Callable[[dict[str, Any]], T], file: str = "config.json") -> T | None:
        try:
            return convert(read_json(home / folder / file, f"a {folder}"))
        except UserError as error:
            problems.append(str(error))
            return None

    transformer = read("transformer", flux_config_from_diffusers)
    t5 = read("text_encoder_2", t5_config_from_transformers)
    clip = read("text_encoder", clip_config_from_transformers)
    vae = read("vae", autoencoder_config_from_diffusers)
    scheduler = read("scheduler", scheduler_config_from_diffusers, "scheduler_config.json")
    if transformer is None or t5 is None or clip is None or vae is None or scheduler is None:
        raise UserError(" ".join(problems))
    misfits = [
        f"{what} is {ours}, but {whose} is {theirs}"
        for what, ours, whose, theirs in (
            ("the transformer's joint_attention_dim", transformer.text_width, "T5's d_model", t5.d_model),
            ("the transformer's pooled_projection_dim", transformer.pooled_width, "CLIP's hidden_size", clip.d_model),
            ("the transformer's in_channels", transformer.in_channels, "4 latent channels", 4 * vae.latent_channels),
        )
        if ours != theirs
    ]
    if misfits:
        raise UserError(
            f"The parts of {home} do not fit one another: {'; '.join(misfits)}; take them from one release."
        )
    defaults = _defaults(home, transformer)
    return PipelineConfig(transformer, t5, clip, vae, scheduler, defaults)


def scheduler_config_from_diffusers(attributes: Mapping[str, object]) -> SchedulerConfig:
    """Reads the configuration of a `FlowMatchEulerDiscreteScheduler`."""
    read: dict[str, Any] = read_attributes(attributes, _SCHEDULER)
    return SchedulerConfig(**read)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object; says what it belongs to when it is missing or broken."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so {path.parent} is not {what}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; download it again.")
    return content


def _defaults(home: Path, transformer: FluxConfig) -> GenerationDefaults:
    """Chooses what a run takes that names nothing else; no file of the pipeline says it outright.

    The autoencoder's `sample_size` is the side of its training images; schnell is distilled to 4 steps and 256 text
    tokens, dev to a guidance scale of 3.5 and used with 28 steps and 512 tokens.
    """
    size = read_json(home / "vae" / "config.json", "an autoencoder").get("sample_size", 1024)
    longest = read_json(home / "tokenizer_2" / "tokenizer_config.json", "a tokenizer").get("model_max_length", 512)
    tokens, steps, guidance = (512, 28, 3.5) if transformer.guidance else (256, 4, 0.0)
    return GenerationDefaults(
        height=size, width=size, text_tokens=int(min(longest, tokens)), steps=steps, guidance=guidance
    )


def _convert_parts(
    config: PipelineConfig, files: Mapping[str, Path], dtype: Any, sharding: Sharding | None, names: tuple[str, ...]
) -> dict[str, Any]:
    """Converts the named parts; the problems of all are raised together."""
    modules: dict[str, Any] = {}
    problems: list[str] = []
    for name in names:
        try:
            source = Source(files[name])
            modules[name] = _load_part(name, source, _part_rules(name, config, source, dtype), sharding)
        except ConversionError as error:
            problems += [f"{files[name].name}: {problem}" for problem in error.problems]
        except UserError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        raise ConversionError(str(next(iter(files.values())).parent), problems)
    return modules


def _part_rules(name: str, config: PipelineConfig, source: Source, dtype: Any) -> PartRules:
    if name == "transformer":
        return PartRules(abstract_module(MMDiT, config.transformer, dtype), FLUX_DIFFUSERS)
    if name == "t5":
        return PartRules(abstract_module(T5Encoder, config.t5, dtype), *t5_tables(list(source)))
    if name == "clip":
        return PartRules(abstract_module(CLIPTextEncoder, config.clip, dtype), *clip_tables(list(source)))
    return PartRules(abstract_module(Autoencoder, config.vae, dtype), AUTOENCODER_DIFFUSERS)


def _load_part(name: str, source: Source, part: PartRules, sharding: Sharding | None) -> Any:
    target = None if sharding is None else sharding(name, part.abstract)
    return load_tree(source, part.rules, part.abstract, ignored=part.ignored, sharding=target)


def _complete(
    file: Path,
    config: PipelineConfig,
    tokenizers: Tokenizers,
    files: Mapping[str, Path],
    dtype: Any,
    sharding: Sharding | None,
) -> Pipeline:
    """Makes a pipeline of a single-file transformer and the other parts of a base directory."""
    transformer, found = convert_transformer(
        file, rope_axes=config.transformer.rope_axes, dtype=dtype, sharding=sharding
    )
    if (found.text_width, found.pooled_width, found.in_channels) != (
        config.transformer.text_width,
        config.transformer.pooled_width,
        config.transformer.in_channels,
    ):
        raise UserError(
            f"{file} takes text of width {found.text_width}, pooled width {found.pooled_width} and "
            f"{found.in_channels} channels, which the base directory does not provide; give the base of the same model."
        )
    others = _convert_parts(config, files, dtype, sharding, ("t5", "clip", "vae"))
    defaults = _defaults(files["vae"].parent, found)
    config = PipelineConfig(found, config.t5, config.clip, config.vae, config.scheduler, defaults)
    return Pipeline(transformer=transformer, **others, tokenizers=tokenizers, config=config)
