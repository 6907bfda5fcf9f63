"""Where a target's gradient enters the walk: through its own block, from the MLP's input x to the residual streams.

A target reads x at one position. Below it, that is one row of attention's output, and so, in every head, one vector of
values that each position contributes to by its share of the pattern. Hence the cotangent of the residual stream
entering the block is

    dh[s] = sum over heads of pattern[head, p, s] * inv_std1[s] * direction[head]     (+ the residual path at s = p)

with one `direction` per head and stream, whatever the position s: about a hundredth of the work of a block's whole
pull-back. The directions are found by `jax.vjp` through single rows. In a single-stream block x is read off the stream
that enters the block, and no attention lies between.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from difffract_jax.models.blocks import (
    DoubleBlock,
    DoubleStream,
    Frozen,
    Streams,
    both,
    merge_heads,
    split,
    values,
)
from difffract_jax.ops import attention_pattern, film, layer_norm


def enter_double(
    block: DoubleBlock,
    frozen: Frozen,
    mod: Streams,
    gradients: Float[Array, "target d_model"],
    stream: Int[Array, "target"],
    position: Int[Array, "target"],
) -> Streams:
    """Pulls gradients at single positions of x back to the residual streams before the block.

    Args:
        block: the targets' block.
        frozen: its record.
        mod: its modulations.
        gradients: of the targets by x; a target that does not enter here has zeros.
        stream: of each target, 0 image, 1 text.
        position: of each target within its stream.

    Returns:
        Cotangents, [target rows d_model].
    """
    heads, head_dim = frozen.q.shape[1:]
    mine = Streams(*(jnp.where((stream == s)[:, None], gradients, 0) for s in (0, 1)))
    scales = both(lambda inv_std: inv_std.at[position].get(mode="clip"), frozen.inv_std2)
    pulled = both(partial(_through_output, heads), block, mod, scales, mine)
    mixed = pulled.img[1] + pulled.txt[1]
    directions = both(lambda weights, m: _through_values(weights, m, mixed), block, mod)
    text = frozen.inv_std1.txt.shape[0]
    joint = jnp.where(stream == 1, position, text + position)
    pattern = attention_pattern(frozen.q[joint], frozen.k, scale=head_dim**-0.5, precision="highest")
    pattern = pattern.transpose(2, 0, 1)
    shares = both(lambda p, inv_std: p * inv_std[:, None, None], split(pattern, text), frozen.inv_std1)
    spread = both(lambda p, d: jnp.einsum("sht,thm->tsm", p, d), shares, directions)
    each = jnp.arange(position.shape[0])
    return both(lambda c, r: c.at[each, position].add(r[0], mode="drop"), spread, pulled)


def enter_single(
    inv_std: Float[Array, "seq"],
    scale: Float[Array, "d_model"],
    gradients: Float[Array, "target d_model"],
    position: Int[Array, "target"],
) -> Float[Array, "target seq d_model"]:
    """Pulls gradients at single positions of x back to the joint residual stream before a single-stream block.

    Args:
        inv_std: recorded scale of the block's norm.
        scale: the block's modulation of it.
        gradients: of the targets by x; zeros for those that do not enter here.
        position: of each target within the joint sequence.
    """
    here = inv_std.at[position].get(mode="clip")
    _, pull = jax.vjp(lambda h: film(layer_norm(h, here)[0], scale, jnp.zeros_like(scale)), jnp.zeros_like(gradients))
    rows = jnp.zeros((gradients.shape[0], inv_std.shape[0], gradients.shape[1]), gradients.dtype)
    return rows.at[jnp.arange(position.shape[0]), position].set(pull(gradients)[0], mode="drop")


def _through_output(
    heads: int,
    stream: DoubleStream,
    mod: Float[Array, "6 d_model"],
    inv_std: Float[Array, "target"],
    gradients: Float[Array, "target d_model"],
) -> tuple[Float[Array, "target d_model"], Float[Array, "target heads head_dim"]]:
    """Pulls x of single rows back to the residual stream before the block, and to the heads' mixed values."""

    def forward(h: Array, mixed: Array) -> Array:
        h = h + mod[2][None, :] * stream.attn.proj(merge_heads(mixed))
        return film(layer_norm(h, inv_std)[0], mod[4], mod[3])

    origin = jnp.zeros_like(gradients)
    _, pull = jax.vjp(forward, origin, origin.reshape(origin.shape[0], heads, -1))
    return pull(gradients)


def _through_values(
    stream: DoubleStream, mod: Float[Array, "6 d_model"], mixed: Float[Array, "target heads head_dim"]
) -> Float[Array, "target heads d_model"]:
    """Pulls each head's part back to a row of the residual stream whose norm has scale 1."""
    targets, heads, head_dim = mixed.shape

    def forward(h: Array) -> Array:
        return values(stream, film(layer_norm(h, jnp.ones_like(h[:, 0]))[0], mod[1], mod[0]))

    alone = mixed[:, :, None] * jnp.eye(heads, dtype=mixed.dtype)[None, :, :, None]
    origin = jnp.zeros((targets * heads, heads * head_dim), mixed.dtype)
    (found,) = jax.vjp(forward, origin)[1](alone.reshape(targets * heads, heads, head_dim))
    return found.reshape(targets, heads, -1)
