"""The blocks of the MM-DiT (METHOD section 1): one definition of each for every way of running it.

1. Double-stream block: image and text have weights of their own, attend jointly, text tokens first, and go through
   an MLP each.
2. Single-stream block: the joint sequence; attention and MLP read the same norm, and their outputs are added.

A block is `block(h, cond, *, frozen=None, mlp=None) -> (h, acts)`:

    live       `frozen` left out: queries, keys and norm scales are computed.
    frozen     they come from a record; then the block is affine in `h` but for its MLP. The attention pattern is
               recomputed from q and k; no S x S matrix is ever stored.
    replaced   `mlp` is what stands in for the MLP sublayer, a function of the block and the sublayer's input x.

What a block computed leaves through `acts`, a NamedTuple. Every function is for one example.

Symbols: h residual stream, m attention input, x and y MLP input and output, q and k queries and keys after RMS norm
and rotation, v values. Modulations come as rows: shift1, scale1, gate1, shift2, scale2, gate2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.ops import attend, film, layer_norm, rms_norm, rotate


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Shape of an MM-DiT.

    Attributes:
        depth_double: number of double-stream blocks.
        depth_single: number of single-stream blocks.
        heads: attention heads.
        head_dim: columns of a head.
        rope_axes: how a head's columns are divided among the three axes of position; even numbers.
        in_channels: channels of a packed latent.
        out_channels: channels of the velocity.
        text_width: channels of the text embedding (T5's width).
        pooled_width: channels of the pooled prompt embedding (CLIP's width).
        guidance: whether the model takes a guidance scale (FLUX.1-dev).
        mlp_ratio: hidden columns of an MLP over d_model.
        rope_theta: base of the rotary wavelengths.
    """

    depth_double: int
    depth_single: int
    heads: int
    head_dim: int
    rope_axes: tuple[int, ...]
    in_channels: int
    out_channels: int
    text_width: int
    pooled_width: int
    guidance: bool
    mlp_ratio: float = 4.0
    rope_theta: float = 10000.0

    @property
    def d_model(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim

    @property
    def d_ff(self) -> int:
        """Hidden columns of an MLP."""
        return int(self.d_model * self.mlp_ratio)


class Streams(NamedTuple):
    """One thing per stream of the double-stream blocks, mostly arrays [rows d_model].

    Attributes:
        img: the image stream's.
        txt: the text stream's.
    """

    img: Any
    txt: Any


class Groups(NamedTuple):
    """One thing per group of MLP sublayers, those that have the same tokens.

    Attributes:
        img: the image stream's, of the double-stream blocks.
        txt: the text stream's.
        joint: the single-stream blocks', whose sequence has the text first.
    """

    img: Any
    txt: Any
    joint: Any


def both(function: Callable[..., Any], *pairs: Any) -> Streams:
    """Applies a function to each stream; `pairs` are anything with `img` and `txt`."""
    return Streams(function(*(pair.img for pair in pairs)), function(*(pair.txt for pair in pairs)))


class Cond(NamedTuple):
    """What every block of one evaluation shares.

    Attributes:
        vec: conditioning vector of time, pooled prompt and guidance, [d_model].
        cos: cosines of the rotary angles, [seq head_dim/2].
        sin: their sines.
    """

    vec: Float[Array, "d_model"]
    cos: Float[Array, "seq half"]
    sin: Float[Array, "seq half"]


class Frozen(NamedTuple):
    """What the replacement holds at its recorded value in one double-stream block.

    Attributes:
        q: queries of the joint sequence, [seq heads head_dim].
        k: its keys.
        inv_std1: 1/sqrt(var + eps) of the norm before attention, [txt] and [img].
        inv_std2: the same of the norm before the MLP.
    """

    q: Float[Array, "seq heads head_dim"]
    k: Float[Array, "seq heads head_dim"]
    inv_std1: Streams
    inv_std2: Streams


class BlockActs(NamedTuple):
    """What one double-stream block computed.

    Attributes:
        frozen: queries, keys and norm scales it used.
        attn_out: attention's output before its gate, per stream [rows d_model].
        mlp_in: the MLP sublayer's input x.
        mlp_out: what was added for the MLP sublayer before its gate, y.
        residual: the residual stream leaving the block.
    """

    frozen: Frozen
    attn_out: Streams
    mlp_in: Streams
    mlp_out: Streams
    residual: Streams


class SingleFrozen(NamedTuple):
    """What is held in one single-stream block: queries, keys, and the scale of its one norm, [seq]."""

    q: Float[Array, "seq heads head_dim"]
    k: Float[Array, "seq heads head_dim"]
    inv_std: Float[Array, "seq"]


class SingleActs(NamedTuple):
    """What one single-stream block computed, on the joint sequence.

    Attributes:
        frozen: queries, keys and norm scale it used.
        mlp_in: the MLP sublayer's input x, which is also attention's.
        mlp_out: what was added for the MLP sublayer, y, without the bias it shares with attention.
        residual: the residual stream leaving the block.
    """

    frozen: SingleFrozen
    mlp_in: Float[Array, "seq d_model"]
    mlp_out: Float[Array, "seq d_model"]
    residual: Float[Array, "seq d_model"]


class RMSNorm(nnx.Module):
    """RMS norm of queries or keys over the columns of a head, with a learned scale."""

    def __init__(self, width: int, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x: Float[Array, "*rows head_dim"]) -> Float[Array, "*rows head_dim"]:
        """Normalises the last axis."""
        return rms_norm(x, self.scale[...])


class Attention(nnx.Module):
    """One stream's side of joint attention."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        d_model = config.d_model
        self.qkv = nnx.Linear(d_model, 3 * d_model, param_dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.proj = nnx.Linear(d_model, d_model, param_dtype=dtype, rngs=rngs)


class MLP(nnx.Module):
    """The MLP sublayer: up, GELU in its tanh form, down."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.up = nnx.Linear(config.d_model, config.d_ff, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.d_ff, config.d_model, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Maps x to y, row by row."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class DoubleStream(nnx.Module):
    """One stream's weights in a double-stream block; `mod` gives shift1, scale1, gate1, shift2, scale2, gate2."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.mod = nnx.Linear(config.d_model, 6 * config.d_model, param_dtype=dtype, rngs=rngs)
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)


class DoubleBlock(nnx.Module):
    """A double-stream block."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.img = DoubleStream(config, rngs=rngs, dtype=dtype)
        self.txt = DoubleStream(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        h: Streams,
        cond: Cond,
        *,
        frozen: Frozen | None = None,
        mlp: "DoubleMLP | None" = None,
        heads: Float[Array, "heads"] | None = None,
    ) -> tuple[Streams, BlockActs]:
        """Runs the block.

        Args:
            h: both residual streams.
            cond: what the evaluation's blocks share.
            frozen: record to take queries, keys and norm scales from.
            mlp: stands in for both MLPs, `mlp(block, x) -> y`; `run_mlps` if left out.
            heads: factor of each attention head's output; 1 if left out.

        Returns:
            The residual streams after the block, and what it computed.
        """
        mod = modulations(self, cond.vec)
        scales = Streams(None, None) if frozen is None else frozen.inv_std1
        normed = both(layer_norm, h, scales)
        m = both(lambda n, c: film(n[0], c[1], c[0]), normed, mod)
        if frozen is None:
            q, k = joint_queries_keys(self, m, cond)
        else:
            q, k = frozen.q, frozen.k
        # A recorded pattern stays the recorded one, whatever precision the rest of the replacement is run in.
        scores = None if frozen is None else "highest"
        mixed = attend(q, k, join(both(values, self, m)), scale=q.shape[-1] ** -0.5, precision=scores)
        if heads is not None:
            mixed = mixed * heads[None, :, None]
        attn_out = both(lambda s, o: s.attn.proj(merge_heads(o)), self, split(mixed, h.txt.shape[0]))
        h = both(lambda r, c, a: r + c[2] * a, h, mod, attn_out)
        normed2 = both(layer_norm, h, Streams(None, None) if frozen is None else frozen.inv_std2)
        x = both(lambda n, c: film(n[0], c[4], c[3]), normed2, mod)
        y = run_mlps(self, x) if mlp is None else mlp(self, x)
        h = both(lambda r, c, o: r + c[5] * o, h, mod, y)
        used = Frozen(q, k, both(lambda n: n[1], normed), both(lambda n: n[1], normed2))
        return h, BlockActs(used, attn_out, x, y, h)


DoubleMLP = Callable[[DoubleBlock, Streams], Streams]
"""Stands in for the MLPs of a double-stream block."""


def run_mlps(block: DoubleBlock, x: Streams) -> Streams:
    """The block's own MLPs."""
    return both(lambda stream, rows: stream.mlp(rows), block, x)


def modulations(block: DoubleBlock, vec: Float[Array, "d_model"]) -> Streams:
    """Returns shift1, scale1, gate1, shift2, scale2, gate2 of both streams."""
    return both(lambda stream: stream.mod(jax.nn.silu(vec)).reshape(6, -1), block)


def split_heads(x: Float[Array, "rows width"], head_dim: int) -> Float[Array, "rows heads head_dim"]:
    """Cuts the columns into heads."""
    return x.reshape(x.shape[0], -1, head_dim)


def merge_heads(x: Float[Array, "rows heads head_dim"]) -> Float[Array, "rows width"]:
    """Puts the heads' columns side by side."""
    return x.reshape(x.shape[0], -1)


def join(pair: Streams) -> Float[Array, "seq *rest"]:
    """Puts the streams into one sequence, text first."""
    return jnp.concatenate([pair.txt, pair.img])


def split(joint: Float[Array, "seq *rest"], text_tokens: int) -> Streams:
    """Undoes `join`."""
    return Streams(img=joint[text_tokens:], txt=joint[:text_tokens])


def joint_queries_keys(
    block: DoubleBlock, m: Streams, cond: Cond
) -> tuple[Float[Array, "seq heads head_dim"], Float[Array, "seq heads head_dim"]]:
    """Returns queries and keys of the joint sequence, normalised and rotated."""

    def one(stream: DoubleStream, rows: Float[Array, "rows d_model"]) -> tuple[Any, Any]:
        q, k = jnp.split(_project(stream.attn.qkv, rows, slice(None, 2 * rows.shape[1])), 2, axis=1)
        head_dim = stream.attn.q_norm.scale.shape[-1]
        return stream.attn.q_norm(split_heads(q, head_dim)), stream.attn.k_norm(split_heads(k, head_dim))

    pairs = both(one, block, m)
    q, k = (join(both(lambda pair, i=i: pair[i], pairs)) for i in (0, 1))
    return rotate(q, cond.cos, cond.sin), rotate(k, cond.cos, cond.sin)


def values(stream: DoubleStream, m: Float[Array, "rows d_model"]) -> Float[Array, "rows heads head_dim"]:
    """Returns one stream's attention values; the frozen block needs these columns of qkv only."""
    return split_heads(_project(stream.attn.qkv, m, slice(2 * m.shape[1], None)), stream.attn.q_norm.scale.shape[-1])


def _project(layer: nnx.Linear, x: Float[Array, "rows d_model"], columns: slice) -> Float[Array, "rows columns"]:
    assert layer.bias is not None
    return x @ layer.kernel[:, columns] + layer.bias[None, columns]


class SingleBlock(nnx.Module):
    """A single-stream block; `mod` gives shift, scale, gate, and `mlp_out` holds the bias of the fused output."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        self.mod = nnx.Linear(d_model, 3 * d_model, param_dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(d_model, 3 * d_model, param_dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.up = nnx.Linear(d_model, config.d_ff, param_dtype=dtype, rngs=rngs)
        self.attn_out = nnx.Linear(d_model, d_model, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.mlp_out = nnx.Linear(config.d_ff, d_model, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Float[Array, "seq d_model"],
        cond: Cond,
        *,
        frozen: SingleFrozen | None = None,
        mlp: "SingleMLP | None" = None,
        heads: Float[Array, "heads"] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], SingleActs]:
        """Runs the block on the joint sequence; see `DoubleBlock.__call__`."""
        shift, scale, gate = self.mod(jax.nn.silu(cond.vec)).reshape(3, -1)
        normed, inv_std = layer_norm(h, None if frozen is None else frozen.inv_std)
        x = film(normed, scale, shift)
        head_dim, width = self.q_norm.scale.shape[-1], h.shape[1]
        if frozen is None:
            q, k = jnp.split(_project(self.qkv, x, slice(None, 2 * width)), 2, axis=1)
            q = rotate(self.q_norm(split_heads(q, head_dim)), cond.cos, cond.sin)
            k = rotate(self.k_norm(split_heads(k, head_dim)), cond.cos, cond.sin)
        else:
            q, k = frozen.q, frozen.k
        v = split_heads(_project(self.qkv, x, slice(2 * width, None)), head_dim)
        mixed = attend(q, k, v, scale=head_dim**-0.5, precision=None if frozen is None else "highest")
        if heads is not None:
            mixed = mixed * heads[None, :, None]
        y = run_mlp(self, x) if mlp is None else mlp(self, x)
        assert self.mlp_out.bias is not None
        h = h + gate[None, :] * (self.attn_out(merge_heads(mixed)) + y + self.mlp_out.bias[None, :])
        return h, SingleActs(SingleFrozen(q, k, inv_std), x, y, h)


SingleMLP = Callable[[SingleBlock, Float[Array, "seq d_model"]], Float[Array, "seq d_model"]]
"""Stands in for the MLP of a single-stream block."""


def run_mlp(block: SingleBlock, x: Float[Array, "seq d_model"]) -> Float[Array, "seq d_model"]:
    """The block's own MLP, without the bias that it shares with attention."""
    return jax.nn.gelu(block.up(x), approximate=True) @ block.mlp_out.kernel[...]
