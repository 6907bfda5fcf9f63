"""Models and transcoders by name or path, and saving them in this package's own format.

1. A model is a directory that `save_pipeline` wrote; or a diffusers directory, or a transformer alone and a base, both
   of which are converted in memory.
2. A set of transcoders is a directory that `save_transcoders` wrote, or one of the reference's `.pt` files.
3. Either may also be a repository on the hub, whose files are downloaded first; `directories` finds them.
4. Our directories hold a `config.json` (format version, kind, content hash, every size) and one safetensors file per
   part; a pipeline's also its tokenizers. They are written whole or not at all.

    kind "pipeline"      transformer t5 clip vae .safetensors, tokenizer/ tokenizer_2/
    kind "transformer"   transformer.safetensors; a single file that was converted without `base` (`conversion`)
    kind "transcoders"   a .safetensors file per group of sites, img txt joint, stacked over its sites
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from converters.alone import completed_config
from converters.configurations import is_diffusers_directory, pipeline_config
from converters.pipelines import Sharding, convert_pipeline
from converters.transcoders import (
    is_torch_directory,
    stacked_transcoders,
    transcoders_from_torch,
)
from difffract_jax.circuits.notation.labels import Labels, read_labels
from difffract_jax.config import UserError
from difffract_jax.directories import (
    base_directory,
    checkpoint,
    is_whole_pipeline,
    labels_file,
    pipeline_directory,
    transcoder_directory,
)
from difffract_jax.estimate.weights import abstract_parts
from difffract_jax.graphs.json_values import to_json_values, typed
from difffract_jax.graphs.loras import MergedLora
from difffract_jax.hub.names import parse_hub_name
from difffract_jax.lora import check_loras, open_loras, with_loras
from difffract_jax.models.families import FLUX1, PARTS, SHAPES, shape_class
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.presets import PRESETS, preset_config
from difffract_jax.models.runs import GenerationDefaults, PipelineConfig
from difffract_jax.models.streaming import Weights, refuse_streamed
from difffract_jax.models.tokenizers import load_tokenizers
from difffract_jax.parts import dtype_of_files, identity, load_part, load_stack
from difffract_jax.sharding import PIPELINE, TRANSCODER, tilings_at
from difffract_jax.storage.checkpoint import atomic_directory, leaf_paths, read_config, save_trees
from difffract_jax.storage.sums import check_sums
from difffract_jax.transcoders.sites import sites_in, some_sites
from difffract_jax.transcoders.transcoder import TranscoderConfig, TranscoderSet, source_of_some

C = TypeVar("C")


def load_pipeline(
    model: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
    weights: Weights = "device",
    text_encoders: Weights | None = None,
    verify: bool | None = None,
    lora: Sequence[str | Path] = (),
    encoders: bool = True,
) -> Pipeline:
    """Loads a FLUX pipeline.

    Args:
        model: "organism" for the embedded model, a directory that `save_pipeline` wrote, a diffusers directory, either
            here or in a bucket, as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, or a repository on the hub that holds
            either: "OWNER/NAME", or `hf:OWNER/NAME[@REVISION][/FOLDER]`; with `base`, a transformer alone: a
            safetensors file, or a directory with one, in any of these places.
        revision: of a repository: branch, tag or commit; its default branch if left out.
        base: diffusers directory, or repository, with the text encoders, the autoencoder and the tokenizers for a
            transformer alone.
        variant: which weights of a diffusers directory to take where it has several, as in fp16.
        dtype: type of the weights in memory; None for that of the files, see `parts.dtype_of_files`.
        sharding: function of a part's name and abstract tree that says where its leaves go, as
            `sharding.traced_pipeline` gives one; one device if left out.
        weights: where the blocks of the transformer and of the text encoder stay: on the `device`; or in `host` memory
            or on `disk`, from where each is fetched for its turn. Results are the same but for rounding.
        text_encoders: where the blocks of the text encoder (T5, Qwen3) stay, if not with the others: on `disk`, they
            cost next to nothing where prompt embeddings are given, or one prompt is encoded.
        verify: compare the content hashes of our own directories; left out, those of parts under 200 MB.
        lora: LoRAs to merge into the weights, each FILE or FILE:SCALE: a `.safetensors` file, or one on the hub,
            hf:OWNER/NAME/FILE; in the layout of diffusers, PEFT, kohya, ComfyUI or XLabs.
        encoders: whether the text encoders must be there; if not, prompts of a diffusers directory that lacks them come
            from a file, by `models.embeddings.with_embeddings`.

    Raises:
        UserError: when `model` is none of these, is damaged or cannot be downloaded, or a LoRA is of another model; the
            message says what to do.
    """
    opened = open_loras((lora,) if isinstance(lora, str | Path) else lora)
    refuse_whole(model, base, revision)
    if opened:  # what does not fit is told before the weights are read
        config = described_pipeline(model, base=base, variant=variant, revision=revision)
        check_loras(opened, {name: getattr(config, name) for name in PARTS})
    places = {"weights": weights, "text_encoders": text_encoders or weights, "verify": verify, "encoders": encoders}
    options = {"revision": revision, "base": base, "variant": variant, "dtype": dtype, "sharding": sharding}
    return with_loras(_load(model, **options, **places), opened)


def _load(
    model: str | Path,
    *,
    revision: str | None,
    base: str | Path | None,
    variant: str | None,
    dtype: Any,
    sharding: Sharding | None,
    weights: Weights,
    text_encoders: Weights,
    verify: bool | None,
    encoders: bool,
) -> Pipeline:
    """Loads a pipeline as it is; arguments as for `load_pipeline`."""
    home = None if base is None else base_directory(base, variant=variant)
    if home is None:
        given = pipeline_directory(model, revision=revision, variant=variant, encoders=encoders)
    else:
        given = checkpoint(model, revision=revision, variant=variant, completed=True)
    path, origin = given.path, given.origin
    check_sums(path)
    dtype = dtype_of_files(path) if dtype is None else dtype
    if home is not None or is_diffusers_directory(path):
        base = None if home is None else home.path
        places = {"weights": weights, "text_encoders": text_encoders, "encoders": encoders}
        pipe = convert_pipeline(path, base=base, dtype=dtype, sharding=sharding, variant=variant, **places)
        parts = {name: getattr(pipe, name) for name in PARTS}
        return pipe._replace(source=identity(parts, given, base=home, variant=variant), origin=origin)
    if variant is not None:
        raise UserError(f"{path} is not a diffusers directory, and its weights have no variants; leave --variant out.")
    record = read_kind(path, "pipeline")
    config = pipeline_config_from_json(record["config"], path)
    places = dict.fromkeys(PARTS, weights) | {"t5": text_encoders}
    modules = {
        name: load_part(path, name, abstract, weights=places[name], sharding=sharding, verify=verify)
        for name, abstract in abstract_parts({name: getattr(config, name) for name in PARTS}, dtype).items()
    }
    origin = origin or record.get("origin", "")
    about = {"source": record["content_hash"], "origin": origin, "base": record.get("base", "")}
    loras = typed(tuple[MergedLora, ...], record.get("loras", []), "loras")
    tokenizers = load_tokenizers(path, thinking=config.transformer.thinking)
    return Pipeline(**modules, tokenizers=tokenizers, config=config, **about, loras=loras)


def abstract_pipeline(model: str | Path, dtype: Any = jnp.float32) -> tuple[FluxConfig, dict[str, Any]]:
    """Describes a pipeline without reading its weights.

    Args:
        model: what `load_pipeline` takes; or the name of a published model of which there is no directory here.
        dtype: type of the weights.

    Returns:
        The transformer's shape, and part -> abstract tree.

    Raises:
        UserError: as `load_pipeline`, if it is none of these.
    """
    shapes = pipeline_shapes(model)
    return shapes["transformer"], abstract_parts(shapes, dtype)


def pipeline_shapes(model: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Returns the shape of every part of a pipeline; arguments as for `described_pipeline`."""
    config = described_pipeline(model, revision=revision)
    return {name: getattr(config, name) for name in PARTS}


