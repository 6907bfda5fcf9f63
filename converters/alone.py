"""A transformer alone: whose it is, its shape, and the shapes of the pipeline that a base directory completes."""

from collections.abc import Sequence
from pathlib import Path

from converters.chroma import (
    CHROMA_LAYOUTS,
    CHROMA_OF_DIFFUSERS,
    chroma_config_from_diffusers,
    chroma_config_from_shapes,
)
from converters.chroma_pipeline import READERS as CHROMA_READERS
from converters.chroma_pipeline import chroma_config
from converters.configurations import (
    check_base,
    check_fit,
    chroma_attributes_beside,
    defaults_of,
    flux2_attributes_beside,
    read_configs,
    read_json,
    rope_axes_beside,
    scheduler_of,
    sd3_attributes_beside,
    sd3_parts,
    sd3_sample_size,
)
from converters.contents import check_weights, describe, find_transformer, transformer_files, transformer_of
from converters.flux import Layout, flux_config_from_shapes
from converters.flux2 import (
    FLUX2_LAYOUTS,
    FLUX2_OF_DIFFUSERS,
    flux2_config_from_diffusers,
    flux2_config_from_shapes,
)
from converters.kinds import CHROMA, FLUX1, KLEIN, SD3
from converters.klein import READERS, klein_config
from converters.sd3 import SD3_LAYOUTS, SD3_OF_DIFFUSERS, sd3_config_from_diffusers, sd3_config_from_shapes
from converters.sd3_pipeline import READERS as SD3_READERS
from converters.sd3_pipeline import sd3_config
from converters.source import Source
from difffract_jax.config import UserError
from difffract_jax.models.chroma import ChromaConfig
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


def chroma_transformer(
    path: Path, variant: str | None, *, rope_axes: tuple[int, ...] | None = None, quiet: bool = False
) -> tuple[Source, Layout, ChromaConfig] | None:
    """Finds a transformer of Chroma; arguments and results as of `flux2_transformer`.

    Args:
        path: its file, or its directory.
        variant: which files to take.
        rope_axes: how a head's dimensions are divided among the axes of position, where no configuration tells; as in
            the release if left out.
        quiet: whether the log says nothing.
    """
    attributes, place = chroma_attributes_beside(path), _chroma_part(path, variant, quiet)
    if place is None:
        return None
    part, layout = place
    if attributes is None:
        return part, layout, chroma_config_from_shapes(part.shapes(), rope_axes or ROPE_AXES)
    return part, layout, chroma_config_from_diffusers(attributes)


def _chroma_part(path: Path, variant: str | None, quiet: bool) -> tuple[Source, Layout] | None:
    """Returns the part of a checkpoint that is a transformer of Chroma, and its layout; None where there is none."""
    known = chroma_attributes_beside(path) is not None
    return _part_and_layout(path, variant, CHROMA_LAYOUTS, CHROMA_OF_DIFFUSERS, known, quiet)


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
    sd3 = sd3_transformer(path, variant, head_dim=head_dim_of(base), quiet=True)
    flux2 = None if sd3 is not None else flux2_transformer(path, variant, quiet=True)
    own = SD3 if sd3 is not None else KLEIN if flux2 is not None else FLUX1
    if own is FLUX1 and _chroma_part(path, variant, quiet=True) is not None:
        own = CHROMA
    if own is FLUX1:
        transformer_of(Source(path, variant=variant), quiet=True)  # which refuses what is none at all
    if own is not kind:
        raise UserError(
            f"{source} is, or holds, a transformer of {own.models}, but the base {base} is a pipeline of "
            f"{kind.models}; give a base of {own.models}."
        )
    if sd3 is not None:
        return _completed_sd3(source, base, sd3[2])
    if own is CHROMA:
        return _completed_chroma(source, base, path, variant)
    return _completed_flux1(source, base, path, variant) if flux2 is None else _completed_klein(source, base, flux2[2])


def head_dim_of(base: Path) -> int | None:
    """Returns the columns of a head of Stable Diffusion 3, by the base's own transformer; None if it has none."""
    folder = base / "transformer"
    attributes = sd3_attributes_beside(folder) if folder.is_dir() else None
    return None if attributes is None else sd3_config_from_diffusers(attributes).head_dim


def _chroma_axes_of(base: Path) -> tuple[int, ...] | None:
    """Returns Chroma's axes of position, by the base's own transformer; None if it has none."""
    attributes = chroma_attributes_beside(base / "transformer")
    return None if attributes is None else chroma_config_from_diffusers(attributes).rope_axes


def _completed_chroma(source: Path, base: Path, path: Path, variant: str | None) -> PipelineConfig:
    found = chroma_transformer(path, variant, rope_axes=_chroma_axes_of(base), quiet=True)
    assert found is not None
    shape = found[2]
    encoder, vae = read_configs(base, ("text_encoder", "vae"), CHROMA_READERS)
    read = [shape, encoder, vae, scheduler_of((source, base), shape)]
    return chroma_config(f"{source} and {base}", read, read_json(base / "vae" / "config.json", "an autoencoder"))


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
