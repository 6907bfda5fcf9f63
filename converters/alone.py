"""A transformer alone: whose it is, its shape, and the shapes of the pipeline that a base directory completes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from converters.configurations import (
    check_base,
    check_fit,
    defaults_of,
    flux2_attributes_beside,
    read_configs,
    read_json,
    rope_axes_beside,
    scheduler_of,
    sd3_attributes_beside,
    sd3_parts,
    sd3_sample_size,
    tabled_beside,
)
from converters.contents import check_weights, describe, find_transformer, transformer_files, transformer_of
from converters.flux import Layout, flux_config_from_shapes
from converters.flux2 import (
    FLUX2_LAYOUTS,
    FLUX2_OF_DIFFUSERS,
    flux2_config_from_diffusers,
    flux2_config_from_shapes,
)
from converters.kinds import FLUX1, KLEIN, SD3, TABLED
from converters.klein import READERS, klein_config
from converters.mapping import Rule
from converters.pipeline_kind import PipelineKind
from converters.sd3 import SD3_LAYOUTS, SD3_OF_DIFFUSERS, sd3_config_from_diffusers, sd3_config_from_shapes
from converters.sd3_pipeline import READERS as SD3_READERS
from converters.sd3_pipeline import sd3_config
from converters.source import Source
from difffract_jax.config import UserError
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.pipeline import PipelineConfig
from difffract_jax.models.sd3 import Sd3Config

ROPE_AXES = (16, 56, 56)
"""How FLUX.1 divides a head's dimensions among the axes of position."""


def transformer_path(path: Path) -> Path:
    """Returns the file, or directory of shards, that holds the transformer that a path stands for.

    Args:
        path: a file, a transformer's directory, or a pipeline's.
    """
    if not path.is_dir():
        return path
    if (path / "transformer").is_dir():
        return path / "transformer"
    files = transformer_files(path)
    # Shards are found by their names in the directory.
    return files[0] if len(files) == 1 and not (path / "config.json").is_file() else path


def flux2_transformer(
    path: Path, variant: str | None, *, quiet: bool = False
) -> tuple[Source, Layout, Flux2Config] | None:
    """Finds a transformer of FLUX.2.

    Args:
        path: its file, or its directory.
        variant: which files to take, see `pipelines.convert_pipeline`.
        quiet: whether the log says nothing of what is left aside.

    Returns:
        The transformer's part of the checkpoint, its layout, and its shape, which the configuration beside it tells,
        or else its tensors do. None for another model's.
    """
    attributes = flux2_attributes_beside(path)
    place = _part_and_layout(path, variant, FLUX2_LAYOUTS, FLUX2_OF_DIFFUSERS, attributes is not None, quiet)
    if place is None:
        return None
    part, layout = place
    if attributes is None:
        return part, layout, flux2_config_from_shapes(part.shapes())
    return part, layout, flux2_config_from_diffusers(attributes)


def sd3_transformer(
    path: Path, variant: str | None, *, head_dim: int | None = None, quiet: bool = False
) -> tuple[Source, Layout, Sd3Config] | None:
    """Finds a transformer of Stable Diffusion 3; arguments and results as of `flux2_transformer`.

    Args:
        path: its file, or its directory.
        variant: which files to take.
        head_dim: columns of a head, where neither a configuration nor a tensor tells; see `sd3_config_from_shapes`.
        quiet: whether the log says nothing.
    """
    attributes = sd3_attributes_beside(path)
    place = _part_and_layout(path, variant, SD3_LAYOUTS, SD3_OF_DIFFUSERS, attributes is not None, quiet)
    if place is None:
        return None
    part, layout = place
    what = describe(list(part), beside_transformer=True)
    if what is not None:
        raise UserError(f"{part.name} is {what}; a transformer of Stable Diffusion 3 is wanted here.")
    if attributes is None:
        return part, layout, sd3_config_from_shapes(part.shapes(), head_dim)
    return part, layout, sd3_config_from_diffusers(attributes)


