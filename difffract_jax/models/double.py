"""The double-stream block of FLUX: image and text have weights of their own, and attend jointly.

See docs/method.md, section 1.

Text tokens come first in attention. Each stream goes through an MLP of its own. Modulations come as rows: shift1,
scale1, gate1, shift2, scale2, gate2.

A target enters at one row of an MLP's input x. Below it, that is one row of attention's output, and so, in every head,
one vector of values that each position contributes to by its share of the pattern. Hence the cotangent of the residual
stream entering the block is

    dh[s] = sum over heads of pattern[head, p, s] * inv_std1[s] * direction[head]     (+ the residual path at s = p)

with one `direction` per head and stream, whatever the position s: about a hundredth of the work of a block's whole
pull-back. The directions are found by `jax.vjp` through single rows.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.address import IMAGE, TEXT, Group
from difffract_jax.models.blocks import (
    QKV,
    BlockActs,
    Cond,
    Entry,
    FluxConfig,
    Number,
    RMSNorm,
    StandIn,
    Streams,
    both,
    join_streams,
    merge_heads,
    project,
    split,
    split_heads,
)
from difffract_jax.models.head_rows import OneAttention, head_of_row, rotated
from difffract_jax.ops import attend, attention_pattern, film, layer_norm


class Frozen(NamedTuple):
    """What the replacement holds at its recorded value in one double-stream block.

    Attributes:
        q: queries of the joint sequence, [seq heads head_dim].
        k: its keys.
        inv_std1: 1/sqrt(var + eps) of the norm before attention, [txt] and [img].
        inv_std2: the same of the norm before the MLP.
        mod: modulations of both streams, [6 d_model]; None to compute them from what conditions the evaluation.
        again: queries and keys of the image's attention to itself; None in blocks without.
    """

    q: Float[Array, "seq heads head_dim"]
    k: Float[Array, "seq heads head_dim"]
    inv_std1: Streams
    inv_std2: Streams
    mod: Streams | None = None
    again: tuple[Float[Array, "img heads head_dim"], Float[Array, "img heads head_dim"]] | None = None


class NoNorm(nnx.Module):
    """What stands for the norm of queries or keys in a model that has none; it has no weights."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, x: Float[Array, "*rows head_dim"]) -> Float[Array, "*rows head_dim"]:
        """Returns x."""
        return x

    def held(
        self, x: Float[Array, "rows head_dim"], denominator: Float[Array, ""] | None
    ) -> tuple[Float[Array, "rows head_dim"], Float[Array, ""]]:
        """Returns x, and 1 in place of a denominator."""
        return x, jnp.ones((), x.dtype) if denominator is None else denominator


