"""The MM-DiT of Chroma: a table of rules for each layout it is published in, and its configuration.

1. `CHROMA_DIFFUSERS`, of diffusers' `ChromaTransformer2DModel`, and `CHROMA_ORIGINAL`, of the original release, one
   file, are FLUX.1's tables and the modulator's rows. Rules for what Chroma lacks, modulations of blocks and
   embeddings of time, pooled text and guidance, match none of its leaves.
2. A block of ours has its number, by which it finds its modulations; a checkpoint numbers blocks in the names of their
   tensors alone. `NumberedSource` is such a checkpoint with these numbers as tensors.
3. `chroma_config_from_diffusers` reads its `config.json` by an allow-list, and `chroma_config_to_diffusers` writes it;
   `chroma_config_from_shapes` reads the sizes off a single file, which has no configuration.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.flux import (
    DIFFUSERS,
    FLUX_DIFFUSERS,
    ORIGINAL,
    Layout,
    blocks_told,
    depth_told,
    sizes_read,
    sizes_written,
)
from converters.mapping import Rule, transpose
from converters.source import Source
from difffract_jax.address import flux_layout
from difffract_jax.config import UserError
from difffract_jax.models.chroma import ChromaConfig

CLASS = "ChromaTransformer2DModel"
NUMBER = ".number"
"""What keys of blocks' numbers end with, which `NumberedSource` adds."""
_STACKS = tuple(stack.name for stack in flux_layout(1, 1).stacks)
_NETWORK = "distilled_guidance_layer"


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    source, target = f"{_NETWORK}.{source}", f"modulator.{target}"
    return Rule(f"{source}.weight", f"{target}.kernel", transpose), Rule(f"{source}.bias", f"{target}.bias")


def _modulator(up: str, down: str, scale: str) -> tuple[Rule, ...]:
    """Returns the modulator's rules, by what a layout calls a layer's matrices and the scale of its norm."""
    return (
        *_linear("in_proj", "inputs"),
        *_linear(f"layers.{{layer}}.{up}", "layers.up"),
        *_linear(f"layers.{{layer}}.{down}", "layers.down"),
        Rule(f"{_NETWORK}.norms.{{layer}}.{scale}", "modulator.layers.norm.scale"),
        *_linear("out_proj", "outputs"),
    )


def _numbers(layout: Layout) -> tuple[Rule, ...]:
    pairs = zip(layout.blocks, _STACKS, strict=True)
    return tuple(Rule(f"{blocks}.{{layer}}{NUMBER}", f"{stack}{NUMBER}") for blocks, stack in pairs)


CHROMA_DIFFUSERS = (*FLUX_DIFFUSERS, *_modulator("linear_1", "linear_2", "weight"), *_numbers(DIFFUSERS))
"""diffusers' `ChromaTransformer2DModel`, with the numbers of its blocks."""
CHROMA_ORIGINAL = (*ORIGINAL.rules, *_modulator("in_layer", "out_layer", "scale"), *_numbers(ORIGINAL))
"""The original release, one file, whose names LoRAs go by too; with the numbers of its blocks."""


def _layout(flux: Layout, rules: tuple[Rule, ...]) -> Layout:
    """Returns a layout of Chroma, by that of FLUX.1 whose names its blocks have."""
    anchor = f"{_NETWORK}.in_proj.weight"
    return Layout(anchor, flux.blocks, rules, (*flux.sizes[:2], anchor, *flux.sizes[3:]), guidance="")


CHROMA_RELEASE = _layout(ORIGINAL, CHROMA_ORIGINAL)
CHROMA_OF_DIFFUSERS = _layout(DIFFUSERS, CHROMA_DIFFUSERS)
CHROMA_LAYOUTS = (CHROMA_RELEASE, CHROMA_OF_DIFFUSERS)


