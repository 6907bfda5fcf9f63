"""What is known of a kind of pipeline that diffusers saves: folders, classes and names, and how they are read.

1. `PipelineKind` is a kind: its folders, and what it is called.
2. A kind with `tables` has one text encoder, in text_encoder/, and FLUX.1's kind of autoencoder. Every place that
   reads, describes, saves, compares or changes a pipeline asks `ModelTables`, and knows of no model itself. Its
   transformer may come as a single file that a base completes: `ModelTables.layouts`. Other kinds have functions of
   their own in these places.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.flux import Layout
from converters.mapping import Rule
from converters.source import Source
from converters.torch_files import BlockRecord, TransformerInputs, TransformerRecord
from difffract_jax.models.blocks import Cond
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.tokenizers import TokenIds

Rules = tuple[Rule, ...]


class ModelCheck(NamedTuple):
    """How a model is compared with PyTorch's.

    Attributes:
        encoder: what its text encoder is called.
        tolerances: how many tolerances the text is allowed.
        text: from the directory, a prompt's ids and the configuration to the text that PyTorch makes.
        record: runs PyTorch's transformer.
        conditions: what conditions the blocks, ours and PyTorch's.
        given: what conditions one block, with PyTorch's values where it has its own.
    """

    encoder: str
    tolerances: int
    text: Callable[[Path, TokenIds, PipelineConfig], np.ndarray]
    record: Callable[[Path, TransformerInputs], TransformerRecord]
    conditions: Callable[[Cond, TransformerRecord], tuple[Any, Any]]
    given: Callable[[Cond, TransformerRecord, BlockRecord], Cond]


class ModelTables(NamedTuple):
    """How a model is read from diffusers' whole directory, from its transformer's folder, or from a single file.

    Attributes:
        readers: folder -> what its configuration is read by: of transformer, text encoder, autoencoder and scheduler.
        config: puts these together, from what to call them in messages, the directory of all parts but the
            transformer, what was read, and the contents of the autoencoder's `config.json`; the encoder is an
            `AbsentConfig` where there is none.
        shape: class of the transformer's shape.
        module: class of the transformer.
        rules: the transformer's table.
        encoder: from our text encoder to its table backwards, and tensors that its folder has besides.
        lora_tables: class of a part -> the tables that modules of LoRAs are looked up in.
        index: the contents of `model_index.json`.
        described: from a configuration to the `config.json` of the transformer and of the text encoder.
        anchor: pattern of a module of the transformer that no other model has, by which a single file is told.
        names: pattern of modules that no other model has, by which a LoRA is told.
        check: how it is compared with PyTorch's.
        source: what a checkpoint is read as, by the transformer's shape and the checkpoint's layout, None for a kind
            without `layouts`.
        added: what keys end with that `source` adds to a checkpoint's, and that are not written; None where it adds
            none.
        layouts: of single files of the transformer, which a base completes; diffusers' own is the last. Empty where
            there are no such files, or no base completes them.
        sizes: from the shapes of such a file's tensors, and how a head's dimensions are divided among the axes of
            position, to the transformer's shape.
    """

    readers: Mapping[str, Callable[[Mapping[str, object]], Any]]
    config: Callable[[str, Path, list[Any], Mapping[str, Any]], PipelineConfig]
    shape: type
    module: type[MMDiT]
    rules: Rules
    encoder: Callable[[Any], tuple[Rules, dict[str, np.ndarray]]]
    lora_tables: Mapping[type, tuple[Rules, ...]]
    index: Mapping[str, Any]
    described: Callable[[PipelineConfig], tuple[dict[str, Any], dict[str, Any]]]
    anchor: str
    names: str
    check: ModelCheck
    source: Callable[[Source, Any, Layout | None], Source] = lambda source, shape, layout: source
    added: str | None = None
    layouts: tuple[Layout, ...] = ()
    sizes: Callable[[Mapping[str, tuple[int, ...] | None], tuple[int, ...]], Any] | None = None

    def part(self, source: Source, shape: Any, layout: Layout | None) -> tuple[Source, Rules]:
        """Returns what a transformer's part of a checkpoint is read as, and its table.

        Args:
            source: the part, without prefix.
            shape: of the transformer.
            layout: of the part, None for a kind without `layouts`.
        """
        return self.source(source, shape, layout), self.rules if layout is None else layout.rules


class PipelineKind(NamedTuple):
    """A kind of pipeline that diffusers saves.

    Attributes:
        name: its class.
        folders: part of a pipeline -> the folder that holds its weights.
        classes: folder -> the classes it may have.
        tokenizers: folders of the tokenizers.
        releases: where all its parts are.
        models: what it is called in messages.
        published: the models of its kind.
        optional: folders that it may lack.
        tables: how it is read, described, saved and compared, of kinds that have no functions of their own.
    """

    name: str
    folders: Mapping[str, str]
    classes: Mapping[str, tuple[str, ...]]
    tokenizers: tuple[str, ...]
    releases: str
    models: str
    published: str
    optional: tuple[str, ...] = ()
    tables: ModelTables | None = None

    def folders_in(self, home: Path) -> dict[str, str]:
        """Returns part -> folder, without those that a directory may lack and does, and without incomplete encoders."""
        there = {part: one for part, one in self.folders.items() if one not in self.optional or (home / one).is_dir()}
        lacking = self.lacks_encoders(home)
        return {part: one for part, one in there.items() if not (lacking and one in self.encoders)}

    @property
    def completed(self) -> bool:
        """Whether a base completes a transformer of this kind alone."""
        return self.tables is None or bool(self.tables.layouts)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Folders of the text encoders."""
        return tuple(folder for folder in self.classes if folder.startswith("text_encoder"))

    def lacks_encoders(self, home: Path) -> bool:
        """Says whether a directory lacks a text encoder that it must have to read prompts."""
        return not all((home / one).is_dir() for one in self.encoders if one not in self.optional)
