"""The walk of cotangents as a loop on the host, a program per block, where memory is little.

1. In a loop over blocks XLA widens, on a processor, all bfloat16 weights of the loop to float32 before it begins: of
   FLUX's 57 blocks 5.7 GiB, although each keeps but a tenth. A program for one block widens that block's alone.
2. Decoder rows that are streamed are fetched when their block's turn comes, those of the next block meanwhile.

The edges are those of `pullback`, bit for bit but for what XLA fuses otherwise.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from difffract_jax.circuits.attribution.rounding import rounded
from difffract_jax.circuits.attribution.walk import Sizes, block_of, walk_block
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Replacement, Sources, by_program
from difffract_jax.circuits.frozen.targets import Targets
from difffract_jax.circuits.trace.record import Record
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.stacks import group_slices, sequences, slice_layer, streams
from difffract_jax.models.streaming import streams_layers


def goes_layerwise(replacement: Replacement, mesh: Mesh | None) -> bool:
    """Says whether targets are pulled back by a program for each block.

    Args:
        replacement: blocks that were streamed to a processor are; and those whose decoder rows are, anywhere.
        mesh: of several devices; None for one.
    """
    rows_streamed = streams_layers([one.stack for one in replacement.sites])
    return rows_streamed or (mesh is None and by_program(replacement.record))


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
    *,
    precision: str = "f32",
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
        precision: of the products, see `pullback.PullOptions`.

    Returns:
        The edges, and the cotangents of the residual streams entering the first block.
    """
    stacks = record.weights.stacks
    top, edges = (int(Targets(*map(np.asarray, targets)).enters[0]) + 1) // 2, _zeroed(spare)
    first = sum(layers for layers, _, _ in places)
    for i, (stack, groups) in reversed(list(enumerate(zip(stacks, group_slices(stacks), strict=True)))):
        layers, begin, per_layer = places[i]
        first -= layers
        joined = sequences(cotangent, stack.groups)
        walked = list(reversed(range(min(max(top - first, 0), layers))))
        placed = [_each_alone(one, walked) for one in sites[groups]]
        for layer in walked:
            parts = stack, record.frozen[i], sources.values[groups], sources.errors[groups]
            edges, joined = _walk_layer(
                record.cond,
                tuple(next(one) for one in placed),
                slice_layer(parts, layer),
                jnp.int32(first + layer),
                jnp.int32(begin + layer * per_layer),
                edges,
                joined,
                targets,
                gradients,
                first_group=groups.start,
                sizes=sizes,
                precision=precision,
            )
            if streams_layers([one.stack for one in sites[groups]]):
                jax.block_until_ready(joined)  # what was fetched goes before more is
        cotangent = streams(joined, stack.groups, cotangent)
    return edges, cotangent


def _each_alone(sites: ReplacedSites, walked: Sequence[int]) -> Iterator[ReplacedSites]:
    """Yields the site of each block, in the order of the walk, with its own transcoder in place of a stack."""
    rows, alone = sites.row_layers, jnp.int32(0)
    fetched = None if rows is None else rows.fetched(walked)
    for layer in walked:
        layers = slice_layer(sites.layers, layer)
        if fetched is not None:
            yield ReplacedSites(next(fetched)[1], layers._replace(slot=alone))
        elif sites.stack is None:
            yield ReplacedSites(None, layers)
        else:
            yield ReplacedSites(slice_layer(sites.stack, int(layers.slot)), layers._replace(slot=alone))


@partial(jax.jit, donate_argnums=0)
def _zeroed(spare: Array) -> Array:
    return jnp.where(False, spare, 0)  # what is given is used again for what is returned


@partial(jax.jit, static_argnames=("first_group", "sizes", "precision"), donate_argnames=("edges", "cotangent"))
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
    precision: str,
) -> tuple[Array, tuple[Array, ...]]:
    def walk_one(cond: Any, sites: Any, parts: Any, layer: Any, column: Any, *others: Any) -> Any:
        stacked = tuple(one._replace(stack=jax.tree.map(lambda leaf: leaf[None], one.stack)) for one in sites)
        return walk_block(block_of(cond, stacked, *parts), layer, column, first_group, *others, sizes)

    walk_it = rounded(walk_one) if precision == "bf16" else walk_one
    return walk_it(cond, sites, parts, layer, column, edges, cotangent, targets, gradients)
