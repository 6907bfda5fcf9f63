"""Checkpoints of other libraries into directories of ours, and back, leaf by leaf: no model is ever in memory.

1. The checkpoint is checked as a whole by its headers; `converters` says how each leaf is made.
2. `storage.streaming` makes a slice of a leaf at a time, writes and hashes it. What is finished outlives an
   interruption: the same call goes on from there, if the source and the settings are the same.
3. After every leaf the source's files are compared with what they were, in size and time: a change ends the conversion.
4. Weights keep their type unless told otherwise: bfloat16 where all of a part are, else float32.

What is written equals what `loading.save_pipeline` and `save_transcoders` write of the same weights, byte for byte.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from converters.configurations import is_diffusers_directory
from converters.mapping import ConversionError, problems_of
from converters.merging import merge_leaves
from converters.pipelines import Opened, open_pipeline, open_transformer, sliced
from converters.source import stored_dtype
from converters.transcoders import (
    OpenedSites,
    export_site,
    is_torch_directory,
    open_torch,
    refuse_foreign_parts,
    stacked_transcoders,
)
from difffract_jax import __version__
from difffract_jax.config import UserError
from difffract_jax.directories import (
    base_directory,
    checkpoint,
    is_transformer_directory,
    pipeline_directory,
    transcoder_directory,
)
from difffract_jax.estimate.weights import abstract_parts
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.graphs.loras import MergedLora
from difffract_jax.loading import (
    PARTS,
    from_json,
    kept_config,
    origin_entry,
    pipeline_config_from_json,
    read_kind,
    refuse_whole,
)
from difffract_jax.lora import OpenedLora, check_loras, open_loras
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.tokenizers import load_tokenizers
from difffract_jax.parts import identity_of_leaves
from difffract_jax.sharding import PIPELINE, TRANSCODER, tilings_at
from difffract_jax.storage.checkpoint import Tilings, leaf_paths, open_tree
from difffract_jax.storage.files import TensorFile, check_vacant
from difffract_jax.storage.resumable import Output, checksum_of, resumable_directory
from difffract_jax.storage.streaming import Leaf, stream_trees
from difffract_jax.transcoders.sites import SiteSet, are_chosen, sites_in, sites_of
from difffract_jax.transcoders.transcoder import TranscoderConfig

Advance = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


class Converted(NamedTuple):
    """What was written.

    Attributes:
        path: the directory.
        source: content hash of the weights; "" for `.pt` files, which have none.
        parameters: part, or group of sites -> its number of parameters.
        dtypes: part, or group of sites -> type of its weights.
        config: shapes: of a pipeline, of a transformer alone, or of each transcoder.
        sites: sites that have a transcoder; None for a pipeline or a transformer.
        loras: that were merged into the weights.
    """

    path: Path
    source: str
    parameters: dict[str, int]
    dtypes: dict[str, str]
    config: PipelineConfig | FluxConfig | TranscoderConfig
    sites: SiteSet | None = None
    loras: tuple[MergedLora, ...] = ()


def convert_flux(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    variant: str | None = None,
    dtype: Any = None,
    lora: Sequence[str | Path] = (),
    overwrite: bool = False,
    progress: Advance = lambda done, total: None,
) -> Converted:
    """Converts a diffusers directory, or a transformer alone, into a directory of ours.

    Args:
        source: the directory or `.safetensors` file, here or on the hub.
        out: directory to write; it appears only when it is complete. What an interrupted call has finished is kept
            beside it, and used by the same call.
        base: for a transformer alone, the diffusers directory with the other parts; without it only the transformer is
            converted.
        variant: which weights of a diffusers directory to take where it has several, as in fp16.
        dtype: type of the weights that are written; if left out, bfloat16 for parts whose weights all are, else
            float32.
        lora: LoRAs to merge into the weights, each FILE or FILE:SCALE, see `load_pipeline`.
        overwrite: replace an existing directory.
        progress: called with bytes written and bytes in all.

    Returns:
        What was written; `load_pipeline` loads it.

    Raises:
        UserError: if the source is none of these or does not fit, a LoRA is of another model, the source changes
            meanwhile, or the disk has not enough room.
    """
    refuse_whole(source, base)
    loras = open_loras((lora,) if isinstance(lora, str | Path) else lora)
    # Entered first, so that an occupied target is refused before hours of work.
    with resumable_directory(out, overwrite=overwrite) as output:
        given = checkpoint(source, variant=variant, completed=base is not None)
        completed = None if base is None else base_directory(base, variant=variant)
        home = None if completed is None else completed.path
        if home is not None or (given.path.is_dir() and not is_transformer_directory(given.path)):
            opened, kind = open_pipeline(given.path, base=home, dtype=dtype, variant=variant), "pipeline"
        else:
            opened, kind = open_transformer(given.path, dtype=dtype, variant=variant), "transformer"
        record = {"kind": kind, "config": dataclasses.asdict(opened.config)} | origin_entry(given.origin)
        merged = opened.parts
        if loras:
            merged = _merged(opened, loras)
            record |= {"base": identity_of_leaves(opened.parts, given, base=completed, variant=variant)}
            record |= {"loras": to_json_values(tuple(one.info for one in loras))}
        tilings = tilings_at(out, merged, PIPELINE)
        digest = _stream(merged, opened.files, output, record, str(given.path), progress, tilings)
        _save_tokenizers(opened, output.files)
    infos = tuple(one.info for one in loras)
    return Converted(Path(out), digest, *_counts(opened.parts), opened.config, loras=infos)


convert_model = convert_flux
"""Converts a model of any kind that `converters.kinds` lists, which it tells by its class and its keys."""


def convert_transcoders(
    source: str | Path,
    out: str | Path,
    *,
    sites: Sequence[str] | None = None,
    to_torch: bool = False,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Advance = lambda done, total: None,
) -> Converted:
    """Converts the reference's `.pt` files into a directory of ours, or back.

    Args:
        source: directory to read, of either kind, or a repository on the hub that holds it.
        out: directory to write; it appears only when it is complete, see `convert_flux`.
        sites: those wanted, as in ("img/0-3", "txt/*"); all if left out.
        to_torch: write `.pt` files instead of our format.
        dtype: type of the weights that are written; if left out, bfloat16 where all are, else float32.
        overwrite: replace an existing directory.
        progress: called with bytes written and bytes in all.

    Returns:
        What was written; `load_transcoders` loads it.

    Raises:
        UserError: as `convert_flux`.
    """
    check_vacant(out, overwrite=overwrite)  # before anything is downloaded
    with resumable_directory(out, overwrite=overwrite) as output:
        directory, origin, files = transcoder_directory(source, sites=sites)
        if is_torch_directory(directory):
            opened = open_torch(directory, sites=sites, files=files, dtype=dtype)
        else:
            opened = _open_ours(directory, sites, dtype)
            origin = origin or read_kind(directory, "transcoders").get("origin", "")
        if to_torch:
            _stream_sites(opened, output, str(directory), progress)
            digest = ""
        else:
            record = {"kind": "transcoders", "config": kept_config(opened.config), "layers": opened.sites.to_json()}
            record |= {"provenance": {}} | origin_entry(origin)
            groups = opened.sites.foreign_groups()
            record |= {"groups": groups} if groups else {}
            tilings = tilings_at(out, opened.stacks, dict.fromkeys(opened.stacks, TRANSCODER))
            digest = _stream(opened.stacks, opened.files, output, record, str(directory), progress, tilings)
    return Converted(Path(out), digest, *_counts(opened.stacks), opened.config, opened.sites)


def open_model(model: str | Path, *, dtype: Any = None) -> Opened:
    """Says how the leaves of a pipeline are made, whether it is one of ours or would have to be converted.

    Args:
        model: "organism", a directory of diffusers or of ours, or a repository on the hub.
        dtype: type of the weights of one that is not ours, see `convert_flux`.

    Raises:
        UserError: as `load_pipeline`.
    """
    path = pipeline_directory(model).path
    if is_diffusers_directory(path):
        return open_pipeline(path, dtype=dtype)
    config = pipeline_config_from_json(read_kind(path, "pipeline")["config"], path)
    parts: dict[str, dict[str, Leaf]] = {}
    for name, abstract in abstract_parts({name: getattr(config, name) for name in PARTS}, np.float32).items():
        leaves, files = leaf_paths(abstract), open_tree(path, abstract, name=name)
        parts[name] = sliced(
            getattr(config, name),
            {one: jax.ShapeDtypeStruct(leaf.shape, files[one].dtype(one)) for one, leaf in leaves.items()},
            lambda one, layer, files=files: files[one].read(one, layer),
        )
    return Opened(parts, config, load_tokenizers(path, thinking=config.transformer.thinking), ())


def _merged(opened: Opened, loras: Sequence[OpenedLora]) -> dict[str, dict[str, Leaf]]:
    """Returns the leaves of all parts with LoRAs merged."""
    config = opened.config
    shapes = vars(config) if isinstance(config, PipelineConfig) else {"transformer": config}
    changes = check_loras(loras, shapes)
    return {part: merge_leaves(leaves, changes.get(part, ())) for part, leaves in opened.parts.items()}


def _stream(
    trees: Mapping[str, Mapping[str, Leaf]],
    files: Sequence[Path],
    output: Output,
    record: Mapping[str, Any],
    source: str,
    progress: Advance,
    tilings: Tilings,
) -> str:
    """Writes all parts and `config.json`; returns the content hash. Problems of their values are told together."""
    stamps = _stamps(files)
    output.begin(
        _identity(trees, stamps, record.get("loras")),
        sum(leaf.nbytes for leaves in trees.values() for leaf in leaves.values()),
    )
    try:
        check = partial(_refuse_changes, stamps, output)
        return stream_trees(trees, output, record, tilings=tilings, check=check, advance=progress)
    except ConversionError:
        output.discard()
        problems = [problem for leaves in trees.values() for problem in problems_of(leaves.values())]
        raise ConversionError(source, problems) from None
    except UserError:
        _refuse_changes(stamps, output)  # which says more than that a file is too short
        raise


def _stream_sites(opened: OpenedSites, output: Output, source: str, progress: Advance) -> None:
    """Writes one `.pt` file per site, one at a time."""
    refuse_foreign_parts(opened.config, opened.stacks)
    stamps = _stamps(opened.files)
    total = sum(leaf.nbytes for leaves in opened.stacks.values() for leaf in leaves.values())
    output.begin(_identity(opened.stacks, stamps) + " .pt", total)
    sites = [(group, place) for group, numbers in opened.sites.groups.items() for place in range(len(numbers))]
    for count, (group, place) in enumerate(sites, 1):
        name = f"{opened.config.role}_{group}_{opened.sites.groups[group][place]}.pt"
        if output.finished.get(name, -1) != checksum_of(output.files / name):
            export_site(opened.stacks[group], place, output.files / f".{name}")
            _refuse_changes(stamps, output)
            os.replace(output.files / f".{name}", output.files / name)
            output.finish(name, checksum_of(output.files / name))
        progress(total * count // len(sites), total)


def _open_ours(directory: Path, sites: Sequence[str] | None, dtype: Any) -> OpenedSites:
    """Says how the leaves of a directory of ours are read, those of the wanted sites."""
    record = read_kind(directory, "transcoders")
    config, held = from_json(TranscoderConfig, record["config"], directory), sites_in(record)
    stacks: dict[str, dict[str, Leaf]] = {}
    members: dict[str, tuple[int, ...]] = {}
    files: list[Path] = []
    names = [(group.label, number) for group, numbers in held.members for number in numbers]
    wanted = iter([True] * len(names) if sites is None else are_chosen(sites, names, str(directory)))
    for group, numbers in held.groups.items():
        abstract = stacked_transcoders(config, len(numbers), np.float32)
        found = open_tree(directory, abstract, name=group)
        tensors = {name: found[name] for name in leaf_paths(abstract)}
        places = [place for place, chosen in zip(range(len(numbers)), wanted, strict=False) if chosen]
        kind = stored_dtype(tensors[name].dtype(name) for name in tensors) if dtype is None else dtype
        if places:
            stacks[group] = {name: _row_leaf(file, name, places, np.dtype(kind)) for name, file in tensors.items()}
            members[group] = tuple(numbers[place] for place in places)
            files += sorted({file.path for file in tensors.values()})
    chosen = sites_of(members, tuple(group for group, _ in held.members))
    return OpenedSites(config, chosen, stacks, tuple(files))


def _row_leaf(file: TensorFile, name: str, places: Sequence[int], dtype: np.dtype) -> Leaf:
    """Returns a stack of some of a stored stack's sites."""

    def make(number: int) -> np.ndarray:
        return file.read(name, places[number]).astype(dtype, copy=False)

    return Leaf(dtype, (len(places), *file.tensors[name].shape[1:]), len(places), make)