def described_pipeline(
    model: str | Path, *, base: str | Path | None = None, variant: str | None = None, revision: str | None = None
) -> PipelineConfig:
    """Returns the shapes of a pipeline's parts and its defaults, without reading weights.

    Args:
        model: as for `abstract_pipeline`; with `base`, a transformer alone. A file of one on the hub is downloaded.
        base: as for `load_pipeline`.
        variant: as for `load_pipeline`.
        revision: of a repository: branch, tag or commit.
    """
    if base is not None:
        refuse_whole(model, base, revision)
        home = base_directory(base, variant=variant).path
        path = checkpoint(model, revision=revision, variant=variant, completed=True).path
        return completed_config(path, home, variant=variant)
    if str(model) in PRESETS and not Path(model).is_dir():
        return preset_config(str(model))
    path = pipeline_directory(model, revision=revision, parts=()).path
    if is_diffusers_directory(path):
        return pipeline_config(path)
    return pipeline_config_from_json(read_kind(path, "pipeline")["config"], path)


def save_pipeline(pipe: Pipeline, out: str | Path, *, overwrite: bool = False) -> str:
    """Writes a pipeline in this package's format; returns its content hash.

    Args:
        pipe: the pipeline.
        out: directory to write; it appears only when it is complete.
        overwrite: replace an existing directory.
    """
    trees = {name: getattr(pipe, name) for name in PARTS}
    refuse_streamed(trees)
    record = {"kind": "pipeline", "config": dataclasses.asdict(pipe.config)} | origin_entry(pipe.origin)
    if pipe.loras:
        record |= {"base": pipe.base, "loras": to_json_values(pipe.loras)}
    with atomic_directory(out, overwrite=overwrite) as partial:
        for folder, tokenizer in pipe.tokenizers.folders().items():
            tokenizer.save_pretrained(partial / folder)
        parts = {name: leaf_paths(tree) for name, tree in trees.items()}
        return save_trees(trees, partial, record, tilings_at(out, parts, PIPELINE))