class NumberedSource(Source):
    """A checkpoint with the number of every block as a tensor."""

    def __init__(self, source: Source, config: ChromaConfig, layout: Layout = CHROMA_OF_DIFFUSERS) -> None:
        """Takes a checkpoint that is open.

        Args:
            source: the checkpoint.
            config: shape of the transformer, which tells how many blocks there are.
            layout: of the checkpoint.
        """
        self.__dict__.update(vars(source))
        self._stored = source
        self._numbers = {
            f"{blocks}.{number}{NUMBER}": np.array([number], np.float32)
            for stack, blocks in zip(config.layout.stacks, layout.blocks, strict=True)
            for number in range(stack.depth)
        }

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        yield from self._numbers

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Returns a tensor's shape; None when its shard cannot be read."""
        return (1,) if key in self._numbers else super().shape(key)

    def dtype(self, key: str) -> str | None:
        """Returns a tensor's type as safetensors calls it; None when its shard cannot be read."""
        return "F32" if key in self._numbers else super().dtype(key)

    def readable(self, key: str) -> bool:
        """Says whether the tensor is there, whole and of a type that is understood."""
        return key in self._numbers or super().readable(key)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._numbers[key] if key in self._numbers else super().__getitem__(key)

    def read(self, key: str) -> np.ndarray:
        """Reads a tensor into memory."""
        return self._numbers[key] if key in self._numbers else super().read(key)

    def kinds(self) -> set[np.dtype]:
        """Returns the types of the checkpoint's own numbers: those of blocks are whole, and fit any type."""
        return self._stored.kinds()

    def files(self) -> list[Path]:
        """Returns the files that hold the tensors."""
        return self._stored.files()


_ALLOWED = AllowList(
    component="Chroma transformer",
    # Absent attributes that have a default here have it in diffusers' constructor too.
    read={
        "num_layers": REQUIRED,
        "num_single_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "attention_head_dim": REQUIRED,
        "in_channels": REQUIRED,
        "out_channels": None,
        "joint_attention_dim": REQUIRED,
        "axes_dims_rope": (16, 56, 56),
        "approximator_num_channels": 64,
        "approximator_hidden_dim": 5120,
        "approximator_layers": 5,
    },
    fixed={"_class_name": (CLASS,), "patch_size": (1,), "guidance_embeds": (False,)},
    # The release's file says the width of FLUX.1's pooled text, too, which the class does not read.
    inert=frozenset(("_diffusers_version", "_name_or_path", "pooled_projection_dim")),
)


def chroma_config_from_diffusers(attributes: Mapping[str, object]) -> ChromaConfig:
    """Reads the configuration of a `ChromaTransformer2DModel`.

    Args:
        attributes: the contents of its `config.json`.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, _ALLOWED)
    channels = read["approximator_num_channels"]
    if channels < 8 or channels % 8:
        raise UserError(
            f"The Chroma transformer has approximator_num_channels={channels}, which must be a multiple of 8, as it is "
            "divided among time, guidance and modulations; correct its config.json."
        )
    return ChromaConfig(
        **sizes_read(read, "Chroma transformer"),
        modulator_inputs=channels,
        modulator_width=read["approximator_hidden_dim"],
        modulator_layers=read["approximator_layers"],
    )


def chroma_config_from_shapes(
    shapes: Mapping[str, tuple[int, ...] | None], rope_axes: tuple[int, ...] = (16, 56, 56)
) -> ChromaConfig:
    """Reads the sizes off a single file.

    Args:
        shapes: key -> shape, prefix stripped, in either layout.
        rope_axes: how a head's dimensions are divided among the axes of position; no tensor tells.

    Raises:
        UserError: when a tensor that tells a size is missing, or sizes do not divide.
    """
    of_release = any(key.startswith(f"{CHROMA_RELEASE.blocks[0]}.") for key in shapes)
    layout = CHROMA_RELEASE if of_release else CHROMA_OF_DIFFUSERS
    sizes, (hidden, channels) = blocks_told(shapes, layout, rope_axes, "Chroma", "modulator")
    if channels < 8 or channels % 8:
        raise UserError(
            f"The file has a modulator of {channels} channels, which must be a multiple of 8; give Chroma's release."
        )
    return ChromaConfig(
        **sizes,
        modulator_inputs=channels,
        modulator_width=hidden,
        modulator_layers=depth_told(shapes, f"{_NETWORK}.layers"),
    )


def chroma_config_to_diffusers(config: ChromaConfig) -> dict[str, Any]:
    """Returns the `config.json` that diffusers would write for this transformer."""
    return sizes_written(config) | {
        "_class_name": CLASS,
        "approximator_hidden_dim": config.modulator_width,
        "approximator_layers": config.modulator_layers,
        "approximator_num_channels": config.modulator_inputs,
    }
