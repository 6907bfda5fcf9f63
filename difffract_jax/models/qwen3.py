"""The Qwen3 language model (arXiv 2505.09388), as it reads prompts for images: hidden states of some of its layers.

For one prompt of `txt` tokens, padding included:

1. x = embedding[ids].
2. In every layer: x += o(attention(rms(x))), then x += down(silu(gate x) * (up x)) on rms(x). Queries and keys are
   RMS-normed per head, then rotated by their position; several heads of queries share one of keys and values.
3. A token attends to itself and those before it, but not to padding, which stands at the end.
4. Return x after each of `read_layers` layers, side by side. States count the embedding as 0: x after 9 layers is
   state 9. Layers behind the last one that is read, the last norm and the output head are not there.

No matrix has a bias. Norms and softmax are computed in at least float32 whatever the dtype of the weights.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.address import Group
from difffract_jax.models.shapes import stacked
from difffract_jax.models.streaming import Streamed, wait_for
from difffract_jax.models.t5 import T5RMSNorm
from difffract_jax.ops import attend, widen
from difffract_jax.trees import brief


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Shape of a Qwen3 text encoder.

    Attributes:
        vocab: number of rows of the embedding.
        width: channels of the residual stream.
        d_ff: hidden width of the feed-forward layers.
        heads: heads of queries.
        key_heads: heads of keys and values; divides `heads`.
        head_dim: width of one head; heads x head_dim need not equal the width.
        padding_id: token that fills a prompt up.
        read_layers: after how many layers the residual stream is read, ascending; all that there are is the last.
        rope_theta: base of the rotary wavelengths.
        eps: added to the mean square under the root of every norm.
        family: what `config.json` of a directory tells this shape by.
    """

    vocab: int
    width: int
    d_ff: int
    heads: int
    key_heads: int
    head_dim: int
    padding_id: int
    read_layers: tuple[int, ...] = (9, 18, 27)
    rope_theta: float = 1e6
    eps: float = 1e-6
    family: Literal["flux2"] = "flux2"

    @property
    def d_model(self) -> int:
        """Channels of the result, the states side by side."""
        return self.width * len(self.read_layers)

    @property
    def layers(self) -> int:
        """Number of blocks: those up to the last that is read."""
        return self.read_layers[-1]


QWEN3_4B = Qwen3Config(vocab=151936, width=2560, d_ff=9728, heads=32, key_heads=8, head_dim=128, padding_id=151643)
"""The encoder of FLUX.2-klein-4B: the first 27 of Qwen3-4B's 36 layers."""


def _linear(wide_in: int, wide_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Linear:
    return nnx.Linear(wide_in, wide_out, use_bias=False, param_dtype=dtype, rngs=rngs)


class Qwen3Attention(nnx.Module):
    """Causal self-attention of grouped heads."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        queries, keys = config.heads * config.head_dim, config.key_heads * config.head_dim
        self.q = _linear(config.width, queries, rngs=rngs, dtype=dtype)
        self.k = _linear(config.width, keys, rngs=rngs, dtype=dtype)
        self.v = _linear(config.width, keys, rngs=rngs, dtype=dtype)
        self.o = _linear(queries, config.width, rngs=rngs, dtype=dtype)
        self.q_norm = T5RMSNorm(config.head_dim, config.eps, dtype=dtype)
        self.k_norm = T5RMSNorm(config.head_dim, config.eps, dtype=dtype)
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "txt width"],
        angles: tuple[Float[Array, "txt half"], Float[Array, "txt half"]],
        bias: Float[Array, "1 txt txt"],
    ) -> Float[Array, "txt width"]:
        """Attends as `bias` allows, which is added to the scores; `angles` are cosines and sines of the positions."""
        q, k, v = (layer(x).reshape(len(x), -1, self.head_dim) for layer in (self.q, self.k, self.v))
        q, k = rotate_halves(self.q_norm(q), *angles), rotate_halves(self.k_norm(k), *angles)
        k, v = (jnp.repeat(one, q.shape[1] // one.shape[1], axis=1) for one in (k, v))
        return self.o(attend(q, k, v, scale=self.head_dim**-0.5, bias=bias).reshape(len(x), -1))


class Qwen3FeedForward(nnx.Module):
    """The position-wise layer: down(silu(gate x) * (up x))."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.gate = _linear(config.width, config.d_ff, rngs=rngs, dtype=dtype)
        self.up = _linear(config.width, config.d_ff, rngs=rngs, dtype=dtype)
        self.down = _linear(config.d_ff, config.width, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "txt width"]) -> Float[Array, "txt width"]:
        """Applies the layer to each token."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Qwen3Block(nnx.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream.

    Attributes:
        groups: of MLP sublayers that can be replaced: none.
    """

    groups: ClassVar[tuple[Group, ...]] = ()

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.attn_norm = T5RMSNorm(config.width, config.eps, dtype=dtype)
        self.attn = Qwen3Attention(config, rngs=rngs, dtype=dtype)
        self.ff_norm = T5RMSNorm(config.width, config.eps, dtype=dtype)
        self.ff = Qwen3FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "txt width"], angles: tuple[Array, Array], bias: Float[Array, "1 txt txt"]
    ) -> Float[Array, "txt width"]:
        """Returns the residual stream after this layer."""
        x = x + self.attn(self.attn_norm(x), angles, bias)
        return x + self.ff(self.ff_norm(x))