def load_transcoders(
    path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    sites: Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    sharding: Any = None,
    weights: Weights = "device",
    verify: bool | None = None,
) -> TranscoderSet:
    """Loads the transcoders or SAEs of a model's MLPs.

    Args:
        path: "organism" or "organism-saes" for the embedded model's, a directory that `save_transcoders` wrote, one of
            the reference's `.pt` files, either here or in a bucket, as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, or a
            repository on the hub that holds either: "OWNER/NAME", or `hf:OWNER/NAME[@REVISION][/FOLDER]`.
        revision: of a repository: branch, tag or commit; its default branch if left out.
        subfolder: folder within the directory or repository.
        sites: those wanted, as in ("img/0-3", "txt/*"); all if left out. Files of others are not downloaded.
        dtype: type of the weights in memory.
        sharding: where the leaves of each group's stack go: None, one sharding, a function of the path, or
            `sharding.traced_transcoders`.
        weights: where the stacks stay: on the `device`; or in `host` memory or on `disk`, from where each transcoder is
            fetched when it is needed.
        verify: compare the content hash of our own directories; left out, that of files under 200 MB.
    """
    directory, origin, files = transcoder_directory(path, revision=revision, subfolder=subfolder, sites=sites)
    if is_torch_directory(directory):
        made = transcoders_from_torch(
            directory, dtype=dtype, sharding=sharding, sites=sites, files=files, weights=weights
        )
        return made._replace(origin=origin)
    record = read_kind(directory, "transcoders")
    config = from_json(TranscoderConfig, record["config"], directory)
    held = sites_in(record)
    kept, places = (held, {}) if sites is None else some_sites(held, sites, str(directory))
    options = {"weights": weights, "sharding": sharding, "verify": verify}
    stacks = {
        name: load_stack(
            directory,
            name,
            stacked_transcoders(config, len(held.groups[name]), dtype),
            layers=None if kept == held else places[name],
            **options,
        )
        for name in kept.groups
    }
    source = record["content_hash"] if kept == held else source_of_some(record["content_hash"], kept, stacks)
    return TranscoderSet(stacks, kept, config, source, origin or record.get("origin", ""))


def load_labels(path: str | Path) -> Labels:
    """Loads what the features of a set of transcoders stand for.

    Args:
        path: what `load_transcoders` takes; the labels lie in its `labels.json`.

    Raises:
        UserError: if there are none.
    """
    file = labels_file(path)
    if not file.is_file():
        how = f"make {file} with `difffract features MODEL {path} --scan`"
        if parse_hub_name(str(path)) is not None:
            how = f"`difffract convert transcoders {path} DIR`, then `difffract features MODEL DIR --scan`, make some"
        raise UserError(f"There are no labels of {path}; {how}.")
    return read_labels(file)


