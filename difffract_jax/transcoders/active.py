"""Products with sparse codes that touch active features alone: k of F columns per row, forward and backward.

    u = x @ W_enc + b_enc             dense: every pre-activation is needed to know which are largest
    pairs (row, feature) that are active, at most k per row on average; a = u there
    y[row] = sum a W_dec[feature]                        and backward, with g = dL/dy:
    da = <g[row], W_dec[feature]>     dW_dec[feature] = sum a g[row]
    dx[row] = sum da W_enc[:, feature]     dW_enc[:, feature] = sum da x[row]     db_enc[feature] = sum da

1. `largest_per_row` and `largest_of_batch` find the pairs. Both first look at the maxima of small groups of features:
   the n largest entries lie in the n groups with the largest maxima, so that few entries remain to be compared.
2. `arrange` lists the pairs by row and by feature, and ranks rows and features by how many pairs they have.
3. `weighted_sums` adds up rows of a table, segment by segment: segments of similar length go together, one pair of each
   at a time. A compiled scatter would go through the pairs one by one, and a dense product through all F columns.
4. `at_active` and `decoded` are the two differentiable functions; their gradients are sums of the same kind.

The numbers are the dense path's up to rounding; the pairs are the same, ties included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.transcoders.transcoder import batch_cutoff

LARGEST_GROUP = 16
"""Features whose maximum is looked at first: a cache line of float32."""
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 256
"""Segments that are summed together: few among the longest, whose lengths differ most."""
LARGEST_KEY = 2**32
"""Feature and place of a pair are sorted as one number if it stays below this: several times as fast as two."""
FLAGS = 64
"""Entries counted together when marked ones are listed."""


class Segments(NamedTuple):
    """Pairs sorted by row or by feature.

    Attributes:
        order: the pairs, by segment; those that are padding come last.
        start: where each segment begins in `order`, and where the last ends.
        rank: segments, the longest first.
    """

    order: Int[Array, "pair"]
    start: Int[Array, "segment_ends"]
    rank: Int[Array, "segment"]


class Pairs(NamedTuple):
    """Active pairs, by row; padding has a place but lies in no segment.

    Attributes:
        row: of each pair.
        feature: of each pair.
        real: whether it is not padding.
        by_row: the pairs sorted by row.
        by_feature: the pairs sorted by feature.
    """

    row: Int[Array, "pair"]
    feature: Int[Array, "pair"]
    real: Bool[Array, "pair"]
    by_row: Segments
    by_feature: Segments


def largest_per_row(u: Float[Array, "rows feat"], k: int) -> Pairs:
    """Returns the k largest entries of every row.

    Args:
        u: pre-activations.
        k: entries.
    """
    rows, features = u.shape
    groups = grouped(u, k)
    # Ascending, so that of equal entries the one of the lower feature comes first, as without groups.
    group = jnp.sort(jax.lax.top_k(jnp.max(groups, axis=-1), k)[1], axis=1)
    inside = jnp.take_along_axis(groups, group[:, :, None], axis=1, mode="promise_in_bounds")
    place = jax.lax.top_k(inside.reshape(rows, -1), k)[1]
    size = groups.shape[2]
    feature = jnp.take_along_axis(group, place // size, axis=1) * size + place % size
    row = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), k)
    return arrange(row, feature.astype(jnp.int32).ravel(), jnp.ones(rows * k, bool), rows, features)


def largest_of_batch(u: Float[Array, "rows feat"], k: int) -> tuple[Pairs, Float[Array, ""]]:
    """Returns the entries above the cut-off of `batch_cutoff`, and the cut-off.

    Args:
        u: pre-activations.
        k: entries per row, on average.
    """
    rows, features = u.shape
    groups, most = grouped(u, 1), rows * k
    maxima = jnp.max(groups, axis=-1)
    # At any threshold fewer maxima lie above it than entries: their cut-off is a lower bound, found by the same halves.
    group, real = marked(maxima > batch_cutoff(maxima, k), most)
    entries = groups.reshape(-1, groups.shape[-1])[group]
    entries = jnp.where(real[:, None], entries, -jnp.inf)
    cutoff = batch_cutoff(entries.reshape(rows, -1), k)
    place, real = marked(entries > cutoff, most)
    flat = group[place // groups.shape[-1]] * groups.shape[-1] + place % groups.shape[-1]
    return arrange(flat // features, flat % features, real, rows, features), cutoff


def grouped(u: Float[Array, "rows feat"], least: int) -> Float[Array, "rows group member"]:
    """Returns the entries in groups of neighbours, at least `least` groups per row."""
    rows, features = u.shape
    sizes = (s for s in range(LARGEST_GROUP, 0, -1) if features % s == 0 and features // s >= least)
    return u.reshape(rows, -1, next(sizes))


def marked(flags: Bool[Array, "*shape"], most: int) -> tuple[Int[Array, "pair"], Bool[Array, "pair"]]:
    """Returns the flat places of flags that are set, ascending, and which of these are real and not padding.

    Args:
        flags: of which at most `most` are set.
        most: places to return.
    """
    flat = flags.ravel()
    blocks = jnp.pad(flat, (0, -flat.size % FLAGS)).reshape(-1, FLAGS)
    ends = jnp.cumsum(jnp.sum(blocks, axis=1, dtype=jnp.int32))
    number = jnp.arange(most, dtype=jnp.int32)
    block = jnp.minimum(jnp.searchsorted(ends, number, side="right"), len(ends) - 1).astype(jnp.int32)
    inside = blocks[block]
    before = jnp.where(block > 0, ends[block - 1], 0)
    # Counts of set flags up to each: a product with a triangle is faster than a running sum, and exact.
    upto = inside.astype(jnp.float32) @ jnp.asarray(np.triu(np.ones((FLAGS, FLAGS), np.float32)))
    wanted = (number - before + 1).astype(jnp.float32)
    place = jnp.argmax(inside & (upto == wanted[:, None]), axis=1).astype(jnp.int32)
    return jnp.minimum(block * FLAGS + place, flat.size - 1), number < ends[-1]


def arrange(
    row: Int[Array, "pair"], feature: Int[Array, "pair"], real: Bool[Array, "pair"], rows: int, features: int
) -> Pairs:
    """Returns pairs that are sorted by row, padding last, with both of their lists.

    Args:
        row: of each pair.
        feature: of each pair.
        real: whether it is not padding.
        rows: number of rows.
        features: number of features.
    """
    place = jnp.arange(row.size, dtype=jnp.int32)
    by_row = segments(place, jnp.where(real, row, rows), rows)
    key = jnp.where(real, feature, features)
    if (features + 1) * row.size < LARGEST_KEY:
        both = jnp.sort(key.astype(jnp.uint32) * np.uint32(row.size) + place.astype(jnp.uint32))
        key, order = (part.astype(jnp.int32) for part in jnp.divmod(both, np.uint32(row.size)))
    else:
        key, order = jax.lax.sort((key, place), num_keys=1)
    return Pairs(row, feature, real, by_row, segments(order, key, features))


def segments(order: Int[Array, "pair"], key: Int[Array, "pair"], count: int) -> Segments:
    """Returns the segments of pairs sorted by `key`, of which those with key `count` are padding."""
    start = jnp.searchsorted(key, jnp.arange(count + 1, dtype=jnp.int32)).astype(jnp.int32)
    return Segments(order, start, jnp.argsort(start[:-1] - start[1:]).astype(jnp.int32))


def blocks(rank: Int[Array, "segment"]) -> list[Int[Array, "block member"]]:
    """Returns segments that are summed together, -1 for none: the longest few, then doubling, then all of one size.

    A block takes as long as its longest segment; doubling keeps what is idle below half of the whole, whatever the
    lengths, and blocks of one size are compiled once.

    Args:
        rank: segments, the longest first.
    """
    found, begin, size = [], 0, SMALLEST_BLOCK
    while begin < rank.size and begin < LARGEST_BLOCK:
        found.append(rank[begin : begin + size][None])
        begin += size
        size = begin
    rest = rank[begin:]
    if rest.size:
        found.append(jnp.pad(rest, (0, -rest.size % LARGEST_BLOCK), constant_values=-1).reshape(-1, LARGEST_BLOCK))
    return found


def weighted_sums(
    table: Float[Array, "item d_model"], item: Int[Array, "pair"], weight: Float[Array, "pair"], by: Segments
) -> Float[Array, "segment d_model"]:
    """Returns for every segment the sum over its pairs of weight x row of the table.

    Args:
        table: rows to add up.
        item: the row of each pair.
        weight: of each pair.
        by: the segments.
    """
    item, weight = item[by.order], weight[by.order]
    length = by.start[1:] - by.start[:-1]

    def block_sums(chosen: Int[Array, "member"]) -> Float[Array, "member d_model"]:
        first = by.start[chosen]
        many = jnp.where(chosen >= 0, length[chosen], 0)

        def add(state: tuple[Array, Array]) -> tuple[Array, Array]:
            j, total = state
            place = jnp.minimum(first + j, item.size - 1)
            factor = jnp.where(j < many, weight[place], 0)
            return j + 1, total + factor[:, None] * table.at[item[place]].get(mode="promise_in_bounds")

        begin = jnp.zeros((), jnp.int32), jnp.zeros((chosen.size, table.shape[1]), table.dtype)
        return jax.lax.while_loop(lambda state: state[0] < many[0], add, begin)[1]

    sums = [jax.lax.map(block_sums, block).reshape(-1, table.shape[1]) for block in blocks(by.rank)]
    count = by.rank.size
    back = jnp.zeros_like(by.rank).at[by.rank].set(jnp.arange(count, dtype=by.rank.dtype), unique_indices=True)
    return jnp.concatenate(sums)[back]


def products(a: Float[Array, "rows d_model"], b: Float[Array, "feat d_model"], pairs: Pairs) -> Float[Array, "pair"]:
    """Returns <a[row], b[feature]> of every pair."""

    def some(at: tuple[Array, Array]) -> Array:
        return jnp.sum(a[at[0]] * b[at[1]], axis=-1)

    parts = max(1, pairs.row.size // a.shape[0])
    if pairs.row.size % parts:
        parts = 1
    row, feature = (index.reshape(parts, -1) for index in (pairs.row, pairs.feature))
    return jax.lax.map(some, (row, feature)).ravel()


@jax.custom_vjp
def at_active(
    x: Float[Array, "rows d_model"],
    kernel: Float[Array, "d_model feat"],
    bias: Float[Array, "feat"],
    u: Float[Array, "rows feat"],
    pairs: Pairs,
) -> Float[Array, "pair"]:
    """Returns x @ kernel + bias at the pairs, 0 at padding.

    Args:
        x: inputs of the encoder.
        kernel: of the encoder.
        bias: of the encoder.
        u: the whole product, already known; a constant here.
        pairs: where.
    """
    return jnp.where(pairs.real, u.at[pairs.row, pairs.feature].get(mode="promise_in_bounds"), 0)


def _at_active_forward(x: Array, kernel: Array, bias: Array, u: Array, pairs: Pairs) -> tuple[Array, tuple]:
    return at_active(x, kernel, bias, u, pairs), (x, kernel, pairs)


def _at_active_backward(saved: tuple[Array, Array, Pairs], g: Array) -> tuple:
    x, kernel, pairs = saved
    g = jnp.where(pairs.real, g, 0)
    to_x = weighted_sums(kernel.T, pairs.feature, g, pairs.by_row)
    to_kernel = weighted_sums(x, pairs.row, g, pairs.by_feature).T
    return to_x, to_kernel, jnp.zeros(kernel.shape[1], g.dtype).at[pairs.feature].add(g), None, None


@jax.custom_vjp
def decoded(
    value: Float[Array, "pair"], kernel: Float[Array, "feat d_model"], pairs: Pairs
) -> Float[Array, "rows d_model"]:
    """Returns z @ kernel, z being zero but for `value` at the pairs."""
    return weighted_sums(kernel, pairs.feature, value, pairs.by_row)


def _decoded_forward(value: Array, kernel: Array, pairs: Pairs) -> tuple[Array, tuple]:
    return decoded(value, kernel, pairs), (value, kernel, pairs)


def _decoded_backward(saved: tuple[Array, Array, Pairs], g: Array) -> tuple:
    value, kernel, pairs = saved
    return products(g, kernel, pairs), weighted_sums(g, pairs.row, value, pairs.by_feature), None


at_active.defvjp(_at_active_forward, _at_active_backward)
decoded.defvjp(_decoded_forward, _decoded_backward)