class TabledTransformer(NamedTuple):
    """A transformer of a kind with `PipelineKind.tables`.

    Attributes:
        kind: the kind.
        source: what its part of the checkpoint is read as.
        rules: its table.
        shape: its shape.
    """

    kind: PipelineKind
    source: Source
    rules: tuple[Rule, ...]
    shape: Any


def tabled_transformer(
    path: Path, variant: str | None, *, rope_axes: tuple[int, ...] | None = None, quiet: bool = False
) -> TabledTransformer | None:
    """Finds a transformer of a kind with `PipelineKind.tables`; None for another kind's.

    Args:
        path: its file, or its directory.
        variant: which files to take, see `pipelines.convert_pipeline`.
        rope_axes: how a head's dimensions are divided among the axes of position, where no configuration tells; as in
            FLUX.1's release if left out.
        quiet: whether the log says nothing of what is left aside.
    """
    place = _tabled_part(path, variant, quiet)
    if place is None:
        return None
    kind, part, layout = place
    tables, beside = kind.tables, tabled_beside(path)
    assert tables is not None
    if beside is not None:
        shape = tables.readers["transformer"](beside[1])
    else:
        assert tables.sizes is not None
        shape = tables.sizes(part.shapes(), rope_axes or ROPE_AXES)
    return TabledTransformer(kind, *tables.part(part, shape, layout), shape)


def _tabled_part(path: Path, variant: str | None, quiet: bool) -> tuple[PipelineKind, Source, Layout | None] | None:
    """Returns the kind of a checkpoint's transformer, its part and its layout; None where its kind has no `tables`.

    A transformer of a kind without layouts is known by the configuration beside it.
    """
    beside = tabled_beside(path)
    for kind in TABLED.values():
        layouts, known = kind.tables.layouts if kind.tables else (), beside is not None and beside[0] is kind
        if layouts:
            place = _part_and_layout(path, variant, layouts, layouts[-1], known, quiet)
            if place is not None:
                return kind, *place
        elif known:
            source = Source(path, variant=variant)
            check_weights(source)
            return kind, source, None
    return None


def _part_and_layout(
    path: Path, variant: str | None, layouts: Sequence[Layout], usual: Layout, known: bool, quiet: bool
) -> tuple[Source, Layout] | None:
    """Returns a checkpoint's transformer and its layout; None where it has none of some layouts.

    Args:
        path: its file, or its directory.
        variant: which files to take.
        layouts: that are wanted.
        usual: the one whose keys are missed where there is none, though the configuration says that there is.
        known: whether the configuration says so.
        quiet: whether the log says nothing.
    """
    source = Source(path, variant=variant)
    place = find_transformer(source, quiet=True)
    if not known and (place is None or place[1] not in layouts):
        return None
    if not quiet:
        find_transformer(source)  # which tells of it
    part, layout = place or (source, usual)
    check_weights(part)
    return part, layout


def completed_config(source: str | Path, base: str | Path, *, variant: str | None = None) -> PipelineConfig:
    """Returns the shapes of a pipeline that a base completes, from the headers of the transformer's file alone.

    Args:
        source: the transformer, as `pipelines.convert_transformer` takes it.
        base: diffusers directory with the other parts.
        variant: which files to take, see `pipelines.convert_pipeline`.

    Raises:
        UserError: as `pipelines.convert_pipeline`, as far as headers and configurations show it.
    """
    source, base = Path(source), Path(base)
    kind, path = check_base(base), transformer_path(source)
    place = _tabled_part(path, variant, quiet=True)
    tabled = None if place is None else place[0]
    if tabled is not None and not tabled.completed:
        raise UserError(
            f"{source} is, or holds, a transformer of {tabled.models}, which --base cannot complete; give the "
            "whole pipeline, without --base."
        )
    sd3 = None if tabled is not None else sd3_transformer(path, variant, head_dim=head_dim_of(base), quiet=True)
    flux2 = None if tabled is not None or sd3 is not None else flux2_transformer(path, variant, quiet=True)
    own = tabled if tabled is not None else SD3 if sd3 is not None else KLEIN if flux2 is not None else FLUX1
    if own is FLUX1:
        transformer_of(Source(path, variant=variant), quiet=True)  # which refuses what is none at all
    if own is not kind:
        raise UserError(
            f"{source} is, or holds, a transformer of {own.models}, but the base {base} is a pipeline of "
            f"{kind.models}; give a base of {own.models}."
        )
    if tabled is not None:
        return _completed_tabled(source, base, path, variant)
    if sd3 is not None:
        return _completed_sd3(source, base, sd3[2])
    return _completed_flux1(source, base, path, variant) if flux2 is None else _completed_klein(source, base, flux2[2])