def _save_tokenizers(opened: Opened, directory: Path) -> None:
    if opened.tokenizers is not None:
        for name, tokenizer in opened.tokenizers.folders().items():
            shutil.rmtree(directory / name, ignore_errors=True)  # of an interrupted call
            tokenizer.save_pretrained(directory / name)


def _counts(trees: Mapping[str, Mapping[str, Leaf]]) -> tuple[dict[str, int], dict[str, str]]:
    """Returns the number of parameters and the type of every part."""
    sizes = {name: sum(leaf.nbytes // leaf.dtype.itemsize for leaf in tree.values()) for name, tree in trees.items()}
    return sizes, {name: next(iter(tree.values())).dtype.name for name, tree in trees.items() if tree}


def _stamps(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Returns the size and the time of every file."""
    return {path: (status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]}


def _identity(
    trees: Mapping[str, Mapping[str, Leaf]], stamps: Mapping[Path, tuple[int, int]], loras: Any = None
) -> str:
    """Says all that an output depends on: the source's files, LoRAs, and every leaf's name, type and shape."""
    leaves = [(name, path, leaf.dtype.name, leaf.shape) for name, tree in trees.items() for path, leaf in tree.items()]
    sources = [(str(path.resolve()), *stamp) for path, stamp in stamps.items()]
    return json.dumps([__version__, sources, leaves, loras])


def _refuse_changes(stamps: Mapping[Path, tuple[int, int]], output: Output) -> None:
    """Refuses to go on with files that are no longer what they were."""
    for path, stamp in stamps.items():
        try:
            now = _stamps([path])[path]
        except OSError:
            raise UserError(f"{path} has vanished while it was converted; put it back, then run this again.") from None
        if now != stamp:
            output.discard()
            raise UserError(f"{path} has changed while it was converted; start again when nothing writes to it.")
