"""The model with MLPs replaced: by their transcoders, or by their mean output. What faithfulness is measured with.

    y^ = decode(encode(x))     kind TRANSCODER; an SAE reads y itself
    y^ = mean y                kind MEAN, of the site at that denoising step: a mean ablation

With guidance by two branches the step's two evaluations each have a mean, and padding, of their own.

Padded text positions keep the true MLP, as in tracing. Which sites are replaced, and how, is an array: one compilation
serves every choice.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.models.blocks import Streams
from difffract_jax.models.mmdit import Inputs, MMDiT, forward
from difffract_jax.models.stacks import sequences, slice_layer
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.transcoder import Transcoder

TRUE, TRANSCODER, MEAN = range(3)


class Swap(NamedTuple):
    """What stands in for the MLPs of one group of sites, block by block.

    Attributes:
        slot: place of each block's transcoder in the stack.
        kind: `TRUE`, `TRANSCODER` or `MEAN`.
        mean: mean output at every evaluation of a run, which is a step or one of its branches.
    """

    slot: Int[Array, "layer"]
    kind: Int[Array, "layer"]
    mean: Float[Array, "layer evaluation d_model"]


class Replaced(NamedTuple):
    """A model with replaced MLPs: the argument of `replaced_velocity`.

    Attributes:
        model: the transformer.
        stacks: transcoders per group.
        swaps: what is replaced, per group; where it is None, the group is left as it is.
        text_mask: text positions that are not padding, of each branch.
    """

    model: MMDiT
    stacks: tuple[Transcoder | None, ...]
    swaps: tuple[Swap | None, ...]
    text_mask: Bool[Array, "branch txt"]


def swaps_of(
    sites: SiteSet,
    model: MMDiT,
    means: Mapping[str, Float[np.ndarray, "_ evaluation d_model"]],
    kinds: Int[np.ndarray, "site"],
) -> tuple[Swap | None, ...]:
    """Lays out what is replaced, per group.

    Args:
        sites: with a transcoder.
        model: the transformer.
        means: name of a group -> each site's mean output at every evaluation.
        kinds: of every site, in the order of the stack.
    """
    layout, swaps = model.config.layout, []
    for number, (group, slots) in enumerate(zip(layout.groups, sites.slots(layout), strict=True)):
        if not slots:
            swaps.append(None)
            continue
        blocks, places, mean = layout.blocks_of(number), np.array(list(slots.values())), means[group.name]
        layers = np.array(list(slots)) - blocks.start
        slot, kind = np.zeros(len(blocks), np.int32), np.full(len(blocks), TRUE, np.int32)
        slot[layers], kind[layers] = places, kinds[sites.slices[group.name]][places]
        spread = np.zeros((len(blocks), *mean.shape[1:]), np.float32)
        spread[layers] = mean[places]
        swaps.append(Swap(jnp.asarray(slot), jnp.asarray(kind), jnp.asarray(spread)))
    return tuple(swaps)


def replaced_velocity(
    params: Replaced, inputs: Inputs, number: Array, grid: tuple[int, int]
) -> Float[Array, "img outputs"]:
    """Velocity of a model with replaced MLPs; see `models.pipeline.Velocity`."""
    own = params.text_mask[number % params.text_mask.shape[0]]
    tokens = Streams(jnp.ones(grid[0] * grid[1], bool), own)
    live = sequences(tokens, params.model.config.layout.groups, axis=0)
    fixed = [(stack, rows, inputs.t, number) for stack, rows in zip(params.stacks, live, strict=True)]
    return forward(params.model, inputs, grid, write=_write, fixed=fixed, layers=params.swaps)[0]


def _write(
    fixed: tuple[Any, Array, Array, Array], swap: Swap | None, x: Array, true: Callable[[], Array]
) -> tuple[Array, None]:
    stack, rows, t, number = fixed
    y = true()
    if swap is None:
        return y, None
    return jnp.where(rows[:, None], _stand_in(stack, swap, t, number, x, y), y), None


def _stand_in(stack: Transcoder, swap: Swap, t: Array, number: Array, x: Any, y: Any) -> Array:
    """Returns what is put in place of one MLP's output y."""
    tc: Transcoder = slice_layer(stack, swap.slot)
    read = (y if tc.config.role == "sae" else x).astype(tc.enc.kernel.dtype)
    choices = (y, tc(read, t).astype(y.dtype), jnp.broadcast_to(swap.mean[number].astype(y.dtype), y.shape))
    return jax.lax.select_n(swap.kind, *choices)
