"""Queries and keys, recorded, of a single row, and rotated: what blocks of every kind do alike."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from difffract_jax.models.blocks import QKV, Cond, Number, project, split_heads
from difffract_jax.ops import film, layer_norm, rotate


class OneAttention(nnx.Module):
    """What blocks with one attention have in common: their records hold its queries and keys as `q` and `k`."""

    @staticmethod
    def attention_shape(frozen: Any) -> tuple[int, int, int]:
        """Returns queries, heads and columns of a head."""
        queries, heads, head_dim = frozen.q.shape[-3:]
        return queries, heads, head_dim

    @staticmethod
    def queries_and_keys(frozen: Any) -> tuple[Float[Array, "seq heads head_dim"], Float[Array, "seq heads head_dim"]]:
        """Returns the recorded queries and keys."""
        return frozen.q, frozen.k

    @staticmethod
    def with_queries(frozen: Any, factor: Float[Array, ""]) -> Any:
        """Returns the record with its queries multiplied by a factor."""
        return frozen._replace(q=factor * frozen.q)


def head_of_row(
    qkv: QKV,
    norm: Any,
    cond: Cond,
    modulation: tuple[Float[Array, "d_model"], Float[Array, "d_model"]],
    part: int,
    head: Number,
    place: Number,
    h: Float[Array, "d_model"],
    inv_std: Float[Array, ""],
    denominator: Float[Array, ""] | None,
) -> tuple[Float[Array, "head_dim"], Float[Array, ""]]:
    """Returns one head's rotated query or key of one residual row; see `blocks.Block.query_or_key`.

    Args:
        qkv: the projection to queries, keys and values.
        norm: of queries or keys.
        cond: what the evaluation's blocks share.
        modulation: shift and scale before the projection.
        part: 0 for the query, 1 for the key.
        head: number of the head.
        place: of the row in attention's sequence.
        h: the residual row.
        inv_std: scale of the norm before the projection, held.
        denominator: 1 / root mean square to hold; that of the row itself if None.
    """
    shift, scale = modulation
    m = film(layer_norm(h[None], inv_std[None])[0], scale, shift)
    return head_of_input(qkv, norm, cond, part, head, place, m, denominator)


def head_of_input(
    qkv: QKV,
    norm: Any,
    cond: Cond,
    part: int,
    head: Number,
    place: Number,
    m: Float[Array, "1 d_model"],
    denominator: Float[Array, ""] | None,
) -> tuple[Float[Array, "head_dim"], Float[Array, ""]]:
    """Returns one head's rotated query or key of one row of attention's input; arguments as of `head_of_row`.

    Args:
        qkv: the projection.
        norm: of queries or keys.
        cond: what the evaluation's blocks share.
        part: 0 for the query, 1 for the key.
        head: number of the head.
        place: of the row in the rotary table.
        m: the row.
        denominator: 1 / root mean square to hold.
    """
    columns = slice(part * m.shape[1], (part + 1) * m.shape[1])
    raw = split_heads(project(qkv, m, columns), norm.width)[:, head]
    normed, denominator = norm.held(raw, denominator)
    if cond.cos is None or cond.sin is None:
        return normed[0], denominator
    return rotate(normed[:, None], cond.cos[place][None], cond.sin[place][None])[0, 0], denominator


def rotated(x: Float[Array, "seq heads head_dim"], cond: Cond) -> Float[Array, "seq heads head_dim"]:
    """Turns queries or keys by their positions' angles; as they are where attention knows no positions."""
    return x if cond.cos is None or cond.sin is None else rotate(x, cond.cos, cond.sin)
