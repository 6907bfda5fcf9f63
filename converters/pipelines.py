"""Whole FLUX pipelines from diffusers directories, and transformers from single files.

1. `configurations` says what the directory holds.
2. The parts are converted in turn, leaf by leaf; the problems of all weights are reported together.
3. `convert_transformer` converts a transformer alone: a single file in any layout, or a directory with one. With a
   `base` directory, which gives the text encoders, the autoencoder and the tokenizers, it becomes a pipeline.
4. `open_pipeline` and `open_transformer` check the same, and say how each leaf is made, without making any.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from converters.alone import (
    ROPE_AXES,
    completed_config,
    flux2_transformer,
    head_dim_of,
    sd3_transformer,
    tabled_transformer,
    transformer_path,
)
from converters.configurations import (
    check_architecture,
    check_base,
    pipeline_config,
    rope_axes_beside,
)
from converters.contents import transformer_of
from converters.flux import flux_config_from_shapes
from converters.mapping import ArraySource, ConversionError, Source, load_tree, open_tree
from converters.part_rules import PartRules, part_rules, two_clips_rules
from converters.sd3 import sd3_labels
from converters.source import stored_dtype
from converters.streaming import stream_module
from converters.weight_files import check_variant, variants
from difffract_jax.config import UserError
from difffract_jax.models.families import PARTS, module_of
from difffract_jax.models.mmdit import FluxConfig, MMDiT
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.streaming import Weights
from difffract_jax.models.tokenizers import Tokenizers, load_tokenizers
from difffract_jax.storage.streaming import Leaf

M = TypeVar("M")
Sharding = Callable[[str, Any], Any]
"""Part ("transformer", "t5", "clip" or "vae") and its abstract tree -> where its leaves go, as `placement` takes it."""

LAYERED_PARTS = ("transformer", "t5")
"""Parts with stacks that can stay elsewhere than on the device."""


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


Use = Callable[[str, Source | ArraySource, PartRules], M]
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
    encoders: bool = True,
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
        encoders: whether the text encoders must be there; or else `models.absent` stands for those that are not.

    Raises:
        UserError: when it is not a pipeline that is known or a configuration is not understood.
        ConversionError: naming every problem of the weights of all parts.
    """
    load = _loading(sharding, weights, text_encoders)
    modules, tokenizers, config = _pipeline(Path(source), base, variant, dtype, load, encoders=encoders)
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
            or the pipeline's. One that no base completes must lie beside its `config.json`.
        rope_axes: how a head's dimensions of FLUX.1 and Chroma are divided among the axes of position, which no tensor
            tells; if left out, as a `config.json` beside the weights says, or as in the release.
        dtype: type of the weights.
        sharding: where the leaves go.
        variant: which files to take, see `convert_pipeline`.
        weights: where the blocks stay.

    Raises:
        UserError: when it is not a transformer that is known; the message says what it is.
    """
    return _transformer(Path(source), rope_axes, variant, dtype, _loading(sharding, weights))


def _transformer(
    source: Path,
    rope_axes: tuple[int, ...] | None,
    variant: str | None,
    dtype: Any,
    use: Use[M],
    head_dim: int | None = None,
) -> tuple[M, FluxConfig]:
    """Makes what is wanted of a transformer alone."""
    path = transformer_path(source)
    sd3 = sd3_transformer(path, variant, head_dim=head_dim)
    if sd3 is not None:
        part, layout, size = sd3
        rules = PartRules(abstract_module(module_of(size), size, dtype), layout.rules, labels=sd3_labels(size))
        return use("transformer", part, rules), size
    tabled = tabled_transformer(path, variant, rope_axes=rope_axes)
    if tabled is not None:
        rules = PartRules(abstract_module(module_of(tabled.shape), tabled.shape, dtype), tabled.rules)
        return use("transformer", tabled.source, rules), tabled.shape
    flux2 = flux2_transformer(path, variant)
    if flux2 is not None:
        part, layout, shape = flux2
        return use("transformer", part, PartRules(abstract_module(module_of(shape), shape, dtype), layout.rules)), shape
    axes = rope_axes if rope_axes is not None else rope_axes_beside(path)
    part, layout = transformer_of(Source(path, variant=variant))
    config = flux_config_from_shapes(part.shapes(), ROPE_AXES if axes is None else axes)
    return use("transformer", part, PartRules(abstract_module(MMDiT, config, dtype), layout.rules)), config


def _loading(sharding: Sharding | None, weights: Weights, text_encoders: Weights | None = None) -> Use[Any]:
    """Returns what loads a part, whole or all but its stacks."""
    places = {"transformer": weights, "t5": text_encoders or weights}

    def load(name: str, source: Source | ArraySource, part: PartRules) -> Any:
        place = places.get(name, "device")
        if place != "device" and part.rules:  # what stands for a missing part has nothing to stream
            return stream_module(source, part.rules, part.abstract, part.ignored, place, part.labels)
        target = None if sharding is None else sharding(name, part.abstract)
        return load_tree(source, part.rules, part.abstract, ignored=part.ignored, labels=part.labels, sharding=target)

    return load


def _opening(dtype: Any, files: list[Path]) -> Use[dict[str, Leaf]]:
    """Returns what says how a part's leaves are made, and adds the files that they are read from to a list."""

    def open_part(name: str, source: Source | ArraySource, part: PartRules) -> dict[str, Leaf]:
        files.extend(file for file in source.files() if file not in files)
        kind = stored_dtype(source.kinds()) if dtype is None else dtype
        options = {"ignored": part.ignored, "labels": part.labels, "dtype": kind}
        return open_tree(source, part.rules, part.abstract, **options, mapped=False)

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


