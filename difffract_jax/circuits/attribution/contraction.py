"""Edges of one block's features: what targets read at every position, times the decoder vectors active there.

1. Positions are taken a few at a time; where the features of one are too many, those in turn.
2. Their decoder vectors are gathered from the stack, used for all targets while they are in a processor's cache, and
   the products written into place: neither the gathered vectors nor the edges of a block are held anywhere else.
3. Places that only fill up a position stand last and have value 0: where features are taken in turn, they cost nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GATHER_BYTES = 2**17
"""Decoder vectors gathered at a time on a processor: few enough to stay in its cache until they have been used."""
ACCELERATOR_GATHER_BYTES = 2**28
"""The same elsewhere."""


def gather_bytes(platform: str) -> int:
    """Returns how many bytes of decoder vectors are gathered at a time.

    Args:
        platform: `cpu`, `gpu` or `tpu`.
    """
    return GATHER_BYTES if platform == "cpu" else ACCELERATOR_GATHER_BYTES


def contract(
    edges: Float[Array, "target source"],
    corner: tuple[Array, Array],
    decoder: Float[Array, "site feat d_model"],
    slot: Int[Array, ""],
    index: Int[Array, "rows active"],
    values: Float[Array, "rows active"],
    written: Float[Array, "target rows d_model"],
    gate: Float[Array, "d_model"],
    count: int,
    gather: int,
) -> Float[Array, "target source"]:
    """Writes value * (cotangent * gate) . decoder vector for every position, feature and some of the targets.

    Args:
        edges: rows to write into.
        corner: first row, and first column, of what is written: position by position, `active` places each.
        decoder: decoder vectors of all sites of a stream.
        slot: the site.
        index: features of every position.
        values: their values.
        written: cotangents of what the sublayer's gate lets through to the residual stream.
        gate: factor between the sublayer's output and the residual stream.
        count: how many targets, from the corner's row on.
        gather: bytes of decoder vectors gathered at a time.
    """
    (rows, active), width = values.shape, written.shape[2]
    if not active:
        return edges
    vectors = max(1, gather // (width * decoder.dtype.itemsize))
    chunk, block = max(1, min(rows, vectors // active)), min(active, vectors)

    def product(position: Array, feature: Array, edges: Array) -> Array:
        # The last piece starts early enough to be whole: what it repeats comes out the same.
        s = jnp.minimum(position, rows - chunk).astype(corner[0].dtype)
        k = jnp.minimum(feature, active - block).astype(corner[0].dtype)
        here, value = (jax.lax.dynamic_slice(a, (s, k), (chunk, block)) for a in (index, values))
        cotangent = jax.lax.dynamic_slice(written, (corner[0], s, jnp.zeros_like(s)), (count, chunk, width))
        cotangent = cotangent.transpose(1, 0, 2) * gate[None, None]
        found = jnp.einsum("stm,skm->stk", cotangent, decoder[slot, here]) * value[:, None]
        place = (corner[0], corner[1] + s * active + k)
        return jax.lax.dynamic_update_slice(edges, found.transpose(1, 0, 2).reshape(count, -1), place)

    if block == active:
        return jax.lax.fori_loop(0, -(-rows // chunk), lambda i, edges: product(i * chunk, jnp.int32(0), edges), edges)
    used = jnp.max(jnp.where(values != 0, jnp.arange(1, active + 1, dtype=jnp.int32)[None], 0), axis=1)

    def at(s: Array, edges: Array) -> Array:
        return jax.lax.fori_loop(0, -(-used[s] // block), lambda j, edges: product(s, j * block, edges), edges)

    return jax.lax.fori_loop(0, rows, at, edges)
