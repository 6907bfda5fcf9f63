"""The T5 encoder (arXiv 1910.10683, version 1.1) that gives FLUX its text tokens.

For one prompt of `txt` tokens, padding included:

1. x = embedding[ids].
2. B[h, q, k] = table[bucket(k - q), h]: one relative position bias for all layers. Half of the buckets are for keys
   after the query; of each half, half count single positions, the rest grow logarithmically up to `max_distance`.
3. In every layer: x += o(softmax(q k^T + B) v) on rms(x), then x += feed_forward(rms(x)). The scores are *not* divided
   by the root of the head width: T5 folds that into its weights.
4. Return rms(x). FLUX passes no attention mask, so padding takes part in the attention.

Symbols: `d_model` width of the residual stream, `d_kv` width of one head, `d_ff` hidden width; `inner` = heads x d_kv.
No matrix has a bias. Norms and softmax are computed in at least float32 whatever the dtype of the weights.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.address import Group
from difffract_jax.models.shapes import stacked
from difffract_jax.models.streaming import Streamed, wait_for
from difffract_jax.ops import attend, widen
from difffract_jax.trees import brief


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Shape of a T5 encoder.

    Attributes:
        vocab: number of rows of the embedding.
        d_model: width of the residual stream, and of the result.
        d_kv: width of one attention head; heads x d_kv need not equal d_model.
        d_ff: hidden width of the feed-forward layers.
        layers: number of blocks.
        heads: number of attention heads.
        buckets: number of relative position buckets, both directions together.
        max_distance: distance in tokens from which on all positions share the last bucket.
        eps: added to the mean square under the root of every norm.
        gated: whether the hidden layer is act(gate x) * (up x), as in version 1.1, or act(up x).
        activation: gelu_new is the tanh approximation.
    """

    vocab: int
    d_model: int
    d_kv: int
    d_ff: int
    layers: int
    heads: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    gated: bool = True
    activation: Literal["gelu_new", "relu"] = "gelu_new"


T5_XXL = T5Config(vocab=32128, d_model=4096, d_kv=64, d_ff=10240, layers=24, heads=64)
"""The encoder of FLUX.1, T5 v1.1 XXL."""


class T5RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, without the mean being taken off."""

    def __init__(self, width: int, eps: float, *, dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Normalises the last axis."""
        wide = widen(x)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(wide.dtype)).astype(x.dtype)


class T5Attention(nnx.Module):
    """Self-attention with an additive position bias and unscaled scores."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        inner = config.heads * config.d_kv
        self.q = nnx.Linear(config.d_model, inner, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.k = nnx.Linear(config.d_model, inner, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.v = nnx.Linear(config.d_model, inner, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.o = nnx.Linear(inner, config.d_model, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(
        self, x: Float[Array, "txt t5_width"], bias: Float[Array, "heads txt txt"]
    ) -> Float[Array, "txt t5_width"]:
        """Attends from every token to every token; `bias` is added to the scores."""
        q, k, v = (layer(x).reshape(len(x), self.heads, -1) for layer in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, scale=1.0, bias=bias).reshape(len(x), -1))


class T5FeedForward(nnx.Module):
    """The position-wise layer, gated or plain."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        sizes = config.d_model, config.d_ff
        self.gate = nnx.Linear(*sizes, use_bias=False, param_dtype=dtype, rngs=rngs) if config.gated else None
        self.up = nnx.Linear(*sizes, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.d_ff, config.d_model, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "txt t5_width"]) -> Float[Array, "txt t5_width"]:
        """Applies the layer to each token."""
        hidden = self.up(x)
        hidden = self._activate(hidden) if self.gate is None else self._activate(self.gate(x)) * hidden
        return self.down(hidden)

    def _activate(self, x: Float[Array, "txt d_ff"]) -> Float[Array, "txt d_ff"]:
        return jax.nn.relu(x) if self.activation == "relu" else jax.nn.gelu(x, approximate=True)


