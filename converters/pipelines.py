"""Whole FLUX.1 pipelines from diffusers directories, and transformers from single files.

1. `configurations` says what the directory holds.
2. The parts are converted in turn, leaf by leaf; the problems of all weights are reported together.
3. `convert_transformer` converts a transformer alone: a single file in either layout, or a directory with one. With a
   `base` directory, which gives the text encoders, the autoencoder and the tokenizers, it becomes a pipeline.
4. `open_pipeline` and `open_transformer` check the same, and say how each leaf is made, without making any.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

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
from converters.mapping import ConversionError, Ignored, Rule, Source, load_tree, open_tree
from converters.source import stored_dtype
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
from difffract_jax.models.tokenizers import Tokenizers, load_tokenizers
from difffract_jax.storage.streaming import Leaf

M = TypeVar("M")
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


class Opened(NamedTuple):
    """A checkpoint that is fit to be converted, before any of its weights is read.

    Attributes:
        parts: part of the pipeline -> path of each of its leaves, in order, and what makes it.
        config: shapes of all parts, or of the transformer where it is alone.
        tokenizers: None for a transformer alone.
        files: that the weights are read from.
    """

    parts: dict[str, dict[str, Leaf]]
    config: PipelineConfig | FluxConfig
    tokenizers: Tokenizers | None
    files: tuple[Path, ...]


Use = Callable[[str, Source, PartRules], M]
"""What becomes of a part: its name, its weights, and how they are converted."""


def convert_pipeline(
    source: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
    variant: str | None = None,
    weights: Weights = "device",
    text_encoders: Weights | None = None,
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
        text_encoders: where those of T5 stay; as the others if left out.

    Raises:
        UserError: when it is not a FLUX.1 pipeline or a configuration is not understood.
        ConversionError: naming every problem of the weights of all parts.
    """
    modules, tokenizers, config = _pipeline(
        Path(source), base, variant, dtype, _loading(sharding, weights, text_encoders)
    )
    return Pipeline(**modules, tokenizers=tokenizers, config=config)


def open_pipeline(
    source: str | Path, *, base: str | Path | None = None, dtype: Any = None, variant: str | None = None
) -> Opened:
    """Checks a pipeline as `convert_pipeline` does, and says how its leaves are made.

    Args:
        source: as there.
        base: as there.
        dtype: type of the weights; left out, bfloat16 for parts whose weights all are, float32 for others.
        variant: as there.

    Raises:
        ConversionError: naming every problem of the weights of all parts that can be seen without reading them.
    """
    files: list[Path] = []
    parts, tokenizers, config = _pipeline(Path(source), base, variant, jnp.float32, _opening(dtype, files))
    return Opened(parts, config, tokenizers, tuple(files))


def open_transformer(source: str | Path, *, dtype: Any = None, variant: str | None = None) -> Opened:
    """Checks a transformer alone as `convert_transformer` does; arguments as for `open_pipeline`."""
    files: list[Path] = []
    leaves, config = _transformer(Path(source), None, variant, jnp.float32, _opening(dtype, files))
    return Opened({"transformer": leaves}, config, None, tuple(files))


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
    return _transformer(Path(source), rope_axes, variant, dtype, _loading(sharding, weights))


def _transformer(
    source: Path, rope_axes: tuple[int, ...] | None, variant: str | None, dtype: Any, use: Use[M]
) -> tuple[M, FluxConfig]:
    """Makes what is wanted of a transformer alone."""
    path = _transformer_path(source)
    axes = rope_axes if rope_axes is not None else rope_axes_beside(path)
    part, layout = transformer_of(Source(path, variant=variant))
    config = flux_config_from_shapes(part.shapes(), ROPE_AXES if axes is None else axes)
    return use("transformer", part, PartRules(abstract_module(MMDiT, config, dtype), layout.rules)), config


def _loading(sharding: Sharding | None, weights: Weights, text_encoders: Weights | None = None) -> Use[Any]:
    """Returns what loads a part, whole or all but its stacks."""
    places = {"transformer": weights, "t5": text_encoders or weights}

    def load(name: str, source: Source, part: PartRules) -> Any:
        place = places.get(name, "device")
        if place != "device":
            return stream_module(source, part.rules, part.abstract, part.ignored, place)
        target = None if sharding is None else sharding(name, part.abstract)
        return load_tree(source, part.rules, part.abstract, ignored=part.ignored, sharding=target)

    return load