class Qwen3Encoder(nnx.Module):
    """Token ids of one prompt to one vector per token. Leaves of `blocks` carry a leading layer axis."""

    __repr__ = brief
    layered: ClassVar[tuple[str, ...]] = ("blocks",)

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.width, param_dtype=dtype, rngs=rngs)
        self.blocks = stacked(lambda one: Qwen3Block(config, rngs=one, dtype=dtype), config.layers, rngs)

    def __call__(self, ids: Int[Array | np.ndarray, "txt"]) -> Float[Array, "txt states"]:
        """Encodes one prompt.

        Args:
            ids: token ids, filled up at the end to the text length that the transformer shall see.

        Returns:
            The states of `read_layers` side by side for every token, padding included, in the dtype of the weights.
        """
        # Not `self.embed(ids)`, which would cast to the dtype the module was built with, whatever its weights are now.
        x = jnp.take(self.embed.embedding[...], jnp.asarray(ids), axis=0)
        angles = _angles(len(ids), self.config, np.promote_types(x.dtype, np.float32))
        bias = jnp.where(_visible(jnp.asarray(ids), self.config.padding_id), 0, -jnp.inf)
        bias = bias[None].astype(np.promote_types(x.dtype, np.float32))
        if isinstance(self.blocks, Streamed):
            states = []
            # Not `enumerate`, which would hold a block while the one after next is fetched.
            for number, block in self.blocks.fetched(range(self.blocks.depth)):
                x = _run_layer(x, block, angles, bias)
                wait_for(x)
                states += [x] if number + 1 in self.config.read_layers else []
                del block  # before the one after next is fetched
            return jnp.concatenate(states, axis=1)
        read = jnp.asarray(self.config.read_layers)

        def step(carry: tuple[Array, Array], now: tuple[Qwen3Block, Array]) -> tuple[tuple[Array, Array], None]:
            x, states = carry
            x = now[0](x, angles, bias)
            return (x, jnp.where((read == now[1])[:, None, None], x[None], states)), None

        none = jnp.zeros((len(read), *x.shape), x.dtype)
        (_, states), _ = jax.lax.scan(step, (x, none), (self.blocks, jnp.arange(1, self.config.layers + 1)))
        return states.swapaxes(0, 1).reshape(len(ids), -1)


@jax.jit
def _run_layer(x: Array, block: Qwen3Block, angles: tuple[Array, Array], bias: Array) -> Float[Array, "txt width"]:
    """Runs one layer as a program of its own."""
    return block(x, angles, bias)


def _visible(ids: Int[Array, "txt"], padding_id: int) -> Bool[Array, "query key"]:
    """Says which keys a query sees: itself and those before it, without padding at the end."""
    places = jnp.arange(ids.shape[0])
    own = places <= jnp.max(jnp.where(ids == padding_id, 0, places))
    return (places[:, None] >= places[None, :]) & own[None, :]


def _angles(length: int, config: Qwen3Config, dtype: DTypeLike) -> tuple[Array, Array]:
    """Returns cosines and sines of every position's angles."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.arange(length)[:, None] * frequencies[None, :]
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def rotate_halves(
    x: Float[Array, "txt heads head_dim"], cos: Float[Array, "txt half"], sin: Float[Array, "txt half"]
) -> Float[Array, "txt heads head_dim"]:
    """Turns the column pairs (0, half), (1, half + 1), ... of every head by the position's angles."""
    first, second = jnp.split(widen(x), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class NoPooledConfig:
    """Shape of what stands where a model without pooled text would have the encoder of it.

    Attributes:
        d_model: channels of the pooled embedding: none.
        positions: tokens that are read: none.
        layers: blocks: none.
        family: what `config.json` of a directory tells this shape by.
    """

    d_model: int = 0
    positions: int = 0
    layers: int = 0
    family: Literal["flux2"] = "flux2"


class NoPooled(nnx.Module):
    """Reads nothing and gives a pooled embedding without channels."""

    __repr__ = brief

    def __init__(self, config: NoPooledConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        del rngs
        self.config, self.dtype = config, np.dtype(dtype)

    def __call__(self, ids: Int[Array | np.ndarray, "clip"]) -> tuple[Float[Array, "clip 0"], Float[Array, "0"]]:
        """Returns no vectors, and the pooled embedding."""
        return jnp.zeros((len(ids), 0), self.dtype), jnp.zeros(0, self.dtype)
