"""Bytes of weights, counted from shapes: of a pipeline's parts, of a block, of a transcoder."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.families import PARTS, module_of
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.qwen3 import Qwen3Encoder
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import depth_of
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.transcoder import TranscoderConfig


class Transcoders(NamedTuple):
    """Transcoders that a command uses: their shape, their sites, bytes of a number, places for features."""

    config: TranscoderConfig
    sites: SiteSet
    itemsize: int
    active: int = 256


def bytes_of(tree: Any) -> int:
    """Returns the bytes of a tree's arrays, or of their shapes."""
    return sum(prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def weights_needed(shapes: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, int]:
    """Returns the bytes of every part's weights.

    Args:
        shapes: part -> shape, from `loading.pipeline_shapes`.
        dtype: of the weights in memory.
    """
    return {name: bytes_of(part) for name, part in abstract_parts(shapes, dtype).items()}


def largest_block(shapes: Mapping[str, Any], dtype: Any = jnp.float32) -> int:
    """Returns the bytes of the largest block, of the transformer or a text encoder: the least that streaming holds.

    Args:
        shapes: part -> shape, of those parts that are streamed.
        dtype: of the weights in memory.
    """
    return max(block_bytes(part) for part in abstract_parts(shapes, dtype).values())


def transcoder_bytes(tcs: Transcoders) -> int:
    """Returns the bytes of one site's transcoder."""
    config = tcs.config
    features, wide, out, time = config.features, config.d_model, config.d_model_out, config.time_embed
    numbers = features * (wide + out + 1) + out + (time * time * 2 + 2 * time + (time + 1) * 2 * wide if time else 0)
    numbers += features if config.activation == "jumprelu" else 0
    return (numbers + (wide * out if config.skip else 0)) * tcs.itemsize


def abstract_parts(shapes: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Returns the abstract trees of the parts whose shapes are given."""
    return {name: abstract_module(module_of(shapes[name]), shapes[name], dtype) for name in PARTS if name in shapes}


def stacks_of(part: Any) -> tuple[Any, ...]:
    """Returns the stacks of a part's blocks; none of an autoencoder."""
    if isinstance(part, MMDiT):
        return part.stacks
    return (part.blocks,) if isinstance(part, T5Encoder | Qwen3Encoder | CLIPTextEncoder) else ()


def block_bytes(part: Any) -> int:
    """Returns the bytes of a part's largest block; of all of it where it has none, as the autoencoder."""
    blocks = [bytes_of(stack) // depth_of(stack) for stack in stacks_of(part)]
    return max(blocks, default=bytes_of(part))


def around_bytes(part: Any, streamed: bool) -> int:
    """Returns the bytes of a part that stay in memory while its blocks pass through; all of it if they do not.

    Args:
        part: abstract.
        streamed: whether they pass through.
    """
    return bytes_of(part) - (sum(map(bytes_of, stacks_of(part))) if streamed else 0)


def slim_bytes(part: MMDiT, first: int, end: int) -> int:
    """Returns the bytes of what a streamed trace keeps of recorded blocks, `models.blocks.Block.slim`.

    Args:
        part: the transformer, abstract.
        first: block that is recorded.
        end: the block behind the last.
    """
    total, begin = 0, 0
    for stack in part.stacks:
        depth = depth_of(stack)
        block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
        taken = max(0, min(end, begin + depth) - max(first, begin))
        total += taken * bytes_of(jax.eval_shape(lambda one: one.slim(), block))
        begin += depth
    return total


def largest_leaf(shapes: Mapping[str, Any], dtype: Any) -> int:
    """Returns the bytes of the largest array, which is put together in host memory while it is loaded."""
    return max(bytes_of(leaf) for leaf in jax.tree.leaves(list(abstract_parts(shapes, dtype).values())))


def largest_slice(shapes: Mapping[str, Any], dtype: Any) -> int:
    """Returns the bytes of the largest array, of one layer where it is stacked, which is what converting makes at once.

    Args:
        shapes: part -> shape.
        dtype: of the weights that are written.
    """
    slices: list[int] = []
    for part in abstract_parts(shapes, dtype).values():
        depths = {id(leaf): depth_of(stack) for stack in stacks_of(part) for leaf in jax.tree.leaves(stack)}
        slices += [bytes_of(leaf) // depths.get(id(leaf), 1) for leaf in jax.tree.leaves(part)]
    return max(slices)
