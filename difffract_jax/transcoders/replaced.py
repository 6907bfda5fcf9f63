"""The model with MLPs replaced: by their transcoders, or by their mean output. What faithfulness is measured with.

    y^ = decode(encode(x))     kind TRANSCODER; an SAE reads y itself
    y^ = mean y                kind MEAN, of the site at that denoising step: a mean ablation (METHOD section 9)

Padded text positions keep the true MLP, as in tracing. Which sites are replaced, and how, is an array: one compilation
serves every choice.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.models.blocks import DoubleBlock, SingleBlock, Streams, join, run_mlp, run_mlps, split
from difffract_jax.models.mmdit import Inputs, MMDiT, run_double, run_single
from difffract_jax.transcoders.sites import Sites
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet

TRUE, TRANSCODER, MEAN = range(3)


class Swap(NamedTuple):
    """What stands in for the MLPs of one group of sites, block by block.

    Attributes:
        slot: place of each block's transcoder in the stack.
        kind: `TRUE`, `TRANSCODER` or `MEAN`.
        mean: mean output at every denoising step.
    """

    slot: Int[Array, "layer"]
    kind: Int[Array, "layer"]
    mean: Float[Array, "layer step d_model"]


class Replaced(NamedTuple):
    """A model with replaced MLPs: the argument of `replaced_velocity`.

    Attributes:
        model: the transformer.
        stacks: transcoders by group of sites.
        swaps: what is replaced, by group; a group that is missing is left as it is.
        text_mask: text positions that are no padding.
    """

    model: MMDiT
    stacks: dict[str, Transcoder]
    swaps: dict[str, Swap]
    text_mask: Bool[Array, "txt"]


def stacks_of(tcs: TranscoderSet) -> tuple[Sites, dict[str, Transcoder]]:
    """Returns where a set's transcoders belong, and its stacks by group."""
    found = {"img": tcs.img, "txt": tcs.txt, "joint": tcs.joint}
    stacks = {name: stack for name, stack in found.items() if stack is not None}
    return Sites(tcs.img_layers, tcs.txt_layers, tcs.joint_layers), stacks


def swaps_of(
    sites: Sites, model: MMDiT, means: dict[str, Float[np.ndarray, "_ step d_model"]], kinds: Int[np.ndarray, "site"]
) -> dict[str, Swap]:
    """Lays out what is replaced.

    Args:
        sites: with a transcoder.
        model: the transformer.
        means: by group, each site's mean output at every step.
        kinds: of every site, in the order of the stack.
    """
    depth = {"img": model.config.depth_double, "txt": model.config.depth_double, "joint": model.config.depth_single}
    swaps = {}
    for name, at in sites.slices.items():
        layers, mean = np.array(sites.groups[name]), means[name]
        slot, kind = np.zeros(depth[name], np.int32), np.full(depth[name], TRUE, np.int32)
        slot[layers], kind[layers] = np.arange(len(layers)), kinds[at]
        spread = np.zeros((depth[name], *mean.shape[1:]), np.float32)
        spread[layers] = mean
        swaps[name] = Swap(jnp.asarray(slot), jnp.asarray(kind), jnp.asarray(spread))
    return swaps


def replaced_velocity(
    params: Replaced, inputs: Inputs, step: Array, grid: tuple[int, int]
) -> Float[Array, "img outputs"]:
    """Velocity of a model with replaced MLPs; see `models.pipeline.Velocity`."""
    text_tokens = inputs.text.shape[0]
    live = {"img": jnp.ones(grid[0] * grid[1], bool), "txt": params.text_mask}
    live["joint"] = jnp.concatenate([params.text_mask, live["img"]])

    def one(name: str, swap: dict[str, Swap], x: Array, y: Array) -> Array:
        if name not in swap:
            return y
        stood_in = _stand_in(params.stacks[name], swap[name], inputs.t, step, x, y)
        return jnp.where(live[name][:, None], stood_in, y)

    def double(swap: dict[str, Swap], block: DoubleBlock, x: Streams) -> Streams:
        y = run_mlps(block, x)
        return Streams(one("img", swap, x.img, y.img), one("txt", swap, x.txt, y.txt))

    def single(swap: dict[str, Swap], block: SingleBlock, x: Array) -> Array:
        return one("joint", swap, x, run_mlp(block, x))

    by_block = [{n: s for n, s in params.swaps.items() if (n == "joint") == last} for last in (False, True)]
    h, cond = params.model.embed(inputs, grid)
    h, _ = run_double(params.model.double, h, cond, mlp=double, per_layer=by_block[0])
    joint, _ = run_single(params.model.single, join(h), cond, mlp=single, per_layer=by_block[1])
    return params.model.final(split(joint, text_tokens).img, cond)


def _stand_in(stack: Transcoder, swap: Swap, t: Array, step: Array, x: Any, y: Any) -> Array:
    """Returns what is put in place of one MLP's output y."""
    tc: Transcoder = jax.tree.map(lambda leaf: leaf[swap.slot], stack)
    read = (y if tc.config.role == "sae" else x).astype(tc.enc.kernel.dtype)
    choices = (y, tc(read, t).astype(y.dtype), jnp.broadcast_to(swap.mean[step].astype(y.dtype), y.shape))
    return jax.lax.select_n(swap.kind, *choices)
