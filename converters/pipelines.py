"""Whole FLUX.1 pipelines from diffusers directories, and transformers from single files.

1. `configurations` says what the directory holds.
2. The parts are converted in turn, leaf by leaf; the problems of all weights are reported together.
3. `convert_transformer` converts a transformer alone: a single file in either layout, or a directory with one. With a
   `base` directory, which gives the text encoders, the autoencoder and the tokenizers, it becomes a pipeline.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from converters.autoencoder import AUTOENCODER_DIFFUSERS
from converters.configurations import (
    check_architecture,
    check_base,
    check_fit,
    defaults_of,
    pipeline_config,
    read_configs,
    rope_axes_beside,
    scheduler_of,
)
from converters.contents import (
    check_autoencoder,
    check_weights,
    find_transformer,
    transformer_files,
    transformer_of,
    without_prefix,
)
from converters.flux import FLUX_DIFFUSERS, flux_config_from_shapes
from converters.mapping import ConversionError, Ignored, Rule, Source, load_tree
from converters.streaming import stream_module
from converters.text_encoders import CLIP_PREFIX, clip_tables, t5_tables
from converters.weight_files import check_variant, variants
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.mmdit import FluxConfig, MMDiT
from difffract_jax.models.pipeline import Pipeline, PipelineConfig
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.streaming import Weights
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.models.tokenizers import load_tokenizers

Sharding = Callable[[str, Any], Any]
"""Part ("transformer", "t5", "clip" or "vae") and its abstract tree -> where its leaves go, as `placement` takes it."""

ROPE_AXES = (16, 56, 56)
"""How FLUX.1 divides a head's dimensions among the axes of position."""

LAYERED_PARTS = ("transformer", "t5")
"""Parts with stacks that can stay elsewhere than on the device."""

FOLDERS = {"transformer": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "vae": "vae"}
"""Part of a pipeline -> the folder of a diffusers directory that holds it."""


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


def convert_pipeline(
    source: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
    variant: str | None = None,
    weights: Weights = "device",
) -> Pipeline:
    """Converts a pipeline.

    Args:
        source: a diffusers directory; or what `convert_transformer` takes, when `base` is given.
        base: diffusers directory whose other parts complete a transformer; it need not have one of its own.
        dtype: type of the weights.
        sharding: where the leaves go, see `Sharding`.
        variant: which files to take where there are several, as in fp16 for `model.fp16.safetensors`; parts that have
            none of this variant are read from their plain files. The only variant there is need not be named.
        weights: where the blocks stay; see `models.streaming`.

    Raises:
        UserError: when it is not a FLUX.1 pipeline or a configuration is not understood.
        ConversionError: naming every problem of the weights of all parts.
    """
    source = Path(source)
    if base is not None:
        return _complete(source, Path(base), _Loading(dtype, sharding, weights), variant)
    check_architecture(source)
    config = pipeline_config(source)
    tokenizers = load_tokenizers(source)
    check_variant(source, _variants([source / folder for folder in FOLDERS.values()]), variant)
    modules = _convert_parts(config, source, _Loading(dtype, sharding, weights), tuple(FOLDERS), variant)
    return Pipeline(**modules, tokenizers=tokenizers, config=config)


def convert_transformer(
    source: str | Path,
    *,
    rope_axes: tuple[int, ...] | None = None,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
    variant: str | None = None,
    weights: Weights = "device",
) -> tuple[MMDiT, FluxConfig]:
    """Converts a transformer alone.

    Args:
        source: a safetensors file, in the original layout or diffusers', under any prefix, alone or with other parts,
            which are left aside; or a directory with such a file, the transformer's directory of a diffusers pipeline,
            or the pipeline's.
        rope_axes: how a head's dimensions are divided among the axes of position, which no tensor tells; if left out,
            as a `config.json` beside the weights says, or as in FLUX.1.
        dtype: type of the weights.
        sharding: where the leaves go.
        variant: which files to take, see `convert_pipeline`.
        weights: where the blocks stay.

    Raises:
        UserError: when it is not a FLUX.1 transformer; the message says what it is.
    """
    path = _transformer_path(Path(source))
    axes = rope_axes if rope_axes is not None else rope_axes_beside(path)
    part, layout = transformer_of(Source(path, variant=variant))
    config = flux_config_from_shapes(part.shapes(), ROPE_AXES if axes is None else axes)
    rules = PartRules(abstract_module(MMDiT, config, dtype), layout.rules)
    return _load_part("transformer", part, rules, _Loading(dtype, sharding, weights)), config