def _convert_parts(
    config: PipelineConfig,
    home: Path,
    dtype: Any,
    use: Use[M],
    folders: Mapping[str, str],
    variant: str | None,
) -> dict[str, M]:
    """Makes what is wanted of the parts in some folders; the problems of all are raised together."""
    files = {name: home / folder for name, folder in folders.items()}
    second = files.pop("clip_2", None)
    modules: dict[str, M] = {}
    problems: list[str] = []
    for name, path in files.items():
        try:
            one = Source(path, variant=variant)
            if name == "clip" and second is not None:
                source, rules = two_clips_rules(config, one, Source(second, variant=variant), dtype)
            else:
                source, rules = part_rules(name, config, one, dtype)
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


def _pipeline(
    source: Path, base: str | Path | None, variant: str | None, dtype: Any, use: Use[M], *, encoders: bool = True
) -> tuple[dict[str, M], Tokenizers, PipelineConfig]:
    """Makes what is wanted of every part of a pipeline; returns its tokenizers and its configuration, too."""
    if base is not None:
        return _completed(source, Path(base), variant, dtype, use)
    kind = check_architecture(source, encoders=encoders)
    config = pipeline_config(source)
    tokenizers = load_tokenizers(source, thinking=config.transformer.thinking)
    folders = kind.folders_in(source)
    check_variant(source, _variants([source / folder for folder in folders.values()]), variant)
    parts = _convert_parts(config, source, dtype, use, folders, variant)
    return _all_parts(parts, config, dtype, use), tokenizers, config


def _all_parts(parts: Mapping[str, M], config: PipelineConfig, dtype: Any, use: Use[M]) -> dict[str, M]:
    """Returns all parts in order: besides those that there are, what stands for one that has no weights."""
    made = dict(parts)
    for name in (name for name in PARTS if name not in parts):
        shape = getattr(config, name)
        made[name] = use(name, ArraySource(name, {}), PartRules(abstract_module(module_of(shape), shape, dtype), ()))
    return {name: made[name] for name in PARTS}


def _completed(
    source: Path, base: Path, variant: str | None, dtype: Any, use: Use[M]
) -> tuple[dict[str, M], Tokenizers, PipelineConfig]:
    """Does what `_pipeline` does, of a transformer and the other parts of a base directory."""
    kind = check_base(base)
    folders = {name: folder for name, folder in kind.folders_in(base).items() if name != "transformer"}
    path = transformer_path(source)
    places = [path, *(base / folder for folder in folders.values())]
    check_variant(f"{source} and {base}", _variants(places), variant)
    config = completed_config(source, base, variant=variant)
    tokenizers = load_tokenizers(base, thinking=config.transformer.thinking)
    axes, head_dim = config.transformer.rope_axes, head_dim_of(base)
    transformer, _ = _transformer(path, axes, variant, dtype, use, head_dim)
    parts = {"transformer": transformer, **_convert_parts(config, base, dtype, use, folders, variant)}
    return _all_parts(parts, config, dtype, use), tokenizers, config
