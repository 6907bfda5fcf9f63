"""Tokens of the text that attention must not see, as a column of queries and keys.

It is 1 in every query, and in a hidden token's key `HIDDEN`, so that its scores are that low, and its share of the
pattern is 0. Whoever has q and k then has the pattern, in live runs and of records, and no matrix of tokens x tokens is
stored. Attention divides scores by the root of a head's columns, those of the mask included; rotary cosines and sines
are scaled by `stretch`, so that the scores come out as without them.

A query of a hidden token sees what the others see. What it reads goes nowhere, since no key is its own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

HIDDEN = -1e9
"""Score of a hidden key; the softmax of it is 0 in every type."""
MASK_COLUMNS = 8
"""Columns of a head that hold the mask: one is used, but matrix units want widths that 8 divides."""


def with_mask(
    q: Float[Array, "*places head_dim"], k: Float[Array, "*places head_dim"], hidden: Float[Array, "*places"]
) -> tuple[Float[Array, "*places columns"], Float[Array, "*places columns"]]:
    """Returns queries and keys with the columns that hide tokens; see the module.

    Args:
        q: queries.
        k: keys.
        hidden: 0, or `HIDDEN`, of every place.
    """
    empty = jnp.zeros((*q.shape[:-1], MASK_COLUMNS), q.dtype)
    columns = empty.at[..., 0].set(1), empty.at[..., 0].set(hidden.astype(k.dtype))
    return jnp.concatenate([q, columns[0]], axis=-1), jnp.concatenate([k, columns[1]], axis=-1)


def sequence_with_mask(
    q: Float[Array, "seq heads head_dim"], k: Float[Array, "seq heads head_dim"], hidden: Float[Array, "seq"]
) -> tuple[Float[Array, "seq heads columns"], Float[Array, "seq heads columns"]]:
    """Returns the queries and keys of attention's sequence with the columns of the mask.

    Args:
        q: queries.
        k: keys.
        hidden: 0, or `HIDDEN`, of every place of the sequence.
    """
    return with_mask(q, k, jnp.broadcast_to(hidden[:, None], q.shape[:2]))


def stretch(head_dim: int) -> float:
    """Returns the factor of rotary cosines and sines that makes up for the columns of the mask.

    Args:
        head_dim: columns of a head without them.
    """
    return (1 + MASK_COLUMNS / head_dim) ** 0.25