def _transformer_path(path: Path) -> Path:
    """Returns the file, or directory of shards, that holds the transformer that a path stands for."""
    if not path.is_dir():
        return path
    if (path / "transformer").is_dir():
        return path / "transformer"
    files = transformer_files(path)
    # Shards are found by their names in the directory.
    return files[0] if len(files) == 1 and not (path / "config.json").is_file() else path


def _convert_parts(
    config: PipelineConfig,
    home: Path,
    loading: "_Loading",
    names: tuple[str, ...],
    variant: str | None,
) -> dict[str, Any]:
    """Converts the named parts; the problems of all are raised together."""
    files = {name: home / FOLDERS[name] for name in names}
    modules: dict[str, Any] = {}
    problems: list[str] = []
    for name, path in files.items():
        try:
            source, rules = _part_rules(name, config, Source(path, variant=variant), loading.dtype)
            modules[name] = _load_part(name, source, rules, loading)
        except ConversionError as error:
            problems += [f"{path.name}: {problem}" for problem in error.problems]
        except UserError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        raise ConversionError(str(home), problems)
    return modules


def _variants(folders: Sequence[Path]) -> set[str]:
    return set[str]().union(*(variants(folder) for folder in folders))


def _part_rules(name: str, config: PipelineConfig, source: Source, dtype: Any) -> tuple[Source, PartRules]:
    """Returns the part of a folder's weights that is wanted, and how it is converted."""
    check_weights(source)
    if name == "transformer":
        # A file of another layout or prefix may stand under diffusers' name.
        part_and_layout = find_transformer(source)
        part, rules = source, FLUX_DIFFUSERS
        if part_and_layout is not None:
            part, rules = part_and_layout[0], part_and_layout[1].rules
        return part, PartRules(abstract_module(MMDiT, config.transformer, dtype), rules)
    if name == "t5":
        source = without_prefix(source, "encoder.final_layer_norm.weight")
        return source, PartRules(abstract_module(T5Encoder, config.t5, dtype), *t5_tables(list(source)))
    if name == "clip":
        embedding = "embeddings.token_embedding.weight"
        source = without_prefix(source, f"{CLIP_PREFIX}{embedding}", embedding)
        return source, PartRules(abstract_module(CLIPTextEncoder, config.clip, dtype), *clip_tables(list(source)))
    source = without_prefix(source, "decoder.conv_in.weight")
    check_autoencoder(source)
    return source, PartRules(abstract_module(Autoencoder, config.vae, dtype), AUTOENCODER_DIFFUSERS)


class _Loading(NamedTuple):
    """How weights are loaded: their type, where leaves go, and where stacks stay."""

    dtype: Any
    sharding: Sharding | None
    weights: Weights


def _load_part(name: str, source: Source, part: PartRules, loading: _Loading) -> Any:
    if loading.weights != "device" and name in LAYERED_PARTS:
        return stream_module(source, part.rules, part.abstract, part.ignored, loading.weights)
    target = None if loading.sharding is None else loading.sharding(name, part.abstract)
    return load_tree(source, part.rules, part.abstract, ignored=part.ignored, sharding=target)


def _complete(source: Path, base: Path, loading: _Loading, variant: str | None) -> Pipeline:
    """Makes a pipeline of a transformer and the other parts of a base directory."""
    check_base(base)
    t5, clip, vae = read_configs(base, ("text_encoder_2", "text_encoder", "vae"))
    tokenizers = load_tokenizers(base)
    path = _transformer_path(source)
    folders = [path, *(base / FOLDERS[name] for name in ("t5", "clip", "vae"))]
    check_variant(f"{source} and {base}", _variants(folders), variant)
    axes = rope_axes_beside(path) or rope_axes_beside(base / "transformer")
    transformer, shape = convert_transformer(path, rope_axes=axes, variant=variant, **loading._asdict())
    check_fit(f"{source} and {base}", shape, t5, clip, vae)
    scheduler = scheduler_of((source, base), shape)
    config = PipelineConfig(shape, t5, clip, vae, scheduler, defaults_of(base, shape))
    others = _convert_parts(config, base, loading, ("t5", "clip", "vae"), variant)
    return Pipeline(transformer=transformer, **others, tokenizers=tokenizers, config=config)