class Attention(nnx.Module):
    """One stream's side of joint attention."""

    def __init__(
        self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, use_bias: bool = True, normed: bool = True
    ) -> None:
        d_model, width = config.d_model, config.head_dim
        self.qkv = QKV(d_model, 3 * d_model, use_bias=use_bias, param_dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(width, dtype=dtype) if normed else NoNorm(width)
        self.k_norm = RMSNorm(width, dtype=dtype) if normed else NoNorm(width)
        self.proj = nnx.Linear(d_model, d_model, use_bias=use_bias, param_dtype=dtype, rngs=rngs)


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

    gate_rows: ClassVar[tuple[int, ...]] = (2, 5)

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.mod = nnx.Linear(config.d_model, 6 * config.d_model, param_dtype=dtype, rngs=rngs)
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def after_attention(
        self,
        h: Float[Array, "rows d_model"],
        mod: Float[Array, "kinds d_model"],
        mixed: Float[Array, "rows heads head_dim"],
    ) -> Float[Array, "rows d_model"]:
        """Adds what attention gives to the residual stream."""
        return h + mod[2] * self.attn.proj(merge_heads(mixed))

    def mlp_input(
        self,
        h: Float[Array, "rows d_model"],
        mod: Float[Array, "kinds d_model"],
        inv_std: Float[Array, "rows"] | None = None,
    ) -> tuple[Float[Array, "rows d_model"], Float[Array, "rows"]]:
        """Returns the MLP sublayer's input, and the scale of the norm before it: the given one, if one is given."""
        normed, used = layer_norm(h, inv_std)
        return film(normed, mod[4], mod[3]), used

    def after_mlp(
        self,
        h: Float[Array, "rows d_model"],
        mod: Float[Array, "kinds d_model"],
        y: Float[Array, "rows d_model"],
    ) -> Float[Array, "rows d_model"]:
        """Adds an output of the MLP sublayer to the residual stream."""
        return h + self.gate(mod) * y

    def gate(self, mod: Float[Array, "kinds d_model"]) -> Float[Array, "d_model"]:
        """Returns the factor of the MLP's output."""
        return mod[5]


class DoubleBlock(OneAttention):
    """A double-stream block; see `blocks.Block` for its methods."""

    groups: ClassVar[tuple[Group, ...]] = (IMAGE, TEXT)
    attention_order: ClassVar[tuple[int, ...]] = (1, 0)

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.img = DoubleStream(config, rngs=rngs, dtype=dtype)
        self.txt = DoubleStream(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        h: Sequence[Float[Array, "_ d_model"]],
        cond: Cond,
        *,
        frozen: Frozen | None = None,
        mlp: StandIn | None = None,
        heads: Float[Array, "heads"] | None = None,
        scores: Float[Array, "heads queries keys"] | None = None,
        modulation: Sequence[Float[Array, "_ d_model"]] | None = None,
    ) -> tuple[Streams, BlockActs]:
        """Runs the block on the image and the text stream."""
        h, mod = Streams(*h), self._modulations(cond, frozen)
        if modulation is not None:
            mod = both(jnp.add, mod, Streams(*modulation))
        scales = Streams(None, None) if frozen is None else frozen.inv_std1
        normed = both(layer_norm, h, scales)
        m = both(lambda n, c: film(n[0], c[1], c[0]), normed, mod)
        if frozen is None:
            q, k = self._queries_keys(m, cond)
        else:
            q, k = frozen.q, frozen.k
        # A recorded pattern stays the recorded one, whatever precision the rest of the replacement is run in.
        precision = None if frozen is None else "highest"
        v = join_streams(both(_values, self, m))
        mixed = attend(q, k, v, scale=q.shape[-1] ** -0.5, bias=scores, precision=precision)
        if heads is not None:
            mixed = mixed * heads[None, : mixed.shape[1], None]
        h = both(lambda s, r, c, o: s.after_attention(r, c, o), self, h, mod, split(mixed, h.txt.shape[0]))
        h, again = self._attend_again(h, normed.img[0], mod.img, frozen, heads)
        held = Streams(None, None) if frozen is None else frozen.inv_std2
        read = both(lambda s, r, c, scale: s.mlp_input(r, c, scale), self, h, mod, held)
        x = both(lambda pair: pair[0], read)
        run = self.run_mlp if mlp is None else mlp
        y = Streams(run(0, x.img), run(1, x.txt))
        h = both(lambda s, r, c, o: s.after_mlp(r, c, o), self, h, mod, y)
        used = Frozen(q, k, both(lambda n: n[1], normed), both(lambda pair: pair[1], read), mod, again)
        return h, BlockActs(used, x, y, h)

    def _attend_again(
        self,
        h: Streams,
        normed: Float[Array, "img d_model"],
        mod: Float[Array, "kinds d_model"],
        frozen: Frozen | None,
        heads: Float[Array, "heads"] | None,
    ) -> tuple[Streams, tuple[Array, Array] | None]:
        """Adds what the image's attention to itself gives, where there is one, and returns its queries and keys."""
        del normed, mod, frozen, heads
        return h, None

    def run_mlp(self, group: int, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns the output of the image stream's MLP, group 0, or the text stream's, group 1."""
        return (self.img, self.txt)[group].mlp(x)

    def gates(self, cond: Cond, frozen: Frozen | None = None) -> tuple[Float[Array, "d_model"], ...]:
        """Returns gate2 of both streams."""
        return tuple(both(lambda stream, mod: stream.gate(mod), self, self._modulations(cond, frozen)))

    def modulations(self, cond: Cond) -> Streams:
        """Returns shift1, scale1, gate1, shift2, scale2, gate2 of both streams."""
        return self._modulations(cond, None)

    def slim(self) -> "DoubleBlock":
        """Returns the block with the values' columns, the output projections and the heads' width alone."""
        slim = jax.tree.map(lambda leaf: leaf, self)
        for stream in (slim.img, slim.txt):
            stream.attn.qkv = stream.attn.qkv.from_column(2 * stream.attn.qkv.in_features)
            stream.mod = stream.mlp = None
        return slim

    def entry(self, cond: Cond, frozen: Frozen) -> Entry:
        """Returns the function that pulls gradients at single rows of x back through the block; see the module."""
        mod = self._modulations(cond, frozen)
        return partial(_enter, self, frozen, mod)

    def query_or_key(
        self,
        cond: Cond,
        frozen: Frozen,
        part: int,
        head: Number,
        group: int,
        row: Number,
        h: Float[Array, "d_model"],
        denominator: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "head_dim"], Float[Array, ""]]:
        """Returns one head's rotated query or key of a residual row, and 1 / its root mean square."""
        stream, inv_std = (self.img, self.txt)[group], frozen.inv_std1[group][row]
        shift, scale = self._modulations(cond, frozen)[group][:2]
        place = row + (0 if group == 1 else frozen.inv_std1.txt.shape[0])
        norm = (stream.attn.q_norm, stream.attn.k_norm)[part]
        return head_of_row(stream.attn.qkv, norm, cond, (shift, scale), part, head, place, h, inv_std, denominator)

    def _queries_keys(self, m: Streams, cond: Cond) -> tuple[Array, Array]:
        """Returns queries and keys of the joint sequence, normalised and rotated, [seq heads head_dim]."""

        def one(stream: DoubleStream, rows: Float[Array, "rows d_model"]) -> tuple[Any, Any]:
            q, k = jnp.split(project(stream.attn.qkv, rows, slice(None, 2 * rows.shape[1])), 2, axis=1)
            head_dim = stream.attn.q_norm.width
            return stream.attn.q_norm(split_heads(q, head_dim)), stream.attn.k_norm(split_heads(k, head_dim))

        pairs = both(one, self, m)
        q, k = (join_streams(both(lambda pair, i=i: pair[i], pairs)) for i in (0, 1))
        return rotated(q, cond), rotated(k, cond)

    def _modulations(self, cond: Cond, frozen: Frozen | None) -> Streams:
        """Returns shift1, scale1, gate1, shift2, scale2, gate2 of both streams; the recorded ones where there are."""
        if frozen is not None and frozen.mod is not None:
            return frozen.mod
        return both(lambda stream: stream.mod(jax.nn.silu(cond.vec)).reshape(-1, cond.vec.size), self)


def _values(stream: DoubleStream, m: Float[Array, "rows d_model"]) -> Float[Array, "rows heads head_dim"]:
    """Returns one stream's attention values; the frozen block needs these columns of qkv only."""
    return values(stream.attn, m)


def values(attn: Attention, m: Float[Array, "rows d_model"]) -> Float[Array, "rows heads head_dim"]:
    """Returns attention's values.

    Args:
        attn: one stream's side of it.
        m: its input.
    """
    return split_heads(project(attn.qkv, m, slice(2 * m.shape[1], None)), attn.q_norm.width)


def _enter(
    block: DoubleBlock,
    frozen: Frozen,
    mod: Streams,
    gradients: Float[Array, "target d_model"],
    group: Int[Array, "target"],
    row: Int[Array, "target"],
) -> tuple[Float[Array, "target _ d_model"], ...]:
    """Returns the cotangents of the streams before the block, image first; see the module."""
    heads, head_dim = frozen.q.shape[1:]
    of_stream = Streams(*(jnp.where((group == s)[:, None], gradients, 0) for s in (0, 1)))
    scales = both(lambda inv_std: inv_std.at[row].get(mode="clip"), frozen.inv_std2)
    pulled = both(partial(through_output, heads), block, mod, scales, of_stream)
    mixed = pulled.img[1] + pulled.txt[1]
    directions = both(lambda stream, m: through_values(stream.attn, m[:2], mixed), block, mod)
    text = frozen.inv_std1.txt.shape[0]
    joint = jnp.where(group == 1, row, text + row)
    pattern = attention_pattern(frozen.q[joint], frozen.k, scale=head_dim**-0.5, precision="highest")
    pattern = pattern.transpose(2, 0, 1)
    shares = both(lambda p, inv_std: p * inv_std[:, None, None], split(pattern, text), frozen.inv_std1)
    spread = both(lambda p, d: jnp.einsum("sht,thm->tsm", p, d), shares, directions)
    each = jnp.arange(row.shape[0])
    return tuple(both(lambda c, r: c.at[each, row].add(r[0], mode="drop"), spread, pulled))


def through_output(
    heads: int,
    stream: DoubleStream,
    mod: Float[Array, "kinds d_model"],
    inv_std: Float[Array, "target"],
    gradients: Float[Array, "target d_model"],
) -> tuple[Float[Array, "target d_model"], Float[Array, "target heads head_dim"]]:
    """Pulls x of single rows back to the residual stream before the block, and to the heads' mixed values.

    Args:
        heads: of the block's attention.
        stream: the rows' stream.
        mod: its modulations.
        inv_std: scale of the norm before the MLP at each row, held.
        gradients: by x.
    """

    def forward(h: Array, mixed: Array) -> Array:
        return stream.mlp_input(stream.after_attention(h, mod, mixed), mod, inv_std)[0]

    origin = jnp.zeros_like(gradients)
    _, pull = jax.vjp(forward, origin, origin.reshape(origin.shape[0], heads, -1))
    return pull(gradients)


def through_values(
    attn: Attention, mod: Float[Array, "shift_scale d_model"], mixed: Float[Array, "target heads head_dim"]
) -> Float[Array, "target heads d_model"]:
    """Pulls each head's part back to a row of the residual stream whose norm has scale 1.

    Args:
        attn: one stream's side of attention.
        mod: shift and scale before it.
        mixed: cotangents of the heads' mixed values.
    """
    targets, heads, head_dim = mixed.shape

    def forward(h: Array) -> Array:
        return values(attn, film(layer_norm(h, jnp.ones_like(h[:, 0]))[0], mod[1], mod[0]))

    alone = mixed[:, :, None] * jnp.eye(heads, dtype=mixed.dtype)[None, :, :, None]
    origin = jnp.zeros((targets * heads, heads * head_dim), mixed.dtype)
    (pulled,) = jax.vjp(forward, origin)[1](alone.reshape(targets * heads, heads, head_dim))
    return pulled.reshape(targets, heads, -1)