def _opening(dtype: Any, files: list[Path]) -> Use[dict[str, Leaf]]:
    """Returns what says how a part's leaves are made, and adds the files that they are read from to a list."""

    def open_part(name: str, source: Source, part: PartRules) -> dict[str, Leaf]:
        files.extend(file for file in source.files() if file not in files)
        kind = stored_dtype(source.kinds()) if dtype is None else dtype
        return open_tree(source, part.rules, part.abstract, ignored=part.ignored, dtype=kind, mapped=False)

    return open_part


def stacks_of(config: Any) -> tuple[str, ...]:
    """Returns the names of a part's stacks, whose leaves have a leading layer axis.

    Args:
        config: shape of the part.
    """
    return tuple(stack.name for stack in config.layout.stacks) if isinstance(config, FluxConfig) else ("blocks",)


def sliced(
    config: Any, arrays: Mapping[str, Any], read: Callable[[str, int | None], np.ndarray] | None = None
) -> dict[str, Leaf]:
    """Returns the leaves of a part that is there already, those of its stacks layer by layer.

    Args:
        config: shape of the part.
        arrays: path -> array, or what has its type and shape.
        read: path and layer, or None -> values; those of `arrays` if left out.
    """

    def take(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(arrays[path] if layer is None else arrays[path][layer])

    values, stacks = read or take, stacks_of(config)
    leaves: dict[str, Leaf] = {}
    for path, array in arrays.items():
        shape, stacked = tuple(array.shape), path.split(".")[0] in stacks
        make = partial(values, path) if stacked else lambda _, path=path: values(path, None)
        leaves[path] = Leaf(np.dtype(array.dtype), shape, shape[0] if stacked else 1, make)
    return leaves


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
    dtype: Any,
    use: Use[M],
    names: tuple[str, ...],
    variant: str | None,
) -> dict[str, M]:
    """Makes what is wanted of the named parts; the problems of all are raised together."""
    files = {name: home / FOLDERS[name] for name in names}
    modules: dict[str, M] = {}
    problems: list[str] = []
    for name, path in files.items():
        try:
            source, rules = _part_rules(name, config, Source(path, variant=variant), dtype)
            modules[name] = use(name, source, rules)
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


def _pipeline(
    source: Path, base: str | Path | None, variant: str | None, dtype: Any, use: Use[M]
) -> tuple[dict[str, M], Tokenizers, PipelineConfig]:
    """Makes what is wanted of every part of a pipeline; returns its tokenizers and its configuration, too."""
    if base is not None:
        return _completed(source, Path(base), variant, dtype, use)
    check_architecture(source)
    config = pipeline_config(source)
    tokenizers = load_tokenizers(source)
    check_variant(source, _variants([source / folder for folder in FOLDERS.values()]), variant)
    return _convert_parts(config, source, dtype, use, tuple(FOLDERS), variant), tokenizers, config


def completed_config(source: str | Path, base: str | Path, *, variant: str | None = None) -> PipelineConfig:
    """Returns the shapes of a pipeline that a base completes, from the headers of the transformer's file alone.

    Args:
        source: the transformer, as `convert_transformer` takes it.
        base: diffusers directory with the other parts.
        variant: which files to take, see `convert_pipeline`.

    Raises:
        UserError: as `convert_pipeline`, as far as headers and configurations show it.
    """
    source, base = Path(source), Path(base)
    t5, clip, vae = read_configs(base, ("text_encoder_2", "text_encoder", "vae"))
    path = _transformer_path(source)
    axes = rope_axes_beside(path) or rope_axes_beside(base / "transformer") or ROPE_AXES
    part, _ = transformer_of(Source(path, variant=variant), quiet=True)
    shape = flux_config_from_shapes(part.shapes(), axes)
    check_fit(f"{source} and {base}", shape, t5, clip, vae)
    return PipelineConfig(shape, t5, clip, vae, scheduler_of((source, base), shape), defaults_of(base, shape))


def _completed(
    source: Path, base: Path, variant: str | None, dtype: Any, use: Use[M]
) -> tuple[dict[str, M], Tokenizers, PipelineConfig]:
    """Does what `_pipeline` does, of a transformer and the other parts of a base directory."""
    check_base(base)
    tokenizers, path = load_tokenizers(base), _transformer_path(source)
    folders = [path, *(base / FOLDERS[name] for name in ("t5", "clip", "vae"))]
    check_variant(f"{source} and {base}", _variants(folders), variant)
    config = completed_config(source, base, variant=variant)
    transformer, _ = _transformer(path, config.transformer.rope_axes, variant, dtype, use)
    others = _convert_parts(config, base, dtype, use, ("t5", "clip", "vae"), variant)
    return {"transformer": transformer, **others}, tokenizers, config
