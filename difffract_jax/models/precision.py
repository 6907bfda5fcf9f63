"""What the text encoders and the autoencoder compute in at least float32, whatever the dtype of their weights.

1. `widen` casts to float32, and leaves float32 and float64 as they are.
2. `standardise` takes off a mean and divides by a standard deviation.
3. `attend` is softmax attention with scores and softmax wide; the mixing runs in the dtype of its inputs.

bfloat16 keeps 8 bits: moments over thousands of values, and exponentials, need more. Axes: q and k positions, h heads,
d head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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


def attend(
    q: Float[Array, "q h d"],
    k: Float[Array, "k h d"],
    v: Float[Array, "k h d"],
    *,
    scale: float,
    bias: Float[Array | np.ndarray, "#h q k"],
) -> Float[Array, "q h d"]:
    """Mixes values by softmax(scale q k^T + bias).

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: factor of the scores.
        bias: added to the scaled scores; -inf where a query must not see a key.

    Returns:
        One mixed value per query and head.
    """
    wide = np.promote_types(q.dtype, np.float32)
    scores = scale * jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=wide) + jnp.asarray(bias, wide)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores).astype(v.dtype), v)
