"""Pure maths of the models: norms whose scale can be frozen, rotary positions, attention, embeddings of time.

1. `widen` casts to float32 at least: bfloat16 keeps 8 bits, too few for moments, exponentials and angles.
2. `layer_norm` returns the 1/sqrt(var + eps) that it used, and uses the one it is given: with it frozen, it is linear.
   `root_norm` does the same with the mean square in place of the variance.
3. `rope_table` and `rotate` turn interleaved pairs of columns by angles that depend on the position.
4. `attend` is softmax attention; its pattern is a function of q and k alone, so that it can be recomputed from them.
5. `sinusoid` embeds a time, in either of the two orders in use (docs/method.md, sections 1 and 2).
6. `film` is the feature-wise affine map by which time, and in the MM-DiT the whole conditioning, enters.

Einsum letters: q and k positions, h heads, d head_dim, w that of values.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.spread import ways

WHOLE_PATTERN = 2**26
"""Bytes of an attention pattern that is held whole; a larger one is computed head by head, and in blocks of queries."""
PATTERN_BLOCK = 2**24
"""Bytes of such a block: about what a processor's last cache holds; accelerators lose little by it."""


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x in float32 at least."""
    # NumPy's promotion: JAX's own refuses under strict promotion.
    return x.astype(np.promote_types(x.dtype, np.float32))


def standardise(x: Float[Array, "*shape"], axes: tuple[int, ...], eps: float) -> Float[Array, "*shape"]:
    """Shifts and scales to mean 0 and variance 1.

    Args:
        x: in float32 or float64.
        axes: axes to take the moments over.
        eps: added to the variance under the root.

    Returns:
        (x - mean) / sqrt(variance + eps).
    """
    centred = x - jnp.mean(x, axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + eps)


def layer_norm(
    x: Float[Array, "rows d_model"], inv_std: Float[Array, "rows"] | None = None, eps: float = 1e-6
) -> tuple[Float[Array, "rows d_model"], Float[Array, "rows"]]:
    """Layer norm without weights, over the last axis.

    Args:
        x: rows to normalise.
        inv_std: the scale to use instead of x's own; then the norm is linear in x, its mean subtraction included.
        eps: added to the variance under the root.

    Returns:
        (x - mean) * inv_std in x's dtype, and inv_std in at least float32.
    """
    wide = widen(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    if inv_std is None:
        inv_std = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1) + eps)
    return (centred * inv_std[:, None]).astype(x.dtype), inv_std


def root_norm(
    x: Float[Array, "rows d_model"],
    scale: Float[Array, "d_model"],
    inv_rms: Float[Array, "rows"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Array, "rows d_model"], Float[Array, "rows"]]:
    """RMS norm with weights over the last axis, whose scale can be held.

    Args:
        x: rows to normalise.
        scale: its weights.
        inv_rms: 1 / root mean square to use instead of x's own; then the norm is linear in x.
        eps: added to the mean square under the root.

    Returns:
        x * inv_rms * scale in x's dtype, and inv_rms in at least float32.
    """
    wide = widen(x)
    if inv_rms is None:
        inv_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + eps)
    return (wide * inv_rms[:, None] * scale.astype(wide.dtype)).astype(x.dtype), inv_rms


def rms_norm(
    x: Float[Array, "*rows head_dim"], scale: Float[Array, "head_dim"], eps: float = 1e-6
) -> Float[Array, "*rows head_dim"]:
    """Divides by the root of the mean square over the last axis, then scales."""
    wide = widen(x)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(wide.dtype)).astype(x.dtype)


def film(
    x: Float[Array, "rows d_model"], scale: Float[Array, "d_model"], shift: Float[Array, "d_model"]
) -> Float[Array, "rows d_model"]:
    """Returns (1 + scale) * x + shift."""
    return x * (1 + scale)[None, :] + shift[None, :]


def rope_table(
    ids: Float[np.ndarray, "seq axes"], widths: tuple[int, ...], theta: float
) -> tuple[Float[np.ndarray, "seq half"], Float[np.ndarray, "seq half"]]:
    """Returns cos and sin of every pair's angle at every position, in float64.

    Args:
        ids: position along each axis.
        widths: columns of a head that each axis turns; even numbers.
        theta: base of the geometric sequence of wavelengths.
    """
    angles = [
        ids[:, axis, None] * theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        for axis, width in enumerate(widths)
    ]
    joined = np.concatenate(angles, axis=1)
    return np.cos(joined), np.sin(joined)


def rotate(
    x: Float[Array, "seq heads head_dim"], cos: Float[Array, "seq half"], sin: Float[Array, "seq half"]
) -> Float[Array, "seq heads head_dim"]:
    """Turns the column pairs (0, 1), (2, 3), ... of every head by the position's angles."""
    wide = widen(x)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    cos, sin = cos[:, None, :].astype(wide.dtype), sin[:, None, :].astype(wide.dtype)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def attend(
    q: Float[Array, "q h d"],
    k: Float[Array, "k h d"],
    v: Float[Array, "k h w"],
    *,
    scale: float,
    bias: Float[Array | np.ndarray, "#h q k"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "q h w"]:
    """Mixes values by softmax(scale q k^T + bias); a pattern above `WHOLE_PATTERN` is never whole in memory.

    Args:
        q: queries.
        k: keys.
        v: values; they may have another width than queries and keys.
        scale: factor of the scores.
        bias: added to the scaled scores; -inf where a query must not see a key.
        precision: of the scores; JAX's default if left out.

    Returns:
        One mixed value per query and head.
    """

    def some(q: Array, k: Array, v: Array, bias: Any) -> Array:
        pattern = attention_pattern(q, k, scale=scale, bias=bias, precision=precision)
        return jnp.einsum("hqk,khd->qhd", pattern.astype(v.dtype), v)

    blocks = query_blocks(q.shape, k.shape[0], np.promote_types(q.dtype, np.float32).itemsize)
    if not blocks:
        return some(q, k, v, bias)
    # Reverse mode keeps q and k alone, and computes a block's pattern once more, for all cotangents that go together.
    again = jax.checkpoint(some, prevent_cse=False)  # the loop itself keeps the two computations apart
    rows = None if bias is None else jnp.broadcast_to(jnp.asarray(bias), (q.shape[1], q.shape[0], k.shape[0]))

    def head(part: tuple[Array, Array, Array, Any]) -> Array:
        q, k, v, bias = part
        queries = (_in_blocks(q, blocks), None if bias is None else _in_blocks(bias, blocks))
        mixed = jax.lax.map(
            lambda at: again(at[0][:, None], k[:, None], v[:, None], None if at[1] is None else at[1][None]), queries
        )
        return mixed.reshape(-1, v.shape[1])[: q.shape[0]]

    turned = (*(x.transpose(1, 0, 2) for x in (q, k, v)), rows)
    together = ways(q.shape[1])
    if together == 1:
        return jax.lax.map(head, turned).transpose(1, 0, 2)
    # Heads that lie on different devices go together, since a loop over a split axis would gather it.
    parts = jax.tree.map(lambda x: x.reshape(together, -1, *x.shape[1:]).swapaxes(0, 1), turned)
    return jax.lax.map(jax.vmap(head), parts).swapaxes(0, 1).reshape(-1, q.shape[0], v.shape[2]).transpose(1, 0, 2)


def _in_blocks(rows: Float[Array, "rows columns"], blocks: int) -> Float[Array, "blocks block columns"]:
    """Cuts rows into equal blocks; the last is filled up."""
    block = -(-rows.shape[0] // blocks)
    return jnp.pad(rows, ((0, blocks * block - rows.shape[0]), (0, 0))).reshape(blocks, block, -1)


def query_blocks(shape: tuple[int, ...], keys: int, itemsize: int) -> int:
    """Returns into how many blocks a head's queries are divided; 0 where the whole pattern of all heads is held.

    Args:
        shape: of the queries, [q h d].
        keys: number of keys.
        itemsize: bytes of a number of the pattern.

    Example:
        >>> query_blocks((320, 8, 64), 320, 4), query_blocks((1536, 24, 128), 1536, 4)
        (0, 1)
        >>> query_blocks((4608, 24, 128), 4608, 4)
        6
    """
    queries, heads, _ = shape
    if heads * queries * keys * itemsize <= WHOLE_PATTERN:
        return 0
    return min(queries, -(-queries * keys * itemsize // PATTERN_BLOCK))


def attention_pattern(
    q: Float[Array, "q h d"],
    k: Float[Array, "k h d"],
    *,
    scale: float,
    bias: Float[Array | np.ndarray, "#h q k"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "h q k"]:
    """Returns softmax(scale q k^T + bias) in at least float32; every row adds up to 1."""
    wide = np.promote_types(q.dtype, np.float32)
    scores = scale * jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide, precision=precision)
    return jax.nn.softmax(scores if bias is None else scores + jnp.asarray(bias, wide))


def sinusoid(t: Float[Array, ""], width: int, order: Literal["cos_sin", "sin_cos"]) -> Float[Array, "width"]:
    """Embeds a number in sines and cosines.

    Args:
        t: the number; FLUX embeds 1000 times the denoising time.
        width: channels of the embedding; even.
        order: `cos_sin` has frequencies 10000^(-i/half), as the MM-DiT; `sin_cos` has 10000^(-i/(half-1)), as the
            transcoders of the reference.
    """
    half = width // 2
    steps = half if order == "cos_sin" else half - 1
    # Frequencies in float64 before the cast: at 1000 t a float32 exponent would already cost a digit of the angle.
    frequencies = jnp.asarray(10000.0 ** -(np.arange(half) / steps), t.dtype)
    angles = t * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if order == "cos_sin" else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts)
