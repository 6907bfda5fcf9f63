"""The text encoder of CLIP (arXiv 2103.00020), which gives FLUX one pooled vector per prompt.

For one prompt of `clip` tokens:

1. x = token_embedding[ids] + position_embedding[0 .. clip).
2. In every layer: x += out(softmax(q k^T / sqrt(head_dim)) v) on norm(x), each token seeing itself and those before it;
   then x += down(act(up(norm(x)))).
3. last_hidden = norm(x); pooled = last_hidden at the end-of-text token.

Which token ends the text has a history: early checkpoints say `eos_token_id` 2, which is wrong, and are pooled at the
largest id of the prompt (the end token is the last of CLIP's vocabulary); later ones at the first `eos_token_id`.

Symbols: `clip` positions, `clip_width` width of the residual stream. Norms and softmax are computed in at least float32
whatever the dtype of the weights.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.models.shapes import stacked
from difffract_jax.ops import attend, standardise, widen
from difffract_jax.trees import brief

LEGACY_EOS_TOKEN_ID = 2


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Shape of a CLIP text encoder.

    Attributes:
        vocab: number of rows of the token embedding.
        d_model: width of the residual stream, and of the results.
        d_ff: hidden width of the feed-forward layers.
        layers: number of blocks.
        heads: number of attention heads; divides d_model.
        positions: longest prompt in tokens, start and end token included.
        activation: quick_gelu is x * sigmoid(1.702 x); gelu is the exact one.
        eps: added to the variance under the root of every norm.
        eos_token_id: token to pool at; 2 stands for the largest id of the prompt (see the module).
    """

    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    positions: int
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS_TOKEN_ID


CLIP_L = CLIPConfig(vocab=49408, d_model=768, d_ff=3072, layers=12, heads=12, positions=77)
"""The encoder of FLUX.1, CLIP ViT-L/14."""


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias."""

    def __init__(self, width: int, eps: float, *, dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Normalises the last axis."""
        wide = standardise(widen(x), (-1,), self.eps)
        scale, bias = self.scale[...].astype(wide.dtype), self.bias[...].astype(wide.dtype)
        return (wide * scale + bias).astype(x.dtype)


class CLIPAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        sizes = config.d_model, config.d_model
        self.q = nnx.Linear(*sizes, param_dtype=dtype, rngs=rngs)
        self.k = nnx.Linear(*sizes, param_dtype=dtype, rngs=rngs)
        self.v = nnx.Linear(*sizes, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(*sizes, param_dtype=dtype, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: Float[Array, "clip clip_width"]) -> Float[Array, "clip clip_width"]:
        """Attends from every token to itself and the tokens before it."""
        q, k, v = (layer(x).reshape(len(x), self.heads, -1) for layer in (self.q, self.k, self.v))
        later = np.triu(np.ones((1, len(x), len(x)), bool), 1)
        mixed = attend(q, k, v, scale=q.shape[-1] ** -0.5, bias=np.where(later, -np.inf, 0.0))
        return self.out(mixed.reshape(len(x), -1))


class CLIPBlock(nnx.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.attn_norm = LayerNorm(config.d_model, config.eps, dtype=dtype)
        self.attn = CLIPAttention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(config.d_model, config.eps, dtype=dtype)
        self.up = nnx.Linear(config.d_model, config.d_ff, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.d_ff, config.d_model, param_dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "clip clip_width"]) -> Float[Array, "clip clip_width"]:
        """Returns the residual stream after this layer."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.down(self._activate(self.up(self.mlp_norm(x))))

    def _activate(self, x: Float[Array, "clip d_ff"]) -> Float[Array, "clip d_ff"]:
        if self.activation == "quick_gelu":
            return x * jax.nn.sigmoid(1.702 * x)
        return jax.nn.gelu(x, approximate=False)


class CLIPTextEncoder(nnx.Module):
    """Token ids of one prompt to one vector per token and one for the prompt.

    Leaves of `blocks` carry a leading layer axis.
    """

    __repr__ = brief

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.d_model, param_dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(config.positions, config.d_model, param_dtype=dtype, rngs=rngs)
        self.blocks = stacked(lambda one: CLIPBlock(config, rngs=one, dtype=dtype), config.layers, rngs)
        self.final_norm = LayerNorm(config.d_model, config.eps, dtype=dtype)

    def __call__(
        self, ids: Int[Array | np.ndarray, "clip"]
    ) -> tuple[Float[Array, "clip clip_width"], Float[Array, "clip_width"]]:
        """Encodes one prompt.

        Args:
            ids: token ids, at most `config.positions` of them.

        Returns:
            One vector per token, and the one at the end of the text, which FLUX uses; in the dtype of the weights.

        Raises:
            ValueError: if there are more ids than positions.
        """
        if len(ids) > self.config.positions:
            raise ValueError(
                f"CLIP was given {len(ids)} token ids, but has {self.config.positions} positions; "
                "cut the prompt to that length."
            )
        return self.encode_embedded(self.embedded(ids), ids)

    def before_last(
        self, ids: Int[Array | np.ndarray, "clip"]
    ) -> tuple[Float[Array, "clip clip_width"], Float[Array, "clip_width"]]:
        """Encodes one prompt as `__call__` does, but returns the states before the last layer, without the last norm.

        Args:
            ids: token ids, at most `config.positions` of them.
        """
        ids = jnp.asarray(ids)

        def step(x: Array, block: CLIPBlock) -> tuple[Array, Array]:
            return block(x), x

        x, entering = jax.lax.scan(step, self.embedded(ids) + self.positions.embedding[: len(ids)], self.blocks)
        return entering[-1], self.final_norm(x)[self._end(ids)]

    def embedded(self, ids: Int[Array | np.ndarray, "clip"]) -> Float[Array, "clip clip_width"]:
        """Returns the embeddings of tokens, without those of their positions."""
        # Not `self.embed(ids)`, which would cast to the dtype the module was built with, whatever its weights are now.
        return jnp.take(self.embed.embedding[...], jnp.asarray(ids), axis=0)

    def encode_embedded(
        self, x: Float[Array, "clip clip_width"], ids: Int[Array | np.ndarray, "clip"]
    ) -> tuple[Float[Array, "clip clip_width"], Float[Array, "clip_width"]]:
        """Encodes embeddings of tokens, as `__call__` does ids.

        Args:
            x: from `embedded`, or others in their place.
            ids: of the tokens, which tell where the text ends.
        """
        ids = jnp.asarray(ids)

        def step(x: Float[Array, "clip clip_width"], block: CLIPBlock) -> tuple[Float[Array, "clip clip_width"], None]:
            return block(x), None

        x = x + self.positions.embedding[: len(ids)]
        x, _ = jax.lax.scan(step, x, self.blocks)
        last_hidden = self.final_norm(x)
        return last_hidden, last_hidden[self._end(ids)]

    def _end(self, ids: Int[Array, "clip"]) -> Int[Array, ""]:
        eos = self.config.eos_token_id
        # argmax returns the first of equals, so padding with the end token does no harm.
        return jnp.argmax(ids if eos == LEGACY_EOS_TOKEN_ID else (ids == eos).astype(jnp.int32))