def save_transcoders(
    tcs: TranscoderSet, out: str | Path, *, overwrite: bool = False, provenance: Mapping[str, Any] | None = None
) -> str:
    """Writes a set of transcoders in this package's format; returns its content hash.

    Args:
        tcs: the transcoders.
        out: directory to write; it appears only when it is complete.
        overwrite: replace an existing directory.
        provenance: how they were made, from `config.provenance`.
    """
    refuse_streamed(tcs.stacks)
    record = {
        "kind": "transcoders",
        "config": kept_config(tcs.config),
        "layers": tcs.sites.to_json(),
        "provenance": dict(provenance or {}),
    } | origin_entry(tcs.origin)
    groups = tcs.sites.foreign_groups()
    record |= {"groups": groups} if groups else {}
    with atomic_directory(out, overwrite=overwrite) as partial:
        parts = {name: leaf_paths(stack) for name, stack in tcs.stacks.items()}
        return save_trees(tcs.stacks, partial, record, tilings_at(out, parts, dict.fromkeys(parts, TRANSCODER)))


def kept_config(config: TranscoderConfig) -> dict[str, Any]:
    """Returns what a directory of transcoders says of their shape.

    Args:
        config: the shape.
    """
    # Without what is left at "as the input", so that releases which know square transcoders alone read these.
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


def pipeline_config_from_json(record: Any, path: Path) -> PipelineConfig:
    """Rebuilds a pipeline's configuration from `config.json`."""
    parts = (*SHAPES[FLUX1], "defaults")
    if not isinstance(record, Mapping) or record.keys() != {*parts}:
        raise UserError(f"The config.json in {path} does not describe the parts {', '.join(parts)}; convert it again.")
    shapes = {name: from_json(_shape_class(name, record[name], path), record[name], path) for name in SHAPES[FLUX1]}
    return PipelineConfig(**shapes, defaults=from_json(GenerationDefaults, record["defaults"], path))


def _shape_class(part: str, record: Any, path: Path) -> type:
    """Returns the class of a part's shape, by the family that its entry names; FLUX.1's name none."""
    family = record.get("family", FLUX1) if isinstance(record, Mapping) else FLUX1
    cls = shape_class(part, str(family))
    if cls is None:
        raise UserError(
            f"The config.json in {path} has a {part} of the family {family!r}, but this release knows "
            f"{' and '.join(SHAPES)}; use a newer release."
        )
    return cls


def from_json(cls: type[C], record: Any, path: Path) -> C:
    """Rebuilds a frozen dataclass of plain values; JSON has turned its tuples into lists."""
    if not isinstance(record, Mapping):
        raise UserError(
            f"The config.json in {path} has {record!r} in place of the values of {cls.__name__}; convert it again."
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    inner = {one.name: one.type for one in dataclasses.fields(cls) if dataclasses.is_dataclass(one.type)}
    values |= {name: from_json(inner[name], values[name], path) for name in inner if name in values}
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"The config.json in {path} does not fit {cls.__name__} ({error}); convert it again.") from None


def refuse_whole(source: str | Path, base: str | Path | None, revision: str | None = None) -> None:
    """Refuses a base for a pipeline that has all parts.

    Args:
        source: the pipeline.
        base: the base, or None.
        revision: of a repository.
    """
    if base is not None and is_whole_pipeline(source, revision=revision):
        raise UserError(f"--base completes a transformer, but {source} is a directory with all parts; leave it out.")


def origin_entry(origin: str) -> dict[str, str]:
    """Returns what a directory of ours says of the repository that it was converted from."""
    return {"origin": origin} if origin else {}


def read_kind(path: Path, kind: str) -> dict[str, Any]:
    """Reads our `config.json` and checks that it is of the kind that is wanted.

    Args:
        path: the directory.
        kind: as in pipeline or transcoders.
    """
    record = read_config(path)
    found = record.get("kind")
    if found == "transformer":
        raise UserError(f"{path} holds a transformer alone; convert the single file again with --base DIR.")
    if found != kind:
        raise UserError(f"{path} holds {found or 'something else'}, but {kind} is wanted here; give another directory.")
    return record
