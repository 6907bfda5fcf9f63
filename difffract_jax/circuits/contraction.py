"""Edges of one block's features: what targets read at every position, times the decoder vectors active there.

Positions are taken a few at a time. Their decoder vectors are gathered from the stack, used for all targets while they
are in a processor's cache, and the products written into place: neither the gathered vectors of a block nor its edges
are ever held beside the rows of edges.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GATHER_BYTES = 2**20
"""Decoder vectors gathered at a time: few enough to stay in a processor's cache until they have been used."""


def contract(
    edges: Float[Array, "target source"],
    corner: tuple[Array, Array],
    decoder: Float[Array, "site feat d_model"],
    slot: Int[Array, ""],
    index: Int[Array, "rows active"],
    values: Float[Array, "rows active"],
    written: Float[Array, "some rows d_model"],
    gate: Float[Array, "d_model"],
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
    """
    (rows, active), (some, _, width) = values.shape, written.shape
    if not active:
        return edges
    chunk = max(1, min(rows, GATHER_BYTES // (active * width * decoder.dtype.itemsize)))

    def step(i: Array, edges: Array) -> Array:
        # The last chunk starts early enough to be whole: what it repeats comes out the same.
        first = jnp.minimum(i * chunk, rows - chunk)
        some_index, value = (jax.lax.dynamic_slice_in_dim(a, first, chunk) for a in (index, values))
        cotangent = jax.lax.dynamic_slice_in_dim(written, first, chunk, axis=1).transpose(1, 0, 2) * gate[None, None]
        found = jnp.einsum("stm,skm->stk", cotangent, decoder[slot, some_index]) * value[:, None]
        place = (corner[0], corner[1] + first * active)
        return jax.lax.dynamic_update_slice(edges, found.transpose(1, 0, 2).reshape(some, -1), place)

    return jax.lax.fori_loop(0, -(-rows // chunk), step, edges)