class T5Block(nnx.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream.

    Attributes:
        groups: of MLP sublayers that can be replaced: none.
    """

    groups: ClassVar[tuple[Group, ...]] = ()

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.attn_norm = T5RMSNorm(config.d_model, config.eps, dtype=dtype)
        self.attn = T5Attention(config, rngs=rngs, dtype=dtype)
        self.ff_norm = T5RMSNorm(config.d_model, config.eps, dtype=dtype)
        self.ff = T5FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "txt t5_width"], bias: Float[Array, "heads txt txt"]
    ) -> Float[Array, "txt t5_width"]:
        """Returns the residual stream after this layer."""
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.ff(self.ff_norm(x))


class T5Encoder(nnx.Module):
    """Token ids of one prompt to one vector per token.

    Leaves of `blocks` carry a leading layer axis. `relative_bias` is the table that all layers share; checkpoints keep
    it in their first layer.
    """

    __repr__ = brief
    layered: ClassVar[tuple[str, ...]] = ("blocks",)

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.d_model, param_dtype=dtype, rngs=rngs)
        self.relative_bias = nnx.Embed(config.buckets, config.heads, param_dtype=dtype, rngs=rngs)
        self.blocks = stacked(lambda one: T5Block(config, rngs=one, dtype=dtype), config.layers, rngs)
        self.final_norm = T5RMSNorm(config.d_model, config.eps, dtype=dtype)

    def __call__(self, ids: Int[Array | np.ndarray, "txt"]) -> Float[Array, "txt t5_width"]:
        """Encodes one prompt.

        Args:
            ids: token ids, padded to the text length that the transformer shall see.

        Returns:
            One vector per token, padding included, in the dtype of the weights.
        """
        bias = self._bias_for(jnp.asarray(ids))
        # Not `self.embed(ids)`, which would cast to the dtype the module was built with, whatever its weights are now.
        x = _rows_of(self.embed.embedding[...], jnp.asarray(ids))
        if isinstance(self.blocks, Streamed):
            for block in self.blocks:
                x = _run_layer(x, block, bias)
                wait_for(x)
                del block  # before the one after next is fetched
        else:
            x, _ = jax.lax.scan(lambda x, block: (block(x, bias), None), x, self.blocks)
        return _normed(x, self.final_norm)

    def _bias_for(self, ids: Int[Array, "txt"]) -> Float[Array, "heads txt txt"]:
        """Returns what is added to the scores of every layer, for a prompt."""
        return self._bias(len(ids))

    def _bias(self, length: int) -> Float[Array, "heads txt txt"]:
        buckets = relative_buckets(length, self.config.buckets, self.config.max_distance)
        return jnp.moveaxis(widen(self.relative_bias.embedding[...])[buckets], -1, 0)


@jax.jit
def _rows_of(table: Float[Array, "vocab t5_width"], ids: Int[Array, "txt"]) -> Float[Array, "txt t5_width"]:
    return jnp.take(table, ids, axis=0)


@jax.jit
def _normed(x: Float[Array, "txt t5_width"], norm: T5RMSNorm) -> Float[Array, "txt t5_width"]:
    return norm(x)


@jax.jit
def _run_layer(x: Float[Array, "txt t5_width"], block: T5Block, bias: Array) -> Float[Array, "txt t5_width"]:
    """Runs one layer as a program of its own."""
    return block(x, bias)


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "query key"]:
    """Returns the bucket of each (query, key) pair of positions.

    Args:
        length: number of tokens.
        buckets: number of buckets, both directions together.
        max_distance: distance from which on the last bucket of a direction is used.

    Returns:
        Bucket numbers in [0, buckets).
    """
    positions = np.arange(length)
    offset = positions[None, :] - positions[:, None]
    side = buckets // 2
    exact = side // 2
    distance = np.abs(offset)
    # float32 throughout, as in PyTorch: an edge between two buckets must fall on the same side.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + steps.astype(np.int32), side - 1)
    return (np.where(offset > 0, side, 0) + np.where(distance < exact, distance, far)).astype(np.int32)
