"""The walk of cotangents as a loop on the host, a program per block, for a processor with little memory.

In a loop over blocks XLA widens, on a processor, all bfloat16 weights of the loop to float32 before it begins: of
FLUX's 57 blocks 5.7 GiB, although each keeps but a tenth. A program for one block widens that block's alone. The edges
are those of `pullback`, bit for bit but for what XLA fuses otherwise.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.circuits.attribution.walk import Sizes, block_of, walk_block
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Sources
from difffract_jax.circuits.frozen.targets import Targets
from difffract_jax.circuits.trace.record import Record
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.stacks import group_slices, sequences, slice_layer, streams


def pull_layerwise(
    sizes: Sizes,
    record: Record,
    sites: Sequence[ReplacedSites],
    sources: Sources,
    places: Sequence[tuple[int, int, int]],
    targets: Targets,
    gradients: Float[Array, "batch d_model"],
    cotangent: Streams,
    spare: Float[Array, "batch source"],
) -> tuple[Float[Array, "batch source"], Streams]:
    """Pulls sorted targets back, block by block.

    Args:
        sizes: of the pieces.
        record: the trace's arrays.
        sites: per group.
        sources: at the traced point.
        places: of each stack, its layers, the place of its first edge, and places of a layer.
        targets: highest first.
        gradients: of each target.
        cotangent: of the residual streams leaving the last block, [target rows d_model] per stream.
        spare: memory for the edges; it is used up.

    Returns:
        The edges, and the cotangents of the residual streams entering the first block.
    """
    stacks = record.weights.stacks
    top, edges = (int(targets.enters[0]) + 1) // 2, _zeroed(spare)
    first = sum(layers for layers, _, _ in places)
    for i, (stack, groups) in reversed(list(enumerate(zip(stacks, group_slices(stacks), strict=True)))):
        layers, begin, per_layer = places[i]
        first -= layers
        joined = sequences(cotangent, stack.groups)
        for layer in reversed(range(min(max(top - first, 0), layers))):
            parts = stack, record.frozen[i], sources.values[groups], sources.errors[groups]
            edges, joined = _walk_layer(
                record.cond,
                tuple(_alone(one, layer) for one in sites[groups]),
                slice_layer(parts, layer),
                jnp.int32(first + layer),
                jnp.int32(begin + layer * per_layer),
                edges,
                joined,
                targets,
                gradients,
                first_group=groups.start,
                sizes=sizes,
            )
        cotangent = streams(joined, stack.groups, cotangent)
    return edges, cotangent


def _alone(sites: ReplacedSites, layer: int) -> ReplacedSites:
    """Returns one block's site, with a stack of its own transcoder alone."""
    layers = slice_layer(sites.layers, layer)
    if sites.stack is None:
        return ReplacedSites(None, layers)
    slot = int(layers.slot)
    return ReplacedSites(slice_layer(sites.stack, slice(slot, slot + 1)), layers._replace(slot=jnp.int32(0)))


@partial(jax.jit, donate_argnums=0)
def _zeroed(spare: Array) -> Array:
    return jnp.where(False, spare, 0)  # what is given is used again for what is returned


@partial(jax.jit, static_argnames=("first_group", "sizes"), donate_argnames=("edges", "cotangent"))
def _walk_layer(
    cond: Cond,
    sites: tuple[ReplacedSites, ...],
    parts: tuple[Any, ...],
    layer: Array,
    column: Array,
    edges: Array,
    cotangent: tuple[Array, ...],
    targets: Targets,
    gradients: Array,
    *,
    first_group: int,
    sizes: Sizes,
) -> tuple[Array, tuple[Array, ...]]:
    block = block_of(cond, sites, *parts)
    return walk_block(block, layer, column, first_group, edges, cotangent, targets, gradients, sizes)
