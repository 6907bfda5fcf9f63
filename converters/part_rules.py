"""How each part of a pipeline is converted: its module's shapes, its table, and which keys may be left over.

1. `part_rules`: of any part, by the folder of a pipeline that holds it; the weights may stand under a prefix.
2. `two_clips_rules`: of two CLIPs, which are one part and lie in two folders.
"""

from typing import Any, NamedTuple

from converters.autoencoder import AUTOENCODER_DIFFUSERS, AUTOENCODER_FLUX2, FLUX2_IGNORED
from converters.contents import check_autoencoder, check_weights, find_transformer, without_prefix
from converters.flux import FLUX_DIFFUSERS
from converters.flux2 import FLUX2_DIFFUSERS
from converters.kinds import tables_of
from converters.mapping import Ignored, Labels, Rule, Source
from converters.qwen3 import qwen3_tables
from converters.sd3 import SD3_DIFFUSERS, sd3_labels
from converters.source import JoinedSource
from converters.text_encoders import CLIP_PREFIX, clip_tables, t5_tables, two_clip_tables
from difffract_jax.models.autoencoder import Flux2AutoencoderConfig
from difffract_jax.models.families import module_of
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.qwen3 import Qwen3Config
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.models.sd3_text import TwoClipsConfig
from difffract_jax.models.shapes import abstract_module

_OF_DIFFUSERS = ((Sd3Config, SD3_DIFFUSERS), (Flux2Config, FLUX2_DIFFUSERS), (FluxConfig, FLUX_DIFFUSERS))
"""Class of a transformer's shape -> its table, where no key tells the layout; derived classes come first."""
_EMBEDDING = "embeddings.token_embedding.weight"
_CLIP_ANCHORS = (f"{CLIP_PREFIX}{_EMBEDDING}", _EMBEDDING)


class PartRules(NamedTuple):
    """How one part of a pipeline is converted.

    Attributes:
        abstract: its module's shapes.
        rules: its table.
        ignored: keys that may be left over.
        labels: names of stacked layers, see `mapping.expand`.
    """

    abstract: Any
    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()
    labels: Labels | None = None


def part_rules(name: str, config: PipelineConfig, source: Source, dtype: Any) -> tuple[Source, PartRules]:
    """Returns the part of a folder's weights that is wanted, and how it is converted.

    Args:
        name: of the part.
        config: of the pipeline.
        source: the folder's weights.
        dtype: of the weights that are made.
    """
    check_weights(source)
    shape = getattr(config, name)
    abstract = abstract_module(module_of(shape), shape, dtype)
    tables = tables_of(shape)
    if tables is not None:
        place = find_transformer(source) if tables.layouts else None
        part, layout = place or (source, tables.layouts[-1] if tables.layouts else None)
        own, rules = tables.part(part, shape, layout)
        return own, PartRules(abstract, rules)
    if isinstance(shape, Qwen3Config):
        source = without_prefix(source, "model.embed_tokens.weight")
        return source, PartRules(abstract, *qwen3_tables(shape, list(source)))
    if name == "transformer":
        # A file of another layout or prefix may stand under diffusers' name.
        part_and_layout = find_transformer(source)
        part, rules = source, next(table for kind, table in _OF_DIFFUSERS if isinstance(shape, kind))
        if part_and_layout is not None:
            part, rules = part_and_layout[0], part_and_layout[1].rules
        labels = sd3_labels(shape) if isinstance(shape, Sd3Config) else None
        return part, PartRules(abstract, rules, labels=labels)
    if name == "t5":
        source = without_prefix(source, "encoder.final_layer_norm.weight")
        return source, PartRules(abstract, *t5_tables(list(source)))
    if name == "clip":
        source = without_prefix(source, *_CLIP_ANCHORS)
        return source, PartRules(abstract, *clip_tables(list(source)))
    source = without_prefix(source, "decoder.conv_in.weight")
    check_autoencoder(source)
    if isinstance(shape, Flux2AutoencoderConfig):
        return source, PartRules(abstract, AUTOENCODER_FLUX2, FLUX2_IGNORED)
    return source, PartRules(abstract, AUTOENCODER_DIFFUSERS)


def two_clips_rules(config: PipelineConfig, first: Source, second: Source, dtype: Any) -> tuple[Source, PartRules]:
    """Returns the weights of two CLIPs as one checkpoint, and how they are converted.

    Args:
        config: of the pipeline.
        first: weights of the first.
        second: weights of the second.
        dtype: of the weights that are made.
    """
    parts = {}
    for name, source in (("first", first), ("second", second)):
        check_weights(source)
        parts[name] = without_prefix(source, *_CLIP_ANCHORS)
    shape = config.clip
    assert isinstance(shape, TwoClipsConfig)
    rules = PartRules(abstract_module(module_of(shape), shape, dtype), *two_clip_tables(parts))
    return JoinedSource(f"{first.name} and {second.name}", parts), rules