def refuse_alone(path: Path, name: str) -> None:
    """Refuses a directory with a transformer alone that no base completes.

    Args:
        path: the directory.
        name: what it was given as.

    Raises:
        UserError: if it is one.
    """
    beside = tabled_beside(path)
    if beside is not None and not beside[0].completed:
        raise UserError(
            f"{name} is {beside[0].models}'s transformer alone, which --base cannot complete; give the whole pipeline."
        )


def head_dim_of(base: Path) -> int | None:
    """Returns the columns of a head of Stable Diffusion 3, by the base's own transformer; None if it has none."""
    folder = base / "transformer"
    attributes = sd3_attributes_beside(folder) if folder.is_dir() else None
    return None if attributes is None else sd3_config_from_diffusers(attributes).head_dim


def _tabled_axes(base: Path) -> tuple[int, ...] | None:
    """Returns the axes of position by the base's own transformer, of a kind with `tables`; None if it has none."""
    beside = tabled_beside(base / "transformer")
    tables = None if beside is None else beside[0].tables
    return None if beside is None or tables is None else tables.readers["transformer"](beside[1]).rope_axes


def _completed_tabled(source: Path, base: Path, path: Path, variant: str | None) -> PipelineConfig:
    found = tabled_transformer(path, variant, rope_axes=_tabled_axes(base), quiet=True)
    assert found is not None and found.kind.tables is not None
    tables = found.kind.tables
    others = [part for part in tables.readers if part not in ("transformer", "scheduler")]
    read = [found.shape, *read_configs(base, others, tables.readers), scheduler_of((source, base), found.shape)]
    index_of_vae = read_json(base / "vae" / "config.json", "an autoencoder")
    return tables.config(f"{source} and {base}", base, read, index_of_vae)


def _completed_sd3(source: Path, base: Path, shape: Sd3Config) -> PipelineConfig:
    others = [part for part in SD3_READERS if part != "transformer"]
    configs = sd3_parts(base, others) | {"transformer": shape, "scheduler": scheduler_of((source, base), shape)}
    return sd3_config(f"{source} and {base}", configs, sd3_sample_size(base))


def _completed_klein(source: Path, base: Path, shape: Flux2Config) -> PipelineConfig:
    encoder, vae = read_configs(base, ("text_encoder", "vae"), READERS)
    read = [shape, encoder, vae, scheduler_of((source, base), shape)]
    index = read_json(base / "model_index.json", "a diffusers pipeline directory")
    vae_index = read_json(base / "vae" / "config.json", "an autoencoder")
    return klein_config(base, read, index, vae_index, f"{source} and {base}")


def _completed_flux1(source: Path, base: Path, path: Path, variant: str | None) -> PipelineConfig:
    t5, clip, vae = read_configs(base, ("text_encoder_2", "text_encoder", "vae"))
    axes = rope_axes_beside(path) or rope_axes_beside(base / "transformer") or ROPE_AXES
    part, _ = transformer_of(Source(path, variant=variant), quiet=True)
    shape = flux_config_from_shapes(part.shapes(), axes)
    check_fit(f"{source} and {base}", shape, t5, clip, vae)
    return PipelineConfig(shape, t5, clip, vae, scheduler_of((source, base), shape), defaults_of(base, shape))
